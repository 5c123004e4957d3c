"""What our MoE families share: the decoder layer, the trunk and the causal language model around our MoE rooms.

A family's file says what differs: its attention, norm and rotary classes (transformers'), its router, and its Hub
layout. The forward passes of the trunk and of the language model stay transformers' own.

Legend: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .._compat import OutputRecorder
from ..moe.block import SparseMoEBlock
from ..moe.experts import GroupedExperts
from ..moe.router import Router
from ..moe.tokens import TokenLayout
from .base import HubModelMixin
from .head import ChunkedLossMixin, LMHead
from .trunk import TrunkMixin

# Mixins: the model classes that they stand in front of are their base for the type checker alone.
if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object


@dataclass(frozen=True)
class BalanceDefaults:
    """How a family's authors balanced its experts: what a trainer's `None` means.

    Args:
        aux_loss_coef: of the Switch loss.
        sequence_loss_coef: of the loss within each document.
        bias_update_rate: step of the correction bias after each optimizer step.
    """

    aux_loss_coef: float = 0.0
    sequence_loss_coef: float = 0.0
    bias_update_rate: float = 0.0


class MoEDecoderLayer(GradientCheckpointingLayer):
    """Attention and an MLP, each behind a norm; a sparse MLP is told which tokens are real.

    Args:
        attention: transformers' attention of the family.
        mlp: a `SparseMoEBlock`, or a dense MLP.
        norm_class: made with `(hidden_size, eps=...)`.
    """

    def __init__(self, config: Any, attention: nn.Module, mlp: nn.Module, norm_class: type[nn.Module]):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = norm_class(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, layout: TokenLayout | None = None, **kwargs) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]; keyword arguments go to attention."""
        attention_output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention_output
        normed = self.post_attention_layernorm(hidden_states)
        is_sparse = isinstance(self.mlp, SparseMoEBlock)
        return hidden_states + (self.mlp(normed, layout) if is_sparse else self.mlp(normed))


def recorded_outputs(layer_class: type[nn.Module], attention_class: type[nn.Module]) -> dict[str, Any]:
    """What `output_hidden_states`, `output_attentions` and `output_router_logits` collect."""
    return {
        "router_logits": OutputRecorder(Router, index=0),
        "hidden_states": layer_class,
        "attentions": attention_class,
    }


class MoEPreTrainedMixin(HubModelMixin):
    """In front of a family's `...PreTrainedModel`: initialises our routers and experts as transformers does its own."""

    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, GroupedExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.normal_(module.bias, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)


class MoEModelMixin(TrunkMixin):
    """In front of a family's trunk: embeddings, our decoder layers, norm, rotary embedding."""

    layer_class: ClassVar[Any]  # made with (config, layer index)
    norm_class: ClassVar[type[nn.Module]]
    rotary_class: ClassVar[type[nn.Module]]

    def __init__(self, config: Any):
        PreTrainedModel.__init__(self, config)  # the parent's own would build its layers first
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(self.build_layers(config))
        self.norm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = self.rotary_class(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def build_layers(self, config: Any) -> list[nn.Module]:
        return [self.layer_class(config, index) for index in range(config.num_hidden_layers)]

    def layer_inputs(self, layout: TokenLayout) -> dict[str, Any]:
        # Only training counts tokens.
        return {"layout": layout if self.training or layout.routes is not None else None}


class MoECausalLMMixin(ChunkedLossMixin, _Base):
    """In front of a family's `...ForCausalLM`: our trunk and a head that scores labels without full logits."""

    model_class: ClassVar[Any]
    balance_defaults: BalanceDefaults = BalanceDefaults()

    def __init__(self, config: PreTrainedConfig):
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        # What transformers' own forwards of some families read for `output_router_logits`.
        self.router_aux_loss_coef = getattr(config, "router_aux_loss_coef", 0.0)
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    @classmethod
    def balance_defaults_of(cls, config: Any) -> BalanceDefaults:
        """`balance_defaults` of a model of this configuration, wherever its trunk stands."""
        return cls.balance_defaults
