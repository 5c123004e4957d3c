"""Layer stacks shaped like published models: every width is theirs, layers and vocabulary are fewer.

The head would otherwise be most of a short stack's work. Weights are random.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..plan.models import known_models

VOCABULARY = 4096
MAX_LENGTH = 1 << 17


@dataclass(frozen=True)
class Shape:
    """A stack that a benchmark builds.

    Args:
        model: a published model (plan/known_models.json).
        layers: how many a GPU of 141 GB takes with gradients and AdamW.
        tiny: sizes to try the benchmark with.
        changes: what the stack has otherwise than the model.
    """

    model: str
    layers: int
    tiny: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def published_layers(self) -> int:
        """How many the model has."""
        return known_models()[self.model]["num_hidden_layers"]

    def config(self) -> PreTrainedConfig:
        short = {
            "num_hidden_layers": self.layers,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": MAX_LENGTH,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
        return AutoConfig.for_model(**(known_models()[self.model] | self.changes | short))

    def made_tiny(self) -> Shape:
        return replace(self, changes=self.changes | self.tiny, layers=2)


_TINY_ATTENTION = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_TINY_QWEN = _TINY_ATTENTION | {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}

SHAPES = {
    shape.model: shape
    for shape in (
        Shape("qwen3-30b-a3b", layers=4, tiny=_TINY_QWEN),
        Shape("qwen3-235b-a22b", layers=2, tiny=_TINY_QWEN),
        Shape(
            "gpt-oss-20b",
            layers=4,
            tiny=_TINY_ATTENTION
            | {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8},
        ),
        Shape(
            "deepseek-v3",
            layers=1,
            changes={"first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
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
    )
}
