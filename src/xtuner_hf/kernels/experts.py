"""Gated MLPs of many experts on rows grouped by expert: the kernels and the registry that names them.

A kernel is `kernel(x_RH, weights, offsets_E) -> y_RH`. Rows of expert e are `offsets_E[e-1]:offsets_E[e]`; every row
belongs to one expert.

Legend: R rows, H hidden size, I expert intermediate size, F = 2*I (gate and up), E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class ExpertWeights(NamedTuple):
    """The parameters of a layer's experts as kernels want them: input dimension first, whatever the storage."""

    gate_up_EHF: torch.Tensor
    down_EIH: torch.Tensor
    gate: Callable[[torch.Tensor], torch.Tensor]  # [R, F] -> [R, I]; knows where gate and up stand in F
    gate_up_bias_EF: torch.Tensor | None = None
    down_bias_EH: torch.Tensor | None = None


ExpertsKernel = Callable[[torch.Tensor, ExpertWeights, torch.Tensor], torch.Tensor]

EXPERTS_KERNELS: dict[str, ExpertsKernel] = {}


def register_experts_kernel(name: str) -> Callable[[ExpertsKernel], ExpertsKernel]:
    """Decorator: make a kernel available as `experts_kernel=name`."""

    def register(kernel: ExpertsKernel) -> ExpertsKernel:
        EXPERTS_KERNELS[name] = kernel
        return kernel

    return register


@register_experts_kernel("reference")
def reference_experts(x_RH: torch.Tensor, weights: ExpertWeights, offsets_E: torch.Tensor) -> torch.Tensor:
    """One plain matrix product per expert: any dtype, any device, slow; what the others are compared with."""

    def linear(x_NA, weight_EAB, bias_EB, expert):
        y_NB = x_NA @ weight_EAB[expert]
        return y_NB if bias_EB is None else y_NB + bias_EB[expert]

    outputs, start = [], 0
    for expert, end in enumerate(offsets_E.tolist()):
        gate_up_NF = linear(x_RH[start:end], weights.gate_up_EHF, weights.gate_up_bias_EF, expert)
        outputs.append(linear(weights.gate(gate_up_NF), weights.down_EIH, weights.down_bias_EH, expert))
        start = end
    return torch.cat(outputs)


@register_experts_kernel("grouped_mm")
def grouped_mm_experts(x_RH: torch.Tensor, weights: ExpertWeights, offsets_E: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.grouped_mm`: all experts in one call, no host sync (CPU, and CUDA from SM80)."""
    gate_up_RF = _grouped_linear(x_RH, weights.gate_up_EHF, weights.gate_up_bias_EF, offsets_E)
    return _grouped_linear(weights.gate(gate_up_RF), weights.down_EIH, weights.down_bias_EH, offsets_E)


def _grouped_linear(x_RA, weight_EAB, bias_EB, offsets_E) -> torch.Tensor:
    # The kernel reads gradients by their strides and refuses broadcast ones (`y.sum().backward()`).
    y_RB = _ContiguousGradient.apply(F.grouped_mm(x_RA, weight_EAB, offs=offsets_E))
    if bias_EB is None:
        return y_RB
    rows = torch.arange(x_RA.shape[0], dtype=offsets_E.dtype, device=x_RA.device)
    expert_R = torch.bucketize(rows, offsets_E, right=True)  # grouped_mm itself takes no bias
    return y_RB + bias_EB[expert_R]


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad.contiguous()
