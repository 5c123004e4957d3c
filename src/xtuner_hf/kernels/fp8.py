"""FP8 matrix products for training, in plain torch: quantise, and compute with what was quantised.

The recipe is DeepSeek-V3's (arXiv 2412.19437, section 3.3.2): e4m3 throughout, a scale of fp32 for every 128 values of
an activation or gradient along the dimension that is summed over, and for every 128x128 block of a weight.

    forward     y_RB = x_RA w_BA^T           x by rows       w by blocks
    dgrad       dx_RA = dy_RB w_BA           dy by rows      w by the same blocks, transposed
    wgrad       dw_BA = dy_RB^T x_RA         dy and x by columns: 128 tokens share a scale

Here a product multiplies dequantised values in fp32; `triton_fp8.py` has the same functions for the tensor cores of
CUDA devices, which multiply in FP8 and add up 128 products before they scale and add in fp32.

Sizes need not be multiples of 128: the last block is ragged, as in published checkpoints (checkpoint/fp8_blocks.py).

Legend: R rows (tokens), A and B features, E experts, `b` after a letter: blocks of 128 of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import rows

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
BLOCK = 128


class Quantised(NamedTuple):
    """values * scale of the value's block."""

    values: torch.Tensor  # e4m3
    scale: torch.Tensor  # fp32, the last two dimensions count blocks


def quantise(x: torch.Tensor, block: tuple[int, int]) -> Quantised:
    """scale = amax / 448 of each block of the last two dimensions (1 where all is 0); NaN stays NaN."""
    height, width = block
    num_rows, num_columns = x.shape[-2:]
    padded = torch.nn.functional.pad(x.float(), (0, -num_columns % width, 0, -num_rows % height))
    blocks = padded.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))  # [..., Rb, height, Cb, width]
    amax = blocks.abs().amax(dim=(-3, -1))
    scale = torch.where(amax == 0, 1.0, amax / E4M3_MAX)
    values = (blocks / scale[..., :, None, :, None]).to(E4M3)
    values = values.flatten(-2, -1).flatten(-3, -2)[..., :num_rows, :num_columns]
    return Quantised(values.contiguous(), scale)


def dequantise(quantised: Quantised, block: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values that a quantised tensor stands for."""
    values, scale = quantised
    scale = scale.repeat_interleave(block[0], dim=-2)[..., : values.shape[-2], :]
    scale = scale.repeat_interleave(block[1], dim=-1)[..., : values.shape[-1]]
    return (values.float() * scale).to(dtype)


def quantise_rows(x_RA: torch.Tensor) -> Quantised:
    """values [R, A], scale [R, Ab]."""
    return quantise(x_RA, (1, BLOCK))


def quantise_columns(x_RA: torch.Tensor, grouping: rows.Grouping | None = None) -> Quantised:
    """Transposed: values [A, R], scale [A, Rb].

    Args:
        grouping: `x_RA` are tokens [T, A], and rows are taken from them (`rows.take`).
    """
    x_RA = x_RA if grouping is None else rows.take(x_RA, grouping)
    return quantise(x_RA.transpose(-2, -1), (1, BLOCK))


def quantise_blocks(weight_BA: torch.Tensor) -> Quantised:
    """Of a weight [B, A], or of those of many experts [E, B, A]: values like it, scale [..., Bb, Ab]."""
    return quantise(weight_BA, (BLOCK, BLOCK))


def mm(x_RA: Quantised, weight_BA: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """[R, A] by rows times [B, A]^T by blocks -> [R, B]."""
    return (dequantise(x_RA, (1, BLOCK)) @ dequantise(weight_BA, (BLOCK, BLOCK)).t()).to(dtype)


def outer(x_BR: Quantised, y_AR: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """[B, R] times [A, R]^T, both by columns -> [B, A]."""
    return (dequantise(x_BR, (1, BLOCK)) @ dequantise(y_AR, (1, BLOCK)).t()).to(dtype)


def grouped_mm(x_RA: Quantised, weight_EBA: Quantised, offsets_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each row by its expert's weight -> [R, B]; experts start at multiples of 128."""
    weight_EAB = dequantise(weight_EBA, (BLOCK, BLOCK)).transpose(1, 2)
    return rows.grouped_mm(dequantise(x_RA, (1, BLOCK)), weight_EAB, offsets_E).to(dtype)


def grouped_outer(x_BR: Quantised, y_AR: Quantised, offsets_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """For each expert the product over its rows -> [E, B, A]; experts start at multiples of 128."""
    x_RB, y_RA = (dequantise(x, (1, BLOCK)).t().contiguous() for x in (x_BR, y_AR))
    return rows.grouped_outer(x_RB, y_RA, offsets_E).to(dtype)
