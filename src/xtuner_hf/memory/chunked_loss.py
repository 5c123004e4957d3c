"""Cross entropy of a language model's head without ever holding the full logits.

Legend: B rows, S positions, T tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import torch

from .logprobs import IGNORE_INDEX, chunked_log_probs

__all__ = ["IGNORE_INDEX", "LossWeights", "chunked_cross_entropy"]


class LossWeights:
    """How much each label counts.

    A plain class: FSDP casts floating-point inputs of a module to bf16, which has 8 bits, and looks into dataclasses.

    Args:
        weights_BS: [B, S] fp32, of each position as its own label.
        total: scalar fp32, what the weighted loss is divided by; the sum of these weights by default.
    """

    def __init__(self, weights_BS: torch.Tensor, total: torch.Tensor | None = None) -> None:
        self.weights_BS = weights_BS
        self.total = weights_BS[:, 1:].sum() if total is None else total


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
