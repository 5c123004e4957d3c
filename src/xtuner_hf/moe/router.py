"""Routers: hidden states -> logits, experts and weights of each token, in fp32.

    logits    linear, in fp32 whatever the dtype of the weights: in bf16 about 3% of tokens change their top-8 experts
    scores    what experts are chosen by, and what weights come from
    select    top-k of scores + e_score_correction_bias; the bias moves the choice and never the weights
    weigh     the weights of the chosen experts, from unbiased scores

Legend: T tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..device import kind_of
from .routing import Routing
from .tokens import TokenLayout

if TYPE_CHECKING:
    from .balance import LayerLoad


class Router(nn.Module):
    """What all routers share; `moe/balance.py` finds them by this class.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        correction_bias: add an fp32 buffer `e_score_correction_bias` [E] to the scores for the *selection* only
            (auxiliary-loss-free balancing, arXiv 2408.15664, eq. 3).
    """

    # The order of a token's experts is the order in which fp32 sums run. Falling scores are the same on every device.
    sorts_experts = True

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, correction_bias: bool = False):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"num_experts_per_tok is {top_k}; it must be between 1 and the {num_experts} experts.")
        self.num_experts = num_experts
        self.top_k = top_k
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)
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
            layout: real tokens and documents, read while a trainer counts or balances the load; and `routes`, which
                may replace what this router chooses.
        """
        logits_TE = self.logits(hidden_TH)
        scores_TE = self.scores(logits_TE)
        topk_ids_TK = self.select(scores_TE)
        if layout is not None and layout.routes is not None:
            topk_ids_TK = layout.routes.choose(self, topk_ids_TK)
        weights_TK = self.weigh(scores_TE.gather(1, topk_ids_TK))
        if self.load is not None and layout is not None:
            weights_TK = self.load.observe(self, Routing(logits_TE, weights_TK, topk_ids_TK), layout)
        return Routing(logits_TE, weights_TK, topk_ids_TK)

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        # Autocast would compute this product in bf16 again.
        with torch.autocast(hidden_TH.device.type, enabled=False):
            dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(hidden_TH.to(dtype), self.weight.to(dtype), bias)

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """[T, E]: what experts are chosen by, and what weights come from."""
        raise NotImplementedError

    def probabilities(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """[T, E], rows summing to 1: what the balance losses average."""
        return self.scores(logits_TE)

    @torch.no_grad()
    def select(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """[T, K] int64: the chosen experts, in falling order of the score they are chosen by if `sorts_experts`."""
        sorts = self.sorts_experts or not kind_of(scores_TE.device).unsorted_topk
        return self.biased(scores_TE).topk(self.top_k, dim=-1, sorted=sorts).indices

    def biased(self, scores_TE: torch.Tensor) -> torch.Tensor:
        bias = self.e_score_correction_bias
        return scores_TE if bias is None else scores_TE + bias

    def weigh(self, chosen_TK: torch.Tensor) -> torch.Tensor:
        """[T, K] scores of the chosen experts -> their weights."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, top_k={self.top_k}"


class SoftmaxTopKRouter(Router):
    """Softmax over all experts, then top-k (Switch Transformer, arXiv 2101.03961; Qwen3-MoE).

    Args:
        norm_topk_prob: divide the K weights by their sum.
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
        super().__init__(hidden_size, num_experts, top_k, correction_bias=correction_bias)
        self.norm_topk_prob = norm_topk_prob

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        return logits_TE.softmax(dim=-1, dtype=torch.float32)

    def weigh(self, chosen_TK: torch.Tensor) -> torch.Tensor:
        return chosen_TK / chosen_TK.sum(dim=-1, keepdim=True) if self.norm_topk_prob else chosen_TK


class TopKSoftmaxRouter(Router):
    """Linear with a bias, top-k of the logits, then softmax over the K chosen ones (GPT-OSS).

    The same weights as a softmax over all experts, normalised over the chosen; computed as the model's authors do.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int):
        super().__init__(hidden_size, num_experts, top_k)
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        return logits_TE

    def probabilities(self, logits_TE: torch.Tensor) -> torch.Tensor:
        return logits_TE.softmax(dim=-1, dtype=torch.float32)

    def weigh(self, chosen_TK: torch.Tensor) -> torch.Tensor:
        return chosen_TK.softmax(dim=-1)


class SigmoidGroupRouter(Router):
    """Sigmoid, group-limited top-k with a correction bias: `noaux_tc` (DeepSeek-V3, arXiv 2412.19437, eq. 12-16).

    Experts stand in `num_groups` groups of equal size. A group's score is the sum of its two best biased scores; only
    experts of the `topk_groups` best groups can be chosen, all others count as -inf (and not as 0, which would win
    over a negative biased score). Everything is fp32, in fp64 models too, as in the authors' code.

    Args:
        num_groups: G; 1 does not limit.
        topk_groups: how many groups a token may use.
        norm_topk_prob: divide the K weights by their sum.
        scaling_factor: what the weights are multiplied by in the end.
    """

    sorts_experts = False  # as in transformers and the authors' code: weights are equal to theirs to the last bit

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int = 1,
        topk_groups: int = 1,
        norm_topk_prob: bool = True,
        scaling_factor: float = 1.0,
    ):
        super().__init__(hidden_size, num_experts, top_k, correction_bias=True)
        if num_experts % num_groups or not 1 <= topk_groups <= num_groups:
            raise ValueError(
                f"n_group {num_groups} must divide the {num_experts} experts, and topk_group {topk_groups} must be "
                f"between 1 and n_group."
            )
        if top_k > topk_groups * (num_experts // num_groups):
            raise ValueError(
                f"num_experts_per_tok {top_k} is more than the {topk_groups * (num_experts // num_groups)} experts in "
                f"topk_group {topk_groups} of n_group {num_groups} groups: raise topk_group or lower the former."
            )
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.norm_topk_prob = norm_topk_prob
        self.scaling_factor = scaling_factor

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        return super().logits(hidden_TH.float())

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        return logits_TE.sigmoid()

    def probabilities(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """Scores divided by their sum over experts (eq. 19)."""
        scores_TE = self.scores(logits_TE)
        return scores_TE / scores_TE.sum(dim=-1, keepdim=True)

    def biased(self, scores_TE: torch.Tensor) -> torch.Tensor:
        scores_TE = super().biased(scores_TE)
        if self.topk_groups == self.num_groups:
            return scores_TE
        in_groups = scores_TE.unflatten(-1, (self.num_groups, -1))
        group_scores_TG = in_groups.topk(min(2, in_groups.shape[-1]), dim=-1).values.sum(dim=-1)
        best_groups = group_scores_TG.topk(self.topk_groups, dim=-1).indices
        is_out_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, best_groups, False)
        return in_groups.masked_fill(is_out_TG[..., None], -torch.inf).flatten(-2)

    def weigh(self, chosen_TK: torch.Tensor) -> torch.Tensor:
        if self.norm_topk_prob:
            # All chosen scores may underflow to 0: the authors' guard against 0 / 0.
            chosen_TK = chosen_TK / (chosen_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen_TK * self.scaling_factor
