"""Which rows of a flattened batch are real tokens, and which document each belongs to.

Legend of the shape suffixes: B rows of the batch, S positions of a row, T = B*S flattened tokens, D documents (or a
bound on their number), L positions of a row on all the ranks that share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..attention.ulysses import SequenceShard
    from .replay import Routes


@dataclass
class TokenLayout:
    """The real tokens and the documents of one micro-batch, from the tensors that the model was called with.

    Computed on the batch's device without a host sync, and only when somebody asks (load balancing and the token
    counts do; plain inference does not).

    Args:
        num_rows: B.
        row_length: S.
        device: where the results live.
        attention_mask: [B, S], 0 on padding. A row is then one document.
        position_ids: [B, S] (or [1, S]); without an attention mask a document starts wherever the position is 0.
        token_mask: [B, S] bool, False on padding of a packed row, which carries no attention mask.
        routes: records or replaces what the routers choose for these tokens.
        sequence: this rank's share of the rows, if ranks share them; all other tensors are of this share then.
    """

    num_rows: int
    row_length: int
    device: torch.device
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None
    routes: Routes | None = None
    sequence: SequenceShard | None = None

    @classmethod
    def of_batch(cls, batch: dict) -> TokenLayout:
        """The layout of a trainer's batch: a dict with `input_ids` or `inputs_embeds` and the masks, if any."""
        tokens = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
        return cls(
            tokens.shape[0],
            tokens.shape[1],
            tokens.device,
            batch.get("attention_mask"),
            batch.get("position_ids"),
            batch.get("token_mask"),
            batch.get("routes"),
            batch.get("sequence"),
        )

    @cached_property
    def real_T(self) -> torch.Tensor:
        """[T] bool: True on every token that is not padding."""
        for mask in (self.token_mask, self.attention_mask):
            if mask is not None and mask.dim() == 2:
                # A mask may be longer than the row (cached keys come first); its tail is this row.
                return mask[:, -self.row_length :].reshape(-1).bool()
        return torch.ones(self.num_rows * self.row_length, dtype=torch.bool, device=self.device)

    @cached_property
    def document_T(self) -> torch.Tensor:
        """[T] int64: index of each token's document, in 0..D-1; D is T, a bound that needs no host sync, unless ranks
        share the rows."""
        if self.sequence is not None:
            return self.sequence.take(self.rows()[1]).reshape(-1)
        starts = torch.zeros(self.num_rows, self.row_length, dtype=torch.bool, device=self.device)
        starts[:, 0] = True
        if self.attention_mask is None and self.position_ids is not None and self.position_ids.dim() == 2:
            starts = starts | (self.position_ids == 0)
        return starts.reshape(-1).long().cumsum(0) - 1

    @cached_property
    def length_D(self) -> torch.Tensor:
        """[D] int64: real tokens of each document; 0 behind the last document."""
        number = self.document_T.shape[0] if self.sequence is None else self.sequence.documents.number
        lengths = torch.zeros(number, dtype=torch.int64, device=self.device)
        return self.sum_over_ranks(lengths.index_add_(0, self.document_T, self.real_T.long()))

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, L] bool and int64: the real tokens of whole rows, and each token's document."""
        if self.sequence is not None:
            real_BL = self.sequence.real_BL
            return real_BL, self.sequence.documents.index_T.view_as(real_BL)
        shape = (self.num_rows, self.row_length)
        return self.real_T.view(shape), self.document_T.view(shape)

    def take(self, whole_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] of whole rows -> [B, S, ...] of this rank's share."""
        return whole_BL if self.sequence is None else self.sequence.take(whole_BL)

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that share the rows; not differentiable if there are several."""
        return tensor if self.sequence is None else self.sequence.ranks.sum(tensor)

    def totals(self) -> torch.Tensor:
        """[3] int64: real tokens, documents with at least one of them, and the sum of squared document lengths."""
        lengths = self.length_D
        return torch.stack([lengths.sum(), (lengths > 0).sum(), (lengths * lengths).sum()])


def shift_left(tensor_BS: torch.Tensor, distance: int, value: float = 0) -> torch.Tensor:
    """Position i gets what stood at i + distance along dimension 1; `value` behind the end."""
    shifted = torch.full_like(tensor_BS, value)
    shifted[:, : max(tensor_BS.shape[1] - distance, 0)] = tensor_BS[:, distance:]
    return shifted
