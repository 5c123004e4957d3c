"""Where the documents of a batch begin and end, worked out once for all layers.

Legend: B rows, S positions of a row, T = B*S tokens in row order, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from ..host_reads import host_reads


@dataclass(eq=False)
class Documents:
    """All T tokens of a batch cut into documents that do not see each other; padding is cut off as documents too.

    Args:
        cu_seqlens: [D + 1] int32 on the batch's device: 0, then where each document ends.
    """

    cu_seqlens: torch.Tensor

    @classmethod
    def of_batch(
        cls,
        num_rows: int,
        row_length: int,
        device: torch.device,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **_: Any,
    ) -> Documents:
        """The documents of a model's inputs, by the first of these that is there:

        Args:
            attention_mask: [B, S], 0 on padding; a row is then one document.
            cu_seq_lens_q: of a packed row; TRL's collator makes it. The only one that costs no host sync.
            position_ids: [B, S] or [1, S]; a document starts wherever the position is 0.

        Raises:
            ValueError: padding between the tokens of a row.
        """
        if attention_mask is not None:
            real_BS = attention_mask.bool()
            starts_BS = F.pad(real_BS[:, 1:] != real_BS[:, :-1], (1, 0), value=True)
            if (starts_BS & real_BS).sum(1).amax() > 1:
                raise ValueError(
                    "attention_mask has padding between the tokens of a row; attention by document takes padding "
                    "before and behind them. Load the model with attn_implementation='sdpa' for such a mask."
                )
        elif cu_seq_lens_q is not None and num_rows == 1:
            return cls(cu_seq_lens_q.to(torch.int32))
        else:
            starts_BS = torch.zeros(num_rows, row_length, dtype=torch.bool, device=device)
            starts_BS[:, 0] = True
            if position_ids is not None:
                starts_BS = starts_BS | (position_ids == 0)
        starts_D = starts_BS.reshape(-1).nonzero()[:, 0].to(torch.int32)
        return cls(F.pad(starts_D, (0, 1), value=num_rows * row_length))

    @property
    def number(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @cached_property
    def ends(self) -> list[int]:
        """Where each document ends, on the host."""
        return list(accumulate(self.lengths))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document, on the host."""
        return host_reads().lengths(self.cu_seqlens)

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths)

    @cached_property
    def index_T(self) -> torch.Tensor:
        """[T] int64: each token's document."""
        ids_D = torch.arange(self.number, device=self.cu_seqlens.device)
        return torch.repeat_interleave(ids_D, self.cu_seqlens.diff(), output_size=sum(self.lengths))

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(number, length) of neighbouring documents of the same length: they can be computed as one batch."""
        runs: list[tuple[int, int]] = []
        for length in self.lengths:
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + 1, length)
            else:
                runs.append((1, length))
        return runs
