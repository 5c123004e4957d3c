"""The shapes that people write images in come to one; what does not match is named."""

from __future__ import annotations

import base64
import json
import logging

import pytest
from datasets import Dataset, Image, List, load_dataset

from tests.data.pictures import encoded, picture, saved, table, tiny_processor, user
from xtuner_hf.data import load_conversations, prepare_dataset
from xtuner_hf.data.conversation import check_conversation
from xtuner_hf.data.image_parts import RowImages, read_image
from xtuner_hf.data.malformed import MalformedRow

ANSWER = {"role": "assistant", "content": "Yes."}


def one(content, **message) -> dict:
    return {"messages": [{"role": "user", "content": content, **message}, ANSWER]}


def part(path: str, **keys) -> dict:
    return {"type": "image", "path": path, **keys}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


XTUNER = {"type": "image_url", "image_url": {"url": "a.png", "image_wh": [40, 30]}}
SIZED = {"path": "a.png", "width": 40, "height": 30}

SHAPES = {
    "parts": (one([part("a.png"), text("What?")]), "<image>\nWhat?", [{"path": "a.png"}]),
    "a part behind": (one([text("What? "), part("a.png")]), "What? <image>\n", [{"path": "a.png"}]),
    "image key": (one([{"type": "image", "image": "a.png"}, text("?")]), "<image>\n?", [{"path": "a.png"}]),
    "url key": (one([{"type": "image", "url": "file:///x/a.png"}, text("?")]), "<image>\n?", [{"path": "/x/a.png"}]),
    "openai": (
        one([{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}, text("?")]),
        "<image>\n?",
        [{"base64": "aGk="}],
    ),
    "base64 key": (one([{"type": "image", "base64": "aGk="}, text("?")]), "<image>\n?", [{"base64": "aGk="}]),
    "no type": (one([{"image": "a.png"}, {"text": "?"}]), "<image>\n?", [{"path": "a.png"}]),
    "arrow nulls": (
        one([{"type": "image", "path": "a.png", "text": None}, {"type": "text", "path": None, "text": "?"}]),
        "<image>\n?",
        [{"path": "a.png"}],
    ),
    "sized": (one([part("a.png", width=40, height=30)]), "<image>\n", [SIZED]),
    "xtuner": (one([XTUNER, text("<IMG_CONTEXT>\nWhat?")]), "<image>\nWhat?", [SIZED]),
    "xtuner, list of sizes": (
        one([{"type": "image_url", "image_url": {"url": "a.png", "image_wh": [[40, 30]]}}, text("?")]),
        "<image>\n?",
        [SIZED],
    ),
    "xtuner, newer": (
        one([{"type": "image", "image": {"url": "a.png", "image_wh": [40, 30]}}, text("?")]),
        "<image>\n?",
        [SIZED],
    ),
    "xtuner, two": (
        one([XTUNER, {"type": "image_url", "image_url": {"url": "b.png"}}, text("<IMG_CONTEXT> and <IMG_CONTEXT>?")]),
        "<image> and <image>?",
        [SIZED, {"path": "b.png"}],
    ),
    "llava": (
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Yes."}],
        },
        "<image>\nWhat?",
        [{"path": "a.png"}],
    ),
    "internvl": (
        {
            "image": ["a.png", "b.png"],
            "width": [40, 50],
            "height": [30, 20],
            "conversations": [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "Yes."}],
        },
        "<image> or <image>?",
        [SIZED, {"path": "b.png", "width": 50, "height": 20}],
    ),
    "trl": (
        {"images": ["a.png"], **one([{"type": "image"}, text("What?")])},
        "<image>\nWhat?",
        [{"path": "a.png"}],
    ),
    "trl, nulls": (
        {"images": ["a.png"], **one([{"type": "image", "text": None}, {"type": "text", "text": "?"}])},
        "<image>\n?",
        [{"path": "a.png"}],
    ),
    "images of a message": (
        one("<image> or <image>?", images=["a.png", {"path": "b.png"}]),
        "<image> or <image>?",
        [{"path": "a.png"}, {"path": "b.png"}],
    ),
    "video": (
        one([{"type": "video", "video": ["1.png", "2.png"]}, text("What?")]),
        "Frame1: <image>\nFrame2: <image>\nWhat?",
        [{"path": "1.png", "max_tiles": 1}, {"path": "2.png", "max_tiles": 1}],
    ),
    "video where the text says": (
        one([{"type": "video", "frames": ["1.png"]}, XTUNER, text("<video>\nand <image>?")]),
        "Frame1: <image>\nand <image>?",
        [{"path": "1.png", "max_tiles": 1}, SIZED],
    ),
    "plain text": (one("What is an <image> tag?"), "What is an <image> tag?", None),
    "text parts": (one([text("a"), text("b")]), "ab", None),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_shape(shape):
    row, content, images = SHAPES[shape]
    conversation = check_conversation(row)
    message = conversation["messages"][0]
    assert message["content"] == content
    assert message.get("images") == images
    assert check_conversation(conversation)["messages"] == conversation["messages"], "checked rows stay as they are"


