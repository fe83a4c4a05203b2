"""Strangers' bytes become RGB or a reason, and nothing else."""

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

from vaejax.data.decode import Refused, decode, open_image, resize, to_rgb

Bombs = dict[str, Callable[[int], bytes]]
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def noise(height: int = 24, width: int = 32, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def flat(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, (12, 10), colour)


def reason(data: bytes) -> str:
    with pytest.raises(Refused) as refused:
        decode(data)
    return refused.value.reason


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read(kind: str):
    image = decode(encode(flat("RGB", (200, 100, 50)), kind))
    assert image.shape == (10, 12, 3)
    assert np.abs(image.astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_bit_for_bit(kind: str):
    assert np.array_equal(decode(encode(Image.fromarray(noise()), kind)), noise())


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected"),
    [
        ("L", 100, "PNG", (100, 100, 100)),
        ("L", 100, "JPEG", (100, 100, 100)),
        ("LA", (100, 255), "PNG", (100, 100, 100)),
        ("LA", (100, 0), "PNG", WHITE),
        ("1", 1, "PNG", WHITE),
        ("1", 0, "TIFF", (0, 0, 0)),
        ("RGBA", (*RED, 255), "PNG", RED),
        ("RGBA", (*RED, 0), "WEBP", WHITE),
        ("RGBA", (*RED, 128), "PNG", (255, 127, 127)),
        ("CMYK", (0, 255, 255, 0), "JPEG", RED),
        ("CMYK", (0, 0, 0, 255), "TIFF", (0, 0, 0)),
        ("YCbCr", (76, 85, 255), "TIFF", RED),
    ],
)
def test_every_mode_becomes_rgb_and_transparency_white(
    mode: str, colour: Any, kind: str, expected: tuple[int, ...]
):
    image = decode(encode(flat(mode, colour), kind))
    assert np.abs(image.astype(int) - expected).max() <= 2


def test_a_palette_becomes_rgb_and_its_transparent_colour_white():
    image = Image.new("P", (12, 10), 0)
    image.putpalette([*RED, 0, 0, 255])
    image.paste(1, (0, 0, 6, 10))
    opaque, see_through = encode(image, "PNG"), encode(image, "GIF", transparency=0)
    assert decode(opaque)[0, ::6].tolist() == [[0, 0, 255], [*RED]]
    assert decode(see_through)[0, ::6].tolist() == [[0, 0, 255], [*WHITE]]


@pytest.mark.parametrize("ending", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_and_not_clipped(ending: str, channels: int):
    ramp = np.linspace(0, 65535, 256 * 16).astype(np.uint16).reshape(16, 256)
    image = ramp if channels == 1 else np.stack([ramp] * 3, axis=2)
    decoded = decode(cv2.imencode(ending, image)[1].tobytes())
    assert np.array_equal(decoded, np.stack([ramp >> 8] * 3, axis=2))
    assert 126.5 < decoded.mean() < 128.5


# How an upright picture is stored by a camera that says "orientation n", in NumPy's words.
STORED = {
    1: lambda u: u,
    2: lambda u: u[:, ::-1],
    3: lambda u: u[::-1, ::-1],
    4: lambda u: u[::-1],
    5: lambda u: u.swapaxes(0, 1),
    6: lambda u: np.rot90(u, 1),
    7: lambda u: u.swapaxes(0, 1)[::-1, ::-1],
    8: lambda u: np.rot90(u, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_pictures_stand_upright(orientation: int):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](noise())))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decode(encode(stored, kind, exif=exif)), noise())
    assert decode(encode(stored, "JPEG", exif=exif)).shape == (24, 32, 3)


