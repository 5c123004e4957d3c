"""What a device computes in one operator of its own where plain torch takes several.

Each room that has such a step asks for its device's operator and computes with plain torch where there is none, so the
plain code beside the question is the definition, and the reference of its tests.

Legend: T tokens, K experts per token, R = T*K rows, H hidden size, I expert intermediate size, F = 2*I (gate and up), E
experts, A and B sizes of a weight, N query heads, M key and value heads, D head size, P part of it that is rotated.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..device import kind_of

Operator = Callable[..., torch.Tensor]


class FusedOperators(NamedTuple):
    """Those of one kind of device; None where it has none.

    Args:
        rms_norm: (x [..., H], weight [H], epsilon) -> like x.
        rotary: (x [B, heads, S, D], cos [B, S, P], sin [B, S, P]) -> like x; the first P numbers of each head are
            rotated, half against half.
        swiglu: (gate_up [R, F]) -> silu(gate) * up, [R, I]; gate is the first half.
        clamped_swiglu: (gate_up [R, F], alpha, limit) -> GPT-OSS's, [R, I]; gate and up take turns.
        grouped_mm: (x [R, A], weight [E, A, B], ends [E] int32) -> [R, B]; rows `ends[e-1]:ends[e]` belong to weight e.
        permute: (hidden [T, H], expert ids [T, K]) -> rows [R, H] by expert, and the row of each slot [R] int.
        unpermute: (rows [R, H], weights [T, K], the row of each slot [R]) -> [T, H], summed in fp32.
        attention: as attention/by_document.py: (q, k, v, documents, *, scaling, window, sinks_N, dropout).
        max_head_size: of `attention`.
    """

    rms_norm: Operator | None = None
    rotary: Operator | None = None
    swiglu: Operator | None = None
    clamped_swiglu: Operator | None = None
    grouped_mm: Operator | None = None
    permute: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    unpermute: Operator | None = None
    attention: Operator | None = None
    max_head_size: int = 0


def fused_on(device: torch.device | str) -> FusedOperators:
    """The fused operators of the kind of a device, or of that name."""
    return _fused(kind_of(device).fused)


@functools.cache
def _fused(module: str | None) -> FusedOperators:
    return FusedOperators() if module is None else importlib.import_module(module).OPERATORS
