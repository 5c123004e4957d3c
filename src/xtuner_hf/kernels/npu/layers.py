"""RMSNorm, rotary embedding and gated activations; shapes are those of kernels/device_operators.py."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    # The weight is of the dtype of x, or fp32.
    if weight.dtype != x.dtype:
        weight = weight.float()
    return torch.ops.npu.npu_rms_norm(x, weight, epsilon)[0]


def rotary(x_BNSD: torch.Tensor, cos_BSP: torch.Tensor, sin_BSP: torch.Tensor) -> torch.Tensor:
    num_rotated = cos_BSP.shape[-1]
    rotated, rest = x_BNSD[..., :num_rotated], x_BNSD[..., num_rotated:]
    cos_B1SP, sin_B1SP = (angles.to(x_BNSD.dtype)[:, None] for angles in (cos_BSP, sin_BSP))
    rotated = torch.ops.npu.npu_rotary_mul(rotated, cos_B1SP, sin_B1SP)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


def swiglu(gate_up_RF: torch.Tensor) -> torch.Tensor:
    if gate_up_RF.shape[0] == 0:  # a rank without tokens; the operator takes no empty tensor
        return gate_up_RF.chunk(2, dim=-1)[0]
    return torch.ops.npu.npu_swiglu(gate_up_RF.contiguous(), dim=-1)


def clamped_swiglu(gate_up_RF: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    if gate_up_RF.shape[0] == 0:
        return gate_up_RF[..., ::2]
    return _ClampedSwiglu.apply(gate_up_RF.contiguous(), alpha, limit)


class _ClampedSwiglu(torch.autograd.Function):
    """GPT-OSS's: gate * sigmoid(alpha * gate) * (up + 1), both clamped. The operator has no derivative of its own."""

    @staticmethod
    def forward(ctx: Any, gate_up_RF, alpha: float, limit: float):
        ctx.save_for_backward(gate_up_RF)
        ctx.alpha, ctx.limit = alpha, limit
        return torch.ops.npu.npu_clipped_swiglu(gate_up_RF, alpha=alpha, limit=limit, bias=1.0, interleaved=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RI):
        (gate_up_RF,) = ctx.saved_tensors
        alpha, limit = ctx.alpha, ctx.limit
        grad_RI = grad_RI.float()
        gate, up = gate_up_RF[..., ::2].float(), gate_up_RF[..., 1::2].float()
        passes_gate, passes_up = gate <= limit, up.abs() <= limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        sigmoid = torch.sigmoid(alpha * gate)
        grad_gate = grad_RI * (up + 1) * sigmoid * (1 + alpha * gate * (1 - sigmoid)) * passes_gate
        grad_up = grad_RI * gate * sigmoid * passes_up
        return torch.stack([grad_gate, grad_up], dim=-1).flatten(-2).to(gate_up_RF.dtype), None, None
