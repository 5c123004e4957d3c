"""Log-probabilities and entropies of chosen tokens without ever holding the full logits.

TRL's tiled kernel does the work: it keeps running log-sum-exp statistics over [tokens x vocabulary] tiles, recomputes
each tile in backward and accumulates the gradients of the head and of the hidden states in fp32.

Legend: T tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._compat import ChunkedLogProbFunction
from ..device import logits_tile_width

IGNORE_INDEX = -100


class TokenLogProbs(NamedTuple):
    """Of each token; 0 where it has no target."""

    log_probs_T: torch.Tensor  # fp32, log p(target)
    entropy_T: torch.Tensor | None  # fp32, -sum_v p_v log p_v, in nats


def chunked_log_probs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> TokenLogProbs:
    """What DPO and GRPO need of a model's head, differentiable in hidden states, weight and bias.

    Args:
        hidden_TH: [T, H] hidden states, any float dtype.
        weight_VH: [V, H] of the head.
        bias_V: [V] or None.
        targets_T: [T] int64, -100 where a token has no target. Those rows cost nothing.
        temperature: what logits are divided by, as in sampling. Both results are of the tempered distribution.
        with_entropy: compute the entropy too, in the same passes over the tiles; differentiable as well.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; logits are divided by it, so it must be positive.")
    has_target_T = targets_T != IGNORE_INDEX
    # Boolean indexing reads the number of targets back to the host: one sync a micro-batch, and the matrix products
    # shrink to the tokens that have one, often half of a conversation.
    log_probs, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden_TH[has_target_T],
        weight_VH,
        bias_V,
        targets_T[has_target_T],
        temperature,
        logits_tile_width(hidden_TH.device),
        None,
        1.0,
        ("entropy",) if with_entropy else (),
    )
    return TokenLogProbs(_spread(log_probs, has_target_T), _spread(entropy, has_target_T) if with_entropy else None)


def _spread(values: torch.Tensor, has_target_T: torch.Tensor) -> torch.Tensor:
    return values.new_zeros(has_target_T.shape).masked_scatter(has_target_T, values)
