"""Attention of packed documents, one document after the other, with kernels that know no documents: any device.

A document needs no mask: its attention is causal. With a window of N keys it is cut into blocks of N queries, which see
their own block and the one before, so that cost and memory grow with the length and not with its square.

    block     0      1      2      3
    queries   |------|------|------|
    keys       1 block, then always 2

Legend: T tokens of all documents; G documents of the same length, L tokens each; N query heads, M key and value heads,
K size of a query and key head, V of a value head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..device import is_host
from .documents import Documents
from .sinks import CPU_KERNEL, SinkAttention, reference_sink_attention

# Blocks of a window are no smaller: kernels want work.
MIN_BLOCK = 64


def attention_by_document(
    q_TNK: torch.Tensor,
    k_TMK: torch.Tensor,
    v_TMV: torch.Tensor,
    documents: Documents,
    *,
    scaling: float,
    window: int | None = None,
    sinks_N: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """[T, N, V]: what every implementation of attention/varlen.py computes.

    Args:
        window: keys that a query sees, itself among them; None sees the whole document up to it.
        sinks_N: one more logit per head, without a value (attention/sinks.py).
        dropout: probability.
    """
    sizes = [number * length for number, length in documents.runs]
    # One split a tensor: slicing document by document would make each a gradient of the size of the whole.
    parts = zip(documents.runs, q_TNK.split(sizes), k_TMK.split(sizes), v_TMV.split(sizes), strict=True)
    outputs = []
    for (number, _), *tensors in parts:
        q_GNLK, k_GMLK, v_GMLV = (tensor.unflatten(0, (number, -1)).transpose(1, 2) for tensor in tensors)
        output_GNLV = _attend(q_GNLK, k_GMLK, v_GMLV, scaling, window, sinks_N, dropout)
        outputs.append(output_GNLV.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def with_equal_heads(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let a kernel (q, k, v, ...) that wants heads of one size compute values with smaller ones too (MLA)."""

    @functools.wraps(kernel)
    def call(q, k, v, *arguments, **options):
        k_size, v_size = k.shape[-1], v.shape[-1]
        if v_size < k_size:
            v = F.pad(v, (0, k_size - v_size))
        return kernel(q, k, v, *arguments, **options)[..., :v_size]

    return call


@with_equal_heads
def _attend(q_GNLK, k_GMLK, v_GMLV, scaling, window, sinks_N, dropout) -> torch.Tensor:
    if window is None or window >= q_GNLK.shape[2]:
        return _kernel(q_GNLK, k_GMLK, v_GMLV, None, scaling, sinks_N, dropout)
    return _attend_in_window(q_GNLK, k_GMLK, v_GMLV, scaling, window, sinks_N, dropout)


def _attend_in_window(q_GNLK, k_GMLK, v_GMLV, scaling, window: int, sinks_N, dropout) -> torch.Tensor:
    num_documents, _, length, _ = q_GNLK.shape
    block = min(max(window, MIN_BLOCK), length)
    num_blocks = -(-length // block)
    mask = _band(block, 2 * block, window, q_GNLK)
    # Padding at the end is of no real query's past, so no mask has to hide it.
    q, k, v = (
        F.pad(tensor, (0, 0, 0, num_blocks * block - length)).unflatten(2, (num_blocks, block))
        for tensor in (q_GNLK, k_GMLK, v_GMLV)
    )
    output = _kernel(q[:, :, 0], k[:, :, 0], v[:, :, 0], mask[..., block:], scaling, sinks_N, dropout)
    outputs = [output[:, :, None]]
    if num_blocks > 1:
        seen = [torch.cat([tensor[:, :, :-1], tensor[:, :, 1:]], dim=3) for tensor in (k, v)]
        q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q[:, :, 1:], *seen))
        output = _kernel(q, k, v, mask, scaling, sinks_N, dropout)
        outputs.append(output.unflatten(0, (num_documents, num_blocks - 1)).transpose(1, 2))
    return torch.cat(outputs, dim=2).flatten(2, 3)[:, :, :length]


def _band(num_queries: int, num_keys: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """[1, 1, queries, keys], 0 where the query sees the key and the lowest number elsewhere; the last key is the last
    query's own."""
    query = torch.arange(num_queries, device=like.device)[:, None] + num_keys - num_queries
    distance = query - torch.arange(num_keys, device=like.device)
    is_hidden = (distance < 0) | (distance >= window)
    mask = torch.zeros_like(is_hidden, dtype=like.dtype).masked_fill_(is_hidden, torch.finfo(like.dtype).min)
    return mask[None, None]


def _kernel(q_GNLK, k_GMLK, v_GMLV, mask, scaling, sinks_N, dropout) -> torch.Tensor:
    """Causal without a mask."""
    if sinks_N is None:
        grouped = q_GNLK.shape[1] != k_GMLK.shape[1]
        return F.scaled_dot_product_attention(
            q_GNLK, k_GMLK, v_GMLV, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    groups = q_GNLK.shape[1] // k_GMLK.shape[1]
    k_GNLK, v_GNLV = (tensor.repeat_interleave(groups, dim=1) for tensor in (k_GMLK, v_GMLV))
    if is_host(q_GNLK.device) and not dropout:
        return SinkAttention.apply(q_GNLK, k_GNLK, v_GNLV, sinks_N, mask, scaling, CPU_KERNEL)
    if mask is None:
        length = q_GNLK.shape[2]
        mask = _band(length, length, length, q_GNLK)
    return reference_sink_attention(q_GNLK, k_GNLK, v_GNLV, sinks_N, mask, scaling, dropout)
