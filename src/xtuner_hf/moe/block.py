"""The sparse MLP of a decoder layer: route, then dispatch -> experts -> combine."""

from __future__ import annotations

import torch
from torch import nn

from .router import Router
from .tokens import TokenLayout


class SparseMoEBlock(nn.Module):
    """Router and `experts`, and shared experts where the family has them, under the names that checkpoints use.

    Args:
        router: the layer's router.
        experts: the layer's experts; expert parallelism replaces their `forward`.
        shared_experts: an MLP that every token also goes through (DeepSeek-V3, GLM-4.5).
    """

    router_name = "gate"

    def __init__(self, router: Router, experts: nn.Module, shared_experts: nn.Module | None = None):
        super().__init__()
        self.add_module(self.router_name, router)
        self.experts = experts
        self.shared_experts = shared_experts

    def forward(self, hidden_BSH: torch.Tensor, layout: TokenLayout | None = None) -> torch.Tensor:
        """[B, S, H] -> [B, S, H] in the same dtype."""
        hidden_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        routing = getattr(self, self.router_name)(hidden_TH, layout)
        # Under expert parallelism, how many tokens go where travels to the host behind the shared experts.
        dispatcher = getattr(self.experts, "ep_dispatcher", None)
        if dispatcher is not None:
            dispatcher.start(routing.topk_ids_TK)
        shared_BSH = None if self.shared_experts is None else self.shared_experts(hidden_BSH)
        output_TH = self.experts(hidden_TH, routing.topk_ids_TK, routing.weights_TK)
        # Weights are fp32; an implementation that multiplies by them hands back fp32.
        output_BSH = output_TH.to(hidden_BSH.dtype).view_as(hidden_BSH)
        return output_BSH if shared_BSH is None else output_BSH + shared_BSH
