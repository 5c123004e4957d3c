"""Which implementation computes the attention of packed documents: chosen by device, dtype and what a layer asks for.

    CUDA, bf16 or fp16    flash-attn 4, 3 or 2 through transformers, the newest that is installed; else torch's own
                          flash attention (torch.nn.attention.varlen)
    with sinks            flash-attn 4, which knows them; else torch's, by the formulas of attention/sinks.py
    NPU                   its fused attention (kernels/npu/attention.py)
    anything else         document by document, with torch's scaled_dot_product_attention

None of the CUDA lines has run on a GPU yet: the tests check which is chosen, and shapes.

Legend: T tokens of all documents, N query heads, M key and value heads, K size of a query and key head, V of a value
head.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from .._compat import cuda_flash_attention, cuda_flash_attention_backward, flash_attention_by_name
from ..device import kind_of
from ..kernels.device_operators import fused_on
from .by_document import attention_by_document, with_equal_heads
from .documents import Documents
from .sinks import FusedKernel, SinkAttention

logger = logging.getLogger(__name__)

# (q_TNK, k_TMK, v_TMV, documents, *, scaling, window, sinks_N, dropout) -> [T, N, V]
Kernel = Callable[..., torch.Tensor]

# Of torch's and flash-attn 2's kernels.
MAX_HEAD_SIZE = 256


@functools.cache
def choose(device_type: str, dtype: torch.dtype, head_size: int, has_sinks: bool, has_dropout: bool) -> Kernel:
    """The implementation for these inputs; logs which, once for each combination.

    Args:
        head_size: of queries and keys.
    """
    name, kernel = "document by document, scaled_dot_product_attention", attention_by_document
    is_half = dtype in (torch.bfloat16, torch.float16)
    fused = fused_on(device_type)
    if fused.attention is not None and head_size <= fused.max_head_size:
        name, kernel = "the device's fused attention", fused.attention
    elif kind_of(device_type).flash_attention and is_half and head_size <= MAX_HEAD_SIZE and not has_dropout:
        installed = _installed_flash_attention()
        if installed is not None and (not has_sinks or installed == "flash_attention_4"):
            name, kernel = installed, functools.partial(_flash_attention, installed)
        elif has_sinks:
            name, kernel = "torch's flash attention, with sinks", _torch_flash_with_sinks
        else:
            name, kernel = "torch.nn.attention.varlen", _torch_varlen
    logger.info("Attention on %s in %s%s: %s.", device_type, dtype, " with sinks" if has_sinks else "", name)
    return kernel


def _installed_flash_attention() -> str | None:
    """transformers' name of the newest flash-attn package that is installed."""
    available = {4: is_flash_attn_4_available, 3: is_flash_attn_3_available, 2: is_flash_attn_2_available}
    return next((f"flash_attention_{version}" for version, found in available.items() if found()), None)


def _flash_attention(name: str, q_TNK, k_TMK, v_TMV, documents: Documents, *, scaling, window, sinks_N, dropout):
    padded = with_equal_heads(functools.partial(flash_attention_by_name, name))
    boundaries = documents.cu_seqlens, documents.max_length
    return padded(q_TNK, k_TMK, v_TMV, *boundaries, scaling=scaling, window=window, sinks=sinks_N)


@with_equal_heads
def _torch_varlen(q_TNK, k_TMK, v_TMV, documents: Documents, *, scaling, window, sinks_N, dropout) -> torch.Tensor:
    ends, longest = documents.cu_seqlens, documents.max_length
    # How many keys to the left, the own one not among them.
    sizes = (-1 if window is None else window - 1, 0)
    is_grouped = q_TNK.shape[1] != k_TMK.shape[1]
    grouped: dict[str, Any] = {"enable_gqa": True} if is_grouped and _asks_for_groups(varlen_attn) else {}
    return varlen_attn(  # type: ignore[return-value]  # with further outputs only if asked for
        q_TNK, k_TMK, v_TMV, ends, ends, longest, longest, scale=scaling, window_size=sizes, **grouped
    )


@functools.cache
def _asks_for_groups(varlen: Callable) -> bool:
    """Whether it wants to be told of fewer key and value heads; torch 2.11's takes them as they come."""
    return "enable_gqa" in inspect.signature(varlen).parameters


@with_equal_heads
def _torch_flash_with_sinks(q_TNK, k_TMK, v_TMV, documents: Documents, *, scaling, window, sinks_N, dropout):
    options = {"cu_seqlens": documents.cu_seqlens, "max_length": documents.max_length, "window": window}
    kernel = FusedKernel(
        functools.partial(cuda_flash_attention, **options), functools.partial(cuda_flash_attention_backward, **options)
    )
    groups = q_TNK.shape[1] // k_TMK.shape[1]
    repeated = (k_TMK.repeat_interleave(groups, dim=1), v_TMV.repeat_interleave(groups, dim=1))
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q_TNK, *repeated))
    return SinkAttention.apply(q, k, v, sinks_N, None, scaling, kernel)[0].transpose(0, 1)
