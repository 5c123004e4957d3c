"""DeepSeek V3 on our MoE rooms. Parameter names, `model_type` and (bf16) checkpoints are those of the Hub.

Attention (MLA with YaRN) is transformers'. Ours are the router, the shared expert's place in the block, and the
multi-token prediction layer, which transformers drops.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from ...moe.block import SparseMoEBlock
from ...moe.experts import GroupedExperts
from ...moe.router import SigmoidGroupRouter
from ..attention import LatentAttention
from ..base import use_hub_layout
from ..moe_model import BalanceDefaults, MoEDecoderLayer, MoEPreTrainedMixin, recorded_outputs
from ..mtp import MTPCausalLMMixin, MTPLayerMixin, MTPModelMixin, stored_copies

use_hub_layout("deepseek_v3", further=stored_copies())


def check_routing(config: Any) -> None:
    """Refuse a configuration whose routing is another one, or that engines would read as another one.

    Raises:
        ValueError: says what to put into `config.json`.
    """
    wanted = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
    optional = {"moe_layer_freq"}
    for name, value in wanted.items():
        found = getattr(config, name, value if name in optional else None)
        if found != value:
            raise ValueError(
                f"config.{name} of this {config.model_type} is {found!r}, expected {value!r}: engines choose the "
                "router by it, and vLLM refuses a checkpoint without it. Take config.json from the original "
                f"checkpoint, or set config.{name} = {value!r}."
            )


def build_sigmoid_block(config: Any, mlp_class: type[nn.Module]) -> SparseMoEBlock:
    """The router, experts and shared experts of a layer; the configurations of DeepSeek V3 and GLM-4.5 read alike."""
    router = SigmoidGroupRouter(
        config.hidden_size,
        config.num_local_experts,
        config.num_experts_per_tok,
        num_groups=config.n_group,
        topk_groups=config.topk_group,
        norm_topk_prob=config.norm_topk_prob,
        scaling_factor=config.routed_scaling_factor,
    )
    shared_experts = mlp_class(config, intermediate_size=config.moe_intermediate_size * config.n_shared_experts)
    return SparseMoEBlock(router, GroupedExperts(config), shared_experts)


class DeepseekV3Attention(LatentAttention, hf.DeepseekV3Attention):
    eager = staticmethod(hf.eager_attention_forward)

    def plain_rotary(self, q, k, cos, sin):
        rotary = hf.apply_rotary_pos_emb_interleave if self.config.rope_interleave else hf.apply_rotary_pos_emb
        return rotary(q, k, cos, sin)


class DeepseekV3DecoderLayer(MoEDecoderLayer):
    def __init__(self, config: DeepseekV3Config, layer_idx: int):
        check_routing(config)
        attention = DeepseekV3Attention(config, layer_idx)
        # As the engines that serve these models do; transformers has 1e-6 whatever the configuration says.
        for norm in (attention.q_a_layernorm, attention.kv_a_layernorm):
            if norm is not None:
                norm.variance_epsilon = config.rms_norm_eps
        is_dense = layer_idx < config.first_k_dense_replace
        mlp = hf.DeepseekV3MLP(config) if is_dense else build_sigmoid_block(config, hf.DeepseekV3MLP)
        super().__init__(config, attention, mlp, hf.DeepseekV3RMSNorm)


class DeepseekV3MTPLayer(MTPLayerMixin, DeepseekV3DecoderLayer):
    pass


class DeepseekV3PreTrainedModel(MoEPreTrainedMixin, hf.DeepseekV3PreTrainedModel):
    _can_record_outputs = recorded_outputs(DeepseekV3DecoderLayer, hf.DeepseekV3Attention)


class DeepseekV3Model(MTPModelMixin, DeepseekV3PreTrainedModel, hf.DeepseekV3Model):
    layer_class = DeepseekV3DecoderLayer
    mtp_layer_class = DeepseekV3MTPLayer
    norm_class = hf.DeepseekV3RMSNorm
    rotary_class = hf.DeepseekV3RotaryEmbedding


class DeepseekV3ForCausalLM(MTPCausalLMMixin, DeepseekV3PreTrainedModel, hf.DeepseekV3ForCausalLM):
    """DeepSeek V3 with a language-model head; `chunked_loss=True` with `labels` never builds the full logits.

    A trainer's `None` takes the coefficients of pre-training (arXiv 2412.19437, section 4.2): correction bias moved by
    1e-3 a step, sequence-wise balance loss 1e-4, no loss over the batch. `aux_loss_alpha` in config.json is not read.
    """

    model_class = DeepseekV3Model
    balance_defaults = BalanceDefaults(sequence_loss_coef=1e-4, bias_update_rate=1e-3)
