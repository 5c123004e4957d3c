"""Train Mixture-of-Experts models with the HuggingFace tools you already use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models.auto import AutoModelForCausalLM, AutoModelForImageTextToText
    from .models.base import IncompleteCheckpointError
    from .models.deepseek_v3.modeling import DeepseekV3ForCausalLM
    from .models.glm4_moe.modeling import Glm4MoeForCausalLM
    from .models.gpt_oss.modeling import GptOssForCausalLM
    from .models.interns1.modeling import InternS1ForConditionalGeneration
    from .models.internvl.modeling import InternVLForConditionalGeneration
    from .models.qwen3.modeling import Qwen3ForCausalLM
    from .models.qwen3_moe.modeling import Qwen3MoeForCausalLM
    from .parallel.layout import ParallelLayout
    from .parallel.plugin import MoEParallelPlugin
    from .trainers.arguments import MoESFTConfig, MoETrainingArguments
    from .trainers.dapo import MoEDAPOTrainer
    from .trainers.dpo import MoEDPOTrainer
    from .trainers.grpo import MoEGRPOTrainer
    from .trainers.grpo_config import MoEDAPOConfig, MoEGRPOConfig
    from .trainers.kto import MoEKTOConfig, MoEKTOTrainer
    from .trainers.mpo import MoEMPOTrainer
    from .trainers.preference_config import MoEDPOConfig, MoEMPOConfig
    from .trainers.sft import MoESFTTrainer
    from .trainers.trainer import MoETrainer

__version__ = "0.1.0.dev0"

# Public name -> module, imported when first used.
_HOMES = {
    "AutoModelForCausalLM": "models.auto",
    "AutoModelForImageTextToText": "models.auto",
    "DeepseekV3ForCausalLM": "models.deepseek_v3.modeling",
    "Glm4MoeForCausalLM": "models.glm4_moe.modeling",
    "GptOssForCausalLM": "models.gpt_oss.modeling",
    "IncompleteCheckpointError": "models.base",
    "InternS1ForConditionalGeneration": "models.interns1.modeling",
    "InternVLForConditionalGeneration": "models.internvl.modeling",
    "MoEDAPOConfig": "trainers.grpo_config",
    "MoEDAPOTrainer": "trainers.dapo",
    "MoEDPOConfig": "trainers.preference_config",
    "MoEDPOTrainer": "trainers.dpo",
    "MoEGRPOConfig": "trainers.grpo_config",
    "MoEGRPOTrainer": "trainers.grpo",
    "MoEKTOConfig": "trainers.kto",
    "MoEKTOTrainer": "trainers.kto",
    "MoEMPOConfig": "trainers.preference_config",
    "MoEMPOTrainer": "trainers.mpo",
    "MoEParallelPlugin": "parallel.plugin",
    "MoESFTConfig": "trainers.arguments",
    "MoESFTTrainer": "trainers.sft",
    "MoETrainer": "trainers.trainer",
    "MoETrainingArguments": "trainers.arguments",
    "ParallelLayout": "parallel.layout",
    "Qwen3ForCausalLM": "models.qwen3.modeling",
    "Qwen3MoeForCausalLM": "models.qwen3_moe.modeling",
}

__all__ = [
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM",
    "GptOssForCausalLM",
    "IncompleteCheckpointError",
    "InternS1ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "MoEDAPOConfig",
    "MoEDAPOTrainer",
    "MoEDPOConfig",
    "MoEDPOTrainer",
    "MoEGRPOConfig",
    "MoEGRPOTrainer",
    "MoEKTOConfig",
    "MoEKTOTrainer",
    "MoEMPOConfig",
    "MoEMPOTrainer",
    "MoEParallelPlugin",
    "MoESFTConfig",
    "MoESFTTrainer",
    "MoETrainer",
    "MoETrainingArguments",
    "ParallelLayout",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
