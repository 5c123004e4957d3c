"""Preferences about images: one pass of the processor for the images of a pair, which both of its answers see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .._compat import DataCollatorForVisionPreference


@dataclass
class VisionPreferenceCollator(DataCollatorForVisionPreference):
    """TRL's collator of preferences with images, which hands the prompts of all pairs, and with them the images, to the
    processor twice.

    Takes rows of `images` (any number, also none), `prompt`, `chosen` and `rejected`. Returns `input_ids`,
    `attention_mask` and `completion_mask` [2B, S], the chosen answers first, and `pixel_values` of the tiles of all 2B
    rows in order.
    """

    def __post_init__(self):
        self.processor = _OncePerPair(self.processor)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call([with_image_list(example) for example in examples])


class _OncePerPair:
    """A processor that is called with the rows of B pairs, twice one behind the other, and processes them once."""

    def __init__(self, processor: Any):
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any = None, text: Any = None, **keywords: Any) -> Any:
        if images is None:
            return self._processor(text=text, **keywords)
        num_pairs = len(text) // 2
        once = self._processor(images=images[:num_pairs], text=text[:num_pairs], **keywords)
        for name, tensor in once.items():
            once[name] = torch.cat([tensor, tensor])
        return once


def with_image_list(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its images, if it has a column for them, as a list under `images`; empty without one."""
    if "image" in row:
        row = {**row, "images": [] if row["image"] is None else [row["image"]]}
        del row["image"]
    elif "images" in row:
        row = {**row, "images": row["images"] or []}
    return row
