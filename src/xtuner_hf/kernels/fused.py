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

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .experts import ExpertWeights
from .select import row_kernels


def fused_experts(
    hidden_TH: torch.Tensor, topk_ids_TK: torch.Tensor, weights_TK: torch.Tensor, weights: ExpertWeights
) -> torch.Tensor:
    """[T, H], [T, K] int64, [T, K] fp32 -> [T, H] in the dtype of `hidden_TH`, or autocast's.

    Raises:
        ValueError: for experts with another activation than `SwiGLU` describes, or with adapters.
    """
    refusal = refusal_of(weights)
    if refusal is not None:
        raise ValueError(f"experts_kernel='fused' cannot compute these experts: {refusal}. Use 'grouped_mm'.")
    dtype = computing_dtype(hidden_TH)
    hidden_TH, gate_up_EHF, down_EIH = (x.to(dtype) for x in (hidden_TH, weights.gate_up_EHF, weights.down_EIH))
    base_TH = None
    if weights.down_bias_EH is not None:
        base_TH = _weighted_biases(topk_ids_TK, weights_TK, weights.down_bias_EH)
    return _FusedExperts.apply(
        *(hidden_TH, weights_TK, gate_up_EHF, down_EIH, weights.gate_up_bias_EF, base_TH),
        *(topk_ids_TK, weights.swiglu, row_kernels(hidden_TH.device)),
    )


def refusal_of(weights: ExpertWeights) -> str | None:
    """Why the fused path cannot compute these experts; None if it can."""
    if weights.swiglu is None:
        return "their activation is none of the SwiGLU family"
    if weights.gate_up_adapter is not None or weights.down_adapter is not None:
        return "they have adapters"
    return None


def computing_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that matrix products of `x` run in: its own, or autocast's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _weighted_biases(topk_ids_TK, weights_TK, bias_EH) -> torch.Tensor:
    """[T, H] fp32: the part of the output that is a sum of biases, as one small matrix product."""
    dtype = torch.promote_types(weights_TK.dtype, bias_EH.dtype)
    zeros_TE = weights_TK.new_zeros(weights_TK.shape[0], bias_EH.shape[0], dtype=dtype)
    with torch.autocast(weights_TK.device.type, enabled=False):
        return zeros_TE.scatter(1, topk_ids_TK, weights_TK.to(dtype)) @ bias_EH.to(dtype)


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, weights_TK, gate_up_EHF, down_EIH, gate_up_bias_EF, base_TH, topk_ids_TK, swiglu, rows):
        grouping = rows.group_by_expert(topk_ids_TK, gate_up_EHF.shape[0])
        gate_up_RF = rows.grouped_mm(rows.take(hidden_TH, grouping), gate_up_EHF, grouping.offsets_E)
        gated_RI = rows.gate(gate_up_RF, gate_up_bias_EF, topk_ids_TK, weights_TK, grouping, swiglu)
        y_RH = rows.grouped_mm(gated_RI, down_EIH, grouping.offsets_E)
        ctx.save_for_backward(
            *(hidden_TH, weights_TK, gate_up_EHF, down_EIH, gate_up_bias_EF, topk_ids_TK, gate_up_RF, *grouping)
        )
        ctx.swiglu, ctx.rows, ctx.base_dtype = swiglu, rows, None if base_TH is None else base_TH.dtype
        return rows.sum_slots(y_RH, grouping, base_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        rows: Any = ctx.rows
        hidden_TH, weights_TK, gate_up_EHF, down_EIH, gate_up_bias_EF, topk_ids_TK, gate_up_RF, *indices = (
            ctx.saved_tensors
        )
        grouping = rows.Grouping(*indices)
        wants_hidden, _, wants_gate_up, wants_down, wants_bias, wants_base = ctx.needs_input_grad[:6]
        ends = grouping.offsets_E

        grad_TH = grad_TH.contiguous()
        grad_y_RH = rows.take(grad_TH, grouping)
        grad_gated_RI = rows.grouped_mm(grad_y_RH, down_EIH.transpose(1, 2), ends)
        gated_RI, grad_gate_up_RF, grad_weights_TK = rows.gate_backward(
            grad_gated_RI, gate_up_RF, gate_up_bias_EF, topk_ids_TK, weights_TK, grouping, ctx.swiglu
        )
        del grad_gated_RI
        grad_down_EIH = weight_gradient(rows, gated_RI, grad_y_RH, down_EIH, ends) if wants_down else None
        del gated_RI, grad_y_RH

        grad_gate_up_EHF = None
        if wants_gate_up:
            grad_gate_up_EHF = weight_gradient(rows, rows.take(hidden_TH, grouping), grad_gate_up_RF, gate_up_EHF, ends)
        grad_bias_EF = None
        if wants_bias:
            grad_bias_EF = rows.segment_sum(grad_gate_up_RF, ends).to(gate_up_bias_EF.dtype)
        grad_hidden_TH = None
        if wants_hidden:
            grad_hidden_TH = rows.sum_slots(
                rows.grouped_mm(grad_gate_up_RF, gate_up_EHF.transpose(1, 2), ends), grouping
            )
        grad_base_TH = grad_TH.to(ctx.base_dtype) if wants_base else None
        return (
            *(grad_hidden_TH, grad_weights_TK.to(weights_TK.dtype), grad_gate_up_EHF, grad_down_EIH),
            *(grad_bias_EF, grad_base_TH, None, None, None),
        )


def weight_gradient(rows: Any, x_RA, grad_RB, weight_EAB, offsets_E) -> torch.Tensor:
    """[E, A, B], in the memory layout of the parameter that `weight_EAB` is a view of."""
    if weight_EAB.stride(1) == 1 and weight_EAB.shape[1] > 1:
        return rows.grouped_outer(grad_RB, x_RA, offsets_E).transpose(1, 2)
    return rows.grouped_outer(x_RA, grad_RB, offsets_E)
