"""The functions of `triton_rows.py` for a dry run: the tensors that they allocate, and for each kernel one operator of
torch that reads and writes what the kernel does. The values are none of theirs.

Legend: as in `rows.py`.
"""

from __future__ import annotations

import torch

from .rows import Grouping, group_by_expert, grouped_mm, grouped_outer, num_rows, take
from .swiglu import SwiGLU

__all__ = [
    "Grouping",
    "gate",
    "gate_backward",
    "group_by_expert",
    "grouped_mm",
    "grouped_outer",
    "num_rows",
    "segment_sum",
    "sum_slots",
    "take",
]


def sum_slots(y_RH: torch.Tensor, grouping: Grouping, base_TH: torch.Tensor | None = None) -> torch.Tensor:
    slots_TK = grouping.row_of_slot_TK
    out_TH = y_RH[: slots_TK.numel()].view(*slots_TK.shape, -1).sum(1)  # the other rows are padding
    return out_TH if base_TH is None else out_TH.add_(base_TH)


def gate(gate_up_RF, bias_EF, topk_ids_TK, weights_TK, grouping: Grouping, swiglu: SwiGLU) -> torch.Tensor:
    return torch.nn.functional.glu(gate_up_RF)


def gate_backward(
    grad_RI, gate_up_RF, bias_EF, topk_ids_TK, weights_TK, grouping: Grouping, swiglu: SwiGLU
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_gate_up_RF = torch.ops.aten.glu_backward(grad_RI, gate_up_RF, -1)
    gated_RI = grad_RI.zero_()  # each tile is overwritten where it was read
    return gated_RI, grad_gate_up_RF, torch.empty_like(weights_TK, dtype=torch.float32)


def segment_sum(x_RA: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    return x_RA.sum(0, dtype=torch.float32).repeat(offsets_E.numel(), 1)
