"""Kimi K2: DeepSeek V3's architecture, and its class name, which is what `architectures` says on the Hub."""

from __future__ import annotations

from ..base import use_hub_layout
from ..deepseek_v3 import modeling as deepseek
from .configuration import KimiK2Config

use_hub_layout(KimiK2Config.model_type, like="deepseek_v3")


class DeepseekV3ForCausalLM(deepseek.DeepseekV3ForCausalLM):
    """Kimi K2. No balance coefficients of its own are published: DeepSeek V3's are the defaults."""

    config_class = KimiK2Config
