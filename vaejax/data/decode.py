"""Image files: from their bytes to RGB uint8 arrays, or to a short reason for a refusal.

The bytes are not trusted: the format is read from them and never from a file's name, and the header
is checked before a pixel is decoded. Pillow decodes everything. OpenCV returns the same pixels of a
96 px JPEG in 60 % of the time, but it would be a second set of rules for colour, orientation and
damage.
"""

import io

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 50_000_000
MIN_SIDE = 8

# The formats that Pillow may try, and the first bytes of such files. The other formats that it
# reads are rare among photographs, and each would be one more parser to attack.
_FIRST_BYTES = {
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
_TRANSPOSE_OF_ORIENTATION = {
    2: _Transpose.FLIP_LEFT_RIGHT,
    3: _Transpose.ROTATE_180,
    4: _Transpose.FLIP_TOP_BOTTOM,
    5: _Transpose.TRANSPOSE,
    6: _Transpose.ROTATE_270,
    7: _Transpose.TRANSVERSE,
    8: _Transpose.ROTATE_90,
}


class Refused(Exception):
    """An image cannot be used; `reason` is a short fixed phrase, so that reasons can be counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an image file: upright, on white, the first frame of several. Raises Refused."""
    return to_rgb(open_image(data))


def open_image(data: bytes) -> Image.Image:
    """Open an image file by its header alone: nothing is decoded, whatever size it claims.

    Raises Refused if it is no image, damaged, too large or too small, or of a mode without a scale.
    """
    if not data:
        raise Refused("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(_FIRST_BYTES))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused("too large: more than 50 megapixels") from None
    except MemoryError:
        raise Refused("not enough memory to decode it") from None
    except UnidentifiedImageError:
        raise Refused(_unidentified(data)) from None
    except Exception:  # a parser's own fault (KeyError, struct.error ...) on hostile bytes
        raise Refused("truncated or damaged") from None
    if image.width * image.height > MAX_PIXELS:
        raise Refused("too large: more than 50 megapixels")
    if min(image.size) < MIN_SIDE:
        raise Refused("too small: a side has less than 8 pixels")
    if image.mode not in _MODES | _MODES_16_BIT:
        raise Refused(_REFUSED_MODES.get(image.mode, f"colour mode {image.mode}"))
    if image.format == "PNG":
        return _with_verified_checksums(image, data)
    return image


def to_rgb(image: Image.Image, *, min_side: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an opened image. Raises Refused if it is damaged.

    A JPEG may come out smaller by a factor of 2, 4 or 8, as long as both sides keep `min_side`
    pixels: a photograph of 12 megapixels then takes 25 ms instead of 120.
    """
    try:
        if min_side is not None:
            image.draft(None, (min_side, min_side))  # does nothing unless it is a JPEG
        image.load()
        return _to_rgb(_upright(image))
    except MemoryError:
        raise Refused("not enough memory to decode it") from None
    except Exception:  # as in open_image
        raise Refused("truncated or damaged") from None


def resize(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Stretch an image to a square.

    A side that shrinks is averaged over areas, which includes every pixel, so that nothing aliases.
    A side that grows is interpolated by cubic splines.
    """
    height, width = image.shape[:2]
    mixed = (height > size) != (width > size)  # one shrinks and one grows: one after the other
    for step in [(size, height), (size, size)] if mixed else [(size, size)]:
        shrinks = step[0] < image.shape[1] or step[1] < image.shape[0]
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        image = np.asarray(cv2.resize(image, step, interpolation=interpolation), np.uint8)
    return image


def _unidentified(data: bytes) -> str:
    is_image = any(data.startswith(start) for starts in _FIRST_BYTES.values() for start in starts)
    return "truncated or damaged" if is_image else "not an image"


def _with_verified_checksums(image: Image.Image, data: bytes) -> Image.Image:
    """Verify the checksums of a PNG's chunks: Pillow's decoder ignores those of the pixels."""
    try:
        image.verify()  # after which Pillow needs it opened anew
        return Image.open(io.BytesIO(data), formats=("PNG",))
    except Exception:  # as in open_image
        raise Refused("truncated or damaged") from None


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says; damaged EXIF is ignored."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        transpose = _TRANSPOSE_OF_ORIENTATION.get(orientation)
    except Exception:  # Pillow raises many kinds for damaged EXIF, which is no reason to refuse
        return image
    return image if transpose is None else image.transpose(transpose)


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode in _MODES_16_BIT:  # Pillow's own conversion clips: everything over 255 is white
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
