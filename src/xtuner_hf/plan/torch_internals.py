"""Names of torch that its documentation does not promise, and what a dry run changes in torch (and, once, in TRL): each
change with its reason, undone where the `with` block ends.

Nothing of this package or of transformers is patched: it has seams (host_reads.py, `device.acting_as`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch._meta_registrations
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.distributed_c10d import _resolve_process_group as resolve_process_group
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_leaves

from .._compat import ChunkedLogProbFunction
from .clock import Clock

__all__ = [
    "FakeStore",
    "FakeTensor",
    "PlannedTensorMode",
    "TorchDispatchMode",
    "fused_loss_tiles",
    "fused_norms",
    "grouped_products_of_any_dtype",
    "hidden_propagation",
    "resolve_process_group",
    "simulated_streams",
    "tensors_in",
    "watched_storages",
    "without_modes",
]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


_GROUPED_BESIDES_BF16 = (torch.float16, torch.float32, torch.float8_e4m3fn)
_INTO_OUT = (torch.ops.aten.cat.out, torch.ops.aten.mm.out, torch.ops.aten.addmm.dtype_out)


class PlannedTensorMode(FakeTensorMode):
    """torch's, with a shorter way to what costs most: the hundreds of products of the loss's tiles, which go into
    memory that is there, and the parts, one of every rank, that FSDP2 joins where it does not shard the first
    dimension."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _INTO_OUT:
            return kwargs["out"]
        if func is not torch.ops.aten.cat.default or any(part.shape != args[0][0].shape for part in args[0]):
            return super().dispatch(func, types, args, kwargs)
        parts, dim = args[0], args[1] if len(args) > 1 else 0
        shape = list(parts[0].shape)
        shape[dim] *= len(parts)
        return super().dispatch(torch.ops.aten.new_empty.default, types, (parts[0], shape), {})


@contextlib.contextmanager
def watched_storages(on_resize: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """FSDP2 frees and remakes parameters by resizing their storage, which no dispatch mode sees."""
    resize_ = torch.UntypedStorage.resize_

    def watched(storage, size):
        result = resize_(storage, size)
        on_resize(storage)
        return result

    with patch.object(torch.UntypedStorage, "resize_", watched):
        yield


@contextlib.contextmanager
def hidden_propagation() -> Iterator[None]:
    """DTensor runs each operator once on tensors of the *global* shape to learn the result's shape. To a dispatch mode
    they look like memory: 3,530 GiB instead of 51 for Qwen3-235B on 128 ranks."""
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def hidden(*args: Any, **kwargs: Any):
        with without_modes():
            return propagate(*args, **kwargs)

    with patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", hidden):
        yield


@contextlib.contextmanager
def simulated_streams(clock: Clock) -> Iterator[None]:
    """torch.cpu's streams and events are stubs "to facilitate device-agnostic code"; FSDP2 and our copies get ones with
    a clock. (A fake "cuda" device aborts the process in autograd where no CUDA build of torch is installed.)"""
    with contextlib.ExitStack() as stack:
        for module, name, replacement in (
            (torch.cpu, "Stream", clock.new_stream),
            (torch.cpu, "Event", clock.new_event),
            (torch.cpu, "stream", clock.on_stream),
            (torch.cpu, "current_stream", clock.current_stream),
            (torch.accelerator, "current_stream", clock.current_stream),  # FSDP2 asks here where gradients add up
        ):
            stack.enter_context(patch.object(module, name, replacement))
        yield


@contextlib.contextmanager
def fused_loss_tiles() -> Iterator[None]:
    """TRL scores each tile of logits with one Triton kernel on a GPU, and with a dozen operators and their temporaries
    on a CPU. Planning a GPU takes one operator in place, which reads and writes the tile as the kernel does, and the
    GPU's own way to add products of bf16 up in fp32."""
    module = inspect.getmodule(ChunkedLogProbFunction)

    def fused(tile: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        tile.mul_(1)

    def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)

    with patch.multiple(module, _forward_tile=fused, _backward_tile=fused, _addmm_fp32=add_product):
        yield


@contextlib.contextmanager
def fused_norms() -> Iterator[None]:
    """torch's RMSNorm is one kernel on a GPU (two in backward), and many operators with temporaries on a CPU."""

    def rms_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        return _OneKernelNorm.apply(x, weight)

    with patch.object(torch.nn.functional, "rms_norm", rms_norm):
        yield


class _OneKernelNorm(torch.autograd.Function):
    """What torch's fused RMSNorm keeps, reads and writes; the values are none of its."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        inverse_rms = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(x, weight, inverse_rms)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, _, _ = ctx.saved_tensors
        return grad * x, grad.flatten(0, -2).sum(0)


@contextlib.contextmanager
def grouped_products_of_any_dtype() -> Iterator[None]:
    """The shape function of grouped matrix products refuses all but bf16; kernels of CPUs and CUDA take fp32 too, and
    ours FP8."""
    shapes = torch._meta_registrations._meta_grouped_mm_common

    def of_any_dtype(mat_a: torch.Tensor, mat_b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if mat_a.dtype not in _GROUPED_BESIDES_BF16 or mat_a.dtype != mat_b.dtype:
            return shapes(mat_a, mat_b, *args, **kwargs)
        groups: tuple[int, ...] = ()
        if mat_a.dim() == mat_b.dim():  # otherwise each row, or column, belongs to one
            groups = mat_a.shape[:1] if mat_a.dim() == 3 else kwargs["offs"].shape
        dtype = kwargs.get("out_dtype") or mat_a.dtype
        return mat_a.new_empty(*groups, mat_a.shape[-2], mat_b.shape[-1], dtype=dtype)

    with patch.object(torch._meta_registrations, "_meta_grouped_mm_common", of_any_dtype):
        yield
