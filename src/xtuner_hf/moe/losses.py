"""The balance losses of one layer, each as this rank's share of the value over an optimizer step.

Every loss is linear in what a single token contributes once the step's totals are known, so the shares of all
micro-batches and ranks add up to the same number however the tokens were split, and so do the gradients.

Legend: T tokens of a micro-batch, E experts, K experts per token, D documents.
"""

from __future__ import annotations

import torch

from .tokens import TokenLayout


def switch_loss(probs_TE, real_T, fraction_E, num_tokens) -> torch.Tensor:
    """Share of E * sum_e f_e * P_e (Switch Transformer, arXiv 2101.03961, eq. 4-6; over the global batch, 2501.11873).

    Args:
        probs_TE: [T, E] router probabilities, rows summing to 1.
        real_T: [T] bool.
        fraction_E: [E] share of all (token, expert) pairs of the step that went to each expert; sums to 1, constant.
        num_tokens: real tokens of the step, over all ranks.

    Returns:
        scalar; 1 in sum when the load is even, E when one expert takes all.
    """
    prob_sum_E = (probs_TE * real_T[:, None]).sum(0)
    return probs_TE.shape[1] * (fraction_E * prob_sum_E).sum() / num_tokens


def z_loss(logits_TE, real_T, num_tokens) -> torch.Tensor:
    """Share of the mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""
    z_T = torch.logsumexp(logits_TE, dim=-1)
    return (z_T * z_T * real_T).sum() / num_tokens


def sequence_loss(probs_TE, topk_ids_TK, layout: TokenLayout, num_documents) -> torch.Tensor:
    """Share of the mean over documents of sum_e f_e * P_e within the document.

    f_e is E/(K*len) times the pairs of the document on expert e, P_e its mean probability: 1 when even (DeepSeek-V3,
    arXiv 2412.19437, eq. 17-20).

    Args:
        topk_ids_TK: [T, K] chosen experts.
        num_documents: documents of the step, over all ranks.
    """
    num_experts = probs_TE.shape[1]
    real_T, document_T = layout.real_T, layout.document_T
    length_D1 = layout.length_D.clamp(min=1)[:, None]
    zeros_DE = probs_TE.new_zeros(len(length_D1), num_experts)
    chosen_TE = torch.zeros_like(probs_TE).scatter_(1, topk_ids_TK, 1.0) * real_T[:, None]
    # f_e is of the whole document, wherever its tokens are; P_e is a sum, of which this is the share of those here.
    count_DE = layout.sum_over_ranks(zeros_DE.index_add(0, document_T, chosen_TE))
    prob_sum_DE = zeros_DE.index_add(0, document_T, probs_TE * real_T[:, None])
    fraction_DE = count_DE * (num_experts / topk_ids_TK.shape[1]) / length_D1
    return (fraction_DE * prob_sum_DE / length_D1).sum() / num_documents
