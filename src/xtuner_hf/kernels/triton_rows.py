"""The functions of `rows.py` as Triton kernels: no host sync, each row crosses memory once in every step.

All launches are shapes known to the host; what depends on the routing is read on the device. Sums over tokens and rows
run in a fixed order, so results repeat to the last bit.

Legend: as in `rows.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rows import Grouping, grouped_mm, grouped_outer, num_rows
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

COLUMNS = 512  # of a tile of rows
ROWS = 8


# ---- grouping: a counting sort in two passes over the ids ----


@triton.jit
def count_kernel(ids_R, counts_BE, num_slots, num_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, EXPERTS)
    ids = tl.load(ids_R + slot, mask=slot < num_slots, other=EXPERTS)
    hits = (ids[:, None] == expert[None, :]).to(tl.int32)
    tl.store(counts_BE + block * num_experts + expert, tl.sum(hits, axis=0), mask=expert < num_experts)


@triton.jit
def place_kernel(
    ids_R,
    first_row_BE,
    slot_of_row_R,
    row_of_slot_R,
    num_slots,
    num_experts,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, EXPERTS)
    is_slot = slot < num_slots
    ids = tl.load(ids_R + slot, mask=is_slot, other=EXPERTS)
    hits = (ids[:, None] == expert[None, :]).to(tl.int32)
    first = tl.load(first_row_BE + block * num_experts + expert, mask=expert < num_experts, other=0)
    # Of its expert's slots in this block, how many come before each slot.
    row = tl.sum(hits * (first[None, :] + tl.cumsum(hits, axis=0) - 1), axis=1)
    tl.store(row_of_slot_R + slot, row, mask=is_slot)
    tl.store(slot_of_row_R + row, slot, mask=is_slot)


def group_by_expert(topk_ids_TK: torch.Tensor, num_experts: int, align: int = 1) -> Grouping:
    num_slots, device = topk_ids_TK.numel(), topk_ids_TK.device
    padded_experts = triton.next_power_of_2(num_experts)
    block = max(16, 8192 // padded_experts)
    num_blocks = max(triton.cdiv(num_slots, block), 1)  # one without a slot counts to 0
    sizes = {"EXPERTS": padded_experts, "BLOCK": block}
    counts_BE = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=device)
    count_kernel[(num_blocks,)](topk_ids_TK, counts_BE, num_slots, num_experts, **sizes)
    through_BE = counts_BE.cumsum(0, dtype=torch.int32)
    sizes_E = (through_BE[-1] + (align - 1)) // align * align
    offsets_E = sizes_E.cumsum(0, dtype=torch.int32)
    first_row_BE = through_BE - counts_BE + (offsets_E - sizes_E)
    slot_of_row_R = torch.full((num_rows(num_slots, num_experts, align),), -1, dtype=torch.int32, device=device)
    row_of_slot_TK = torch.empty(topk_ids_TK.shape, dtype=torch.int32, device=device)
    place_kernel[(num_blocks,)](
        topk_ids_TK, first_row_BE, slot_of_row_R, row_of_slot_TK, num_slots, num_experts, **sizes
    )
    return Grouping(slot_of_row_R, row_of_slot_TK, offsets_E)


# ---- tokens to rows and back ----


@triton.jit
def take_kernel(
    x_TH,
    slot_of_row_R,
    out_RH,
    num_rows,
    width,
    top_k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slot_of_row_R + row, mask=row < num_rows, other=-1).to(tl.int64)
    is_column = column[None, :] < width
    source = x_TH + (slot // top_k)[:, None] * width + column[None, :]
    values = tl.load(source, mask=(slot >= 0)[:, None] & is_column, other=0.0)
    tl.store(out_RH + row[:, None] * width + column[None, :], values, mask=(row < num_rows)[:, None] & is_column)


def take(x_TH: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    x_TH = x_TH.contiguous()
    rows, width = grouping.slot_of_row_R.numel(), x_TH.shape[1]
    out_RH = x_TH.new_empty(rows, width)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
    top_k = grouping.row_of_slot_TK.shape[1]
    take_kernel[grid](x_TH, grouping.slot_of_row_R, out_RH, rows, width, top_k, ROWS=ROWS, COLUMNS=COLUMNS)
    return out_RH


@triton.jit
def sum_slots_kernel(
    y_RH,
    row_of_slot_TK,
    base_TH,
    out_TH,
    num_tokens,
    width,
    HAS_BASE: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token = token < num_tokens
    mask = is_token[:, None] & (column[None, :] < width)
    place = token[:, None] * width + column[None, :]
    if HAS_BASE:
        total = tl.load(base_TH + place, mask=mask, other=0.0).to(tl.float32)
    else:
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_slot_TK + token * TOP_K + k, mask=is_token, other=0).to(tl.int64)
        total += tl.load(y_RH + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_TH + place, total.to(out_TH.dtype.element_ty), mask=mask)


def sum_slots(y_RH: torch.Tensor, grouping: Grouping, base_TH: torch.Tensor | None = None) -> torch.Tensor:
    num_tokens, top_k = grouping.row_of_slot_TK.shape
    width = y_RH.shape[1]
    out_TH = y_RH.new_empty(num_tokens, width)
    grid = (triton.cdiv(num_tokens, ROWS), triton.cdiv(width, COLUMNS))
    sum_slots_kernel[grid](
        y_RH,
        grouping.row_of_slot_TK,
        y_RH if base_TH is None else base_TH.contiguous(),
        out_TH,
        num_tokens,
        width,
        HAS_BASE=base_TH is not None,
        TOP_K=top_k,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return out_TH


# ---- the activation, with bias and routing weight ----


@triton.jit
def load_gate_up(
    gate_up_RF,
    bias_EF,
    row,
    expert,
    column,
    mask,
    inner,
    HAS_BIAS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Gate and up before clamping in fp32, and their place within a row."""
    gate_place = 2 * column if INTERLEAVED else column
    up_place = 2 * column + 1 if INTERLEAVED else column + inner
    source = gate_up_RF + row[:, None] * (2 * inner)
    gate = tl.load(source + gate_place[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + up_place[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = bias_EF + expert[:, None] * (2 * inner)
        gate += tl.load(bias + gate_place[None, :], mask=mask, other=0.0).to(tl.float32)
        up += tl.load(bias + up_place[None, :], mask=mask, other=0.0).to(tl.float32)
    return gate, up, gate_place, up_place


@triton.jit
def gate_kernel(
    gate_up_RF,
    bias_EF,
    ids_R,
    weights_R,
    slot_of_row_R,
    out_RI,
    num_rows,
    inner,
    alpha,
    limit,
    up_shift,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slot_of_row_R + row, mask=row < num_rows, other=-1)
    weight = tl.load(weights_R + slot, mask=slot >= 0, other=0.0).to(tl.float32)
    expert = tl.load(ids_R + slot, mask=slot >= 0, other=0)
    mask = (slot >= 0)[:, None] & (column[None, :] < inner)
    gate, up, _, _ = load_gate_up(gate_up_RF, bias_EF, row, expert, column, mask, inner, HAS_BIAS, INTERLEAVED)
    if HAS_LIMIT:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    gated = (up + up_shift) * gate / (1 + tl.exp(-alpha * gate)) * weight[:, None]
    place = out_RI + row[:, None] * inner + column[None, :]
    # Rows of padding become zeros: their values were masked when they were loaded.
    is_row = (row < num_rows)[:, None] & (column[None, :] < inner)
    tl.store(place, gated.to(out_RI.dtype.element_ty), mask=is_row)


@triton.jit
def gate_backward_kernel(
    grad_RI,
    gate_up_RF,
    bias_EF,
    ids_R,
    weights_R,
    slot_of_row_R,
    gated_RI,
    grad_gate_up_RF,
    grad_weights_R,
    num_rows,
    inner,
    alpha,
    limit,
    up_shift,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slot_of_row_R + row, mask=row < num_rows, other=-1)
    is_slot = slot >= 0
    weight = tl.load(weights_R + slot, mask=is_slot, other=0.0).to(tl.float32)[:, None]
    expert = tl.load(ids_R + slot, mask=is_slot, other=0)
    grad_weight = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, inner, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = column[None, :] < inner
        mask = is_slot[:, None] & is_column
        raw_gate, raw_up, gate_place, up_place = load_gate_up(
            gate_up_RF, bias_EF, row, expert, column, mask, inner, HAS_BIAS, INTERLEAVED
        )
        gate, up = raw_gate, raw_up
        if HAS_LIMIT:
            gate = tl.minimum(raw_gate, limit)
            up = tl.minimum(tl.maximum(raw_up, -limit), limit)
        place = row[:, None] * inner + column[None, :]
        grad = tl.load(grad_RI + place, mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-alpha * gate))
        glu = gate * sigmoid
        activated = (up + up_shift) * glu
        grad_weight += tl.sum(grad * activated, axis=1)
        grad_up = grad * weight * glu
        grad_gate = grad * weight * (up + up_shift) * sigmoid * (1 + alpha * gate * (1 - sigmoid))
        if HAS_LIMIT:
            grad_gate = tl.where(raw_gate > limit, 0.0, grad_gate)
            grad_up = tl.where(tl.abs(raw_up) > limit, 0.0, grad_up)
        is_row = (row < num_rows)[:, None] & is_column
        tl.store(gated_RI + place, (activated * weight).to(gated_RI.dtype.element_ty), mask=is_row)
        target = grad_gate_up_RF + row[:, None] * (2 * inner)
        tl.store(target + gate_place[None, :], grad_gate.to(grad_gate_up_RF.dtype.element_ty), mask=is_row)
        tl.store(target + up_place[None, :], grad_up.to(grad_gate_up_RF.dtype.element_ty), mask=is_row)
    tl.store(grad_weights_R + slot, grad_weight, mask=is_slot)


def _gate_options(bias_EF: torch.Tensor | None, swiglu: SwiGLU, inner: int) -> dict:
    return {
        "HAS_BIAS": bias_EF is not None,
        "HAS_LIMIT": swiglu.limit is not None,
        "INTERLEAVED": swiglu.interleaved,
        "ROWS": ROWS,
        "COLUMNS": min(256, triton.next_power_of_2(inner)),
    }


def gate(gate_up_RF, bias_EF, topk_ids_TK, weights_TK, grouping: Grouping, swiglu: SwiGLU) -> torch.Tensor:
    rows, inner = gate_up_RF.shape[0], gate_up_RF.shape[1] // 2
    out_RI = gate_up_RF.new_empty(rows, inner)
    options = _gate_options(bias_EF, swiglu, inner)
    gate_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(inner, options["COLUMNS"]))](
        gate_up_RF,
        gate_up_RF if bias_EF is None else bias_EF.contiguous(),
        topk_ids_TK,
        weights_TK.contiguous(),
        grouping.slot_of_row_R,
        out_RI,
        rows,
        inner,
        swiglu.alpha,
        swiglu.limit or 0.0,
        swiglu.up_shift,
        **options,
    )
    return out_RI


