"""Images that rows speak of: where they lie, how large they are, and their pixels.

An image travels as a small JSON object, `{"path": ...}` or `{"base64": ...}` with perhaps `width` and `height`, through
loading, tokenising and packing. Its pixels are read when a batch is put together, in a worker of the data loader.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .malformed import MalformedRow

# Above this an image is decoded at a half, a quarter or an eighth of its size, or refused where its format cannot:
# 150 MB of pixels. Below it, tiles are exactly those of transformers' processor.
MAX_PIXELS = 50_000_000
_ORIENTATION = 0x0112  # of EXIF
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)


class BadImage(MalformedRow):
    """An image that is missing, broken, too large or of a kind that is not read."""


def image_size(image: dict[str, Any], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) as the image is looked at: what the row says, or else the file's header, turned as EXIF says.

    Raises:
        BadImage: a missing or broken file, or one that `load_pixels` would find too large.
    """
    if image.get("width") and image.get("height"):
        return image["width"], image["height"]
    with _opened(image) as opened:
        size = _looked_at(opened)
        _reduce(opened, max_pixels, _name(image))
        return size


def load_pixels(image: dict[str, Any], max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, tuple[int, int]]:
    """The image in RGB, turned as EXIF says; the first frame of an animation; transparency dropped, as InternVL does.

    Args:
        max_pixels: decoded at once.

    Returns:
        The image, and the (width, height) of the file, of which a very large one has a part.

    Raises:
        BadImage: a missing, broken or cut-off file, values without a known range, or more than `max_pixels` in a format
            that is only decoded whole.
    """
    with _opened(image) as opened:
        turn, size = _orientation(opened), _looked_at(opened)
        _reduce(opened, max_pixels, _name(image))
        pixels = _to_rgb(opened, _name(image))
    return (pixels.transpose(_TRANSPOSED[turn]) if turn in _TRANSPOSED else pixels), size


@contextmanager
def _opened(image: dict[str, Any]) -> Iterator[Image.Image]:
    """The header is read; the pixels are when they are asked for, and any fault of the file becomes a `BadImage`."""
    name = _name(image)
    try:
        with warnings.catch_warnings():
            # Of sizes for which there is a limit here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            source: Any = (
                image["path"] if "path" in image else io.BytesIO(base64.b64decode(image["base64"], validate=True))
            )
            with Image.open(source) as opened:
                yield opened
    except MalformedRow:
        raise
    except FileNotFoundError:
        raise BadImage("missing image", f"there is no image {name}; put it there, or correct the path.") from None
    except IsADirectoryError:
        raise BadImage("missing image", f"the image {name} is a folder; name a file in it.") from None
    except PermissionError:
        raise BadImage("missing image", f"the image {name} may not be read; change its permissions.") from None
    except binascii.Error as error:
        raise BadImage("broken image", f"the image {name} is not base64 ({error}); encode it anew.") from None
    except Image.DecompressionBombError as error:
        raise BadImage("image too large", f"the image {name} is too large ({error}); make it smaller.") from None
    except UnidentifiedImageError:
        raise BadImage(
            "broken image", f"the image {name} {_what_it_is(image)}; replace it, or leave the row out."
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise
        raise BadImage(
            "broken image", f"the image {name} cannot be decoded ({error}); replace it, or leave the row out."
        ) from None


def _what_it_is(image: dict[str, Any]) -> str:
    size = Path(image["path"]).stat().st_size if "path" in image else len(image["base64"])
    return "is in no format that Pillow reads" if size else "is empty (0 bytes)"


def _name(image: dict[str, Any]) -> str:
    return repr(image["path"]) if "path" in image else "that came as bytes"


def _looked_at(opened: Image.Image) -> tuple[int, int]:
    width, height = opened.size
    return (height, width) if _orientation(opened) in _SWAPS_SIDES else (width, height)


def _orientation(opened: Image.Image) -> int:
    """What the header says: Pillow's `getexif` would decode a whole PNG to look behind it, and turns TIFF by itself."""
    header = opened.info.get("exif")
    if not header or opened.format == "TIFF":
        return 1
    exif = Image.Exif()
    exif.load(header)
    return exif.get(_ORIENTATION, 1)


def _reduce(opened: Image.Image, max_pixels: int, name: str) -> None:
    """Have a very large image decoded at a part of its size, or refuse it."""
    width, height = opened.size
    if width * height <= max_pixels:
        return
    too_large = f"the image {name} has {width} x {height} pixels, more than the {max_pixels:,} that are decoded at once"
    # A progressive file is decoded whole before it is reduced.
    if opened.format != "JPEG" or opened.info.get("progressive"):
        kind = "progressive JPEG" if opened.format == "JPEG" else opened.format
        raise BadImage("image too large", f"{too_large}, and {kind} cannot be read at less; make it smaller.")
    # The format divides the sides by 2, 4 or 8.
    divisor = next((power for power in (2, 4, 8) if width * height <= max_pixels * power**2), 8)
    opened.draft(None, (width // divisor, height // divisor))
    if opened.size[0] * opened.size[1] > max_pixels:
        raise BadImage("image too large", f"{too_large}, even at an eighth of its sides; make it smaller.")


def _to_rgb(opened: Image.Image, name: str) -> Image.Image:
    if opened.mode.startswith("I;16"):
        # Pillow would cut off everything above 255, which leaves a white picture.
        return Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)).convert("RGB")
    if opened.mode in ("I", "F"):
        raise BadImage(
            "pixels without a range",
            f"the image {name} has 32 bits a pixel, of which nothing says what is white; save it with 8 or 16.",
        )
    return opened.convert("RGB")
