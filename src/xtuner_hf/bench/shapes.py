"""Layer stacks shaped like published models: every width is theirs, layers and vocabulary are fewer.

The head would otherwise be most of a short stack's work. Weights are random.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import DeepseekV3Config, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

VOCABULARY = 4096
MAX_LENGTH = 1 << 17


@dataclass(frozen=True)
class Shape:
    """A stack that a benchmark builds.

    Args:
        config_class: of transformers.
        sizes: of the published model.
        layers: how many a GPU of 141 GB takes with gradients and AdamW.
        published_layers: how many the model has.
        tiny: sizes to try the benchmark with.
    """

    config_class: Any
    sizes: dict[str, Any]
    layers: int
    published_layers: int
    tiny: dict[str, Any]

    def config(self) -> PreTrainedConfig:
        return self.config_class(
            **self.sizes,
            num_hidden_layers=self.layers,
            vocab_size=VOCABULARY,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )

    def made_tiny(self) -> Shape:
        return replace(self, sizes=self.sizes | self.tiny, layers=2)


_TINY_ATTENTION = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_TINY_QWEN = _TINY_ATTENTION | {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}

SHAPES = {
    "qwen3-30b-a3b": Shape(
        Qwen3MoeConfig,
        {
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        layers=4,
        published_layers=48,
        tiny=_TINY_QWEN,
    ),
    "qwen3-235b-a22b": Shape(
        Qwen3MoeConfig,
        {
            "hidden_size": 4096,
            "moe_intermediate_size": 1536,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        layers=2,
        published_layers=94,
        tiny=_TINY_QWEN,
    ),
    "gpt-oss-20b": Shape(
        GptOssConfig,
        {
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
        },
        layers=4,
        published_layers=24,
        tiny=_TINY_ATTENTION
        | {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "deepseek-v3": Shape(
        DeepseekV3Config,
        {
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 0,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 0,
        },
        layers=1,
        published_layers=61,
        tiny={
            "hidden_size": 64,
            "moe_intermediate_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 16,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
}
