"""Token rows to a batch, padded or packed, and the tiles of their images.

Legend: B rows of the batch, S positions of a row.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from .._compat import DataCollatorForLanguageModeling
from .images import BadImage
from .tiles import IMAGE_REFS, ImageTiler
from .tokenize import IGNORE_INDEX

logger = logging.getLogger(__name__)


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


@dataclass
class VisionCollator(PackedCollator):
    """`PackedCollator` for rows with `image_refs`, whose images it reads: run it in workers of the data loader
    (`dataloader_num_workers`). Rows without images may stand among them.

    Adds `num_tiles` [rows] int64, and, if there are any tiles, `pixel_values` [tiles, 3, side, side] float32 in the
    order of their tokens.

    Args:
        tiler: cuts images; the one that the rows were tokenised with.
        on_bad_image: for images that cannot be read. "error" stops the run and names the row. "skip" trains on without
            the document: its labels are -100 and its tiles empty, and a warning counts it.

    Raises:
        BadImage: with `on_bad_image="error"`.
    """

    tiler: ImageTiler = field(kw_only=True)
    on_bad_image: str = field(default="error", kw_only=True)
    num_bad_images: int = field(default=0, init=False)

    def __post_init__(self):
        if self.on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image is {self.on_bad_image!r}; use 'error' or 'skip'.")

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        read = [self._read_images(example) for example in examples]
        batch = super().torch_call([example for example, _ in read])
        tiles = [tile for _, tiles_of_row in read for tile in tiles_of_row]
        batch["num_tiles"] = torch.tensor([sum(map(len, tiles_of_row)) for _, tiles_of_row in read])
        if tiles:
            batch["pixel_values"] = torch.cat(tiles)
        return batch

    def _read_images(self, example: dict[str, Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """The row without references, and the tiles of each of its images."""
        row = {key: value for key, value in example.items() if key != IMAGE_REFS}
        tiles = []
        for position, reference in enumerate(example.get(IMAGE_REFS) or ()):
            if reference is None:
                continue
            try:
                tiles.append(self.tiler.cut(reference))
            except BadImage as error:
                if self.on_bad_image == "error":
                    raise
                self.num_bad_images += 1
                logger.warning("Trained on without a document, the %d. in this process: %s", self.num_bad_images, error)
                tiles.append(self.tiler.blank(reference))
                row["labels"] = _without_document(row, position)
        return row, tiles


def _without_document(row: dict[str, Any], position: int) -> list[int]:
    """The labels of a row, -100 in the document that the position lies in."""
    labels, start = list(row["labels"]), 0
    for length in row.get("seq_lengths") or [len(labels)]:
        if start <= position < start + length:
            labels[start : start + length] = [IGNORE_INDEX] * length
        start += length
    return labels
