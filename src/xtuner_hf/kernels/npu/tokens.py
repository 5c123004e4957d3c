"""Tokens into expert order and back; shapes are those of kernels/device_operators.py."""

from __future__ import annotations

import torch


def permute(hidden_TH: torch.Tensor, topk_ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of equal experts stand in the order of their slots. The second result is int32."""
    if topk_ids_TK.numel() == 0:
        return hidden_TH, topk_ids_TK.reshape(-1).int()
    return torch.ops.npu.npu_moe_token_permute(hidden_TH.contiguous(), topk_ids_TK.int().contiguous())


def unpermute(y_RH: torch.Tensor, weights_TK: torch.Tensor, row_of_slot_R: torch.Tensor) -> torch.Tensor:
    """Weights may be fp32 beside rows of bf16."""
    if weights_TK.numel() == 0:
        return y_RH * weights_TK.sum().to(y_RH.dtype)  # no token, and still part of the graph
    return torch.ops.npu.npu_moe_token_unpermute(y_RH.contiguous(), row_of_slot_R, probs=weights_TK.contiguous())
