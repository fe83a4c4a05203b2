"""Bombs: files of a few bytes whose headers claim as many pixels as one likes."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image


def _png(side: int) -> bytes:
    """A 1-bit PNG made row by row, since the picture itself would take side**2 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(9)
    row = bytes(1 + -(-side // 8))
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", packed), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _small(kind: str, **settings: Any) -> bytearray:
    file = io.BytesIO()
    Image.new("L", (16, 16)).save(file, kind, **settings)
    return bytearray(file.getvalue())


def _written(data: bytearray, offset: int, layout: str, *values: int) -> bytes:
    struct.pack_into(layout, data, offset, *values)
    return bytes(data)


def _jpeg(side: int) -> bytes:
    data = _small("JPEG", progressive=True)  # of which every scan needs all coefficients
    return _written(data, data.index(b"\xff\xc2") + 5, ">HH", side, side)


def _webp(side: int) -> bytes:
    data = _small("WEBP", lossless=True)
    offset = data.index(b"VP8L") + 9  # two sizes of 14 bits each
    flags = struct.unpack_from("<I", data, offset)[0] >> 28 << 28
    return _written(data, offset, "<I", flags | (side - 1) << 14 | (side - 1))


def _gif(side: int) -> bytes:
    """The picture is as small as ever, but one of its frames is not."""
    data = _small("GIF")
    frame = data.index(b"\x2c" + bytes(4) + struct.pack("<HH", 16, 16))
    return _written(data, frame + 5, "<HH", side, side)


def _bmp(side: int) -> bytes:
    return _written(_small("BMP"), 18, "<ii", side, side)


def _ppm(side: int) -> bytes:
    return bytes(_small("PPM")).replace(b"16 16", b"%d %d" % (side, side))


def _tiff(side: int) -> bytes:
    data = _small("TIFF")
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for offset in range(start + 2, start + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", data, offset)
        if tag in (256, 257, 278):  # width, height, rows in a strip
            struct.pack_into("<HII", data, offset + 2, 4, 1, side)
    return bytes(data)


@pytest.fixture(scope="session")
def bombs() -> dict[str, Callable[[int], bytes]]:
    """By format, what makes a file of so many pixels a side: a sound one of 16."""
    return {
        "PNG": _png,
        "JPEG": _jpeg,
        "WEBP": _webp,
        "GIF": _gif,
        "BMP": _bmp,
        "PPM": _ppm,
        "TIFF": _tiff,
    }
