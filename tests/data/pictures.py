"""Images, a processor with tiny tiles, and rows with images, that tests share."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.data.chat import tiny_tokenizer
from xtuner_hf.data import InternVLProcessor
from xtuner_hf.data.tokenize import internvl_template

SIDE, TILE_LENGTH = 16, 4
NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def vision_tokenizer() -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with InternVL's tokens and template."""
    backend = tiny_tokenizer().backend_tokenizer
    backend.add_special_tokens(list(NAMES.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=NAMES,
        chat_template=internvl_template(),
        model_max_length=1_000_000,
    )


def tiny_processor(side: int = SIDE, tile_length: int = TILE_LENGTH, **settings: Any) -> InternVLProcessor:
    """Tiles of 16 x 16 pixels and 4 tokens, 12 at most."""
    images = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        **{"crop_to_patches": True, **settings},
    )
    return InternVLProcessor(images, vision_tokenizer(), image_seq_length=tile_length)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth one: what is resized in two ways stays alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def saved(folder: Path, name: str, width: int = 16, height: int = 16, seed: int = 0, **options: Any) -> str:
    path = folder / name
    picture(width, height, seed).save(path, **options)
    return str(path)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def table(*rows: dict[str, Any]) -> Dataset:
    """Rows that did not come through `load_conversations`: every content a list of parts, as Arrow wants it."""

    def parts(content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    return Dataset.from_list(
        [
            row | {"messages": [message | {"content": parts(message["content"])} for message in row["messages"]]}
            for row in rows
        ]
    )


def user(*parts: Any) -> list[dict[str, Any]]:
    """A conversation of one turn each; text is a part of its own."""
    parts = tuple({"type": "text", "text": part} if isinstance(part, str) else part for part in parts)
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "Yes."}]
