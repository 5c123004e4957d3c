"""Routers: hidden states -> logits, experts and weights of each token, in fp32.

Legend: T tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .routing import Routing
from .tokens import TokenLayout

if TYPE_CHECKING:
    from .balance import LayerLoad


class SoftmaxTopKRouter(nn.Module):
    """Softmax over all experts, then top-k (Switch Transformer, arXiv 2101.03961; Qwen3-MoE).

    Logits and softmax are computed in fp32 whatever the dtype of the weights: with bf16 logits the top-8 set of
    about 3% of tokens changes. Gate weights always come from the unbiased probabilities.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        norm_topk_prob: divide the K weights by their sum.
        correction_bias: add an fp32 buffer `e_score_correction_bias` [E] to the scores for the *selection* only
            (auxiliary-loss-free balancing, arXiv 2408.15664, eq. 3).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        norm_topk_prob: bool = False,
        correction_bias: bool = False,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))
        if correction_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32))
        else:
            self.e_score_correction_bias = None
        # What a trainer attaches to count the load and to balance it; a plain object, so it is in no state dict.
        self.load: LayerLoad | None = None

    def forward(self, hidden_TH: torch.Tensor, layout: TokenLayout | None = None) -> Routing:
        """Route tokens.

        Args:
            hidden_TH: [T, H], any float dtype.
            layout: real tokens and documents; only read while a trainer counts or balances the load.
        """
        logits_TE = self.logits(hidden_TH)
        scores_TE = self.scores(logits_TE)
        topk_ids_TK = self.select(scores_TE)
        weights_TK = scores_TE.gather(1, topk_ids_TK)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        if self.load is not None and layout is not None:
            weights_TK = self.load.observe(self, Routing(logits_TE, weights_TK, topk_ids_TK), layout)
        return Routing(logits_TE, weights_TK, topk_ids_TK)

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        # Autocast would compute this product in bf16 again.
        with torch.autocast(hidden_TH.device.type, enabled=False):
            dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
            return F.linear(hidden_TH.to(dtype), self.weight.to(dtype))

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """[T, E] fp32: what experts are chosen by, what weights come from, and what the balance losses average."""
        return logits_TE.softmax(dim=-1, dtype=torch.float32)

    @torch.no_grad()
    def select(self, scores_TE: torch.Tensor) -> torch.Tensor:
        if self.e_score_correction_bias is not None:
            scores_TE = scores_TE + self.e_score_correction_bias
        return scores_TE.topk(self.top_k, dim=-1, sorted=True).indices

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, top_k={self.top_k}, norm_topk_prob={self.norm_topk_prob}"