def gate_backward(
    grad_RI, gate_up_RF, bias_EF, topk_ids_TK, weights_TK, grouping: Grouping, swiglu: SwiGLU
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, inner = gate_up_RF.shape[0], gate_up_RF.shape[1] // 2
    grad_gate_up_RF = torch.empty_like(gate_up_RF)
    grad_weights_TK = torch.empty(weights_TK.shape, dtype=torch.float32, device=weights_TK.device)
    gate_backward_kernel[(triton.cdiv(rows, ROWS),)](
        grad_RI,
        gate_up_RF,
        gate_up_RF if bias_EF is None else bias_EF.contiguous(),
        topk_ids_TK,
        weights_TK.contiguous(),
        grouping.slot_of_row_R,
        grad_RI,  # each tile is read before it is overwritten
        grad_gate_up_RF,
        grad_weights_TK,
        rows,
        inner,
        swiglu.alpha,
        swiglu.limit or 0.0,
        swiglu.up_shift,
        **_gate_options(bias_EF, swiglu, inner),
    )
    return grad_RI, grad_gate_up_RF, grad_weights_TK


# ---- the gradient of a bias ----


@triton.jit
def segment_sum_kernel(x_RA, offsets_E, out_EA, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    expert = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column[None, :] < width
    begin = tl.load(offsets_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_E + expert)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(begin, end, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < end)[:, None] & is_column
        total += tl.sum(tl.load(x_RA + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32), 0)
    tl.store(out_EA + expert * width + column, total, mask=column < width)


def segment_sum(x_RA: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    num_experts, width = offsets_E.numel(), x_RA.shape[1]
    out_EA = torch.empty(num_experts, width, dtype=torch.float32, device=x_RA.device)
    grid = (num_experts, triton.cdiv(width, 128))
    segment_sum_kernel[grid](x_RA, offsets_E, out_EA, width, ROWS=64, COLUMNS=128)
    return out_EA
