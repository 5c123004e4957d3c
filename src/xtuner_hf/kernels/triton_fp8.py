"""The functions of `fp8.py` as Triton kernels for GPUs with FP8 tensor cores (SM89 and newer).

Both operands of a product have the summed dimension last, which is the only layout that Hopper's FP8 instructions read;
what is needed the other way round is written transposed when it is quantised.

Legend: as in `fp8.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

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

# As many tiles of rows are worked on side by side: they share the columns' operand in the cache.
TILES_SIDE_BY_SIDE = 8


# ---- quantise ----


@triton.jit
def quantise_rows_kernel(x_RA, values_RA, scale_RAb, num_rows, width, ROWS: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    x = tl.load(x_RA + place, mask=mask, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(x), axis=1)
    scale = tl.where(amax == 0, 1.0, amax / 448.0)
    tl.store(values_RA + place, (x / scale[:, None]).to(values_RA.dtype.element_ty), mask=mask)
    tl.store(scale_RAb + row * tl.num_programs(1) + tl.program_id(1), scale, mask=row < num_rows)


def quantise_rows(x_RA: torch.Tensor) -> Quantised:
    x_RA = x_RA.contiguous()
    num_rows, width = x_RA.shape
    grid = (triton.cdiv(num_rows, 32), triton.cdiv(width, BLOCK))
    values_RA = torch.empty_like(x_RA, dtype=E4M3)
    scale_RAb = torch.empty(num_rows, grid[1], dtype=torch.float32, device=x_RA.device)
    quantise_rows_kernel[grid](x_RA, values_RA, scale_RAb, num_rows, width, ROWS=32, SIZE=BLOCK)
    return Quantised(values_RA, scale_RAb)


@triton.jit
def quantise_columns_kernel(
    x_RA,
    slot_of_row_R,
    values_AR,
    scale_ARb,
    num_rows,
    width,
    top_k,
    TAKES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """TAKES: `x_RA` holds tokens, and the row of slot s is token s // top_k; zeros where a row is padding."""
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    source, is_read = row.to(tl.int64), mask
    if TAKES:
        slot = tl.load(slot_of_row_R + row, mask=row < num_rows, other=-1).to(tl.int64)
        source, is_read = slot // top_k, mask & (slot >= 0)[:, None]
    x = tl.load(x_RA + source[:, None] * width + column[None, :], mask=is_read, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(x), axis=0)
    scale = tl.where(amax == 0, 1.0, amax / 448.0)
    values = (x / scale[None, :]).to(values_AR.dtype.element_ty)
    tl.store(values_AR + column[None, :] * num_rows + row[:, None], values, mask=mask)
    tl.store(scale_ARb + column * tl.num_programs(0) + tl.program_id(0), scale, mask=column < width)


def quantise_columns(x_RA: torch.Tensor, grouping: Grouping | None = None) -> Quantised:
    x_RA = x_RA.contiguous()
    slots = x_RA if grouping is None else grouping.slot_of_row_R
    num_rows, width = slots.shape[0], x_RA.shape[1]
    grid = (triton.cdiv(num_rows, BLOCK), triton.cdiv(width, 32))
    values_AR = torch.empty(width, num_rows, dtype=E4M3, device=x_RA.device)
    scale_ARb = torch.empty(width, grid[0], dtype=torch.float32, device=x_RA.device)
    quantise_columns_kernel[grid](
        x_RA,
        slots,
        values_AR,
        scale_ARb,
        num_rows,
        width,
        1 if grouping is None else grouping.row_of_slot_TK.shape[1],
        TAKES=grouping is not None,
        COLUMNS=32,
        SIZE=BLOCK,
    )
    return Quantised(values_AR, scale_ARb)


