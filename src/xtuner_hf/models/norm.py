"""RMSNorm by the device's fused operator, in the norms of transformers."""

from __future__ import annotations

import functools

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
def device_norm(norm_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass of one of transformers' RMSNorms that uses a fused operator where there is one."""
    return type(norm_class.__name__, (_DeviceNorm, norm_class), {})


def use_device_norms(model: nn.Module) -> None:
    """Give the RMSNorms that transformers has built within a model their subclass, as FSDP does with what it shards."""
    for module in model.modules():
        cls = type(module)
        if (
            cls.__name__.endswith("RMSNorm")
            and hasattr(module, "variance_epsilon")
            and not issubclass(cls, _DeviceNorm)
        ):
            module.__class__ = device_norm(cls)  # type: ignore[arg-type]
