"""The definition of attention over packed documents, written down as plainly as it goes: memory T*T.

Legend: T tokens of all documents, N query heads, M key and value heads, K size of a query and key head, V of a value
head.
"""

from __future__ import annotations

import torch

from .documents import Documents
from .sinks import reference_sink_attention


def reference_attention(
    q_TNK, k_TMK, v_TMV, documents: Documents, *, scaling: float, window=None, sinks_N=None, dropout: float = 0.0
) -> torch.Tensor:
    """As `attention_by_document`; the softmax runs in fp32 at least."""
    index_T = documents.index_T
    distance_TT = torch.arange(len(index_T), device=index_T.device)[:, None] - torch.arange(
        len(index_T), device=index_T.device
    )
    is_seen_TT = (index_T[:, None] == index_T) & (distance_TT >= 0)
    if window is not None:
        is_seen_TT = is_seen_TT & (distance_TT < window)
    dtype = torch.promote_types(q_TNK.dtype, torch.float32)
    mask_TT = torch.zeros_like(is_seen_TT, dtype=dtype).masked_fill_(~is_seen_TT, torch.finfo(dtype).min)
    groups = q_TNK.shape[1] // k_TMK.shape[1]
    q_NTK, k_NTK, v_NTV = (
        tensor.transpose(0, 1) for tensor in (q_TNK, *(t.repeat_interleave(groups, dim=1) for t in (k_TMK, v_TMV)))
    )
    if sinks_N is None:  # a sink that takes nothing
        sinks_N = torch.full(q_NTK.shape[:1], -torch.inf, dtype=dtype, device=q_TNK.device)
    return reference_sink_attention(q_NTK, k_NTK, v_NTV, sinks_N, mask_TT, scaling, dropout).transpose(0, 1)
