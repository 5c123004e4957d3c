"""Intern-S1's configuration, which transformers does not know, for AutoConfig."""

from __future__ import annotations

from transformers import AutoConfig

from .configuration_interns1 import InternS1Config, InternS1VisionConfig

__all__ = ["InternS1Config", "InternS1VisionConfig"]

AutoConfig.register(InternS1VisionConfig.model_type, InternS1VisionConfig, exist_ok=True)
AutoConfig.register(InternS1Config.model_type, InternS1Config, exist_ok=True)
