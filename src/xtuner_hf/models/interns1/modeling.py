"""Intern-S1 and Intern-S1-mini: InternVL's architecture under names of their own, on the Hub as in memory.

Inference engines know this family; transformers reads it by the code that travels with a checkpoint. What was published
with them was written for transformers 4, so that ours takes its place in what we save.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from ..internvl import modeling as internvl
from ..internvl.vision import InternVLVisionModel
from .configuration import InternS1Config, InternS1VisionConfig

_CODE = ("configuration_interns1.py", "modeling_interns1.py")
AUTO_MAP = {
    "AutoConfig": "configuration_interns1.InternS1Config",
    "AutoModel": "modeling_interns1.InternS1Model",
    "AutoModelForCausalLM": "modeling_interns1.InternS1ForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_interns1.InternS1ForConditionalGeneration",
}


class InternS1VisionModel(InternVLVisionModel):
    config_class = InternS1VisionConfig


class InternS1Model(internvl.InternVLModel):
    config_class = InternS1Config
    vision_class = InternS1VisionModel


class InternS1ForConditionalGeneration(internvl.InternVLForConditionalGeneration):
    """Intern-S1 with a language-model head."""

    config_class = InternS1Config
    model_class = InternS1Model
    remote_code: ClassVar[tuple[Path, ...]] = tuple(Path(__file__).with_name(name) for name in _CODE)

    def __init__(self, config: InternS1Config):
        super().__init__(config)
        found: dict[str, Any] = getattr(config, "auto_map", None) or {}
        config.auto_map = found | AUTO_MAP
