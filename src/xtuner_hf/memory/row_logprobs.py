"""Log-probabilities and entropies over whole rows of logits, a few rows at a time, in plain torch.

For devices without Triton, where TRL's tiles would be folded by a dozen operators each: here a row is one softmax. As
over full logits, a row's gradient is one matrix product, so that it is as exact.

Legend: N tokens with a target, R of them at a time, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.select import computing_dtype

# Products of fewer rows are slow everywhere, and MKL's of 16 and fewer add up less exactly (1.5 times the error).
FEWEST_ROWS = 32


class RowLogProbs(torch.autograd.Function):
    """`apply(hidden_NH, weight_VH, bias_V, targets_N, temperature, with_entropy, logits_at_a_time)` gives the log
    p(target) [N] and the entropy [N], in nats, or None; both fp32, fp64 of fp64 inputs.

    Args:
        bias_V: or None.
        logits_at_a_time: the number of logits, R * V, that forward and backward hold at once; R is 32 at least.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH, weight_VH, bias_V, targets_N, temperature, with_entropy, logits_at_a_time):
        ctx.set_materialize_grads(False)
        ctx.dtype = computing_dtype(hidden_NH)
        ctx.temperature, ctx.num_rows = temperature, max(FEWEST_ROWS, logits_at_a_time // weight_VH.shape[0])
        log_probs_N = hidden_NH.new_empty(len(targets_N), dtype=_precise(hidden_NH.dtype))
        entropy_N = torch.empty_like(log_probs_N) if with_entropy else None
        head = _cast(ctx.dtype, weight_VH, bias_V)
        for rows in _slices(len(targets_N), ctx.num_rows):
            log_p_RV = _logits(hidden_NH[rows], *head, ctx).log_softmax(-1)
            log_probs_N[rows] = log_p_RV.gather(-1, targets_N[rows, None])[:, 0]
            if entropy_N is not None:
                entropy_N[rows] = -(log_p_RV.exp() * log_p_RV).sum(-1)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N)
        return log_probs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None):  # type: ignore[override]
        hidden_NH, weight_VH, bias_V, targets_N = ctx.saved_tensors
        grad_log_probs_N, grad_entropy_N = (None if grad is None else grad / ctx.temperature for grad in grads)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        precise = _precise(hidden_NH.dtype)
        head = _cast(ctx.dtype, weight_VH, bias_V)
        grad_hidden_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        # Added up over many slices, which must not round each sum to bf16.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=precise) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=precise) if needs_bias else None
        for rows in _slices(len(targets_N), ctx.num_rows):
            logits_RV = _logits(hidden_NH[rows], *head, ctx)
            p_RV = logits_RV.softmax(-1)
            if grad_log_probs_N is None:
                grad_RV = torch.zeros_like(p_RV)
            else:
                grad_R1 = grad_log_probs_N[rows, None]
                grad_RV = (p_RV * -grad_R1).scatter_add_(-1, targets_N[rows, None], grad_R1)
            if grad_entropy_N is not None:
                # log p + entropy, without the normaliser, which would round
                mean_R1 = (p_RV * logits_RV).sum(-1, keepdim=True)
                grad_RV -= grad_entropy_N[rows, None] * p_RV * (logits_RV - mean_R1)
            grad_RV = grad_RV.to(ctx.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[rows] = (grad_RV @ head[0]).to(hidden_NH.dtype)
            if grad_weight_VH is not None:
                grad_weight_VH.addmm_(grad_RV.T.to(precise), hidden_NH[rows].to(precise))
            if grad_bias_V is not None:
                grad_bias_V += grad_RV.sum(0, dtype=precise)
        sums = (None if total is None else total.to(weight_VH.dtype) for total in (grad_weight_VH, grad_bias_V))
        return grad_hidden_NH, *sums, None, None, None, None


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cast(dtype: torch.dtype, weight_VH: torch.Tensor, bias_V: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    return weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _logits(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, ctx: Any) -> torch.Tensor:
    logits_RV = F.linear(hidden_RH.to(ctx.dtype), weight_VH, bias_V).to(_precise(hidden_RH.dtype))
    return logits_RV if ctx.temperature == 1 else logits_RV / ctx.temperature
