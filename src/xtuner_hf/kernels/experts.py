"""Gated MLPs of many experts on rows grouped by expert: the kernels and the registry that names them.

A kernel is `kernel(x_RH, gate_up_EFH, down_EHI, offsets_E, activation) -> y_RH` with F = 2*I, gate rows first. Rows of
expert e are `offsets_E[e-1]:offsets_E[e]`; every row belongs to one expert.

Legend: R rows, H hidden size, I expert intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

ExpertsKernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor
]

EXPERTS_KERNELS: dict[str, ExpertsKernel] = {}


def register_experts_kernel(name: str) -> Callable[[ExpertsKernel], ExpertsKernel]:
    """Decorator: make a kernel available as `experts_kernel=name`."""

    def register(kernel: ExpertsKernel) -> ExpertsKernel:
        EXPERTS_KERNELS[name] = kernel
        return kernel

    return register


@register_experts_kernel("reference")
def reference_experts(x_RH, gate_up_EFH, down_EHI, offsets_E, activation):
    """One plain matrix product per expert: any dtype, any device, slow; what the others are compared with."""
    outputs, start = [], 0
    for expert, end in enumerate(offsets_E.tolist()):
        gate, up = F.linear(x_RH[start:end], gate_up_EFH[expert]).chunk(2, dim=-1)
        outputs.append(F.linear(activation(gate) * up, down_EHI[expert]))
        start = end
    return torch.cat(outputs)


@register_experts_kernel("grouped_mm")
def grouped_mm_experts(x_RH, gate_up_EFH, down_EHI, offsets_E, activation):
    """`torch.nn.functional.grouped_mm`: all experts in one call, no host sync (CPU, and CUDA from SM80)."""
    gate, up = _grouped_linear(x_RH, gate_up_EFH, offsets_E).chunk(2, dim=-1)
    return _grouped_linear(activation(gate) * up, down_EHI, offsets_E)


def _grouped_linear(x_RA: torch.Tensor, weight_EBA: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    # The kernel reads gradients by their strides and refuses broadcast ones (`y.sum().backward()`).
    return _ContiguousGradient.apply(F.grouped_mm(x_RA, weight_EBA.transpose(-2, -1), offs=offsets_E))


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad.contiguous()
