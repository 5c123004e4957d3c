"""What a data-loader worker needs from an image file to its tiles: milliseconds of one core.

python benchmarks/image_decoding.py
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from xtuner_hf.data.tiles import ImageTiler

RESULTS = Path(__file__).parent / "results" / "image_decoding.json"
SIZES = {"448x448": (448, 448), "800x600": (800, 600), "1920x1080": (1920, 1080), "12000x8500": (12_000, 8_500)}


class _Processor:
    """What a tiler asks of a processor, without a tokenizer."""

    image_processor = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448},
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        crop_to_patches=True,
    )
    image_seq_length = 256
    image_token, image_token_id, start_image_token_id, end_image_token_id = "<IMG_CONTEXT>", 0, 1, 2


def main() -> None:
    tiler, found = ImageTiler(_Processor()), {}
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            path = Path(folder) / f"{name}.jpg"
            Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
            (reference,) = tiler.references([{"path": str(path)}], name)
            seconds = []
            for _ in range(5):
                started = time.process_time()
                tiles = tiler.cut(reference)
                seconds.append(time.process_time() - started)
            found[name] = {"tiles": len(tiles), "milliseconds": round(min(seconds) * 1000, 1)}
            print(name, found[name])
    where = {"machine": f"{platform.machine()} CPU, one core, {platform.system()}", "files": "smooth JPEG, quality 90"}
    RESULTS.write_text(json.dumps(where | {"from file to tiles": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
