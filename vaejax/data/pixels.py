"""The pixels of a file of records, read from where they lie in it, without parsing a record.

ArrayRecord writes uncompressed records as they are, into Riegeli's blocks of 64 KiB, each of which
begins with a header of 24 bytes (google/riegeli, doc/riegeli_records_file_format.md). Between those
headers the pixels of an image are consecutive bytes. Where they begin is looked up when the file
has been written, and is kept in an index with a checksum of each image. The checksum is compared at
every read, because reading in this way goes past those of the format.
"""

import mmap
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from jaxtyping import Int, UInt8
from xxhash import xxh3_64_intdigest

BLOCK, HEADER = 1 << 16, 24
_READ = 64  # blocks at a time
_RECORDS = 256  # at a time

# Of an image: the offset of its first byte in the file; XXH3 of its pixels, with its number in the
# file as the seed, so that an entry counts for no other image.
ENTRY = np.dtype([("start", "<i8"), ("checksum", "<u8")])


class PixelsError(Exception):
    """The pixels of a record are not those that were written, or are not to be had."""


class MappedFile:
    """A file as an array in memory: its pages come from the system's cache, and remain there.

    Raises OSError if there is no such file, ValueError if it is empty.
    """

    def __init__(self, path: str | os.PathLike[str]):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.bytes: UInt8[np.ndarray, " n"] = np.frombuffer(self._map, np.uint8)

    def check_length(self) -> None:
        """Raise PixelsError if the file was cut: reading what is gone would kill the process."""
        if self._map.size() < len(self.bytes):
            raise PixelsError("it was cut")


class Index:
    """Where the pixels of the images of a split lie. Raises OSError or ValueError."""

    def __init__(self, path: str | os.PathLike[str]):
        self._file = MappedFile(path)
        self._entries = self._file.bytes.view(ENTRY)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> np.ndarray:
        self._file.check_length()
        return self._entries[indices]


class PixelFile:
    """The pixels of one file of records. Raises OSError or ValueError."""

    def __init__(self, path: str | os.PathLike[str], size: int):
        self._file = MappedFile(path)
        self._image_bytes = 3 * size * size
        # every place where an image could begin, as a view: a gather of rows copies whole images
        self._windows = np.lib.stride_tricks.sliding_window_view(
            self._file.bytes, self._image_bytes
        )

    def read(self, entries: np.ndarray, numbers: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b n"]:
        """Read images by their entries in the index and their numbers in the file.

        Raises PixelsError if the pixels of one are not those that were written.
        """
        self._file.check_length()
        starts = entries["start"]
        try:
            images = self._windows[starts]
            for row in np.flatnonzero(starts % BLOCK > BLOCK - self._image_bytes).tolist():
                self._cut_headers(images[row], int(starts[row]))
        except (IndexError, ValueError):
            raise PixelsError("its index is wrong") from None
        rows = zip(images, numbers.tolist(), strict=True)
        checksums = [xxh3_64_intdigest(row, number) for row, number in rows]
        if checksums != entries["checksum"].tolist():
            wrong = np.flatnonzero(np.array(checksums, np.uint64) != entries["checksum"])[0]
            raise PixelsError(f"image {numbers[wrong]} is not as it was written")
        return images

    def _cut_headers(self, image: UInt8[np.ndarray, " n"], start: int) -> None:
        """Fill in what follows the first header in an image."""
        done = BLOCK - start % BLOCK
        start += done + HEADER
        while done < len(image):
            part = image[done : done + BLOCK - HEADER]
            part[:] = self._file.bytes[start : start + len(part)]
            done += len(part)
            start += BLOCK


# The index ----------------------------------------------------------------------------------------


def locate(path: str | os.PathLike[str], size: int) -> np.ndarray:
    """Return the entries of all images in a file of records, of which each is read and checked by
    ArrayRecord."""
    with open(path, "rb") as file:
        text, entries = _Text(file), []
        for number, pixels in enumerate(_read_pixels(path)):
            if len(pixels) != 3 * size * size:
                raise ValueError(f"{len(pixels)} bytes are no image of {size} x {size} pixels")
            entries.append((text.find(pixels), xxh3_64_intdigest(pixels, number)))
    return np.array(entries, ENTRY)


def _read_pixels(path: str | os.PathLike[str]) -> Iterator[bytes]:
    from array_record.python.array_record_module import ArrayRecordReader
    from tensorflow_datasets.proto import tf_example_pb2

    options = "readahead_buffer_size:0,max_parallelism:0"
    reader = ArrayRecordReader(os.fsencode(path), options=options)
    count = reader.num_records()
    for first in range(0, count, _RECORDS):
        for record in reader.read(first, min(first + _RECORDS, count)):
            example = tf_example_pb2.Example.FromString(record)
            yield example.features.feature["image"].bytes_list.value[0]
    reader.close()


class _Text:
    """A file of records without the headers of its blocks, read from front to back."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._text, self._first = b"", 0  # what was read, and where it begins
        self._position = 0  # in it

    def find(self, pixels: bytes) -> int:
        """Return where in the file the next image begins."""
        while (found := self._text.find(pixels, self._position)) < 0:
            blocks = self._file.read(_READ * BLOCK)
            if not blocks:
                raise ValueError("the pixels do not lie in the file as they are")
            kept = max(self._position, len(self._text) - len(pixels) + 1)
            self._first += kept
            self._text = self._text[kept:] + b"".join(
                blocks[block + HEADER : block + BLOCK] for block in range(0, len(blocks), BLOCK)
            )
            self._position = 0
        self._position = found + len(pixels)
        place = self._first + found
        return place + HEADER * (place // (BLOCK - HEADER) + 1)
