"""Combine: expert order -> token order, weighted and summed in fp32.

Legend: T tokens, K experts per token, R = T*K rows, H hidden size.
"""

from __future__ import annotations

import torch

from ..kernels.device_operators import fused_on


def combine(y_RH: torch.Tensor, weights_TK: torch.Tensor, row_of_slot_R: torch.Tensor) -> torch.Tensor:
    """Weighted sum of each token's K expert outputs, [T, H] in the dtype of `y_RH`.

    The K terms are added in the router's order and in fp32 at least, so the result does not depend on which expert
    ran first, and fp32 results equal transformers' to the last bit.
    """
    unpermute = fused_on(y_RH.device).unpermute
    if unpermute is not None:
        return unpermute(y_RH, weights_TK, row_of_slot_R)
    dtype = torch.promote_types(y_RH.dtype, torch.float32)
    num_tokens, top_k = weights_TK.shape
    weights_R = weights_TK.reshape(-1).to(dtype)
    y_TKH = (y_RH[row_of_slot_R].to(dtype) * weights_R[:, None]).view(num_tokens, top_k, y_RH.shape[-1])
    return y_TKH.sum(dim=1).to(y_RH.dtype)
