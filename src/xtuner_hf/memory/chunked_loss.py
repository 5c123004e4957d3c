"""Cross entropy of a language model's head without ever holding the full logits.

Legend: B rows, S positions, T tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .logprobs import IGNORE_INDEX, chunked_log_probs

__all__ = ["IGNORE_INDEX", "LossWeights", "chunked_cross_entropy"]


class LossWeights:
    """How much each label counts, and what the weighted loss is divided by.

    A plain class: FSDP casts floating-point inputs of a module to bf16, which has 8 bits, and looks into dataclasses.

    Args:
        weights_BS: [B, S] fp32, of each position as its own label; None where every label counts 1.
        total: scalar fp32; the sum of these weights by default.

    Raises:
        ValueError: for neither.
    """

    def __init__(self, weights_BS: torch.Tensor | None, total: torch.Tensor | None = None) -> None:
        if total is None:
            if weights_BS is None:
                raise ValueError("LossWeights needs weights, or the total that the loss is divided by.")
            total = weights_BS[:, 1:].sum()
        self.weights_BS, self.total = weights_BS, total

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> LossWeights:
        """With weights that were brought elsewhere, of the same total."""
        return LossWeights(None if self.weights_BS is None else move(self.weights_BS), self.total)


def chunked_cross_entropy(hidden_TH, weight_VH, bias_V, labels_T, weights_T=None) -> torch.Tensor:
    """Sum over labelled tokens of -log p(label), scalar fp32.

    Args:
        hidden_TH: [T, H] hidden states, any float dtype.
        weight_VH: [V, H] of the head.
        bias_V: [V] or None.
        labels_T: [T] int64, -100 where a token has no label. Those rows cost nothing.
        weights_T: [T], how much each label counts; 1 by default.
    """
    log_probs_T = chunked_log_probs(hidden_TH, weight_VH, bias_V, labels_T).log_probs_T
    return -(log_probs_T if weights_T is None else log_probs_T * weights_T).sum()
