"""A linear layer whose three products run in FP8.

Legend: T tokens, A input and B output features.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .fp8 import Quantised
from .fp8_weights import fp8_kernels, operand
from .select import computing_dtype


class Fp8Linear(nn.Linear):
    """`nn.Linear` with FP8 products: the same parameters under the same names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., A] -> [..., B] in the dtype of `x`, or autocast's."""
        dtype = computing_dtype(x)
        y_TB = _LinearFunction.apply(x.reshape(-1, x.shape[-1]).to(dtype), self.weight)
        y = y_TB.view(*x.shape[:-1], y_TB.shape[-1])
        return y if self.bias is None else y + self.bias.to(dtype)


class _LinearFunction(torch.autograd.Function):
    """Keeps the input in FP8, by columns, as the weight's gradient wants it: half of bf16's memory."""

    @staticmethod
    def forward(ctx, x_TA, weight_BA):
        kernels = fp8_kernels(x_TA.device)
        columns = kernels.quantise_columns(x_TA) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(weight_BA, *columns)
        return kernels.mm(kernels.quantise_rows(x_TA), operand(weight_BA), x_TA.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TB):
        weight_BA, *columns = ctx.saved_tensors
        kernels = fp8_kernels(grad_TB.device)
        grad_x_TA = grad_weight_BA = None
        if ctx.needs_input_grad[0]:
            grad_x_TA = kernels.mm(kernels.quantise_rows(grad_TB), operand(weight_BA.transpose(0, 1)), grad_TB.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight_BA = kernels.outer(kernels.quantise_columns(grad_TB), Quantised(*columns), weight_BA.dtype)
        return grad_x_TA, grad_weight_BA
