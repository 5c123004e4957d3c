"""Qwen3 dense: transformers' model with our head and our loading and saving."""

from __future__ import annotations

from transformers.models.qwen3 import modeling_qwen3 as hf
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from ..attention import GroupedQueryAttention
from ..base import HubModelMixin, use_hub_layout
from ..head import ChunkedLossMixin, LMHead
from ..trunk import TrunkMixin

use_hub_layout("qwen3")


class Qwen3PreTrainedModel(HubModelMixin, hf.Qwen3PreTrainedModel):
    pass


class Qwen3Attention(GroupedQueryAttention, hf.Qwen3Attention):
    plain_rotary = staticmethod(hf.apply_rotary_pos_emb)
    eager = staticmethod(hf.eager_attention_forward)


class Qwen3Model(TrunkMixin, Qwen3PreTrainedModel, hf.Qwen3Model):
    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.__class__ = Qwen3Attention  # transformers has built the layers


class Qwen3ForCausalLM(ChunkedLossMixin, Qwen3PreTrainedModel, hf.Qwen3ForCausalLM):
    """Qwen3 with a language-model head; `chunked_loss=True` with `labels` never builds the full logits."""

    model_class = Qwen3Model

    def __init__(self, config: Qwen3Config):
        super(hf.Qwen3ForCausalLM, self).__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
