"""Tiles and tokens of images against transformers' own processor and the counts of InternVL's."""

from __future__ import annotations

import json

import pytest
import torch

from tests.data.pictures import SIDE, TILE_LENGTH, encoded, picture, saved, tiny_processor, user
from xtuner_hf._compat import optimal_tiled_canvas
from xtuner_hf.data.conversation import check_conversation
from xtuner_hf.data.images import BadImage, load_pixels
from xtuner_hf.data.processor import InternVLProcessor
from xtuner_hf.data.tiles import ImageTiler, take_images
from xtuner_hf.data.tokenize import tokenize_conversation


@pytest.mark.parametrize(
    ("width", "height", "tiles", "context_tokens"),
    [(448, 448, 1, 256), (800, 600, 13, 3328), (1920, 1080, 9, 2304)],
)
def test_tiles_of_internvl(width, height, tiles, context_tokens):
    tiler = ImageTiler(tiny_processor(side=448, tile_length=256))
    assert tiler.num_tiles(width, height) == tiles
    assert tiler.length(tiles) == context_tokens + 2


def reference_tiles(width: int, height: int, most: int) -> int:
    """InternVL's rule, written out: the nearest ratio, on a tie the larger grid if the image fills half of it."""
    grids = sorted(
        ((i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most), key=lambda g: g[0] * g[1]
    )
    best, nearest = (1, 1), float("inf")
    for i, j in grids:
        away = abs(width / height - i / j)
        if away < nearest or (away == nearest and width * height > 0.5 * 448 * 448 * i * j):
            best, nearest = (i, j), away
    cells = best[0] * best[1]
    return cells + (cells > 1)


def test_many_sizes_against_the_rule_written_out():
    tiler = ImageTiler(tiny_processor(side=448))
    for width in range(1, 4000, 271):
        for height in range(1, 4000, 193):
            assert tiler.num_tiles(width, height) == reference_tiles(width, height, 12), (width, height)
            assert tiler.num_tiles(width, height, 5) == reference_tiles(width, height, 5), (width, height)


def test_images_of_a_row_share_its_tiles():
    tiler = ImageTiler(tiny_processor(), max_row_tiles=12)
    images = [{"path": "x", "width": 64, "height": 48}] * 5 + [{"path": "y", "width": 64, "height": 48, "max_tiles": 1}]
    tiles = [json.loads(reference)["tiles"] for reference in tiler.references(images, "row")]
    assert tiles == [reference_tiles(64 * 28, 48 * 28, 2)] * 5 + [1]


@pytest.mark.parametrize("size", [(16, 16), (40, 31), (200, 30), (7, 90)])
@pytest.mark.parametrize("settings", [{}, {"max_patches": 6}, {"min_patches": 2}, {"crop_to_patches": False}])
def test_ids_and_pixels_equal_transformers_processor(tmp_path, size, settings):
    """The stock processor is given the images opened; here the sizes alone make the ids, and the pixels come later."""
    processor = tiny_processor(**settings)
    other = saved(tmp_path, "other.png", 30, 30, seed=1)
    path = saved(tmp_path, "image.png", *size)
    messages = user("Look: ", {"type": "image", "path": path}, "and ", {"type": "image", "path": other}, "Alike?")
    tiler = ImageTiler(processor)
    images, conversation = take_images(check_conversation({"messages": messages}), tiler)
    ids, labels = tokenize_conversation(conversation, processor.tokenizer, None, False)
    ids, labels, references = tiler.expand(ids, labels, tiler.references(images, "row"))
    expected = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"crop_to_patches": True}
    )
    assert ids == expected["input_ids"][0].tolist()
    pixels = torch.cat([tiler.cut(reference) for reference in references if reference is not None])
    torch.testing.assert_close(pixels, expected["pixel_values"], rtol=0, atol=0)
    assert pixels.shape[1:] == (3, SIDE, SIDE)
    in_image = [token in processor.image_token_ids for token in ids]
    assert sum(in_image) == len(pixels) * TILE_LENGTH + 2 * 2
    assert labels == [-100 if hidden else token for token, hidden in zip(ids, in_image, strict=True)]
    starts = [place for place, reference in enumerate(references) if reference is not None]
    assert starts == [place for place, token in enumerate(ids) if token == processor.start_image_token_id]


def test_a_file_that_changed_its_size_is_named_with_its_row(tmp_path):
    tiler = ImageTiler(tiny_processor())
    path = saved(tmp_path, "image.png", 64, 48)
    (reference,) = tiler.references([{"path": path, "width": 16, "height": 16}], "train[7]")
    with pytest.raises(
        BadImage, match=r"^train\[7\]: the image '.*image.png' has 64 x 48 pixels, which is 13 tiles, and"
    ):
        tiler.cut(reference)


def test_a_reduced_image_keeps_its_grid(tmp_path):
    """Rounding of its sides moves the ratio; the grid is that of the whole image."""
    tiler = ImageTiler(tiny_processor(), max_pixels=20_000)
    whole = ImageTiler(tiny_processor())
    for width in range(201, 1201, 111):
        (tmp_path / "large.jpg").write_bytes(encoded(picture(width, 333), "JPEG", quality=95))
        (reference,) = whole.references([{"path": str(tmp_path / "large.jpg")}], "row")
        pixels, size = load_pixels(json.loads(reference), 20_000)
        assert size == (width, 333)
        assert pixels.width < width
        reduced, exact = tiler.cut(reference), whole.cut(reference)
        assert reduced.shape == exact.shape
        assert (reduced - exact).abs().mean() < 0.05
        grid = optimal_tiled_canvas((333, width), (SIDE, SIDE), 1, 12)
        assert len(reduced) == grid[0] * grid[1] + (grid != (1, 1))


def test_processor_round_trip(tmp_path):
    processor = tiny_processor(max_patches=7)
    processor.save_pretrained(tmp_path)
    loaded = InternVLProcessor.from_pretrained(str(tmp_path))
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    assert loaded.image_processor.max_patches == 7
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["processor_class"] == "InternVLProcessor"
    assert settings["image_seq_length"] == TILE_LENGTH
    frames = settings["video_processor"]
    assert frames["video_processor_type"] == "InternVLVideoProcessor", "transformers loads no processor without it"
    assert frames["image_mean"] == settings["image_processor"]["image_mean"]
    with pytest.raises(
        ValueError, match="The tokenizer has no start_image_token, end_image_token, context_image_token"
    ):
        InternVLProcessor(
            processor.image_processor, type(processor.tokenizer)(tokenizer_object=processor.tokenizer.backend_tokenizer)
        )
