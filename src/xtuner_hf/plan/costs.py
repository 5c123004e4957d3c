"""FLOPs and bytes of one operation, and the time that a device would take: a roofline.

    seconds = max(FLOPs / (peak * efficiency), bytes / (memory bandwidth * efficiency), shortest kernel)

Matrix products are recognised by their operators. Everything else costs the bytes that it reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .devices import Device
from .torch_internals import tensors_in


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VIEWS = _names(
    "view _unsafe_view t transpose permute expand slice select split split_with_sizes unsqueeze squeeze as_strided "
    "detach alias chunk unbind narrow lift_fresh _reshape_alias diagonal is_same_size sym_size sym_stride "
    "empty empty_like empty_strided new_empty new_empty_strided set_ resize_ record_stream"
)
_WRITE_ONLY = _names("zeros zeros_like ones ones_like full full_like zero_ fill_ new_zeros new_ones arange")
_READ_WHAT_THEY_WRITE = _names("index embedding gather index_select")
_SCATTERED = _names("index_put_ index_put _unsafe_index_put scatter scatter_ index_add_ index_add")
_COPIES_OF_LISTS = _names("split_with_sizes_copy chunk_cat all_gather_copy_in _foreach_copy_")

# Kinds of matrix products, as the efficiencies of a device name them.
DENSE, GROUPED = "dense_matmul", "grouped_matmul"
ATTENTION, ATTENTION_BACKWARD = "attention_forward", "attention_backward"


def is_free(name: str) -> bool:
    """Whether an operator of this name does nothing on a device."""
    return name in _VIEWS


def num_bytes(tensor: torch.Tensor) -> int:
    """What reading it whole costs; values that an expansion repeats are read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride:
            count *= size
    return count * tensor.element_size()


def bytes_moved(name: str, args: Sequence[Any], kwargs: dict[str, Any], outputs: list[torch.Tensor]) -> int:
    """Bytes that an operator reads from and writes to the device's memory."""
    written = sum(map(num_bytes, outputs))
    if name in _WRITE_ONLY:
        return written
    if name in _READ_WHAT_THEY_WRITE:
        return 2 * written
    if name in _COPIES_OF_LISTS:
        return 2 * sum(map(num_bytes, tensors_in(args[0])))
    inputs = tensors_in((args, kwargs))
    if name in _SCATTERED:
        return 3 * sum(map(num_bytes, inputs[1:]))
    if name == "_fused_adamw_":  # parameter, gradient and two moments read, three of them written
        return 7 * sum(map(num_bytes, tensors_in(args[0])))
    return sum(map(num_bytes, inputs)) + written


