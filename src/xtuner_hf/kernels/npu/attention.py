"""Attention over packed documents by npu_fusion_attention: causal, with windows and sinks, and heads of any two sizes.

The operator takes the ends of the documents from the host (`Documents.ends`, read once for all layers), and what is
hidden as one 2048 x 2048 triangle that it lays along the diagonal of each document:

    sparse_mode 3    causal, aligned to the last query and key
    sparse_mode 4    a band as well: `pre_tockens` keys to the left of a query's own

Legend: T tokens of all documents, N query heads, M key and value heads, K size of a query and key head, V of a value
head.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .autocast import autocast

if TYPE_CHECKING:
    from ...attention.documents import Documents

# Of the operator.
MAX_HEAD_SIZE = 768
MAX_DOCUMENTS = 1024
_CAUSAL, _BAND = 3, 4


def packed_attention(
    q_TNK: torch.Tensor,
    k_TMK: torch.Tensor,
    v_TMV: torch.Tensor,
    documents: Documents,
    *,
    scaling: float,
    window: int | None = None,
    sinks_N: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """[T, N, V], as `attention_by_document`; in bf16, fp16 or fp32."""
    q_TNK, k_TMK, v_TMV = autocast(q_TNK, k_TMK, v_TMV)
    outputs = []
    for tokens, ends in _calls(documents.ends):
        output_TNV, *_ = torch.ops.npu.npu_fusion_attention(
            *(tensor[tokens] for tensor in (q_TNK, k_TMK, v_TMV)),
            q_TNK.shape[1],
            "TND",
            atten_mask=_triangle(q_TNK.device),
            scale=scaling,
            keep_prob=1.0 - dropout,
            sparse_mode=_CAUSAL if window is None else _BAND,
            pre_tockens=2**31 - 1 if window is None else window - 1,
            next_tockens=0,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            sink=None if sinks_N is None else sinks_N.float(),
        )
        outputs.append(output_TNV)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _calls(ends: list[int]) -> list[tuple[slice, list[int]]]:
    """Tokens and ends of each call: one for all documents, or for as many as the operator takes."""
    calls, start = [], 0
    for first in range(0, len(ends), MAX_DOCUMENTS):
        some = ends[first : first + MAX_DOCUMENTS]
        calls.append((slice(start, some[-1]), [end - start for end in some]))
        start = some[-1]
    return calls


@functools.cache
def _triangle(device: torch.device) -> torch.Tensor:
    """What the operator wants as its mask, True on what is hidden: 4 MiB, one for each device."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)
