"""InternViT, the vision tower of InternVL and Intern-S1: transformers' parts, with stochastic depth.

All tiles of a micro-batch have the same number of patches, so that the batch of tiles is what a varlen kernel would be
given: no padding, no mask, and torch's (or an installed) flash attention over it.

Legend: N tiles, P patches of a tile and one class token, C hidden size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.internvl import modeling_internvl as hf
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from ..base import HubModelMixin


class StochasticDepth(nn.Module):
    """Leaves a residual branch out for whole tiles, in training (arXiv 1603.09382, section 3).

    Args:
        rate: the probability; what stays is divided by 1 - rate.
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, branch_NPC: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return branch_NPC
        kept_N11 = torch.rand(len(branch_NPC), 1, 1, device=branch_NPC.device) >= self.rate
        return branch_NPC * (kept_N11.to(branch_NPC.dtype) / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class InternVLVisionLayer(hf.InternVLVisionLayer):
    def __init__(self, config: InternVLVisionConfig):
        super().__init__(config)
        self.stochastic_depth = StochasticDepth()

    def forward(self, hidden_NPC: torch.Tensor) -> torch.Tensor:
        """[N, P, C] -> [N, P, C]"""
        attention_NPC, _ = self.attention(self.layernorm_before(hidden_NPC))
        hidden_NPC = self.stochastic_depth(self.lambda_1 * attention_NPC) + hidden_NPC
        mlp_NPC = self.dropout(self.mlp(self.layernorm_after(hidden_NPC)))
        return self.stochastic_depth(self.lambda_2 * mlp_NPC) + hidden_NPC


class InternVLVisionEncoder(hf.InternVLVisionEncoder):
    def __init__(self, config: InternVLVisionConfig):
        nn.Module.__init__(self)
        self.config = config
        self.layer = nn.ModuleList(InternVLVisionLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False


class InternVLVisionModel(HubModelMixin, hf.InternVLVisionModel):
    """Both sizes: 300M (layer norm, biases) and 6B (RMS norm, norms on queries and keys).

    `config.drop_path_rate` (InternVL's name; 0 where there is none) is the rate of the last layer; it rises linearly
    from 0 at the first.
    """

    _fsdp_plan: ClassVar = {"embeddings": "free_full_weight", "encoder.layer.*": "free_full_weight"}
    _can_record_outputs: ClassVar = {"hidden_states": InternVLVisionLayer, "attentions": hf.InternVLVisionAttention}

    def __init__(self, config: InternVLVisionConfig):
        PreTrainedModel.__init__(self, config)
        self.embeddings = hf.InternVLVisionEmbeddings(config)
        self.encoder = InternVLVisionEncoder(config)
        has_norm = not config.use_mean_pooling
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else nn.Identity()
        self.set_drop_path_rate(getattr(config, "drop_path_rate", 0.0))
        self.post_init()

    def set_drop_path_rate(self, rate: float) -> None:
        """Choose the stochastic depth of the last layer.

        Raises:
            ValueError: for a rate outside of [0, 1).
        """
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path_rate is {rate}; it is a probability below 1, 0.1 to 0.4 is usual.")
        layers: Any = self.encoder.layer
        for depth, layer in enumerate(layers):
            layer.stochastic_depth.rate = rate * depth / max(len(layers) - 1, 1)

    def init_parallel_plans(self) -> None:
        super().init_parallel_plans()
        keep_own_rules(self)


def keep_own_rules(model: Any) -> None:
    """Drop the rules that every configuration brings, which are those of a language model's trunk."""
    for rule in model.config.base_model_fsdp_plan:
        model._fsdp_plan.pop(rule, None)
