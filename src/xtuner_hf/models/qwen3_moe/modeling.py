"""Qwen3-MoE on our MoE rooms. Parameter names, `model_type` and checkpoints are those of transformers and the Hub."""

from __future__ import annotations

from transformers.models.qwen3_moe import modeling_qwen3_moe as hf
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from ...moe.block import SparseMoEBlock
from ...moe.experts import GroupedExperts
from ...moe.router import SoftmaxTopKRouter
from ..attention import GroupedQueryAttention
from ..base import use_hub_layout
from ..moe_model import (
    BalanceDefaults,
    MoECausalLMMixin,
    MoEDecoderLayer,
    MoEModelMixin,
    MoEPreTrainedMixin,
    recorded_outputs,
)

use_hub_layout("qwen3_moe")


def build_sparse_block(config: Qwen3MoeConfig) -> SparseMoEBlock:
    """The router and experts of a Qwen3-MoE layer.

    `config.router_correction_bias` (ours, off by default) adds the bias of auxiliary-loss-free balancing. Published
    Qwen3-MoE checkpoints have none, and engines that serve this family do not read one.
    """
    router = SoftmaxTopKRouter(
        config.hidden_size,
        config.num_experts,
        config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
        correction_bias=getattr(config, "router_correction_bias", False),
    )
    return SparseMoEBlock(router, GroupedExperts(config))


class Qwen3MoeAttention(GroupedQueryAttention, hf.Qwen3MoeAttention):
    plain_rotary = staticmethod(hf.apply_rotary_pos_emb)
    eager = staticmethod(hf.eager_attention_forward)


class Qwen3MoeDecoderLayer(MoEDecoderLayer):
    def __init__(self, config: Qwen3MoeConfig, layer_idx: int):
        is_dense = layer_idx in config.mlp_only_layers or (layer_idx + 1) % config.decoder_sparse_step != 0
        if is_dense or config.num_experts == 0:
            mlp = hf.Qwen3MoeMLP(config, intermediate_size=config.intermediate_size)
        else:
            mlp = build_sparse_block(config)
        super().__init__(config, Qwen3MoeAttention(config, layer_idx), mlp, hf.Qwen3MoeRMSNorm)


class Qwen3MoePreTrainedModel(MoEPreTrainedMixin, hf.Qwen3MoePreTrainedModel):
    _can_record_outputs = recorded_outputs(Qwen3MoeDecoderLayer, hf.Qwen3MoeAttention)


class Qwen3MoeModel(MoEModelMixin, Qwen3MoePreTrainedModel, hf.Qwen3MoeModel):
    layer_class = Qwen3MoeDecoderLayer
    norm_class = hf.Qwen3MoeRMSNorm
    rotary_class = hf.Qwen3MoeRotaryEmbedding


class Qwen3MoeForCausalLM(MoECausalLMMixin, Qwen3MoePreTrainedModel, hf.Qwen3MoeForCausalLM):
    """Qwen3-MoE with a language-model head; `chunked_loss=True` with `labels` never builds the full logits."""

    model_class = Qwen3MoeModel

    @classmethod
    def balance_defaults_of(cls, config: Qwen3MoeConfig) -> BalanceDefaults:
        """The checkpoint's own coefficient: 1e-3 over the global batch (Qwen3, arXiv 2505.09388)."""
        return BalanceDefaults(aux_loss_coef=config.router_aux_loss_coef)

    @property
    def balance_defaults(self) -> BalanceDefaults:
        return self.balance_defaults_of(self.config)
