"""Which implementation computes the experts: chosen by device, dtype and shape, logged once for each combination."""

from __future__ import annotations

import functools
import importlib.util
import logging
from types import ModuleType

import torch

from ..device import is_simulated, kind, kind_of
from . import rows, simulated_rows

logger = logging.getLogger(__name__)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it comes with torch's builds for CUDA."""
    return importlib.util.find_spec("triton") is not None


def computing_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that matrix products of `x` run in: its own, or autocast's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def row_kernels(device: torch.device) -> ModuleType:
    """The module with the steps of the MoE path for this device."""
    if not kind_of(kind(device)).triton:
        return rows
    if is_simulated(device):
        return simulated_rows
    if not has_triton():
        return rows
    from . import triton_rows

    return triton_rows


@functools.cache
def choose_experts_kernel(
    device_type: str, dtype: torch.dtype, sizes: tuple[int, ...], refusal: str | None, *, simulated: bool = False
) -> str:
    """What `experts_kernel="auto"` means here.

    Args:
        device_type: the kind of device.
        dtype: that matrix products run in.
        sizes: hidden and intermediate size.
        refusal: why the fused path cannot compute these experts, None if it can.
        simulated: in a dry run, which takes for granted what torch's builds for the device bring.
    """
    reason = refusal
    if not kind_of(device_type).triton:
        reason = f"the device is {device_type}"  # where results equal transformers' to the last bit
    elif not simulated and not has_triton():
        reason = "triton is not installed"
    elif dtype not in (torch.bfloat16, torch.float16):
        reason = f"matrix products run in {dtype}"
    elif any(size % 8 for size in sizes):
        reason = f"sizes {sizes} are not multiples of 8"
    name = "fused" if reason is None else "grouped_mm"
    logger.info("Experts on %s in %s: %s%s.", device_type, dtype, name, f" ({reason})" if reason else "")
    return name
