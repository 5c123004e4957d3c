"""Rows with images from conversations to batches: nothing is decoded before, and each tile arrives."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from tests.data.pictures import SIDE, TILE_LENGTH, saved, tiny_processor, user
from xtuner_hf.attention.documents import Documents
from xtuner_hf.data import ImageTiler, PackedCollator, VisionCollator, load_conversations, prepare_dataset
from xtuner_hf.data.images import BadImage
from xtuner_hf.data.packing import fit_rows, pack_rows
from xtuner_hf.data.tiles import IMAGE_REFS, image_spans


@pytest.fixture
def conversations(tmp_path) -> Dataset:
    """Text alone, one image, two images in two turns, an image of many tiles."""
    small, large = saved(tmp_path, "small.png", seed=1), saved(tmp_path, "large.png", 64, 32, seed=2)
    rows = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}],
        user({"type": "image", "path": small}, "What?"),
        [*user({"type": "image", "path": large}, "This?"), *user({"type": "image", "path": small}, "That?")],
        user("Well", {"type": "image", "path": large}),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    return load_conversations(path)


def collator(processor, **options) -> VisionCollator:
    return VisionCollator(pad_token_id=0, tiler=ImageTiler(processor), **options)


def in_turn(collate, rows) -> list[dict]:
    return [collate([row]) for row in rows]


def test_nothing_is_opened_before_a_batch(conversations, monkeypatch):
    def refuse(*_):
        raise AssertionError("an image was opened")

    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.open", refuse)
        rows = prepare_dataset(conversations, tiny_processor(), 256)
    assert sum(reference is not None for row in rows for reference in row[IMAGE_REFS]) == 4
    monkeypatch.setattr("PIL.Image.open", refuse)
    with pytest.raises(AssertionError, match="an image was opened"):
        collator(tiny_processor(), padding_free=True)(list(rows))


def test_only_answers_are_learned(conversations):
    processor = tiny_processor()
    rows = prepare_dataset(conversations, processor, 256, packing=False)
    learned = [processor.tokenizer.decode([label for label in row["labels"] if label != -100]) for row in rows]
    assert learned == [
        "Hello there<|im_end|>\n",
        "Yes.<|im_end|>\n",
        "Yes.<|im_end|>\nYes.<|im_end|>\n",
        "Yes.<|im_end|>\n",
    ]


def test_packed_and_padded_batches_hold_the_same(conversations):
    processor = tiny_processor()
    padded_rows = list(prepare_dataset(conversations, processor, 512, packing=False))
    packed_rows = list(prepare_dataset(conversations, processor, 512))
    assert len(packed_rows) < len(padded_rows)
    padded = collator(processor)(padded_rows)
    packed = collator(processor, padding_free=True, pad_to_multiple_of=64)(packed_rows)
    alone = in_turn(collator(processor, padding_free=True), padded_rows)
    documents = {tuple(batch["input_ids"][0].tolist()): batch.get("pixel_values") for batch in alone}
    assert [set(batch) & {"pixel_values", IMAGE_REFS} for batch in alone] == [set(), *[{"pixel_values"}] * 3]
    assert padded["num_tiles"].tolist() == [0, 1, 10, 9] == [batch["num_tiles"].item() for batch in alone]
    assert padded["num_tiles"].dtype == torch.int64
    assert packed["num_tiles"].sum() == 20
    torch.testing.assert_close(padded["pixel_values"], torch.cat([batch["pixel_values"] for batch in alone[1:]]))
    # The tiles of the packed batch, dealt out by the image tokens of its documents.
    found = Documents.of_batch(
        1, packed["input_ids"].shape[1], torch.device("cpu"), cu_seq_lens_q=packed["cu_seq_lens_q"]
    )
    tiles = packed["pixel_values"].split(1)
    taken = 0
    for ids in packed["input_ids"][0].split(found.lengths):
        if tuple(ids.tolist()) not in documents:
            assert not ids.any(), "the padding is a document of its own"
            continue
        number = int((ids == processor.image_token_id).sum()) // TILE_LENGTH
        expected = documents.pop(tuple(ids.tolist()))
        if number:
            torch.testing.assert_close(torch.cat(tiles[taken : taken + number]), expected)
        taken += number
    assert taken == 20
    assert not documents
    assert packed["pixel_values"].shape == (20, 3, SIDE, SIDE)
    text_alone = PackedCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=64)(
        [{key: value for key, value in row.items() if key != IMAGE_REFS} for row in packed_rows]
    )
    for key, value in text_alone.items():
        torch.testing.assert_close(packed[key], value) if torch.is_tensor(value) else None
    assert packed.keys() - text_alone.keys() == {"num_tiles", "pixel_values"}


class _Witness(VisionCollator):
    def torch_call(self, examples):
        return super().torch_call(examples) | {"process": os.getpid()}


def test_images_are_decoded_in_workers(conversations):
    processor = tiny_processor()
    rows = prepare_dataset(conversations, processor, 128)
    witness = _Witness(pad_token_id=0, tiler=ImageTiler(processor), padding_free=True)
    batches = list(DataLoader(rows, batch_size=1, num_workers=2, collate_fn=witness))
    assert os.getpid() not in {batch["process"] for batch in batches}
    for batch, expected in zip(batches, in_turn(witness, list(rows)), strict=True):
        assert batch.keys() == expected.keys()
        if "pixel_values" in batch:
            torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"])


def test_an_image_that_broke_later_is_named_with_its_row(conversations):
    processor = tiny_processor()
    rows = list(prepare_dataset(conversations, processor, 512, name="train_dataset"))
    path = json.loads(next(ref for row in rows for ref in row[IMAGE_REFS] if ref is not None and "large" in ref))[
        "path"
    ]
    Path(path).write_bytes(Path(path).read_bytes()[:200])
    with pytest.raises(BadImage, match=r"^train_dataset\[[23]\]: the image '.*large.png' cannot be decoded"):
        collator(processor, padding_free=True)(rows)
    loader = DataLoader(rows, batch_size=8, num_workers=1, collate_fn=collator(processor, padding_free=True))
    with pytest.raises(
        RuntimeError, match=r"BadImage: train_dataset\[[23]\]: the image '.*large.png' cannot be decoded"
    ):
        list(loader)


def test_the_document_of_a_bad_image_is_left_out_and_counted(conversations, caplog):
    processor = tiny_processor()
    rows = list(prepare_dataset(conversations, processor, 512))
    whole = collator(processor, padding_free=True)(rows)
    path = next(
        json.loads(ref)["path"] for row in rows for ref in row[IMAGE_REFS] if ref is not None and "large" in ref
    )
    Path(path).unlink()
    skipping = collator(processor, padding_free=True, on_bad_image="skip")
    with caplog.at_level(logging.WARNING):
        batch = skipping(rows)
    assert skipping.num_bad_images == 2
    assert "Trained on without a document, the 2. in this process: dataset[" in caplog.text
    assert batch["pixel_values"].shape == whole["pixel_values"].shape
    assert sum(tile.any().item() for tile in batch["pixel_values"]) == 2, "the small ones"
    torch.testing.assert_close(batch["input_ids"], whole["input_ids"])
    for start, end in zip(whole["cu_seq_lens_q"][:-1], whole["cu_seq_lens_q"][1:], strict=True):
        ids, labels = whole["input_ids"][0, start:end], batch["labels"][0, start:end]
        is_bad = (ids == processor.image_token_id).sum() > TILE_LENGTH
        expected = torch.full_like(labels, -100) if is_bad else whole["labels"][0, start:end]
        torch.testing.assert_close(labels, expected)
    with pytest.raises(ValueError, match="on_bad_image is 'ignore'; use 'error' or 'skip'"):
        collator(processor, on_bad_image="ignore")


def test_no_cut_goes_through_an_image(conversations):
    processor = tiny_processor()
    rows = prepare_dataset(conversations, processor, 512, packing=False)
    window = 40
    pieces = list(fit_rows(rows, window, "split"))
    for column in ("input_ids", "labels", IMAGE_REFS):
        assert [value for piece in pieces for value in piece[column]] == [
            value for row in rows for value in row[column]
        ]
    for piece in pieces:
        assert 0 < len(piece["input_ids"]) <= window
        for _, end in image_spans(piece[IMAGE_REFS]):
            assert end <= len(piece["input_ids"])
        assert piece["input_ids"].count(processor.start_image_token_id) == len(image_spans(piece[IMAGE_REFS]))
        assert piece["input_ids"].count(processor.image_token_id) % TILE_LENGTH == 0
    streamed = IterableDataset.from_generator(lambda: iter(rows), features=rows.features)
    assert list(fit_rows(streamed, window, "split")) == pieces
    for keep in ("start", "end"):
        for row in fit_rows(rows, window, "truncate", keep=keep):
            assert row["input_ids"].count(processor.image_token_id) % TILE_LENGTH == 0
            assert len(row["input_ids"]) == len(row["labels"]) == len(row[IMAGE_REFS]) <= window
    packed = pack_rows(rows, 512)
    split = list(fit_rows(packed, window, "split"))
    for column in ("input_ids", "labels", IMAGE_REFS):
        assert [value for row in split for value in row[column]] == [v for row in packed for v in row[column]]
    for row in split:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) <= window
        assert row["input_ids"].count(processor.start_image_token_id) == len(image_spans(row[IMAGE_REFS]))
        assert row["input_ids"].count(processor.image_token_id) % TILE_LENGTH == 0
    assert [length for row in split for length in row["seq_lengths"]].count(len(rows[0]["input_ids"])) >= 1
    with pytest.raises(ValueError, match="a row has an image of more than max_length=12 tokens, which cannot be cut"):
        fit_rows(rows, 12, "split")
    with pytest.raises(ValueError, match="packing_strategy='wrapped' would cut through them"):
        pack_rows(rows, 64, strategy="wrapped", name="train")
