"""Dispatch within one rank: token order -> expert order, without dropping a token and without a host sync.

Legend: T tokens, K experts per token, R = T*K rows, H hidden size, E experts of this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.device_operators import fused_on


class Dispatch(NamedTuple):
    """Rows grouped by expert, and the way back."""

    x_RH: torch.Tensor  # the token of each row, rows of one expert next to each other
    offsets_E: torch.Tensor  # int32, end of each expert's rows: what grouped matrix products want
    row_of_slot_R: torch.Tensor  # int, the row that computes slot t*K + k


def count_tokens(expert_ids: torch.Tensor, num_experts: int, counted: torch.Tensor | None = None) -> torch.Tensor:
    """[E] int64: how often each expert is chosen.

    Args:
        expert_ids: int64, any shape, values in 0..E-1.
        counted: bool, same shape; False entries are left out.
    """
    ones = torch.ones_like(expert_ids) if counted is None else counted.to(expert_ids.dtype)
    counts = torch.zeros(num_experts, dtype=expert_ids.dtype, device=expert_ids.device)
    # bincount reads its length back to the host; scatter_add_ does not.
    return counts.scatter_add_(0, expert_ids.reshape(-1), ones.reshape(-1))


def dispatch(hidden_TH: torch.Tensor, topk_ids_TK: torch.Tensor, num_experts: int) -> Dispatch:
    """Group the (token, expert) pairs by expert."""
    offsets_E = count_tokens(topk_ids_TK, num_experts).cumsum(0, dtype=torch.int32)
    permute = fused_on(hidden_TH.device).permute
    if permute is not None:
        x_RH, row_of_slot_R = permute(hidden_TH, topk_ids_TK)
        return Dispatch(x_RH, offsets_E, row_of_slot_R)
    # The same sort as transformers': a matrix product's last bits depend on where in its block a row stands, so only
    # equal row orders make equal results. The order within an expert carries no meaning.
    _, slot_of_row_R = torch.sort(topk_ids_TK.reshape(-1))
    row_of_slot_R = torch.empty_like(slot_of_row_R)
    row_of_slot_R[slot_of_row_R] = torch.arange(slot_of_row_R.numel(), device=slot_of_row_R.device)
    x_RH = hidden_TH[slot_of_row_R // topk_ids_TK.shape[1]]
    return Dispatch(x_RH, offsets_E, row_of_slot_R)
