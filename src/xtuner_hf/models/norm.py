"""Another forward in front of transformers' RMSNorms, and the one by the device's fused operator."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..kernels.device_operators import fused_on


class _DeviceNorm(nn.Module):
    """In front of a family's RMSNorm."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> the same, in its dtype where the operator is fused."""
        rms_norm = fused_on(hidden_states.device).rms_norm
        if rms_norm is None:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


@functools.cache
def _subclass(front: Any, norm_class: Any) -> Any:
    return type(norm_class.__name__, (front, norm_class), {})


def put_in_front(model: nn.Module, front: Any) -> int:
    """Give each RMSNorm that transformers has built within a model a subclass with `front` before its own class, as
    FSDP does with what it shards. Returns how many had none yet."""
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    norms = [norm for norm in norms if hasattr(norm, "variance_epsilon") and not isinstance(norm, front)]
    for norm in norms:
        norm_class: Any = type(norm)
        norm.__class__ = _subclass(front, norm_class)
    return len(norms)


def use_device_norms(model: nn.Module) -> None:
    """Let the RMSNorms of a model use a fused operator where their device has one."""
    put_in_front(model, _DeviceNorm)
