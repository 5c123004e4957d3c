"""Attention with a learned sink: one more logit per head that takes part in the softmax and has no value (GPT-OSS).

    p_j = exp(s_j) / (exp(sink) + sum_k exp(s_k))

Fused attention kernels know no sink, but give the log-sum-exp of their scores, and that is all it takes. With
O, LSE of the kernel, both without the sink:

    LSE' = logaddexp(LSE, sink)                 O' = O * exp(LSE - LSE')

The kernel's own backward, handed O' and LSE' for O and LSE, computes the right dQ, dK and dV, because it recomputes
p = exp(s - LSE') and needs rowsum(dO * O') besides. What is left is

    dsink_h = - sum_t exp(sink_h - LSE'_ht) * rowsum(dO * O')_ht

Legend: B batch, N heads, S queries, L keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from .._compat import cpu_flash_attention, cpu_flash_attention_backward
from ..device import is_host

SINK_ATTENTION = "xtuner_sinks"


class FusedKernel(NamedTuple):
    """A fused softmax attention without sinks.

    Args:
        forward: (q, k, v, mask, scaling) -> output [B, N, S, D] and log-sum-exp [B, N, S] (fp32 at least). The mask is
            added to the scores; None is causal.
        backward: (grad_output, q, k, v, output, log-sum-exp, mask, scaling) -> gradients of q, k and v.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


CPU_KERNEL = FusedKernel(cpu_flash_attention, cpu_flash_attention_backward)


class SinkAttention(torch.autograd.Function):
    """A fused kernel and the sinks, by the formulas on top of this file."""

    @staticmethod
    def forward(ctx, q_BNSD, k_BNLD, v_BNLD, sinks_N, mask, scaling: float, kernel: FusedKernel):
        output_BNSD, lse_BNS = kernel.forward(q_BNSD, k_BNLD, v_BNLD, mask, scaling)
        sinks_N1 = sinks_N.to(lse_BNS.dtype)[:, None]
        total_BNS = torch.logaddexp(lse_BNS, sinks_N1)
        output_BNSD = (output_BNSD * (lse_BNS - total_BNS).exp()[..., None]).to(q_BNSD.dtype)
        ctx.save_for_backward(q_BNSD, k_BNLD, v_BNLD, sinks_N, mask, output_BNSD, total_BNS)
        ctx.scaling, ctx.kernel = scaling, kernel
        return output_BNSD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BNSD):
        q_BNSD, k_BNLD, v_BNLD, sinks_N, mask, output_BNSD, total_BNS = ctx.saved_tensors
        grads = ctx.kernel.backward(grad_BNSD, q_BNSD, k_BNLD, v_BNLD, output_BNSD, total_BNS, mask, ctx.scaling)
        sink_share_BNS = (sinks_N.to(total_BNS.dtype)[:, None] - total_BNS).exp()
        row_BNS = (grad_BNSD.to(total_BNS.dtype) * output_BNSD.to(total_BNS.dtype)).sum(-1)
        grad_sinks_N = -(sink_share_BNS * row_BNS).sum((0, 2)).to(sinks_N.dtype)
        return *grads, grad_sinks_N, None, None, None


def reference_sink_attention(q_BNSD, k_BNLD, v_BNLD, sinks_N, mask, scaling: float, dropout: float = 0.0):
    """The sink as one more column of the scores, softmax in fp32 at least: any device, memory B*N*S*L."""
    dtype = torch.promote_types(q_BNSD.dtype, torch.float32)
    scores_BNSL = (q_BNSD @ k_BNLD.transpose(-2, -1)).to(dtype) * scaling + mask.to(dtype)
    sinks_BNS1 = sinks_N.to(dtype)[:, None, None].expand(*scores_BNSL.shape[:-1], 1)
    probs_BNSL = torch.cat([scores_BNSL, sinks_BNS1], dim=-1).softmax(dim=-1)[..., :-1]
    return nn.functional.dropout(probs_BNSL.to(v_BNLD.dtype), dropout) @ v_BNLD


def sink_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """`attn_implementation="xtuner_sinks"`: a fused kernel where there is one (CPU), else the reference.

    Args:
        query: [B, N, S, D]; `key` and `value` may have fewer heads.
        attention_mask: [B, 1, S, L], added to the scores. It says everything: causality, window, documents, padding.
        s_aux: [N] sinks.
    """
    if s_aux is None:
        raise ValueError(
            f"{type(module).__name__} has no sinks: choose another attn_implementation than {SINK_ATTENTION!r}."
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    if attention_mask.dtype != query.dtype:  # under autocast; fp32's lowest number would become -inf in bf16
        is_hidden = attention_mask < 0
        attention_mask = torch.zeros_like(is_hidden, dtype=query.dtype)
        attention_mask.masked_fill_(is_hidden, torch.finfo(query.dtype).min)
    if is_host(query.device) and not dropout:
        output = SinkAttention.apply(query, key, value, s_aux, attention_mask, scaling, CPU_KERNEL)
    else:
        output = reference_sink_attention(query, key, value, s_aux, attention_mask, scaling, dropout)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(SINK_ATTENTION, sink_attention_forward)
AttentionMaskInterface.register(SINK_ATTENTION, eager_mask)
