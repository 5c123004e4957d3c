"""Configuration of Intern-S1. This file also travels with checkpoints, for `trust_remote_code=True`: it uses nothing
but transformers (5 or newer)."""

from typing import Any

from transformers.models.internvl.configuration_internvl import InternVLConfig, InternVLVisionConfig


class InternS1VisionConfig(InternVLVisionConfig):
    """InternViT's configuration.

    Attributes:
        drop_path_rate: stochastic depth of the last layer, in training.
    """

    model_type = "interns1_vision"
    drop_path_rate = 0.0


class InternS1Config(InternVLConfig):
    """What `config.json` of Intern-S1 and Intern-S1-mini says."""

    model_type = "interns1"

    def __post_init__(self, **kwargs):
        vision: Any = self.vision_config or {}
        if not isinstance(vision, InternS1VisionConfig):  # the parent would make one of its own class
            self.vision_config = InternS1VisionConfig(**{k: v for k, v in vision.items() if k != "model_type"})
        super().__post_init__(**kwargs)
