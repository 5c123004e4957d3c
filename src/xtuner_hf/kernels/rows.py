"""The steps of the MoE path on rows grouped by expert, in plain torch: any device, any dtype.

`triton_rows.py` has the same functions for CUDA. Arithmetic runs in fp32 at least; results have their inputs' dtype.

Legend: T tokens, K experts per token, R rows (T*K and padding), H hidden size, I expert intermediate size, F = 2*I,
E experts, A and B any sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .swiglu import SwiGLU

ROWS_AT_ONCE = 4096


class Grouping(NamedTuple):
    """Which (token, expert) pair each row computes. Slot t*K + k is the k-th expert of token t."""

    slot_of_row_R: torch.Tensor  # int32, -1 where a row is padding
    row_of_slot_TK: torch.Tensor  # int32
    offsets_E: torch.Tensor  # int32, end of each expert's rows

    @property
    def is_padded(self) -> bool:
        return self.slot_of_row_R.numel() > self.row_of_slot_TK.numel()


def num_rows(num_slots: int, num_experts: int, align: int) -> int:
    """R: enough for any routing once each expert's rows are filled up to a multiple of `align`; known to the host."""
    return -(-(num_slots + num_experts * (align - 1)) // align) * align


def group_by_expert(topk_ids_TK: torch.Tensor, num_experts: int, align: int = 1) -> Grouping:
    """Sort the pairs by expert, and by slot within one; no host sync.

    Args:
        topk_ids_TK: [T, K] int64 in 0..E-1.
        align: start each expert's rows at a multiple of this.
    """
    ids_R = topk_ids_TK.reshape(-1)
    sorted_ids_R, slot_R = torch.sort(ids_R, stable=True)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=ids_R.device)
    counts_E.scatter_add_(0, ids_R, torch.ones_like(ids_R))
    sizes_E = (counts_E + align - 1) // align * align
    offsets_E = sizes_E.cumsum(0)
    # Where an expert's rows begin, with padding before them and without.
    shift_E = (offsets_E - sizes_E) - (counts_E.cumsum(0) - counts_E)
    row_R = torch.arange(ids_R.numel(), device=ids_R.device) + shift_E[sorted_ids_R]
    rows = num_rows(ids_R.numel(), num_experts, align)
    slot_of_row_R = torch.full((rows,), -1, dtype=torch.int32, device=ids_R.device)
    slot_of_row_R[row_R] = slot_R.int()
    row_of_slot_R = torch.empty_like(ids_R, dtype=torch.int32)
    row_of_slot_R[slot_R] = row_R.int()
    return Grouping(slot_of_row_R, row_of_slot_R.view_as(topk_ids_TK), offsets_E.int())


