"""The whole MoE path of a layer as one differentiable function that keeps little for its backward.

    forward                                             kept
    group     ids_TK -> rows by expert                  the order of the rows
    take      x_RH = hidden[token of row]               hidden_TH, which the layer before holds anyway
    up        gate_up_RF = x_RH W1                      gate_up_RF
    gate      gated_RI = swiglu(gate_up + b1) * weight  -
    down      y_RH = gated_RI W2                        -
    combine   out_TH = sum of a token's rows, fp32      -

The routing weight is applied on the narrow side, before the down projection: the gradient of a weight then is a dot
product of I numbers that the backward has at hand, and neither y_RH nor weighted rows are kept. Backward takes the rows
and computes the activation again. Kept per token: H + K*2I numbers, where computing step by step keeps K*(2H + 4I).

Not equal to transformers' to the last bit: the weight multiplies before a rounding to bf16 instead of after it.

Legend: T tokens, K experts per token, R rows, H hidden size, I expert intermediate size, F = 2*I, E experts.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from .experts import ExpertWeights
from .fp8 import BLOCK, Quantised
from .fp8_weights import fp8_kernels, operand
from .rows import Grouping
from .select import computing_dtype, row_kernels
from .swiglu import SwiGLU


class Products(Protocol):
    """The grouped matrix products of the path, in some precision. A and B: any features.

    `x_RA` and `grad_RB` are rows, or what `take` returned for them.
    """

    align: int  # each expert's rows start at a multiple of this

    def take(self, x_TA: torch.Tensor, grouping: Grouping) -> Any:
        """The tokens of all rows, in whatever form the products want them."""

    def times(self, x_RA: Any, weight_EAB: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        """[R, B]"""

    def weight_gradient(self, x_RA: Any, grad_RB: Any, weight_EAB: torch.Tensor, offsets_E) -> torch.Tensor:
        """[E, A, B], in the memory layout of the parameter that `weight_EAB` is a view of."""


class HighPrecision:
    """Products in the dtype of their operands."""

    align = 1

    def __init__(self, device: torch.device):
        self.rows = row_kernels(device)

    def take(self, x_TA, grouping):
        return self.rows.take(x_TA, grouping)

    def times(self, x_RA, weight_EAB, offsets_E):
        return self.rows.grouped_mm(x_RA, weight_EAB, offsets_E)

    def weight_gradient(self, x_RA, grad_RB, weight_EAB, offsets_E):
        if _is_transposed(weight_EAB):
            return self.rows.grouped_outer(grad_RB, x_RA, offsets_E).transpose(1, 2)
        return self.rows.grouped_outer(x_RA, grad_RB, offsets_E)


class Taken(NamedTuple):
    """Rows that are never written in high precision: their tokens, and which each row is."""

    tokens_TA: torch.Tensor
    grouping: Grouping

    @property
    def dtype(self) -> torch.dtype:
        return self.tokens_TA.dtype


class Fp8:
    """Products in FP8 (fp8.py), with weights that may be cached or gathered in FP8."""

    align = BLOCK

    def __init__(self, device: torch.device):
        self.rows, self.kernels = row_kernels(device), fp8_kernels(device)

    def take(self, x_TA, grouping):
        return Taken(x_TA, grouping)

    def times(self, x_RA, weight_EAB, offsets_E):
        weight = operand(weight_EAB.transpose(1, 2))
        return self.kernels.grouped_mm(self._quantised_rows(x_RA), weight, offsets_E, x_RA.dtype)

    def weight_gradient(self, x_RA, grad_RB, weight_EAB, offsets_E):
        x, grad = self._quantised_columns(x_RA), self._quantised_columns(grad_RB)
        if _is_transposed(weight_EAB):
            return self.kernels.grouped_outer(grad, x, offsets_E, weight_EAB.dtype).transpose(1, 2)
        return self.kernels.grouped_outer(x, grad, offsets_E, weight_EAB.dtype)

    def _quantised_rows(self, x_RA) -> Quantised:
        if not isinstance(x_RA, Taken):
            return self.kernels.quantise_rows(x_RA)
        values_TA, scale_TAb = self.kernels.quantise_rows(x_RA.tokens_TA)
        values_RA = self.rows.take(values_TA.view(torch.uint8), x_RA.grouping).view(values_TA.dtype)
        return Quantised(values_RA, self.rows.take(scale_TAb, x_RA.grouping))

    def _quantised_columns(self, x_RA) -> Quantised:
        if not isinstance(x_RA, Taken):
            return self.kernels.quantise_columns(x_RA)
        return self.kernels.quantise_columns(x_RA.tokens_TA, x_RA.grouping)


def _is_transposed(weight_EAB: torch.Tensor) -> bool:
    return weight_EAB.stride(1) == 1 and weight_EAB.shape[1] > 1


def fused_experts(
    hidden_TH: torch.Tensor, topk_ids_TK: torch.Tensor, weights_TK: torch.Tensor, weights: ExpertWeights
) -> torch.Tensor:
    """[T, H], [T, K] int64, [T, K] fp32 -> [T, H] in the dtype of `hidden_TH`, or autocast's.

    Raises:
        ValueError: for experts with another activation than `SwiGLU` describes, or with adapters.
    """
    _refuse("fused", weights, "'grouped_mm'")
    dtype = computing_dtype(hidden_TH)
    weights = weights._replace(gate_up_EHF=weights.gate_up_EHF.to(dtype), down_EIH=weights.down_EIH.to(dtype))
    return _run(hidden_TH.to(dtype), topk_ids_TK, weights_TK, weights, HighPrecision(hidden_TH.device))


def fp8_experts(
    hidden_TH: torch.Tensor, topk_ids_TK: torch.Tensor, weights_TK: torch.Tensor, weights: ExpertWeights
) -> torch.Tensor:
    """As `fused_experts`, with all six products in FP8."""
    _refuse("fp8", weights, "fp8=False")
    return _run(hidden_TH.to(computing_dtype(hidden_TH)), topk_ids_TK, weights_TK, weights, Fp8(hidden_TH.device))


def _refuse(name: str, weights: ExpertWeights, remedy: str) -> None:
    refusal = refusal_of(weights)
    if refusal is not None:
        raise ValueError(f"The experts kernel {name!r} cannot compute these experts: {refusal}. Use {remedy}.")


def _run(hidden_TH, topk_ids_TK, weights_TK, weights: ExpertWeights, products: Products) -> torch.Tensor:
    base_TH = None
    if weights.down_bias_EH is not None:
        base_TH = _weighted_biases(topk_ids_TK, weights_TK, weights.down_bias_EH)
    return _FusedExperts.apply(
        *(hidden_TH, weights_TK, weights.gate_up_EHF, weights.down_EIH, weights.gate_up_bias_EF, base_TH),
        *(topk_ids_TK.contiguous(), weights.swiglu, row_kernels(hidden_TH.device), products),
    )


def refusal_of(weights: ExpertWeights) -> str | None:
    """Why the fused path cannot compute these experts; None if it can."""
    if weights.swiglu is None:
        return "their activation is none of the SwiGLU family"
    if weights.gate_up_adapter is not None or weights.down_adapter is not None:
        return "they have adapters"
    return None


def _weighted_biases(topk_ids_TK, weights_TK, bias_EH) -> torch.Tensor:
    """[T, H] fp32: the part of the output that is a sum of biases, as one small matrix product."""
    dtype = torch.promote_types(weights_TK.dtype, bias_EH.dtype)
    zeros_TE = weights_TK.new_zeros(weights_TK.shape[0], bias_EH.shape[0], dtype=dtype)
    with torch.autocast(weights_TK.device.type, enabled=False):
        return zeros_TE.scatter(1, topk_ids_TK, weights_TK.to(dtype)) @ bias_EH.to(dtype)


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        gate_up_EHF: torch.Tensor,
        down_EIH: torch.Tensor,
        gate_up_bias_EF: torch.Tensor | None,
        base_TH: torch.Tensor | None,
        topk_ids_TK: torch.Tensor,
        swiglu: SwiGLU,
        rows: ModuleType,
        products: Products,
    ) -> torch.Tensor:
        grouping = rows.group_by_expert(topk_ids_TK, gate_up_EHF.shape[0], products.align)
        gate_up_RF = products.times(products.take(hidden_TH, grouping), gate_up_EHF, grouping.offsets_E)
        gated_RI = rows.gate(gate_up_RF, gate_up_bias_EF, topk_ids_TK, weights_TK, grouping, swiglu)
        y_RH = products.times(gated_RI, down_EIH, grouping.offsets_E)
        ctx.save_for_backward(
            *(hidden_TH, weights_TK, gate_up_EHF, down_EIH, gate_up_bias_EF, topk_ids_TK, gate_up_RF, *grouping)
        )
        ctx.swiglu, ctx.rows, ctx.products = swiglu, rows, products
        ctx.base_dtype = None if base_TH is None else base_TH.dtype
        return rows.sum_slots(y_RH, grouping, base_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, products = ctx.rows, ctx.products
        hidden_TH, weights_TK, gate_up_EHF, down_EIH, bias_EF, topk_ids_TK, gate_up_RF, *indices = ctx.saved_tensors
        grouping = Grouping(*indices)
        wants_hidden, _, wants_gate_up, wants_down, wants_bias, wants_base = ctx.needs_input_grad[:6]
        ends = grouping.offsets_E

        grad_y_RH = products.take(grad_TH, grouping)
        grad_gated_RI = products.times(grad_y_RH, down_EIH.transpose(1, 2), ends)
        gated_RI, grad_gate_up_RF, grad_weights_TK = rows.gate_backward(
            grad_gated_RI, gate_up_RF, bias_EF, topk_ids_TK, weights_TK, grouping, ctx.swiglu
        )
        del grad_gated_RI
        grad_down_EIH = products.weight_gradient(gated_RI, grad_y_RH, down_EIH, ends) if wants_down else None
        del gated_RI, grad_y_RH

        grad_gate_up_EHF = grad_bias_EF = grad_hidden_TH = None
        if wants_gate_up:
            x_RH = products.take(hidden_TH, grouping)
            grad_gate_up_EHF = products.weight_gradient(x_RH, grad_gate_up_RF, gate_up_EHF, ends)
            del x_RH
        if wants_bias:
            grad_bias_EF = rows.segment_sum(grad_gate_up_RF, ends).to(bias_EF.dtype)
        if wants_hidden:
            grad_x_RH = products.times(grad_gate_up_RF, gate_up_EHF.transpose(1, 2), ends)
            grad_hidden_TH = rows.sum_slots(grad_x_RH, grouping)
        grad_base_TH = grad_TH.to(ctx.base_dtype) if wants_base else None
        return (
            *(grad_hidden_TH, grad_weights_TK.to(weights_TK.dtype), grad_gate_up_EHF, grad_down_EIH),
            *(grad_bias_EF, grad_base_TH, None, None, None, None),
        )
