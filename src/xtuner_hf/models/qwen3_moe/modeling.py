"""Qwen3-MoE on our MoE rooms. Parameter names, `model_type` and checkpoints are those of transformers and the Hub."""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.qwen3_moe import modeling_qwen3_moe as hf
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from ..._compat import OutputRecorder
from ...moe.block import SparseMoEBlock
from ...moe.experts import GroupedExperts
from ...moe.router import SoftmaxTopKRouter
from ...moe.tokens import TokenLayout
from ..base import HubModelMixin, use_hub_layout
from ..head import ChunkedLossMixin, LMHead

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


class Qwen3MoeDecoderLayer(hf.Qwen3MoeDecoderLayer):
    """Attention and norms are transformers'; the sparse MLP is ours and is told which tokens are real."""

    def __init__(self, config: Qwen3MoeConfig, layer_idx: int):
        super(hf.Qwen3MoeDecoderLayer, self).__init__()
        self.self_attn = hf.Qwen3MoeAttention(config, layer_idx)
        is_dense = layer_idx in config.mlp_only_layers or (layer_idx + 1) % config.decoder_sparse_step != 0
        if is_dense or config.num_experts == 0:
            self.mlp = hf.Qwen3MoeMLP(config, intermediate_size=config.intermediate_size)
        else:
            self.mlp = build_sparse_block(config)
        self.input_layernorm = hf.Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = hf.Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_size = config.hidden_size

    def forward(self, hidden_states: torch.Tensor, layout: TokenLayout | None = None, **kwargs) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]; keyword arguments go to attention."""
        attention_output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention_output
        normed = self.post_attention_layernorm(hidden_states)
        is_sparse = isinstance(self.mlp, SparseMoEBlock)
        return hidden_states + (self.mlp(normed, layout) if is_sparse else self.mlp(normed))


class Qwen3MoePreTrainedModel(HubModelMixin, hf.Qwen3MoePreTrainedModel):
    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(SoftmaxTopKRouter, index=0),
        "hidden_states": Qwen3MoeDecoderLayer,
        "attentions": hf.Qwen3MoeAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, GroupedExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, SoftmaxTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)


class Qwen3MoeModel(Qwen3MoePreTrainedModel, hf.Qwen3MoeModel):
    def __init__(self, config: Qwen3MoeConfig):
        super(hf.Qwen3MoeModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([Qwen3MoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = hf.Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = hf.Qwen3MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        """As in transformers, and `token_mask` [B, S] bool: False on padding of a packed row."""
        batch = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "token_mask": kwargs.pop("token_mask", None),
        }
        kwargs["layout"] = TokenLayout.of_batch(batch) if self.training else None
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class Qwen3MoeForCausalLM(ChunkedLossMixin, Qwen3MoePreTrainedModel, hf.Qwen3MoeForCausalLM):
    """Qwen3-MoE with a language-model head; `chunked_loss=True` with `labels` never builds the full logits."""

    def __init__(self, config: Qwen3MoeConfig):
        super(hf.Qwen3MoeForCausalLM, self).__init__(config)
        self.model = Qwen3MoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()
