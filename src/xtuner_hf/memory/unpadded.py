"""Padded batches scored as packed rows: padding costs nothing, neither in attention nor in experts nor in the head.

    TRL pads              the model computes                  what comes back
    . . a a A A .         a a A A | b b b b B B B | c C       by position of the padded batch, 0 on padding
    b b b b B B B
    . . . c C . .         positions count from 0 in each document, as an engine's and `generate`'s do

So the result for a sample does not depend, even by rounding, on how long the others are: rotations are fp32, and those
of a sample moved to the right by padding differ from its own in the last bits.

Legend: B rows, S positions of a padded row, N = B*S, T real tokens of all rows, K experts per token.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from ..attention.varlen import VARLEN_ATTENTION
from ..host_reads import host_reads
from ..moe.replay import NATIVE, RearrangedRoutes
from .logprobs import IGNORE_INDEX, PER_TOKEN

# Inputs that are packed or do not concern single positions (images stand in the order of their tokens, which packing
# keeps). A forward with others is left as it is.
_KNOWN = {"input_ids", "attention_mask", "labels", "routes", "pixel_values", "num_tiles"}
_KNOWN |= {"fused_lm_head", "use_cache", "logits_to_keep", "num_items_in_batch"}


def scores_unpadded(model: Any) -> bool:
    """Whether this model's attention takes packed rows at no further cost, and nothing is put in front of its rows."""
    adapters = getattr(model, "peft_config", {}).values()
    prepends = any(adapter.is_prompt_learning for adapter in adapters)
    return model.config._attn_implementation == VARLEN_ATTENTION and not prepends


class UnpaddedModel:
    """Calls a model of this package on the real tokens of a padded batch.

    Args:
        model: also with TRL's fused head, adapters, or on a share of the positions (parallel/sequence.py).
    """

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        """As the model. Of the results, the loss and what TRL's fused head returns for each token [B, S - 1] are as of
        the padded batch; all else is of the packed row.

        Args:
            inputs: `attention_mask` [B, S] is 0 on padding; `routes` are by position of the padded batch.
        """
        if inputs.get("attention_mask") is None or inputs.keys() - _KNOWN:
            return self.model(**inputs)
        rows = _Rows(inputs.pop("attention_mask").bool())
        for name, value in inputs.items():
            if name == "input_ids":
                inputs[name] = rows.pack(value)
            elif name == "labels":  # nothing in a document comes before its first token
                inputs[name] = rows.pack(value).masked_fill(rows.positions == 0, IGNORE_INDEX)
            elif name == "routes" and value is not None:
                inputs[name] = RearrangedRoutes(value, put=rows.put_routes, take=rows.take_routes)
        outputs = self.model(**inputs, position_ids=rows.positions)
        for name in PER_TOKEN:
            if outputs.get(name) is not None:  # [1, T - 1], of the second token on
                outputs[name] = rows.spread(F.pad(outputs[name], (1, 0)))[:, 1:]
        return outputs


class _Rows:
    """Where the real tokens of a padded batch are.

    Args:
        real_BS: bool.
    """

    def __init__(self, real_BS: torch.Tensor):
        self.real_BS = real_BS

    @cached_property
    def index_T(self) -> torch.Tensor:
        """[T] int64: where they are in the flattened batch. An index by mask would let the host wait each time."""
        return host_reads().true_rows(self.real_BS.flatten())

    def pack(self, tensor_BS: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [1, T]"""
        return tensor_BS.flatten()[self.index_T][None]

    def spread(self, tensor_1T: torch.Tensor) -> torch.Tensor:
        """[1, T] -> [B, S], 0 on padding; differentiable."""
        zeros_N = tensor_1T.new_zeros(self.real_BS.numel())
        return zeros_N.scatter(0, self.index_T, tensor_1T[0]).view(self.real_BS.shape)

    @cached_property
    def positions(self) -> torch.Tensor:
        """[1, T] int64: from 0 in each row."""
        return self.pack(self.real_BS.cumsum(1) - 1)

    def take_routes(self, ids_NK: torch.Tensor) -> torch.Tensor:
        """[B * S, K] -> [T, K]"""
        return ids_NK[self.index_T]

    def put_routes(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [B * S, K], native on padding."""
        ids_NK = ids_TK.new_full((self.real_BS.numel(), ids_TK.shape[1]), NATIVE)
        ids_NK[self.index_T] = ids_TK
        return ids_NK