def test_what_transformers_template_writes_for_frames_of_a_video():
    """(The stock processor replaces `<video>` by the same words; its template puts a line end behind.)"""
    message = check_conversation(one([{"type": "video", "video": ["1.png", "2.png"]}, text("?")]))["messages"][0]
    frames = tiny_processor().replace_video_token({"pixel_values_videos": [_Frames(2)]}, 0)
    assert message["content"].replace("<image>", "<img>" + "<IMG_CONTEXT>" * 4 + "</img>") == frames + "\n?"


class _Frames:
    def __init__(self, number: int):
        self.shape = (number,)


def test_bytes_and_pixels():
    image = picture(20, 10)
    for value in (image, encoded(image), {"bytes": encoded(image), "path": None}):
        found = check_conversation(one([{"type": "image", "image": value}]))["messages"][0]["images"][0]
        assert base64.b64decode(found["base64"]) == encoded(image)
    assert (found.get("width"), read_image(image, "x")["width"]) == (None, 20)


def test_a_folder_of_frames_and_relative_paths(tmp_path):
    (tmp_path / "clip").mkdir()
    for name in ("2.png", "1.png"):
        saved(tmp_path / "clip", name)
    row = one([{"type": "video_url", "video_url": {"url": "clip", "image_wh": [16, 16]}}, text("<VIDEO_CONTEXT>?")])
    message = check_conversation(row, image_root=tmp_path)["messages"][0]
    assert [image["path"] for image in message["images"]] == [str(tmp_path / "clip" / f"{n}.png") for n in (1, 2)]
    assert message["images"][0]["width"] == 16
    assert read_image("a.png", "x", tmp_path)["path"] == str(tmp_path / "a.png")
    assert read_image("/b/a.png", "x", tmp_path)["path"] == "/b/a.png"


BAD = [
    (one([{"type": "image"}, text("?")]), "message 1 has a placeholder of an image, and the row has no image left"),
    ({"image": "a.png", **one("<image> <image>")}, "message 1 has a placeholder of an image, and the row has no image"),
    (one([XTUNER, text("<IMG_CONTEXT> <IMG_CONTEXT>")]), "message 1 has more placeholders than its 1 images"),
    (one([XTUNER, text("<video>")]), "message 1 has <video> in its text and no video for it"),
    ({"images": ["a.png"], **one("What?")}, "1 of the row's images have no placeholder: write <image> in the text"),
    ({"images": ["a.png", "b.png"], **one("<image>")}, "1 of the row's images have no placeholder"),
    (one([XTUNER, XTUNER, text("<image>")]), "message 1 has 1 images or videos more than placeholders in its text"),
    (one("What?", images=["a.png"]), "message 1 has 'images', and its text does not say where they stand"),
    (
        one([part("https://x.org/a.png")]),
        "message 1 has an image at 'https://x.org/a.png', which training does not fetch",
    ),
    (one([part("s3://x/a.png")]), "which training does not fetch"),
    (one([{"type": "image", "image": 7}]), "message 1 has an image that is a number; give a path or bytes"),
    (one([{"type": "image", "image": "data:image/png,x"}]), "has a 'data:' URL that is not base64"),
    (
        one([{"type": "video", "video": "clip.mp4"}]),
        "has a video that is not given as its frames; write them as images",
    ),
    (one([{"type": "audio", "audio": "a.wav"}]), "message 1 has a part of type 'audio'; parts of type 'text', 'image'"),
    (one([part("a.png", width=0, height=7)]), "an image has width 0 and height 7"),
    ({"image": ["a.png"], "width": [1, 2], "height": [1, 2], **one("<image>")}, "'width' has 2 numbers for 1 images"),
]


@pytest.mark.parametrize(("row", "problem"), BAD)
def test_what_does_not_match_is_named(row, problem):
    with pytest.raises(MalformedRow) as error:
        check_conversation(row)
    assert str(error.value).startswith(problem) or problem in str(error.value)


