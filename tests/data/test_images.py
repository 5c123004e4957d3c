"""Pixels of good files of every kind, and a name for every bad one."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.pictures import encoded, picture, saved
from xtuner_hf.data.images import BadImage, image_size, load_pixels


def as_row(data: bytes) -> dict:
    return {"base64": base64.b64encode(data).decode()}


def grey(pixels: Image.Image) -> np.ndarray:
    return np.asarray(pixels.convert("L")).astype(int)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_kind_of_pixels_is_rgb(mode):
    image = picture(24, 16).convert(mode)
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    data = encoded(image, kind, **({"quality": 100} if kind == "JPEG" else {}))
    pixels, size = load_pixels(as_row(data))
    assert (pixels.mode, pixels.size, size) == ("RGB", (24, 16), (24, 16))
    assert np.abs(grey(pixels) - grey(image.convert("RGB"))).max() <= 3


@pytest.mark.parametrize("big_endian", [False, True])
def test_sixteen_bits_are_not_cut_off(big_endian):
    """Pillow's own conversion makes everything above 255 white."""
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    data = encoded(Image.fromarray(values.astype(">u2") if big_endian else values), "TIFF" if big_endian else "PNG")
    pixels, _ = load_pixels(as_row(data))
    assert (np.asarray(pixels) == (values >> 8)[..., None]).all()


def test_32_bits_have_no_white():
    data = encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
    with pytest.raises(BadImage, match="has 32 bits a pixel, of which nothing says what is white"):
        load_pixels(as_row(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_turns_the_image_and_its_size(orientation, kind):
    image = picture(32, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    row = as_row(encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
    pixels, size = load_pixels(row)
    assert image_size(row) == size == pixels.size == ((16, 32) if orientation > 4 else (32, 16))
    with Image.open(io.BytesIO(base64.b64decode(row["base64"]))) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    assert (np.asarray(pixels) == np.asarray(expected)).all()


def test_a_size_that_is_given_is_not_looked_up():
    assert image_size({"path": "/nowhere.png", "width": 30, "height": 20}) == (30, 20)


PNG = encoded(picture(64, 64), "PNG")
JPEG = encoded(picture(64, 64), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason", "problem"),
    [
        (b"", "broken image", r"is empty \(0 bytes\); replace it, or leave the row out"),
        (b"<html>Not found</html>", "broken image", "is in no format that Pillow reads"),
        (PNG[:10], "broken image", "is in no format that Pillow reads"),
        (PNG[: len(PNG) // 2], "broken image", "cannot be decoded"),
        (JPEG[: len(JPEG) // 2], "broken image", r"cannot be decoded \(Truncated File Read\)"),
        (PNG[:200] + bytes(30) + PNG[230:], "broken image", "cannot be decoded"),
    ],
)
def test_a_broken_file_is_named(tmp_path, data, reason, problem):
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with pytest.raises(BadImage, match=f"^the image '{path}' {problem}") as error:
        load_pixels({"path": str(path)})
    assert error.value.reason == reason
    with pytest.raises(BadImage, match=f"^the image that came as bytes {problem}"):
        load_pixels(as_row(data))


def test_a_missing_file_is_named(tmp_path):
    for image, problem in [
        ({"path": str(tmp_path / "no.png")}, "there is no image '.*no.png'; put it there, or correct the path"),
        ({"path": str(tmp_path)}, "the image '.*' is a folder; name a file in it"),
        ({"base64": "###"}, "the image that came as bytes is not base64"),
    ]:
        for look in (image_size, load_pixels):
            with pytest.raises(BadImage, match=problem):
                look(image)


@pytest.mark.parametrize("look", [image_size, load_pixels])
def test_a_large_image_that_is_only_decoded_whole_is_refused(tmp_path, look):
    path = saved(tmp_path, "large.png", 200, 150)
    with pytest.raises(
        BadImage, match="has 200 x 150 pixels, more than the 20,000 that are decoded at once, and PNG"
    ) as error:
        look({"path": path}, 20_000)
    assert error.value.reason == "image too large"
    progressive = as_row(encoded(picture(200, 150), "JPEG", progressive=True))
    with pytest.raises(BadImage, match="and progressive JPEG cannot be read at less; make it smaller"):
        look(progressive, 20_000)
    with pytest.raises(BadImage, match="even at an eighth of its sides"):
        look(as_row(encoded(picture(200, 150), "JPEG")), 100)
    assert look(as_row(encoded(picture(200, 150), "JPEG")), 20_000)


MEMORY = """
import re, sys
from xtuner_hf.data.images import load_pixels
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
pixels, size = load_pixels({"path": sys.argv[1]})
print(pixels.size, size, round(peak() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_a_hundred_megapixels_take_bounded_memory(tmp_path):
    """300 MB decoded whole; at half of its sides 75, and as much again for a moment."""
    path = tmp_path / "large.jpg"
    Image.new("L", (12_000, 8_500), 200).save(path)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    *sizes, megabytes = done.stdout.rsplit(" ", 1)
    assert sizes == ["(6000, 4250) (12000, 8500)"]
    print(f"peak memory of a 102-megapixel JPEG: {megabytes.strip()} MB")
    assert 50 < int(megabytes) < 200
