"""`attn_implementation="xtuner_varlen"`: attention over packed documents, and over the ranks that share a sequence.

The trunk (models/trunk.py) works out the documents of a batch once and hands them to every layer; there is no mask.
With sequence parallelism a layer's queries, keys and values come as this rank's positions of all heads, are exchanged
for all positions of this rank's heads (attention/ulysses.py), and the result goes the way back.

    [B, N, S/P, K]  --all-to-all-->  [B*S, N/P, K]  --kernel-->  [B*S, N/P, V]  --all-to-all-->  [B, S/P, N, V]

Generation with a cache has no documents: it goes through transformers' own attention with a mask.

Legend: B rows, S positions, P ranks that share a sequence, N query heads, M key and value heads, K size of a query and
key head, V of a value head, T = B*S tokens.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ..device import kind
from .documents import Documents
from .kernels import choose
from .sinks import sink_attention_forward
from .ulysses import SequenceShard, heads_to_sequence, sequence_to_heads

VARLEN_ATTENTION = "xtuner_varlen"


def varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    documents: Documents | None = None,
    sequence: SequenceShard | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within documents; the function that transformers' attention modules call.

    Args:
        query: [B, N, S, K]; `key` [B, M, S, K] and `value` [B, M, S, V] may have fewer heads, and V may differ.
        attention_mask: used only without `documents`.
        sliding_window: keys that a query sees, its own among them.
        s_aux: [N] sinks.
        documents: of all B*S tokens, of the whole rows if they are shared.
        sequence: this rank's share of the rows.

    Returns:
        [B, S, N, V]
    """
    if documents is None:
        return _with_mask(module, query, key, value, attention_mask, scaling, dropout, s_aux, **kwargs)
    if torch.is_autocast_enabled(query.device.type):
        # RoPE hands on fp32 where the hidden states are; values come from a projection.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    num_rows = query.shape[0]
    q_BSNK, k_BSMK, v_BSMV = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if sequence is not None:
        q_BSNK, k_BSMK, v_BSMV = sequence_to_heads(q_BSNK, k_BSMK, v_BSMV, sequence.ranks)
        if s_aux is not None:
            s_aux = s_aux.chunk(sequence.ranks.size)[sequence.ranks.rank]
    kernel = choose(kind(query.device), query.dtype, query.shape[-1], s_aux is not None, dropout > 0)
    output_TNV = kernel(
        *(tensor.flatten(0, 1) for tensor in (q_BSNK, k_BSMK, v_BSMV)),
        documents,
        scaling=scaling,
        window=sliding_window,
        sinks_N=s_aux,
        dropout=dropout,
    )
    output_BSNV = output_TNV.unflatten(0, (num_rows, -1))
    if sequence is not None:
        output_BSNV = heads_to_sequence(output_BSNV, sequence.ranks)
    return output_BSNV.contiguous(), None


def attention_refusal(implementation: str) -> str:
    """Why this implementation is none for a sequence that several ranks share."""
    return (
        f"attn_implementation {implementation!r} would attend within each rank's share of a sequence; load the model "
        f"with {VARLEN_ATTENTION!r}, the default, for sp_size above 1."
    )


def _with_mask(module, query, key, value, attention_mask, scaling, dropout, s_aux, **kwargs):
    if s_aux is not None:
        return sink_attention_forward(module, query, key, value, attention_mask, scaling, dropout, s_aux=s_aux)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def _mask_of_a_cache(*args, config, **kwargs) -> torch.Tensor | None:
    # Of the families here only GPT-OSS has sinks, whose attention adds its mask to the scores.
    build = eager_mask if config.model_type == "gpt_oss" else sdpa_mask
    return build(*args, config=config, **kwargs)


AttentionInterface.register(VARLEN_ATTENTION, varlen_attention_forward)
AttentionMaskInterface.register(VARLEN_ATTENTION, _mask_of_a_cache)
