"""The forward of every trunk of ours: fills in what transformers' own leaves to chance, then runs it.

Legend: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..attention.documents import Documents
from ..attention.masks import masks_without_cache
from ..attention.varlen import VARLEN_ATTENTION, attention_refusal
from ..moe.tokens import TokenLayout

if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object


class TrunkMixin(_Base):
    """In front of a family's `...Model`."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        token_mask=None,
        routes=None,
        sequence=None,
        **kwargs,
    ):
        """As in transformers. Documents packed in a row (`position_ids` that start again at 0, no `attention_mask`)
        never see each other.

        Args:
            token_mask: [B, S] bool, False on padding of a packed row.
            routes: a `RouteRecorder` or `RouteReplay` (moe/replay.py).
            sequence: a `SequenceShard` (attention/ulysses.py) if the rows are shared between ranks; all other inputs
                are then this rank's share. parallel/sequence.py makes them.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        masks = {"attention_mask": attention_mask, "position_ids": position_ids, "token_mask": token_mask}
        layout = TokenLayout.of_batch({"inputs_embeds": inputs_embeds, "routes": routes, "sequence": sequence, **masks})
        if past_key_values is None and not isinstance(attention_mask, dict):
            if position_ids is None:
                position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
            is_ready = attention_mask is not None and attention_mask.dim() == 4
            if self.config._attn_implementation == VARLEN_ATTENTION and not is_ready:
                boundaries = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
                kwargs["documents"] = (
                    sequence.documents
                    if sequence is not None
                    else Documents.of_batch(*inputs_embeds.shape[:2], inputs_embeds.device, **boundaries)
                )
                kwargs["sequence"] = sequence
            elif sequence is not None:
                raise ValueError(attention_refusal(self.config._attn_implementation))
            attention_mask = masks_without_cache(self.config, inputs_embeds, attention_mask, position_ids)
        return self.run(
            layout,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def run(self, layout: TokenLayout, **inputs: Any) -> Any:
        """The parent's forward."""
        return super().forward(**inputs, **self.layer_inputs(layout))

    def layer_inputs(self, layout: TokenLayout) -> dict[str, Any]:
        """What the parent hands on to every layer besides its own."""
        return {}
