"""Kimi K2's configuration: DeepSeek V3's under a `model_type` of its own, which transformers does not know."""

from __future__ import annotations

from transformers import AutoConfig, DeepseekV3Config


class KimiK2Config(DeepseekV3Config):
    """What `config.json` of Kimi K2 says; all values come from there."""

    model_type = "kimi_k2"


AutoConfig.register(KimiK2Config.model_type, KimiK2Config, exist_ok=True)
