"""Images and videos of a conversation, in the shapes that people write them in, to one shape.

A message with images then has a text `content` with `<image>` where each stands, and `images`, a list of objects in the
order of the placeholders (see images.py):

    {"role": "user", "content": "<image>\\nWhat is this?", "images": [{"path": "cat.jpg", "width": 640, "height": 480}]}

Read are parts of content (`image`, `image_url`, `video`, `video_url`), placeholders in the text, in which case the
images may stand in parts or in the row's `images` or `image` (LLaVA, InternVL, TRL), and XTuner's jsonl.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .malformed import MalformedRow, kind

IMAGE = "<image>"
_PLACEHOLDER = re.compile("<image>|<IMG_CONTEXT>")
_VIDEO_PLACEHOLDER = re.compile("<video>|<VIDEO_CONTEXT>")
_IMAGE_PARTS, _VIDEO_PARTS = ("image", "image_url"), ("video", "video_url")
_IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class RowImages:
    """The images that stand in a row and not in its messages, given out in order.

    Args:
        row: perhaps with `images` (a list) or `image` (one, or a list); `width` and `height` next to them, each one
            number or a list.
        root: folder of relative paths.
    """

    def __init__(self, row: Mapping[str, Any], root: str | Path | None = None):
        self.root = root
        given = row.get("images") if row.get("images") is not None else row.get("image")
        given = [] if given is None else given if isinstance(given, list) else [given]
        self.found = bool(given)
        sizes = [_numbers(row.get(side), len(given), side) for side in ("width", "height")]
        self._left: Iterator[dict[str, Any]] = iter(
            [
                _sized(read_image(value, f"image {number}", root), width, height)
                for number, (value, width, height) in enumerate(zip(given, *sizes, strict=True), 1)
            ]
        )

    def take(self, where: str) -> dict[str, Any]:
        image = next(self._left, None)
        if image is None:
            raise MalformedRow(
                "placeholder without image",
                f"{where} has a placeholder of an image, and the row has no image left for it; give the row as many "
                "images as placeholders.",
            )
        return image

    def check_all_taken(self) -> None:
        left = sum(1 for _ in self._left)
        if left:
            raise MalformedRow(
                "image without placeholder",
                f"{left} of the row's images have no placeholder: write {IMAGE} in the text where each of them stands.",
            )


def place_images(message: dict[str, Any], where: str, row_images: RowImages) -> None:
    """Bring `content` and `images` of a message into the one shape; a message without images stays as it is.

    Raises:
        MalformedRow: placeholders and images do not match, or an image cannot be meant.
    """
    content = message.get("content")
    given = message.pop("images", None)
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    parts = [part for part in parts if part is not None]
    images = [read_image(image, where, row_images.root) for image in given or ()]
    images += [_image_of_part(part, where, row_images) for part in parts if _kind(part) in _IMAGE_PARTS]
    videos = [_frames(part, where, row_images.root) for part in parts if _kind(part) in _VIDEO_PARTS]
    if not images and not videos and not row_images.found:
        return
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    says_where = any(_PLACEHOLDER.search(text) or _VIDEO_PLACEHOLDER.search(text) for text in texts)
    text, placed = (_by_placeholders if says_where else _by_parts)(parts, images, videos, where, row_images)
    if placed:
        message["content"], message["images"] = text, placed


def _by_parts(parts: list, images: list, videos: list, where: str, row_images: RowImages) -> tuple[str, list]:
    """Images stand where their parts do, each with a line of its own, as in InternVL's chat template."""
    text, placed = "", []
    images_left, videos_left = iter(images), iter(videos)
    for part in parts:
        if _kind(part) in _IMAGE_PARTS:
            text += f"{IMAGE}\n"
            placed.append(next(images_left))
        elif _kind(part) in _VIDEO_PARTS:
            frames = next(videos_left)
            text += f"{_of_frames(frames)}\n"
            placed += frames
        else:
            text += _text_of(part, where)
    if next(images_left, None) is not None:
        raise MalformedRow(
            "image without placeholder",
            f"{where} has 'images', and its text does not say where they stand: write {IMAGE} for each of them.",
        )
    return text, placed


def _by_placeholders(parts: list, images: list, videos: list, where: str, row_images: RowImages) -> tuple[str, list]:
    """Images stand where the text says."""
    placed: list[dict[str, Any]] = []
    own_images, own_videos = iter(images), iter(videos)

    def place(match: re.Match) -> str:
        if _VIDEO_PLACEHOLDER.fullmatch(match[0]):
            frames = next(own_videos, None)
            if frames is None:
                raise MalformedRow(
                    "placeholder without image",
                    f"{where} has {match[0]} in its text and no video for it; add a part of type 'video'.",
                )
            placed.extend(frames)
            return _of_frames(frames)
        image = next(own_images, None) if images else row_images.take(where)
        if image is None:
            raise MalformedRow(
                "placeholder without image",
                f"{where} has more placeholders than its {len(images)} images; give it as many.",
            )
        placed.append(image)
        return IMAGE

    either = f"{_PLACEHOLDER.pattern}|{_VIDEO_PLACEHOLDER.pattern}"
    is_media = (*_IMAGE_PARTS, *_VIDEO_PARTS)
    text = "".join(re.sub(either, place, _text_of(part, where)) for part in parts if _kind(part) not in is_media)
    left = len(list(own_images)) + len(list(own_videos))
    if left:
        raise MalformedRow(
            "image without placeholder",
            f"{where} has {left} images or videos more than placeholders in its text: write {IMAGE} where each stands, "
            "or no placeholder at all, and they stand where their parts do.",
        )
    return text, placed


