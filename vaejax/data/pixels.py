"""The pixels of a split, as they are: files that are mapped into memory, and gathered from.

A file holds the images, uint8 `[n h w c]`, and behind them a checksum of each: XXH3 of 64 bits,
with the number of the image as the seed, so that it counts for no other image. It is compared at
every read, which takes a fifth of the time.
"""

import math
import mmap
import os
import weakref
from collections import deque

import numpy as np
from jaxtyping import Int, UInt8
from xxhash import xxh3_64_intdigest

_CHECKSUM = np.dtype("<u8")


class PixelsError(Exception):
    """The pixels of an image are not those that were written, or are not to be had."""


def file_bytes(count: int, size: int) -> int:
    """Return the length of a file of so many images of `size` x `size` pixels."""
    return count * (3 * size * size + _CHECKSUM.itemsize)


class PixelFile:
    """The images of one file, by their number in it.

    A page of the file belongs to the system's cache and not to this process, though tools count it.
    Raises OSError or ValueError if the file cannot be read, PixelsError if it is of other images.
    """

    def __init__(self, path: str | os.PathLike[str], *, count: int, size: int):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._map) != file_bytes(count, size):
            raise PixelsError("it is of other images")
        pixels = 3 * size * size * count
        self._images = np.frombuffer(self._map, np.uint8, pixels).reshape(count, size, size, 3)
        self._checksums = np.frombuffer(self._map, _CHECKSUM, count, offset=pixels)

    def read(self, numbers: Int[np.ndarray, " b"], out: UInt8[np.ndarray, "b h w c"]) -> None:
        """Copy images into an array. Raises PixelsError if one is not as it was written."""
        if self._map.size() < len(self._map):  # to read what is gone would kill the process
            raise PixelsError("it was cut")
        expected = self._checksums[numbers]
        # "clip" because "raise" copies twice; the line above has raised
        np.take(self._images, numbers, axis=0, out=out, mode="clip")
        checksums = list(map(xxh3_64_intdigest, out, numbers.tolist()))
        if checksums != expected.tolist():
            wrong = np.flatnonzero(np.array(checksums, _CHECKSUM) != expected)[0]
            raise PixelsError(f"image {numbers[wrong]:,} is not as it was written")


class PixelWriter:
    """Writes a file of images; use it as a context. Raises OSError."""

    def __init__(self, path: str | os.PathLike[str]):
        self._file = open(path, "wb")  # noqa: SIM115 (it is closed at the end of the context)
        self._checksums: list[int] = []

    def __enter__(self) -> "PixelWriter":
        return self

    def append(self, pixels: bytes | memoryview) -> None:
        """Write the next image, `h w c` bytes."""
        self._file.write(pixels)
        self._checksums.append(xxh3_64_intdigest(pixels, len(self._checksums)))

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if error is None:
                self._file.write(np.array(self._checksums, _CHECKSUM).data)


class Buffers:
    """Memory for arrays, used again when nobody holds the last view of an array.

    For fresh memory the system's page faults take longer than to fill it.
    """

    def __init__(self, kept: int):
        self._free: deque[bytearray] = deque(maxlen=kept)

    def empty(self, *shape: int) -> UInt8[np.ndarray, "..."]:
        """Return an array whose contents are arbitrary."""
        size = math.prod(shape)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = None
        if memory is None or len(memory) != size:
            memory = bytearray(size)
        # Every view refers to this array, and not to what is below it, which is no array.
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(shape)
