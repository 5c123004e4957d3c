"""The functions of `triton_fp8.py` for a dry run: the tensors that they allocate, and for each kernel one operator of
torch that reads and writes about what the kernel does. The values are none of theirs.

Legend: as in `fp8.py`.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .fp8 import BLOCK, E4M3, Quantised
from .rows import Grouping

__all__ = [
    "grouped_mm",
    "grouped_outer",
    "mm",
    "outer",
    "quantise_blocks",
    "quantise_columns",
    "quantise_rows",
]


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def quantise_rows(x_RA: torch.Tensor) -> Quantised:
    num_rows, width = x_RA.shape
    values_RA = x_RA.contiguous().to(E4M3)
    return Quantised(values_RA, x_RA.new_empty(num_rows, _blocks(width), dtype=torch.float32))


def quantise_columns(x_RA: torch.Tensor, grouping: Grouping | None = None) -> Quantised:
    x_RA = x_RA.contiguous()
    num_rows, width = (x_RA if grouping is None else grouping.slot_of_row_R).shape[0], x_RA.shape[1]
    values_AR = x_RA.new_empty(width, num_rows, dtype=E4M3)
    values_AR.view(torch.uint8).bitwise_not_()
    return Quantised(values_AR, x_RA.new_empty(width, _blocks(num_rows), dtype=torch.float32))


def quantise_blocks(weight_BA: torch.Tensor) -> Quantised:
    weight_BA = weight_BA.contiguous()
    *experts, height, width = weight_BA.shape
    scale = weight_BA.new_empty(*experts, _blocks(height), _blocks(width), dtype=torch.float32)
    return Quantised(weight_BA.to(E4M3), scale)


def mm(x_RA: Quantised, weight_BA: Quantised, dtype: torch.dtype) -> torch.Tensor:
    out_RB = x_RA.values.new_empty(x_RA.values.shape[0], weight_BA.values.shape[0], dtype=dtype)
    return torch.mm(x_RA.values, weight_BA.values.t(), out=out_RB)


def outer(x_BR: Quantised, y_AR: Quantised, dtype: torch.dtype) -> torch.Tensor:
    return mm(x_BR, y_AR, dtype)


def grouped_mm(x_RA: Quantised, weight_EBA: Quantised, offsets_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return F.grouped_mm(x_RA.values, weight_EBA.values.transpose(1, 2), offs=offsets_E, out_dtype=dtype)


def grouped_outer(x_BR: Quantised, y_AR: Quantised, offsets_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return F.grouped_mm(x_BR.values, y_AR.values.t(), offs=offsets_E, out_dtype=dtype)
