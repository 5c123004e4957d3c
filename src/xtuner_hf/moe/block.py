"""The sparse MLP of a decoder layer: route, then dispatch -> experts -> combine."""

from __future__ import annotations

import torch
from torch import nn

from .experts import GroupedExperts
from .router import SoftmaxTopKRouter
from .tokens import TokenLayout


class SparseMoEBlock(nn.Module):
    """Router `gate` and `experts`, under the names that checkpoints use.

    Args:
        router: the layer's router.
        experts: the layer's experts; expert parallelism replaces their `forward`.
    """

    def __init__(self, router: SoftmaxTopKRouter, experts: GroupedExperts):
        super().__init__()
        self.gate = router
        self.experts = experts

    def forward(self, hidden_BSH: torch.Tensor, layout: TokenLayout | None = None) -> torch.Tensor:
        """[B, S, H] -> [B, S, H] in the same dtype."""
        hidden_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        routing = self.gate(hidden_TH, layout)
        output_TH = self.experts(hidden_TH, routing.topk_ids_TK, routing.weights_TK)
        # Weights are fp32; an implementation that multiplies by them hands back fp32.
        return output_TH.to(hidden_BSH.dtype).view_as(hidden_BSH)
