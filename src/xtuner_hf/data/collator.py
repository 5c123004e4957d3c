"""Token rows to a batch, padded or packed.

Legend: B rows of the batch, S positions of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .._compat import DataCollatorForLanguageModeling


@dataclass
class PackedCollator(DataCollatorForLanguageModeling):
    """TRL's collator for language modelling, and padding of packed rows that nobody takes for tokens.

    Takes rows of `input_ids`, perhaps `labels` (-100 where there is none; the ids by default) and `seq_lengths` (the
    documents of a packed row). Returns int64 tensors:

    - padded (`padding_free=False`): `input_ids`, `labels` and `attention_mask`, each [B, S].
    - packed (`padding_free=True`): all rows in one, `input_ids`, `labels` and `position_ids` [1, S], which start at 0
      in each document, and no attention mask; `cu_seq_lens_q` and so on for varlen kernels. The first label of each
      document is -100: what it would be predicted from is another document's last token. With `pad_to_multiple_of`,
      also `token_mask` [1, S] bool, False on the padding, which is a document of its own.

    Args:
        pad_token_id: fills up.
        padding_free: pack.
        pad_to_multiple_of: of S.

    Raises:
        ValueError: for packed rows with `padding_free=False`, whose documents would see each other.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.padding_free:
            if any(len(example.get("seq_lengths") or ()) > 1 for example in examples):
                raise ValueError(
                    "The rows are packed ('seq_lengths'), but the collator pads them with an attention mask that lets "
                    "their documents see each other: use PackedCollator(padding_free=True), or packing=True in the "
                    "arguments of MoESFTTrainer."
                )
            return super().torch_call(examples)
        if not self.pad_to_multiple_of:
            return super().torch_call(examples)
        num_tokens = sum(len(example["input_ids"]) for example in examples)
        num_padding = -num_tokens % self.pad_to_multiple_of
        batch = super().torch_call([*examples, self._padding(num_padding, examples[0])] if num_padding else examples)
        batch["token_mask"] = (torch.arange(num_tokens + num_padding) < num_tokens)[None]
        return batch

    def _padding(self, length: int, like: dict[str, Any]) -> dict[str, Any]:
        """A document of padding, which TRL's collator then takes along."""
        row = {"input_ids": [self.pad_token_id] * length, "labels": [-100] * length}
        return row | ({"seq_lengths": [length]} if "seq_lengths" in like else {})
