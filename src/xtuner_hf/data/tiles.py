"""Dynamic tiling: images to tiles of one size, and tiles to the tokens that stand for them.

How many tiles an image gives, and with it how many tokens, follows from its size alone, so that rows are tokenised and
packed before an image is opened. The grid is InternVL's (arXiv:2404.16821, section 3.3), as transformers' image
processor has it: of all grids with `min_patches` to `max_patches` cells the one of the nearest aspect ratio, and a
thumbnail of the whole in addition if there is more than one cell.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from .._compat import optimal_tiled_canvas
from .image_parts import IMAGE
from .images import MAX_PIXELS, BadImage, image_size, load_pixels
from .malformed import MalformedRow

IMAGE_REFS = "image_refs"


class ImageTiler:
    """The tiles and tokens of images, by a processor.

    Args:
        processor: with the interface of transformers' `InternVLProcessor`.
        max_row_tiles: cells of all images of a row together, as in XTuner: an image of n gets at most
            max(1, max_row_tiles // n). None: every image gets what the processor allows.
        max_pixels: of an image that are decoded at once.
    """

    def __init__(self, processor: Any, max_row_tiles: int | None = None, max_pixels: int = MAX_PIXELS):
        self.image_processor = processor.image_processor
        self.tile_length = processor.image_seq_length
        self.max_row_tiles = max_row_tiles
        self.max_pixels = max_pixels
        self.placeholder = processor.image_token
        self.image_token_id = processor.image_token_id
        self.start_id, self.end_id = processor.start_image_token_id, processor.end_image_token_id

    @property
    def side(self) -> int:
        """Pixels of a tile's side."""
        return self.image_processor.size["height"]

    def num_tiles(self, width: int, height: int, max_tiles: int | None = None) -> int:
        """Tiles of an image, the thumbnail among them.

        Args:
            max_tiles: cells of the grid at most; the processor's `max_patches` by default.
        """
        return self.image_processor.get_number_of_image_patches(height, width, self._limits(max_tiles))

    def _limits(self, max_tiles: int | None) -> dict[str, Any]:
        most = min(max_tiles or self.image_processor.max_patches, self.image_processor.max_patches)
        return {
            "crop_to_patches": True,
            "max_patches": most,
            "min_patches": min(self.image_processor.min_patches, most),
        }

    # ---- before an image is opened ----

    def references(self, images: list[dict[str, Any]], row: str) -> list[str]:
        """What a row keeps of each of its images, as JSON text.

        Args:
            images: in the shape of images.py. A file's header is read where its size is not given.
            row: its name in errors.

        Raises:
            BadImage: a missing or broken file.
        """
        share = max(1, self.max_row_tiles // len(images)) if self.max_row_tiles and images else None
        found = []
        for image in images:
            width, height = image_size(image)
            most = min(filter(None, (share, image.get("max_tiles"))), default=None)
            tiles = self.num_tiles(width, height, most)
            kept = {key: image[key] for key in ("path", "base64") if key in image}
            found.append(
                json.dumps(kept | {"row": row, "max_tiles": most, "tiles": tiles, "tokens": self.length(tiles)})
            )
        return found

    def length(self, tiles: int) -> int:
        """Tokens of an image: those of its tiles between a start and an end."""
        return tiles * self.tile_length + 2

    def text(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        """A message with the tokenizer's token in place of each `<image>`, and without its images.

        Raises:
            MalformedRow: another number of placeholders than of images.
        """
        content, images = message.get("content") or "", message.get("images") or ()
        placeholders = content.count(IMAGE) + content.count(self.placeholder)
        if placeholders != len(images) or self.placeholder in content:
            raise MalformedRow(
                "placeholder without image",
                f"{where} has {placeholders} placeholders of images in its text and {len(images)} images; give it as "
                f"many, and leave {IMAGE} and {self.placeholder} out of text that means something else.",
            )
        rest = {key: value for key, value in message.items() if key != "images"}
        return rest | {"content": content.replace(IMAGE, self.placeholder)} if images else rest

    def expand(
        self, input_ids: list[int], labels: list[int], references: list[str], ignore_index: int = -100
    ) -> tuple[list[int], list[int], list[str | None]]:
        """The tokens of each image in place of its one; nothing of it is learned.

        Returns:
            ids, labels and references, one a token: a reference where an image's tokens begin, None elsewhere.
        """
        if input_ids.count(self.image_token_id) != len(references):
            raise MalformedRow(
                "placeholder without image",
                f"the row has {len(references)} images and, as the chat template wrote it, "
                f"{input_ids.count(self.image_token_id)} placeholders: leave {self.placeholder} out of its texts, or "
                "mend the template.",
            )
        ids: list[int] = []
        expanded: list[int] = []
        placed: list[str | None] = []
        left = iter(references)
        for token, label in zip(input_ids, labels, strict=True):
            if token != self.image_token_id:
                ids.append(token)
                expanded.append(label)
                placed.append(None)
                continue
            reference = next(left)
            tiles = json.loads(reference)["tiles"]
            ids += [self.start_id, *[self.image_token_id] * (tiles * self.tile_length), self.end_id]
            expanded += [ignore_index] * self.length(tiles)
            placed += [reference, *[None] * (self.length(tiles) - 1)]
        return ids, expanded, placed

    # ---- when a batch is put together ----

    def cut(self, reference: str) -> torch.Tensor:
        """[tiles, 3, side, side] float32: the tiles of an image, normalised.

        Raises:
            BadImage: an image that cannot be read, or is of another size than the row said; names the row.
        """
        image = json.loads(reference)
        try:
            pixels, (width, height) = load_pixels(image, self.max_pixels)
            found = self.num_tiles(width, height, image["max_tiles"])
            if found != image["tiles"]:
                raise BadImage(
                    "another size",
                    f"the image {image.get('path', '')!r} has {width} x {height} pixels, which is {found} tiles, and "
                    f"the row was tokenised with {image['tiles']}; correct its width and height, or tokenise it anew.",
                )
        except BadImage as error:
            raise BadImage(error.reason, f"{image['row']}: {error}") from None
        limits = self._limits(image["max_tiles"])
        if pixels.size != (width, height):
            # Decoded at a part of its size, which need not have the nearest ratio to the same grid.
            grid = optimal_tiled_canvas(
                (height, width), (self.side, self.side), limits["min_patches"], limits["max_patches"]
            )
            pixels = pixels.resize((grid[0] * self.side, grid[1] * self.side), self.image_processor.resample)
        batch = self.image_processor(images=[pixels], **limits)
        return torch.from_numpy(np.stack(batch["pixel_values"]))

    def blank(self, reference: str) -> torch.Tensor:
        """[tiles, 3, side, side] of zeros, in place of an image that cannot be read."""
        return torch.zeros(json.loads(reference)["tiles"], 3, self.side, self.side)


def take_images(conversation: dict[str, Any], tiler: ImageTiler | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The images of a conversation, and the conversation with the tokenizer's token where each stands.

    Raises:
        MalformedRow: images that do not match the placeholders in the text, or are there without a tiler.
    """
    images = [image for message in conversation["messages"] for image in message.get("images", ())]
    if tiler is None:
        if images:
            raise MalformedRow(
                "images without processor",
                f"the row has {len(images)} images, and a tokenizer alone makes nothing of them: pass the model's "
                "processor (xtuner_hf.data.InternVLProcessor) instead.",
            )
        return images, conversation
    messages = [tiler.text(message, f"message {number}") for number, message in enumerate(conversation["messages"], 1)]
    return images, conversation | {"messages": messages}


def count_tiles(references: list[str | None] | None) -> int:
    """Tiles of a row, from its `image_refs`."""
    return sum(json.loads(reference)["tiles"] for reference in references or () if reference is not None)


def image_spans(references: list[str | None] | None) -> list[tuple[int, int]]:
    """(first token, one behind the last) of each image of a row, from its `image_refs`."""
    found = [(start, reference) for start, reference in enumerate(references or ()) if reference is not None]
    return [(start, start + json.loads(reference)["tokens"]) for start, reference in found]