def read_image(value: Any, where: str, root: str | Path | None = None) -> dict[str, Any]:
    """One image in the shape of images.py; nothing is opened.

    Args:
        value: a path, a `file:` or `data:` URL, bytes, a PIL image, or an object with one of these as `path`, `url`,
            `bytes`, `base64`, `image` or `image_url`, and perhaps `width` and `height` or XTuner's `image_wh`.

    Raises:
        MalformedRow: for http URLs, too, which are not fetched in training.
    """
    if isinstance(value, Mapping):
        value = {key: item for key, item in value.items() if item is not None}
        source = next(
            (value[key] for key in ("bytes", "base64", "path", "url", "image", "image_url") if key in value), None
        )
        if isinstance(source, str) and "base64" in value and "bytes" not in value:
            source = f"data:;base64,{source}"
        image = read_image(source, where, root)
        tiles = {"max_tiles": value["max_tiles"]} if "max_tiles" in value else {}
        return _sized(image, *_size_in(value)) | tiles
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        (value if value.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else value.convert("RGB")).save(
            file, "PNG"
        )
        return {"base64": base64.b64encode(file.getvalue()).decode(), "width": value.width, "height": value.height}
    if isinstance(value, (bytes, bytearray)):
        return {"base64": base64.b64encode(value).decode()}
    if not isinstance(value, str) or not value:
        raise MalformedRow("no image", f"{where} has an image that is {kind(value)}; give a path or bytes.")
    if value.startswith("data:"):
        header, _, data = value.partition(",")
        if not header.endswith(";base64"):
            raise MalformedRow("no image", f"{where} has a 'data:' URL that is not base64; encode it so.")
        return {"base64": data}
    if re.match(r"(https?|ftp|s3|gs|hf)://", value):
        raise MalformedRow(
            "image on the network",
            f"{where} has an image at {value!r}, which training does not fetch; download it and give its path.",
        )
    path = Path(value.removeprefix("file://"))
    return {"path": str(Path(root) / path if root is not None else path)}


def _image_of_part(part: dict[str, Any], where: str, row_images: RowImages) -> dict[str, Any]:
    """The part's own image, or the row's next one."""
    named = {key for key, value in part.items() if value is not None} - {"type", "text", "width", "height"}
    if not named:
        return _sized(row_images.take(where), part.get("width"), part.get("height"))
    return read_image({key: part[key] for key in part if key != "type"}, where, row_images.root)


def _frames(part: dict[str, Any], where: str, root: str | Path | None) -> list[dict[str, Any]]:
    """A frame is one tile, as in InternVL."""
    value = next(
        (part[key] for key in ("frames", "video", "video_url", "path", "url") if part.get(key) is not None), None
    )
    if isinstance(value, Mapping):
        return _frames({"type": "video", **value}, where, root)
    if isinstance(value, str):
        folder = Path(root or "") / value.removeprefix("file://")
        value = (
            sorted(str(file) for file in folder.iterdir() if file.suffix.lower() in _IMAGE_FILES)
            if folder.is_dir()
            else None
        )
        root = None
    if not isinstance(value, list) or not value:
        raise MalformedRow(
            "video without frames",
            f"{where} has a video that is not given as its frames; write them as images (a folder, or a list of them).",
        )
    return [_sized(read_image(frame, where, root), *_size_in(part)) | {"max_tiles": 1} for frame in value]


def _of_frames(frames: list) -> str:
    return "\n".join(f"Frame{number}: {IMAGE}" for number in range(1, len(frames) + 1))


def _size_in(part: Mapping[str, Any]) -> tuple[Any, Any]:
    """(width, height) or Nones. XTuner's `image_wh` is a pair, or a list that holds one."""
    wh: Any = part.get("image_wh") or (part.get("width"), part.get("height"))
    return tuple(wh[0]) if len(wh) == 1 else tuple(wh)


def _sized(image: dict[str, Any], width: Any, height: Any) -> dict[str, Any]:
    if not width and not height:
        return image
    if not all(isinstance(side, int) and side > 0 for side in (width, height)):
        raise MalformedRow("malformed size", f"an image has width {width!r} and height {height!r}; both are pixels.")
    return image | {"width": width, "height": height}


def _numbers(value: Any, number: int, side: str) -> list[Any]:
    values = value if isinstance(value, list) else [value] * number
    if len(values) != number:
        raise MalformedRow("malformed size", f"'{side}' has {len(values)} numbers for {number} images; give each one.")
    return values


def _kind(part: Any) -> str | None:
    """Of a part of content; Hub data sets leave `type` out now and then."""
    if not isinstance(part, Mapping):
        return None
    return part.get("type") or next((key for key in (*_IMAGE_PARTS, *_VIDEO_PARTS) if part.get(key) is not None), None)


def _text_of(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        raise wrong_part(part, where)
    return part["text"]


def wrong_part(part: Any, where: str) -> MalformedRow:
    """The error of a part of a message's content that is neither text, image nor video."""
    found = f"a part of type {_kind(part)!r}" if _kind(part) else f"a part that is {kind(part)}"
    return MalformedRow(
        "content of the wrong type", f"{where} has {found}; parts of type 'text', 'image' and 'video' are read."
    )
