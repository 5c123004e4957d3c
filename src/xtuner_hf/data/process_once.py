"""One pass of the image processor for each image, however often the same batch goes through its processor.

TRL's GRPO hands a batch of prompts to the processor for their token ids, again for the pixels, and once more for the
number of tiles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_utils import make_flat_list_of_images


@contextlib.contextmanager
def images_processed_once(processor: Any) -> Iterator[None]:
    """In here, a processor of images and text remembers the tiles of each image object.

    Args:
        processor: of a trainer; a tokenizer is left as it is.
    """
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None:
        yield
        return
    processor.image_processor = _Remembering(image_processor)
    try:
        yield
    finally:
        processor.image_processor = image_processor


class _Remembering:
    """Stands for an image processor that cuts tiles: `pixel_values` [tiles, 3, height, width] and `num_patches`."""

    def __init__(self, image_processor: Any):
        self._image_processor = image_processor
        # The image is kept too: another one would get its identity.
        self._tiles: dict[tuple[int, str], tuple[Any, BatchFeature]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)

    def __call__(self, images: Any, **settings: Any) -> BatchFeature:
        flat: Any = make_flat_list_of_images(images)
        parts = [self._of_image(image, settings) for image in flat]
        return BatchFeature(
            {name: torch.cat([part[name] for part in parts]) for name in ("pixel_values", "num_patches")}
        )

    def _of_image(self, image: Any, settings: dict[str, Any]) -> BatchFeature:
        settings = settings | {"return_tensors": "pt"}
        changed = {n: v for n, v in settings.items() if v != getattr(self._image_processor, n, None)}
        key = id(image), repr(sorted(changed.items()))
        if key not in self._tiles:
            self._tiles[key] = image, self._image_processor([image], **settings)
        return self._tiles[key][1]
