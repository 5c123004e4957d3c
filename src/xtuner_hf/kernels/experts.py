"""Gated MLPs of many experts on rows grouped by expert: the kernels and the registry that names them.

A kernel is `kernel(x_RH, weights, offsets_E) -> y_RH`. Rows of expert e are `offsets_E[e-1]:offsets_E[e]`; every row
belongs to one expert.

Legend: R rows, H hidden size, I expert intermediate size, F = 2*I (gate and up), E experts, Q rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .device_operators import fused_on
from .swiglu import SwiGLU


class LowRank(NamedTuple):
    """What an adapter adds to a weight [E, A, B]: the product of its two factors (LoRA, arXiv 2106.09685, eq. 3)."""

    down_EAQ: torch.Tensor
    up_EQB: torch.Tensor  # with the adapter's scale in it

    def to(self, dtype: torch.dtype) -> LowRank:
        return LowRank(self.down_EAQ.to(dtype), self.up_EQB.to(dtype))


class ExpertWeights(NamedTuple):
    """The parameters of a layer's experts as kernels want them: input dimension first, whatever the storage."""

    gate_up_EHF: torch.Tensor
    down_EIH: torch.Tensor
    gate: Callable[[torch.Tensor], torch.Tensor]  # [R, F] -> [R, I]; knows where gate and up stand in F
    gate_up_bias_EF: torch.Tensor | None = None
    down_bias_EH: torch.Tensor | None = None
    gate_up_adapter: LowRank | None = None
    down_adapter: LowRank | None = None
    swiglu: SwiGLU | None = None  # what `gate` computes, where it is known

    def merged(self) -> ExpertWeights:
        """The same experts with the adapters in the weights: for kernels that know none, at the price of full
        gradients of the weights."""
        return self._replace(
            gate_up_EHF=_merge(self.gate_up_EHF, self.gate_up_adapter),
            down_EIH=_merge(self.down_EIH, self.down_adapter),
            gate_up_adapter=None,
            down_adapter=None,
        )


def _merge(weight_EAB: torch.Tensor, adapter: LowRank | None) -> torch.Tensor:
    return weight_EAB if adapter is None else torch.baddbmm(weight_EAB, *adapter)


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
    weights = weights.merged()

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
    """All experts in one call, no host sync: `torch.nn.functional.grouped_mm` (CPU, and CUDA from SM80), or the grouped
    matrix product that the device has fused."""
    gate_up_RF = _grouped_linear(x_RH, weights.gate_up_EHF, weights.gate_up_bias_EF, weights.gate_up_adapter, offsets_E)
    gated_RI = weights.gate(gate_up_RF)
    return _grouped_linear(gated_RI, weights.down_EIH, weights.down_bias_EH, weights.down_adapter, offsets_E)


def _grouped_linear(x_RA, weight_EAB, bias_EB, adapter: LowRank | None, offsets_E) -> torch.Tensor:
    y_RB = _grouped_mm(x_RA, weight_EAB, offsets_E)
    if adapter is not None:
        # The rank is small: neither the adapted weights nor their gradients are ever built.
        down_EAQ, up_EQB = _aligned(adapter)
        y_RB = y_RB + _grouped_mm(_grouped_mm(x_RA, down_EAQ, offsets_E), up_EQB, offsets_E)
    if bias_EB is None:
        return y_RB
    rows = torch.arange(x_RA.shape[0], dtype=offsets_E.dtype, device=x_RA.device)
    expert_R = torch.bucketize(rows, offsets_E, right=True)  # grouped_mm itself takes no bias
    return y_RB + bias_EB[expert_R]


def _grouped_mm(x_RA, weight_EAB, offsets_E) -> torch.Tensor:
    fused = fused_on(x_RA.device).grouped_mm
    if fused is not None:
        return fused(x_RA, weight_EAB, offsets_E)
    # The kernel reads gradients by their strides and refuses broadcast ones (`y.sum().backward()`).
    return _ContiguousGradient.apply(F.grouped_mm(x_RA, weight_EAB, offs=offsets_E))


def _aligned(adapter: LowRank) -> LowRank:
    """The adapter with its rank filled up by zeros to whole units of 16 bytes, which the kernel wants of rows."""
    rank, unit = adapter.up_EQB.shape[1], 16 // adapter.up_EQB.element_size()
    missing = -rank % unit
    if not missing:
        return adapter
    return LowRank(F.pad(adapter.down_EAQ, (0, missing)), F.pad(adapter.up_EQB, (0, 0, 0, missing)))


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad.contiguous()
