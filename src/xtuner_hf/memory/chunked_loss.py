"""Cross entropy of a language model's head without ever holding the full logits.

TRL's tiled kernel does the work: it keeps running log-sum-exp statistics over [tokens x vocabulary] tiles, recomputes
each tile in backward and accumulates the gradients of the head and of the hidden states in fp32.

Legend: T tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import torch

from .._compat import ChunkedLogProbFunction
from ..device import logits_tile_width

IGNORE_INDEX = -100


def chunked_cross_entropy(hidden_TH, weight_VH, bias_V, labels_T) -> torch.Tensor:
    """Sum over labelled tokens of -log p(label), scalar fp32.

    Args:
        hidden_TH: [T, H] hidden states, any float dtype.
        weight_VH: [V, H] of the head.
        bias_V: [V] or None.
        labels_T: [T] int64, -100 where a token has no label. Those rows cost nothing.
    """
    labelled_T = labels_T != IGNORE_INDEX
    # Boolean indexing reads the number of labels back to the host: one sync a micro-batch, and the matrix products
    # shrink to the labelled tokens, often half of a conversation.
    tile_width = logits_tile_width(hidden_TH.device)
    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden_TH[labelled_T], weight_VH, bias_V, labels_T[labelled_T], 1.0, tile_width, None, 1.0, ()
    )
    return -log_probs.sum()