@triton.jit
def quantise_blocks_kernel(x_EBA, values_EBA, scale_EBbAb, height, width, SIZE: tl.constexpr):
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    mask = (row < height)[:, None] & (column < width)[None, :]
    place = expert * height * width + row[:, None] * width + column[None, :]
    x = tl.load(x_EBA + place, mask=mask, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    scale = tl.where(amax == 0, 1.0, amax / 448.0)
    tl.store(values_EBA + place, (x / scale).to(values_EBA.dtype.element_ty), mask=mask)
    block = (expert * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(scale_EBbAb + block, scale)


def quantise_blocks(weight_BA: torch.Tensor) -> Quantised:
    weight_BA = weight_BA.contiguous()
    *experts, height, width = weight_BA.shape
    grid = (triton.cdiv(height, BLOCK), triton.cdiv(width, BLOCK), *(experts or [1]))
    values = torch.empty_like(weight_BA, dtype=E4M3)
    scale = torch.empty(*experts, *grid[:2], dtype=torch.float32, device=weight_BA.device)
    quantise_blocks_kernel[grid](weight_BA, values, scale, height, width, SIZE=BLOCK)
    return Quantised(values, scale)


# ---- multiply ----


@triton.jit
def mm_kernel(
    x_RA,
    scale_RAb,
    weight_EBA,
    scale_EBbAb,
    offsets_E,
    out_RB,
    num_rows,
    num_inner,
    num_columns,
    num_experts,
    EXPERTS: tl.constexpr,
    SIZE: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """A tile of 128 rows, all of one expert, times a tile of 128 of its weight's rows.

    DESCRIBED: `x_RA` and `weight_EBA` (as [E*B, A]) are tensor descriptors, which the copy engine loads by.
    """
    row_tiles, column_tiles = tl.cdiv(num_rows, SIZE), tl.cdiv(num_columns, SIZE)
    band = tl.program_id(0) // (SIDE_BY_SIDE * column_tiles)
    first = band * SIDE_BY_SIDE
    height = tl.minimum(row_tiles - first, SIDE_BY_SIDE)
    within = tl.program_id(0) % (SIDE_BY_SIDE * column_tiles)
    row_tile, column_tile = first + within % height, within // height

    known = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_E + known, mask=known < num_experts, other=2147483647)
    expert = tl.sum((ends <= row_tile * SIZE).to(tl.int32), axis=0)
    if expert < num_experts:
        row = (row_tile * SIZE + tl.arange(0, SIZE)).to(tl.int64)
        column = column_tile * SIZE + tl.arange(0, SIZE)
        inner = tl.arange(0, SIZE)
        inner_blocks = tl.cdiv(num_inner, SIZE)
        scales = scale_EBbAb + (expert * column_tiles + column_tile) * inner_blocks
        total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
        for block in range(0, inner_blocks):
            if DESCRIBED:
                x = x_RA.load([row_tile * SIZE, block * SIZE])
                # A tile that reaches into the next expert is cut off when it is stored.
                w = weight_EBA.load([expert * num_columns + column_tile * SIZE, block * SIZE]).T
            else:
                depth = block * SIZE + inner
                is_depth = depth < num_inner
                x = tl.load(
                    x_RA + row[:, None] * num_inner + depth[None, :],
                    mask=(row < num_rows)[:, None] & is_depth[None, :],
                    other=0.0,
                )
                place = expert.to(tl.int64) * num_columns * num_inner + column[None, :] * num_inner + depth[:, None]
                w = tl.load(weight_EBA + place, mask=(column < num_columns)[None, :] & is_depth[:, None], other=0.0)
            scale = tl.load(scale_RAb + row * inner_blocks + block, mask=row < num_rows, other=0.0)
            total += tl.dot(x, w) * (scale * tl.load(scales + block))[:, None]
        place = out_RB + row[:, None] * num_columns + column[None, :]
        mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
        tl.store(place, total.to(out_RB.dtype.element_ty), mask=mask)


def grouped_mm(x_RA: Quantised, weight_EBA: Quantised, offsets_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    num_experts, num_columns, num_inner = weight_EBA.values.shape
    num_rows = x_RA.values.shape[0]
    out_RB = torch.empty(num_rows, num_columns, dtype=dtype, device=x_RA.values.device)
    x, weight = x_RA.values, weight_EBA.values
    described = _can_be_described(x, weight)
    mm_kernel[(triton.cdiv(num_rows, BLOCK) * triton.cdiv(num_columns, BLOCK),)](
        _describe(x) if described else x,
        x_RA.scale,
        _describe(weight.flatten(0, 1)) if described else weight,
        weight_EBA.scale,
        offsets_E,
        out_RB,
        num_rows,
        num_inner,
        num_columns,
        num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        SIZE=BLOCK,
        SIDE_BY_SIDE=TILES_SIDE_BY_SIDE,
        DESCRIBED=described,
        num_warps=8,
        num_stages=3,
    )
    return out_RB


def _can_be_described(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can load tiles of these: rows and beginnings at multiples of 16 bytes."""
    return all(x.shape[-1] % 16 == 0 and x.data_ptr() % 16 == 0 and x.numel() > 0 for x in tensors)


def _describe(x_RA: torch.Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x_RA, [BLOCK, BLOCK])


@triton.jit
def outer_kernel(
    x_BR,
    scale_BRb,
    y_AR,
    scale_ARb,
    offsets_E,
    out_EBA,
    num_rows,
    height,
    width,
    SIZE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """A tile of one expert's weight gradient: the sum over its rows, 128 at a time. DESCRIBED: as in `mm_kernel`."""
    expert = tl.program_id(2)
    b = (tl.program_id(0) * SIZE + tl.arange(0, SIZE)).to(tl.int64)
    a = (tl.program_id(1) * SIZE + tl.arange(0, SIZE)).to(tl.int64)
    row_blocks = tl.cdiv(num_rows, SIZE)
    begin = tl.load(offsets_E + expert - 1, mask=expert > 0, other=0) // SIZE
    end = tl.cdiv(tl.load(offsets_E + expert), SIZE)
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for block in range(begin, end):
        if DESCRIBED:
            x = x_BR.load([tl.program_id(0) * SIZE, block * SIZE])
            y = y_AR.load([tl.program_id(1) * SIZE, block * SIZE]).T
        else:
            row = block * SIZE + tl.arange(0, SIZE)
            is_row = row < num_rows
            x = tl.load(
                x_BR + b[:, None] * num_rows + row[None, :], mask=(b < height)[:, None] & is_row[None, :], other=0.0
            )
            y = tl.load(
                y_AR + a[None, :] * num_rows + row[:, None], mask=(a < width)[None, :] & is_row[:, None], other=0.0
            )
        x_scale = tl.load(scale_BRb + b * row_blocks + block, mask=b < height, other=0.0)
        y_scale = tl.load(scale_ARb + a * row_blocks + block, mask=a < width, other=0.0)
        total += tl.dot(x, y) * (x_scale[:, None] * y_scale[None, :])
    place = out_EBA + expert.to(tl.int64) * height * width + b[:, None] * width + a[None, :]
    tl.store(place, total.to(out_EBA.dtype.element_ty), mask=(b < height)[:, None] & (a < width)[None, :])


def grouped_outer(x_BR: Quantised, y_AR: Quantised, offsets_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    (height, num_rows), width, num_experts = x_BR.values.shape, y_AR.values.shape[0], offsets_E.numel()
    out_EBA = torch.empty(num_experts, height, width, dtype=dtype, device=x_BR.values.device)
    grid = (triton.cdiv(height, BLOCK), triton.cdiv(width, BLOCK), num_experts)
    x, y = x_BR.values, y_AR.values
    described = _can_be_described(x, y)
    outer_kernel[grid](
        _describe(x) if described else x,
        x_BR.scale,
        _describe(y) if described else y,
        y_AR.scale,
        offsets_E,
        out_EBA,
        num_rows,
        height,
        width,
        SIZE=BLOCK,
        DESCRIBED=described,
        num_warps=8,
        num_stages=3,
    )
    return out_EBA


# ---- a dense layer is one expert ----


def mm(x_RA: Quantised, weight_BA: Quantised, dtype: torch.dtype) -> torch.Tensor:
    weight_EBA = Quantised(*(part[None] for part in weight_BA))
    return grouped_mm(x_RA, weight_EBA, _one_end(x_RA.values.shape[0], x_RA.values.device), dtype)


def outer(x_BR: Quantised, y_AR: Quantised, dtype: torch.dtype) -> torch.Tensor:
    return grouped_outer(x_BR, y_AR, _one_end(x_BR.values.shape[1], x_BR.values.device), dtype)[0]


def _one_end(num_rows: int, device: torch.device) -> torch.Tensor:
    return torch.full((1,), num_rows, dtype=torch.int32, device=device)
