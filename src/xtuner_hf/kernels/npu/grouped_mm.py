"""The grouped matrix product of the experts, with the derivative that torch_npu lacks.

`npu_grouped_matmul` has no autograd formula. Called on parameters it gives the right numbers, and backward leaves them
without a gradient; a warning on stderr is all that is said.

Legend: R rows, E experts, A input and B output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .autocast import autocast

# `group_type` of the operator: what is grouped, the rows of x or the dimension that is summed over.
_ROWS, _SUMMED = 0, 2


def grouped_mm(x_RA: torch.Tensor, weight_EAB: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """[R, B]: rows `ends[e-1]:ends[e]` of x times weight e; differentiable in x and the weight."""
    x_RA, weight_EAB = autocast(x_RA, weight_EAB)
    if weight_EAB.shape[0] == 1 or x_RA.shape[0] == 0:
        # The operator takes neither a single group nor no rows. A plain product does, and has gradients (of zero).
        return x_RA @ weight_EAB[0]
    counts_E = ends_E.long().diff(prepend=ends_E.new_zeros(1).long())
    return _GroupedProduct.apply(x_RA, weight_EAB, counts_E)


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RA, weight_EAB, counts_E):
        x_RA = x_RA.contiguous()
        ctx.save_for_backward(x_RA, weight_EAB, counts_E)
        return _grouped(x_RA, weight_EAB, counts_E, _ROWS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RB):
        x_RA, weight_EAB, counts_E = ctx.saved_tensors
        grad_RB = grad_RB.contiguous()
        wants_x, wants_weight, _ = ctx.needs_input_grad
        grad_x = _grouped(grad_RB, weight_EAB.transpose(1, 2), counts_E, _ROWS) if wants_x else None
        # Wanted as the transposed view that it is here.
        grad_weight = _grouped(x_RA.t(), grad_RB, counts_E, _SUMMED) if wants_weight else None
        return grad_x, grad_weight, None


def _grouped(x, weight, counts_E, group_type: int) -> torch.Tensor:
    one_output = 2 if group_type == _ROWS else 3
    (product,) = torch.ops.npu.npu_grouped_matmul(
        [x], [weight], group_list=counts_E, group_list_type=1, group_type=group_type, split_item=one_output
    )
    return product