def take(x_TH: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    """[T, H] -> [R, H]: each row's token; zeros where a row is padding."""
    slot_R, top_k = grouping.slot_of_row_R, grouping.row_of_slot_TK.shape[1]
    if not grouping.is_padded:
        return x_TH[slot_R // top_k]
    return x_TH[slot_R.clamp(min=0) // top_k].masked_fill_((slot_R < 0)[:, None], 0)


def sum_slots(y_RH: torch.Tensor, grouping: Grouping, base_TH: torch.Tensor | None = None) -> torch.Tensor:
    """[R, H] -> [T, H]: the sum of each token's rows in the router's order, on top of `base_TH` (fp32)."""
    dtype = torch.promote_types(y_RH.dtype, torch.float32)
    total_TH = y_RH.new_zeros(grouping.row_of_slot_TK.shape[0], y_RH.shape[1], dtype=dtype)
    if base_TH is not None:
        total_TH += base_TH
    for row_T in grouping.row_of_slot_TK.unbind(1):
        total_TH += y_RH[row_T]
    return total_TH.to(y_RH.dtype)


def gate(
    gate_up_RF: torch.Tensor,
    bias_EF: torch.Tensor | None,
    topk_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    grouping: Grouping,
    swiglu: SwiGLU,
) -> torch.Tensor:
    """[R, F] -> [R, I]: bias, activation and routing weight; zeros where a row is padding."""
    out_RI = gate_up_RF.new_empty(gate_up_RF.shape[0], gate_up_RF.shape[1] // 2)
    for rows, slots, is_padding in _pieces(grouping):
        pre_RF = _pre_activation(gate_up_RF[rows], bias_EF, topk_ids_TK, slots)
        gated_RI = swiglu.forward(pre_RF) * weights_TK.reshape(-1)[slots, None]
        out_RI[rows] = gated_RI.masked_fill_(is_padding, 0)
    return out_RI


def gate_backward(
    grad_RI: torch.Tensor,
    gate_up_RF: torch.Tensor,
    bias_EF: torch.Tensor | None,
    topk_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    grouping: Grouping,
    swiglu: SwiGLU,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `gate` returned, computed again [R, I]; the gradient of its input [R, F]; that of the weights [T, K].

    Args:
        grad_RI: of what `gate` returned; its memory may be used for the first result.
    """
    gated_RI, grad_gate_up_RF = torch.empty_like(grad_RI), torch.empty_like(gate_up_RF)
    grad_weights_R = torch.empty(grad_RI.shape[0], dtype=weights_TK.dtype, device=grad_RI.device)
    for rows, slots, is_padding in _pieces(grouping):
        pre_RF = _pre_activation(gate_up_RF[rows], bias_EF, topk_ids_TK, slots)
        weights_R1 = weights_TK.reshape(-1)[slots, None]
        activated_RI, grad = swiglu.forward(pre_RF), grad_RI[rows].to(pre_RF.dtype)
        grad_weights_R[rows] = (grad * activated_RI).sum(1)
        gated_RI[rows] = (activated_RI * weights_R1).masked_fill_(is_padding, 0)
        grad_gate_up_RF[rows] = swiglu.backward(pre_RF, grad * weights_R1).masked_fill_(is_padding, 0)
    return gated_RI, grad_gate_up_RF, grad_weights_R[grouping.row_of_slot_TK]


def _pieces(grouping: Grouping) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Rows in pieces whose fp32 copies are small: the rows, their slots (0 for padding), and which are padding."""
    for start in range(0, grouping.slot_of_row_R.numel(), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        slots = grouping.slot_of_row_R[rows]
        # What a matrix product leaves in rows of no expert may be anything, NaN too.
        yield rows, slots.clamp(min=0), (slots < 0)[:, None]


def _pre_activation(gate_up_RF, bias_EF, topk_ids_TK, slots_R) -> torch.Tensor:
    pre_RF = gate_up_RF.to(torch.promote_types(gate_up_RF.dtype, torch.float32))
    return pre_RF if bias_EF is None else pre_RF + bias_EF[topk_ids_TK.reshape(-1)[slots_R]]


def segment_sum(x_RA: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """[R, A] -> [E, A] fp32 (at least): the sum of each expert's rows."""
    dtype = torch.promote_types(x_RA.dtype, torch.float32)
    return torch.stack([x_RA[start:end].sum(0, dtype=dtype) for start, end in _segments(offsets_E)])


def grouped_mm(x_RA: torch.Tensor, weight_EAB: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """[R, A] x [E, A, B] -> [R, B], each row with its expert's weight; rows of no expert are left undefined."""
    if x_RA.dtype != torch.float64:
        return F.grouped_mm(x_RA, weight_EAB, offs=offsets_E)
    y_RB = x_RA.new_empty(x_RA.shape[0], weight_EAB.shape[2])
    for expert, (start, end) in enumerate(_segments(offsets_E)):
        torch.mm(x_RA[start:end], weight_EAB[expert], out=y_RB[start:end])
    return y_RB


def grouped_outer(x_RA: torch.Tensor, y_RB: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """[R, A], [R, B] -> [E, A, B]: for each expert the product over its rows, the gradient of a weight."""
    if x_RA.dtype != torch.float64:
        return F.grouped_mm(x_RA.t(), y_RB, offs=offsets_E)
    return torch.stack([x_RA[start:end].t() @ y_RB[start:end] for start, end in _segments(offsets_E)])


def _segments(offsets_E: torch.Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *offsets_E.tolist()]))