def test_damaged_exif_spoils_no_picture():
    damaged = encode(Image.fromarray(noise()), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(decode(damaged), noise())


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind: str):
    frames = [flat("RGB", colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decode(data).astype(int) - RED).max() <= 3


def test_pixels_without_a_scale_are_refused():
    ramp = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    assert reason(encode(Image.fromarray(ramp), "TIFF")) == "float pixels"
    assert reason(encode(Image.fromarray(ramp.astype(np.int32)), "TIFF")) == "32-bit pixels"


@pytest.mark.parametrize("kind", FORMATS)
def test_half_a_file_is_refused(kind: str):
    data = encode(Image.fromarray(noise(64, 64)), kind)
    assert reason(data[: len(data) // 2]) == "truncated or damaged"
    assert reason(data[:12]) == "truncated or damaged"


@pytest.mark.parametrize("chunk", [b"IHDR", b"IDAT"])
@pytest.mark.parametrize("checksum", [True, False])
def test_a_png_whose_checksum_does_not_hold_is_refused(chunk: bytes, checksum: bool):
    data = bytearray(encode(Image.fromarray(noise()), "PNG"))
    start = data.index(chunk) + 4
    length = int.from_bytes(data[start - 8 : start - 4], "big")
    data[start + length if checksum else start + length - 1] ^= 1
    assert reason(bytes(data)) == "truncated or damaged"


def test_a_palette_of_too_many_colours_is_refused():
    data = bytearray(encode(Image.new("P", (200, 100)), "BMP"))
    data[46:50] = (50_000).to_bytes(4, "little")
    assert reason(bytes(data)) == "truncated or damaged"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (b"\0" * 1000, "not an image"),
        (noise().tobytes(), "not an image"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"\xff\xd8\xff", "truncated or damaged"),
    ],
)
def test_a_file_that_is_no_image_is_refused_with_its_reason(data: bytes, expected: str):
    assert reason(data) == expected


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_decoded_or_refused_and_raises_nothing_else(kind: str):
    random, original = np.random.default_rng(0), encode(Image.fromarray(noise(16, 16)), kind)
    outcomes = set()
    for _ in range(150):
        data = bytearray(original[: random.integers(1, len(original) + 1)])
        for offset in random.integers(0, len(data), random.integers(0, 4)):
            data[offset] = random.integers(256)
        try:
            outcomes.add(decode(bytes(data)).dtype)
        except Refused:
            outcomes.add("refused")
    assert outcomes <= {np.dtype(np.uint8), "refused"}
    assert "refused" in outcomes


def test_a_side_below_8_pixels_is_refused():
    assert decode(encode(Image.new("L", (8, 8)), "PNG")).shape == (8, 8, 3)
    for size in ((7, 100), (100, 7), (1, 1)):
        assert reason(encode(Image.new("L", size), "PNG")).startswith("too small")


MEASURE = """
import resource, sys, time
from pathlib import Path
from vaejax.data.decode import Refused, decode
ready = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for data in [Path(name).read_bytes() for name in sys.argv[1:]]:
    start = time.perf_counter()
    try:
        decode(data)
    except Refused as refused:
        assert refused.reason == "too large: more than 50 megapixels", refused
    else:
        raise AssertionError("decoded")
    print(time.perf_counter() - start)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - ready) / 1024)
"""


SIDES = (10_000, 14_000, 16_383)  # the last is the most that a WebP can say


@pytest.mark.parametrize("kind", FORMATS)
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, bombs: Bombs, kind: str):
    names = [str(tmp_path / f"{side}") for side in SIDES]
    for name, side in zip(names, SIDES, strict=True):
        with open(name, "wb") as file:
            assert file.write(bombs[kind](side)) < 40_000
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, *names]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    *seconds, megabytes = map(float, output.split())
    assert max(seconds) < 1
    assert megabytes < 20


@pytest.mark.parametrize("kind", FORMATS)
def test_a_small_file_built_like_a_bomb_is_read(bombs: Bombs, kind: str):
    """Or else the test above would refuse for another reason."""
    assert np.array_equal(decode(bombs[kind](16)), np.zeros((16, 16, 3), np.uint8))


def test_a_large_photograph_is_decoded_small_but_not_too_small():
    ramp = np.linspace(0, 255, 1000).astype(np.uint8)
    photograph = np.broadcast_to(ramp[:, None], (1000, 800))
    data = encode(Image.fromarray(photograph), "JPEG")
    small = to_rgb(open_image(data), min_side=128)
    assert small.shape == (250, 200, 3)
    shrunk = resize(small, 64).astype(int)
    assert np.abs(shrunk - resize(decode(data), 64)).max() <= 3


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_a_constant_stays_constant_at_any_size(value: int):
    for shape in ((8, 8), (8, 500), (500, 8), (64, 64), (63, 65), (1000, 3000)):
        image = np.full((*shape, 3), value, np.uint8)
        assert np.array_equal(resize(image, 64), np.full((64, 64, 3), value, np.uint8))


@pytest.mark.parametrize(("tall", "wide"), [(2, 2), (5, 3), (1, 4)])
def test_shrinking_takes_the_mean_of_every_pixel(tall: int, wide: int):
    image = noise(16 * tall, 16 * wide)
    means = image.reshape(16, tall, 16, wide, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(resize(image, 16) - means).max() <= 1


def test_an_image_of_the_requested_size_is_unchanged():
    assert np.array_equal(resize(noise(32, 32), 32), noise(32, 32))


def test_a_side_that_shrinks_is_averaged_though_the_other_grows():
    stripes = np.zeros((16, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # which any sampling of pixels would show as black, white or moiré
    assert np.unique(resize(stripes, 64)).tolist() == [128]