def test_row_images_are_given_out_once():
    images = RowImages({"images": ["a.png", "b.png"]})
    assert [images.take("x")["path"], images.take("x")["path"]] == ["a.png", "b.png"]
    images.check_all_taken()


@pytest.mark.parametrize("content", ["An <image> tag", "<IMG_CONTEXT>", "<image><image>"])
def test_placeholders_in_a_text_without_images(tmp_path, content):
    """As text they are text; next to images the model would take them for one."""
    dataset = Dataset.from_list([one("Hi"), one(content)])
    prepare_dataset(dataset, tiny_processor().tokenizer, 512)
    with pytest.raises(
        ValueError, match=r"^train\[1\]: message 1 has \d placeholders of images in its text and 0 images"
    ):
        prepare_dataset(dataset, tiny_processor(), 512, name="train")


def test_images_and_a_tokenizer_alone(tmp_path):
    row = one([part(saved(tmp_path, "a.png"))])
    with pytest.raises(ValueError, match=r"^train\[0\]: the row has 1 images, and a tokenizer alone makes nothing of"):
        prepare_dataset(table(row), tiny_processor().tokenizer, 512, name="train")


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_load_reads_sizes_and_counts_bad_images(tmp_path, caplog):
    saved(tmp_path, "good.png", 40, 30)
    (tmp_path / "empty.png").write_bytes(b"")
    rows = [
        one([part("good.png")]),
        one([part("missing.png")]),
        one([part("empty.png")]),
        one([part("elsewhere.png", width=100, height=50)]),  # nothing is opened
        one("Hi"),
    ]
    path = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: there is no image '.*/missing.png'; .* \(and 1 more"):
        load_conversations(path)
    with caplog.at_level(logging.WARNING):
        loaded = load_conversations(path, on_bad_row="skip")
    assert "Left out 2 of 5 rows: 1 missing image, 1 broken image. The first" in caplog.text
    assert [message[0].get("images") for message in loaded["messages"]] == [
        [{"path": str(tmp_path / "good.png"), "width": 40, "height": 30}],
        [{"path": str(tmp_path / "elsewhere.png"), "width": 100, "height": 50}],
        None,
    ]


def test_columns_of_images_are_not_decoded(tmp_path):
    """The files of a Hub data set travel as they are; `datasets` would decode each to pixels."""
    jpeg = encoded(picture(20, 20), "JPEG")
    rows = table({"images": [{"bytes": jpeg, "path": None}], **one([{"type": "image"}, text("?")])})
    rows.cast_column("images", List(Image())).to_parquet(tmp_path / "rows.parquet")
    hub = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    for rows in (load_conversations(tmp_path / "rows.parquet"), hub):
        prepared = prepare_dataset(rows, tiny_processor(), 512, packing=False)
        (reference,) = [json.loads(ref) for ref in prepared[0]["image_refs"] if ref is not None]
        assert base64.b64decode(reference["base64"]) == jpeg
        assert reference["tiles"] == 1


def test_text_and_pre_training_rows_with_images(tmp_path):
    path = saved(tmp_path, "a.png", 64, 16)
    processor = tiny_processor()
    texts = Dataset.from_list(
        [{"text": "A <image> b", "images": [path]}, {"text": "", "images": []}, {"text": "c", "images": []}]
    )
    rows = prepare_dataset(texts, processor, 512, packing=False)
    chats = [
        {"messages": [{"role": "pretrain", "content": [text("A "), part(path), text("b")]}]},
        {"messages": user("c")},
    ]
    chat_rows = prepare_dataset(table(*chats), processor, 512, packing=False)
    image = "<img>" + "<IMG_CONTEXT>" * 4 * 5 + "</img>"
    assert [processor.tokenizer.decode(row["input_ids"]) for row in rows] == [f"A {image} b<|im_end|>", "c<|im_end|>"]
    assert processor.tokenizer.decode(chat_rows[0]["input_ids"]) == f"A {image}\nb<|im_end|>"
    for row in (rows[0], chat_rows[0]):
        learned = [label for label in row["labels"] if label != -100]
        assert learned == [token for token in row["input_ids"] if token not in processor.image_token_ids]
    with pytest.raises(MalformedRow, match="a turn of role 'pretrain' is a row of its own"):
        check_conversation({"messages": [{"role": "pretrain", "content": "a"}, ANSWER]})
