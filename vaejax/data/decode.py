"""Bytes of an image file -> RGB uint8, or a short reason why not.

The bytes come from strangers: what they are is read from them and never from a file's name, and
they are judged by their header before a pixel is decoded. Pillow decodes everything. OpenCV gives
the same pixels from a 96 px JPEG in 60 % of the time, but it would be a second set of rules for
colour, orientation and damage.
"""

import io

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

MOST_PIXELS = 50_000_000
LEAST_SIDE = 8

# What Pillow may try, and how such a file begins. The other formats that it knows are rare as
# photographs, and each is a parser more to attack.
_BEGINNINGS = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "BMP": (b"BM",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*"),
    "PPM": (b"P4", b"P5", b"P6"),
}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
_MODES_16_BIT = {"I;16", "I;16L", "I;16B", "I;16N"}
_REFUSED_MODES = {"F": "float pixels", "I": "32-bit pixels"}

_Transpose = Image.Transpose
_UPRIGHT = {
    2: _Transpose.FLIP_LEFT_RIGHT,
    3: _Transpose.ROTATE_180,
    4: _Transpose.FLIP_TOP_BOTTOM,
    5: _Transpose.TRANSPOSE,
    6: _Transpose.ROTATE_270,
    7: _Transpose.TRANSVERSE,
    8: _Transpose.ROTATE_90,
}


class Refused(Exception):
    """An image that cannot be used; `reason` is a short fixed phrase, so that reasons count."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of an image file: upright, on white, the first frame of several."""
    return pixels(opened(data))


def opened(data: bytes) -> Image.Image:
    """An image judged by its header: nothing is decoded yet, whatever size the header claims."""
    if not data:
        raise Refused("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(_BEGINNINGS))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused("too large: more than 50 megapixels") from None
    except MemoryError:
        raise Refused("not enough memory to decode it") from None
    except UnidentifiedImageError:
        raise Refused(_unidentified(data)) from None
    except Exception:  # a parser's own mistake (KeyError, struct.error ...) on hostile bytes
        raise Refused("truncated or damaged") from None
    if image.width * image.height > MOST_PIXELS:
        raise Refused("too large: more than 50 megapixels")
    if min(image.size) < LEAST_SIDE:
        raise Refused("too small: a side has less than 8 pixels")
    if image.mode not in _MODES | _MODES_16_BIT:
        raise Refused(_REFUSED_MODES.get(image.mode, f"colour mode {image.mode}"))
    if image.format == "PNG":
        return _with_true_checksums(image, data)
    return image


def pixels(image: Image.Image, *, at_least: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an opened image.

    A JPEG may come out smaller, by 2, 4 or 8, as long as both sides keep `at_least` pixels: a
    photograph of 12 megapixels then takes 25 ms in place of 120.
    """
    try:
        if at_least is not None:
            image.draft(None, (at_least, at_least))  # does nothing unless it is a JPEG
        image.load()
        return _rgb(_upright(image))
    except MemoryError:
        raise Refused("not enough memory to decode it") from None
    except Exception:  # as above
        raise Refused("truncated or damaged") from None


def resize(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Stretched to a square: area averages along a side that shrinks, cubic along one that grows.

    Area averaging sees every pixel, so nothing aliases.
    """
    height, width = image.shape[:2]
    mixed = (height > size) != (width > size)  # one shrinks and one grows: one after the other
    for step in [(size, height), (size, size)] if mixed else [(size, size)]:
        shrinks = step[0] < image.shape[1] or step[1] < image.shape[0]
        how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        image = np.asarray(cv2.resize(image, step, interpolation=how), np.uint8)
    return image


def _unidentified(data: bytes) -> str:
    known = any(data.startswith(start) for starts in _BEGINNINGS.values() for start in starts)
    return "truncated or damaged" if known else "not an image"


def _with_true_checksums(image: Image.Image, data: bytes) -> Image.Image:
    """A PNG whose chunks' checksums hold; Pillow's decoder passes over those of the pixels."""
    try:
        image.verify()  # after which Pillow wants it opened anew
        return Image.open(io.BytesIO(data), formats=("PNG",))
    except Exception:
        raise Refused("truncated or damaged") from None


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; damaged EXIF spoils no picture."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode in _MODES_16_BIT:  # Pillow's own conversion clips: everything over 255 is white
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))
