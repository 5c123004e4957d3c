"""Log-probabilities and entropies of chosen tokens without ever holding the full logits.

On CUDA, TRL's tiled Triton kernel does the work: it keeps running log-sum-exp statistics over [tokens x vocabulary]
tiles, recomputes each tile in backward and adds the gradients up in fp32. Elsewhere row_logprobs.py takes whole rows.

Legend: T tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._compat import ChunkedLogProbFunction
from ..device import kind, kind_of
from ..host_reads import host_reads
from .row_logprobs import RowLogProbs

IGNORE_INDEX = -100
# Vocabulary entries of a tile of TRL's kernel: an accelerator wants matrix products that fill it.
TILE_WIDTH = 8192
# What TRL's fused head returns for each token.
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


class TokenLogProbs(NamedTuple):
    """Of each token; 0 where it has no target."""

    log_probs_T: torch.Tensor  # log p(target); fp32, fp64 of fp64 inputs where Triton does not run
    entropy_T: torch.Tensor | None  # the same dtype, -sum_v p_v log p_v, in nats


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
    # The number of targets is read back to the host: one sync a micro-batch, and the matrix products shrink to the
    # tokens that have one, often half of a conversation.
    row_N = host_reads().true_rows(targets_T != IGNORE_INDEX)
    head = (hidden_TH[row_N], weight_VH, bias_V, targets_T[row_N], temperature)
    here = kind_of(kind(hidden_TH.device))
    if here.triton:
        outputs = ("entropy",) if with_entropy else ()
        log_probs, entropy, *_ = ChunkedLogProbFunction.apply(*head, TILE_WIDTH, None, 1.0, outputs)
    else:
        log_probs, entropy = RowLogProbs.apply(*head, with_entropy, here.logits_at_a_time)
    num_tokens = targets_T.shape[0]
    spread_entropy_T = _spread(entropy, row_N, num_tokens) if with_entropy else None
    return TokenLogProbs(_spread(log_probs, row_N, num_tokens), spread_entropy_T)


def _spread(values_N: torch.Tensor, row_N: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return values_N.new_zeros(num_tokens).scatter(0, row_N, values_N)