def chunk_cat_scratch(tensors: Sequence[torch.Tensor], num_chunks: int, out: torch.Tensor) -> int:
    """Bytes that a CPU's `_chunk_cat` takes while it joins gradients to be reduced; CUDA has a kernel that takes none.

    Gradients that do not lie in one piece, or do not divide, are copied, and these copies wait for each other. Where
    `out` has another dtype, each of them is copied once more, one after the other.
    """
    copies = largest = 0
    for tensor in tensors:
        rows = -(-tensor.shape[0] // num_chunks) * num_chunks
        size = tensor.numel() // max(tensor.shape[0], 1) * rows * tensor.element_size()
        largest = max(largest, size)
        copies += size * (rows != tensor.shape[0] or not tensor.is_contiguous())
    return copies + largest * (out.dtype != tensors[0].dtype)


def _mm(a: torch.Tensor, b: torch.Tensor, *_: Any) -> float:
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[1]


def _bmm(a: torch.Tensor, b: torch.Tensor, *_: Any) -> float:
    return 2.0 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, *_: Any) -> float:
    """Each row (or column) belongs to one group: [R, A] x [E, A, B], or [A, R] x [R, B] for gradients of weights."""
    groups = a.shape[0] if a.dim() == 3 else 1
    return 2.0 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: Any, stride: Sequence[int], *_: Any) -> float:
    """Of patches that do not overlap."""
    patches = x.shape[0] * (x.shape[2] // stride[0]) * (x.shape[3] // stride[1])
    return 2.0 * patches * weight.numel()


_MATMUL_FLOPS: dict[str, Callable[..., float]] = {
    "mm": _mm,
    "addmm": lambda bias, *args: _mm(*args),
    "bmm": _bmm,
    "baddbmm": lambda bias, *args: _bmm(*args),
    "_grouped_mm": _grouped_mm,
    "convolution": _convolution,
    # Nothing trains below the patches of an image: the weight's gradient alone.
    "convolution_backward": lambda grad, x, weight, biases, stride, *_: _convolution(x, weight, None, stride),
}

# name -> where query, key and value stand among the arguments, and whether heads come before positions.
_ATTENTION_OPERATORS = {
    "_varlen_attn": (0, False),
    "_varlen_attn_backward": (1, False),
    "_flash_attention_forward": (0, False),
    "_flash_attention_backward": (1, False),
    "_scaled_dot_product_flash_attention_for_cpu": (0, True),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (1, True),
}


class Costs:
    """Prices operators on a device.

    Args:
        documents: tokens of each document that attention sees.
    """

    def __init__(self, device: Device, documents: Sequence[int]):
        self.device = device
        self._documents = documents

    def flops(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[float, str]:
        """FLOPs of the operator's matrix products, and their kind; 0 if it has none."""
        if name.removesuffix("_") in _MATMUL_FLOPS:  # in place or not
            return _MATMUL_FLOPS[name.removesuffix("_")](*args), GROUPED if name == "_grouped_mm" else DENSE
        if name in _ATTENTION_OPERATORS:
            is_backward = name.endswith("backward")
            return self._attention(name, args, kwargs), ATTENTION_BACKWARD if is_backward else ATTENTION
        return 0.0, ""

    def _attention(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> float:
        """Causal attention within documents, and within a window where the layer has one."""
        first, heads_first = _ATTENTION_OPERATORS[name]
        q, k, v = args[first : first + 3]
        heads = q.shape[1] if heads_first else q.shape[-2]
        window = self._window(name, args, kwargs)
        if heads_first:  # one call for neighbouring documents of one length, or for blocks of a window
            queries, keys = q.shape[2], k.shape[2]
            is_causal = any(argument is True for argument in args) or kwargs.get("is_causal", False)
            pairs = q.shape[0] * queries * keys * (0.5 if is_causal else 1.0)
        else:
            pairs = sum(_causal_pairs(length, window) for length in self._documents)
        sizes = q.shape[-1] + v.shape[-1]
        if name.endswith("backward"):
            # The scores again, dV and dP with a value head's size twice, dQ and dK with a query head's.
            return 2.0 * heads * pairs * (3 * q.shape[-1] + 2 * v.shape[-1])
        return 2.0 * heads * pairs * sizes

    @staticmethod
    def _window(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
        """Keys that a query sees, None for all before it."""
        left = kwargs.get("window_size_left")
        if left is None and name.startswith("_varlen_attn"):
            sizes = next((value for value in reversed(args) if isinstance(value, list)), None)
            left = sizes[0] if sizes else None
        return None if left is None or left < 0 else left + 1

    def seconds(self, flops: float, kind: str, moved: int, dtype: torch.dtype) -> float:
        """Time of an operator on the device."""
        device = self.device
        seconds = max(moved / (device.memory_bandwidth * device.efficiencies["memory"]), device.shortest_kernel)
        if not flops:
            return seconds
        peak = device.bf16_flops
        if kind in (DENSE, GROUPED):
            peak = {torch.float32: device.fp32_flops, torch.float8_e4m3fn: device.fp8_flops}.get(dtype) or peak
        return max(seconds, flops / (peak * device.efficiencies[kind]))


def _causal_pairs(length: int, window: int | None) -> float:
    """(query, key) pairs of a document, the diagonal counted half."""
    if window is None or window >= length:
        return length * length / 2
    return window * (length - window / 2)
