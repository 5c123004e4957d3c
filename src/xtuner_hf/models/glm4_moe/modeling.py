"""GLM-4.5 (`glm4_moe`) on our MoE rooms: grouped-query attention, DeepSeek-V3's routing and multi-token prediction."""

from __future__ import annotations

from transformers.models.glm4_moe import modeling_glm4_moe as hf
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig

from ..attention import GroupedQueryAttention
from ..base import use_hub_layout
from ..deepseek_v3.modeling import build_sigmoid_block
from ..moe_model import BalanceDefaults, MoEDecoderLayer, MoEPreTrainedMixin, recorded_outputs
from ..mtp import MTPCausalLMMixin, MTPLayerMixin, MTPModelMixin, stored_copies

use_hub_layout("glm4_moe", further=stored_copies())


class Glm4MoeAttention(GroupedQueryAttention, hf.Glm4MoeAttention):
    plain_rotary = staticmethod(hf.apply_rotary_pos_emb)
    eager = staticmethod(hf.eager_attention_forward)


class Glm4MoeDecoderLayer(MoEDecoderLayer):
    def __init__(self, config: Glm4MoeConfig, layer_idx: int):
        is_dense = layer_idx < config.first_k_dense_replace
        mlp = hf.Glm4MoeMLP(config) if is_dense else build_sigmoid_block(config, hf.Glm4MoeMLP)
        super().__init__(config, Glm4MoeAttention(config, layer_idx), mlp, hf.Glm4MoeRMSNorm)


class Glm4MoeMTPLayer(MTPLayerMixin, Glm4MoeDecoderLayer):
    pass


class Glm4MoePreTrainedModel(MoEPreTrainedMixin, hf.Glm4MoePreTrainedModel):
    _can_record_outputs = recorded_outputs(Glm4MoeDecoderLayer, hf.Glm4MoeAttention)


class Glm4MoeModel(MTPModelMixin, Glm4MoePreTrainedModel, hf.Glm4MoeModel):
    layer_class = Glm4MoeDecoderLayer
    mtp_layer_class = Glm4MoeMTPLayer
    norm_class = hf.Glm4MoeRMSNorm
    rotary_class = hf.Glm4MoeRotaryEmbedding


class Glm4MoeForCausalLM(MTPCausalLMMixin, Glm4MoePreTrainedModel, hf.Glm4MoeForCausalLM):
    """GLM-4.5 with a language-model head; `chunked_loss=True` with `labels` never builds the full logits.

    A trainer's `None` takes the coefficients of pre-training (arXiv 2508.06471, section 2.4).
    """

    model_class = Glm4MoeModel
    balance_defaults = BalanceDefaults(sequence_loss_coef=1e-4, bias_update_rate=1e-3)
