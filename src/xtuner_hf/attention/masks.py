"""Masks of a forward pass without a cache: causal, within a window where a layer has one, documents kept apart.

transformers' mask builders do all of it, if they are told the positions and no cache: documents packed in a row are
found by positions that do not go on. Its models do not always tell them. GPT-OSS leaves out the positions, and every
family makes a cache of its own first where `use_cache` is on, which is the default; then packed documents see each
other.

`xtuner_varlen` needs no mask: it takes the documents themselves (documents.py).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .varlen import VARLEN_ATTENTION

_BUILDERS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def masks_without_cache(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
) -> Any:
    """What transformers' trunks take as `attention_mask` and use as it is.

    A window of N is N keys, the query's own among them.

    Args:
        inputs_embeds: [B, S, H], for its shape, dtype and device.
        attention_mask: [B, S], 0 on padding; rows with one are not packed.
        position_ids: [B, S] or [1, S].

    Returns:
        the mask of all layers, or one for each type of layer if the configuration lists `layer_types`. Its form depends
        on the attention implementation; None where that needs none.

    Raises:
        ValueError: the rows are packed, and the attention implementation would let their documents see each other.
    """
    layer_types = getattr(config, "layer_types", None)
    if config._attn_implementation == VARLEN_ATTENTION and (attention_mask is None or attention_mask.dim() == 2):
        # Four dimensions, which transformers takes for a mask that is ready; it would build one of S*S otherwise.
        unused = inputs_embeds.new_empty(1, 1, 0, 0)
        return unused if layer_types is None else dict.fromkeys(layer_types, unused)
    if attention_mask is None:
        _check_keeps_documents(config._attn_implementation, position_ids)
    arguments = (config, inputs_embeds, attention_mask, None, position_ids)
    if layer_types is not None:
        return {layer_type: _BUILDERS[layer_type](*arguments) for layer_type in set(layer_types)}
    has_window = getattr(config, "sliding_window", None) is not None
    return _BUILDERS["sliding_attention" if has_window else "full_attention"](*arguments)


def _check_keeps_documents(implementation: str, position_ids: torch.Tensor) -> None:
    """Implementations without a mask find documents by themselves, if they do at all."""
    finds_in_one_row = "flash" in implementation
    makes_mask = implementation in AttentionMaskInterface() and not finds_in_one_row
    if makes_mask or (finds_in_one_row and position_ids.shape[0] == 1):
        return
    if (position_ids[:, 1:] == 0).any():
        rows = " in batches of several rows" if finds_in_one_row else ""
        raise ValueError(
            f"attn_implementation {implementation!r} would let packed documents see each other{rows}. Load the "
            f"model with {VARLEN_ATTENTION!r}, the default, or train without packing."
        )
