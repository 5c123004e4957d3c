"""Configurations of published checkpoints, as their `config.json` says, where size and routing depend on it."""

from __future__ import annotations

from transformers import (
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    InternVLConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from xtuner_hf.models.interns1.configuration import InternS1Config
from xtuner_hf.models.kimi_k2.configuration import KimiK2Config

_DEEPSEEK = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def qwen3_dense(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


def qwen3_moe(
    hidden: int, layers: int, heads: int, kv_heads: int, experts: int, moe_intermediate: int
) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        num_experts=experts,
        num_experts_per_tok=8,
        moe_intermediate_size=moe_intermediate,
        norm_topk_prob=True,
    )


def gpt_oss(layers: int, experts: int) -> GptOssConfig:
    return GptOssConfig(num_hidden_layers=layers, num_local_experts=experts, num_experts_per_tok=4)


def deepseek_v3() -> DeepseekV3Config:
    return DeepseekV3Config(
        **_DEEPSEEK,
        vocab_size=129280,
        first_k_dense_replace=3,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_routed_experts=256,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
    )


def kimi_k2() -> KimiK2Config:
    return KimiK2Config(
        **_DEEPSEEK,
        vocab_size=163840,
        first_k_dense_replace=1,
        num_attention_heads=64,
        num_key_value_heads=64,
        n_routed_experts=384,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        num_nextn_predict_layers=0,
    )


def glm4_moe() -> Glm4MoeConfig:
    """GLM-4.5-Air, whose published index lists its multi-token prediction layer 46 too."""
    return Glm4MoeConfig(
        vocab_size=151552,
        hidden_size=4096,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=46,
        first_k_dense_replace=1,
        num_attention_heads=96,
        num_key_value_heads=8,
        head_dim=128,
        attention_bias=True,
        n_routed_experts=128,
        n_shared_experts=1,
        num_experts_per_tok=8,
        num_nextn_predict_layers=1,
    )


VIT_300M = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
VIT_300M |= {"attention_bias": True, "norm_type": "layer_norm", "use_qk_norm": False}
VIT_6B = {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800}
VIT_6B |= {"attention_bias": False, "norm_type": "rms_norm", "use_qk_norm": True}


def internvl(text: PreTrainedConfig, vision: dict) -> InternVLConfig:
    """InternVL3.5. Of the two published heads of the smallest the tied one is taken, whose parameters count once."""
    return InternVLConfig(
        text_config=text.to_dict(),
        vision_config=vision,
        image_token_id=151671,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def interns1(text: PreTrainedConfig, vision: dict) -> InternS1Config:
    return InternS1Config(
        text_config=text.to_dict() | {"vocab_size": 153216},
        vision_config=vision | {"drop_path_rate": 0.1},
        image_token_id=152957,
        tie_word_embeddings=False,
    )
