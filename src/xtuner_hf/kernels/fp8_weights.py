"""Weights for FP8 products: quantised once for each value that they take, and gathered by FSDP as FP8.

    one process      a parameter with a cache (`cache_quantised`) is quantised when a product first meets a new value
    FSDP             each rank quantises its shard once a step, the all-gather moves e4m3 values and scales, half of
                     bf16's bytes, and the module sees a `GatheredWeight`
    anything else    quantised at each use

Legend: B output and A input features, as in `fp8.py`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from ..device import is_simulated
from . import fp8, simulated_fp8
from .fp8 import E4M3, Quantised
from .select import has_triton


def fp8_kernels(device: torch.device) -> ModuleType:
    """The module with the FP8 products for this device.

    Raises:
        ValueError: for a GPU without FP8 tensor cores.
    """
    if is_simulated(device):
        return simulated_fp8
    if device.type != "cuda":
        return fp8
    if torch.cuda.get_device_capability(device) < (8, 9) or not has_triton():
        raise ValueError(
            f"fp8=True needs Triton and tensor cores that multiply e4m3 (compute capability 8.9 or newer), and "
            f"{torch.cuda.get_device_name(device)} has {torch.cuda.get_device_capability(device)}: leave fp8 off."
        )
    from . import triton_fp8

    return triton_fp8


def operand(weight: torch.Tensor) -> Quantised:
    """A weight [..., B, A], or a transposed view of one, quantised by blocks; both parts contiguous."""
    if isinstance(weight, GatheredWeight):
        return Quantised(weight.e4m3.contiguous(), weight.scale.contiguous())
    is_stored = weight.stride(-1) == 1
    stored = (weight if is_stored else weight.transpose(-2, -1)).detach()
    parameter: Any = weight if weight._base is None else weight._base
    cache = getattr(parameter, "quantised_cache", None)
    if cache is not None:
        return cache.operand(stored, is_stored)
    quantised = fp8_kernels(stored.device).quantise_blocks(stored)
    return quantised if is_stored else _transposed(quantised)


def _transposed(quantised: Quantised) -> Quantised:
    return Quantised(*(part.transpose(-2, -1).contiguous() for part in quantised))


class QuantisedCache:
    """What was made of a parameter's present value, the way it lies and transposed: 2 bytes an element."""

    def __init__(self) -> None:
        self._version: object = None
        self._made: dict[bool, Quantised] = {}

    def operand(self, stored: torch.Tensor, is_stored: bool, version: object = None) -> Quantised:
        """The weight as it is stored, or transposed.

        Args:
            version: another one stands for another value; the tensor's own by default.
        """
        version = stored._version if version is None else version
        if version != self._version:
            self._version, self._made = version, {True: fp8_kernels(stored.device).quantise_blocks(stored)}
        if is_stored not in self._made:
            self._made[is_stored] = _transposed(self._made[True])
        return self._made[is_stored]

    def forget(self) -> None:
        """The value may be another one now."""
        self._version, self._made = None, {}


def cache_quantised(parameter: torch.Tensor) -> QuantisedCache:
    """Quantise this parameter once for each value that it takes, and not at each use.

    Not for parameters of FSDP: gathering writes new values and counts no new version.
    """
    cache = parameter.quantised_cache = QuantisedCache()  # type: ignore[attr-defined]
    return cache


class Fp8State:
    """The quantised weights of one model."""

    def __init__(self, caches: list[QuantisedCache]):
        self._caches = caches

    def new_step(self) -> None:
        """An optimizer may have stepped, in whatever way."""
        for cache in self._caches:
            cache.forget()


class GatheredWeight(torch.Tensor):
    """A weight whose values lie in FP8; to autograd and FSDP it is one of the computation's dtype.

    Products take `e4m3` and `scale`; any other operation on the whole of it is an error.
    """

    e4m3: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        weight: Any = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=dtype, device=values.device
        )
        weight.e4m3, weight.scale = values, scale
        return weight

    def __init__(self, values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        pass

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"GatheredWeight({tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        weight, *rest = args
        if func is torch.ops.aten.transpose.int:
            return cls(*(part.transpose(*rest) for part in (weight.e4m3, weight.scale)), weight.dtype)
        is_view = func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.view.default)
        is_whole = func is torch.ops.aten.as_strided.default and tuple(rest[0]) == tuple(weight.shape)
        if is_whole or (is_view and (not rest or tuple(rest[0]) == tuple(weight.shape))):
            return cls(weight.e4m3, weight.scale, weight.dtype)
        raise NotImplementedError(f"{func} on a weight that was gathered in FP8: only products of fp8_weights take it.")


class ShardExtension:
    """What FSDP asks of a shard that is gathered as FP8 (torch.distributed.fsdp's all-gather extension).

    Args:
        sharded: the parameter, a DTensor; this rank's part of it is of whole blocks along the first dimension.
    """

    def __init__(self, sharded: Any):
        self.cache = QuantisedCache()
        self._sharded = sharded
        shard: Any = sharded._local_tensor
        shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = self.pre_all_gather, self.post_all_gather

    def pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """The tensors to gather, and what `post_all_gather` is told of them."""
        shard = self._sharded._local_tensor
        # An optimizer that steps the DTensor counts on that, one that steps what is inside on this.
        version = (self._sharded._version, shard._version)
        values, scale = self.cache.operand(shard.detach(), is_stored=True, version=version)
        if mesh.size() > 1:
            return (values.view(torch.uint8), scale), None
        # There is nothing to gather, and FSDP copies one tensor only.
        return (torch.cat([part.flatten().view(torch.uint8) for part in (scale, values)]),), (values.shape, scale.shape)

    def post_all_gather(self, outputs, metadata, dtype, *, out=None):
        """The whole weight and the tensors that FSDP frees with it."""
        if out is not None:
            return None  # made of the same memory, which was filled again
        if metadata is None:
            values, scale = outputs
        else:
            values_shape, scale_shape = metadata
            scale, values = outputs[0].split([4 * scale_shape.numel(), values_shape.numel()])
            values, scale = values.view(values_shape), scale.view(torch.float32).view(scale_shape)
        return GatheredWeight(values.view(E4M3), scale, dtype), outputs
