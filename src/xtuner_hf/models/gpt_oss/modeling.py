"""GPT-OSS on our MoE rooms. Parameter names, `model_type` and (bf16) checkpoints are those of transformers and the Hub.

The experts are transformers' module, stored transposed, gate and up interleaved, with biases and a clamped SwiGLU; our
kernels compute it. Ours are the router (fp32) and the attention, whose softmax runs in fp32 and whose sinks have an
exact backward through a fused kernel (attention/sinks.py).
"""

from __future__ import annotations

import torch
from transformers.models.gpt_oss import modeling_gpt_oss as hf
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig

from ...kernels.device_operators import fused_on
from ...moe.block import SparseMoEBlock
from ...moe.router import TopKSoftmaxRouter
from ..attention import GroupedQueryAttention
from ..base import use_hub_layout
from ..moe_model import MoECausalLMMixin, MoEDecoderLayer, MoEModelMixin, MoEPreTrainedMixin, recorded_outputs

use_hub_layout("gpt_oss")


class GptOssAttention(GroupedQueryAttention, hf.GptOssAttention):
    plain_rotary = staticmethod(hf.apply_rotary_pos_emb)
    eager = staticmethod(hf.eager_attention_forward)

    def whole_angles(self, angles_BSP: torch.Tensor) -> torch.Tensor:
        return torch.cat([angles_BSP, angles_BSP], dim=-1)  # transformers keeps one of both halves


class GptOssExperts(hf.GptOssExperts):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        fused = fused_on(gate_up.device).clamped_swiglu
        return super()._apply_gate(gate_up) if fused is None else fused(gate_up, self.alpha, self.limit)


class GptOssMLP(SparseMoEBlock):
    router_name = "router"

    def __init__(self, config: GptOssConfig):
        router = TopKSoftmaxRouter(config.hidden_size, config.num_local_experts, config.num_experts_per_tok)
        super().__init__(router, GptOssExperts(config))


class GptOssDecoderLayer(MoEDecoderLayer):
    def __init__(self, config: GptOssConfig, layer_idx: int):
        super().__init__(config, GptOssAttention(config, layer_idx), GptOssMLP(config), hf.GptOssRMSNorm)


class GptOssPreTrainedModel(MoEPreTrainedMixin, hf.GptOssPreTrainedModel):
    _can_record_outputs = recorded_outputs(GptOssDecoderLayer, hf.GptOssAttention)


class GptOssModel(MoEModelMixin, GptOssPreTrainedModel, hf.GptOssModel):
    layer_class = GptOssDecoderLayer
    norm_class = hf.GptOssRMSNorm
    rotary_class = hf.GptOssRotaryEmbedding


class GptOssForCausalLM(MoECausalLMMixin, GptOssPreTrainedModel, hf.GptOssForCausalLM):
    """GPT-OSS with a language-model head; `chunked_loss=True` with `labels` never builds the full logits.

    No balance coefficients are published, so a trainer's `None` balances nothing: the 0.9 in the published
    `config.json` is far above what any MoE was trained with, and engines ignore it.
    """

    model_class = GptOssModel
