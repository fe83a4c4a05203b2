"""A prepared data set as a stream of uint8 batches: deterministic, resumable, sharded by process.

The order is a function of the seed and the position alone. It is decided over indices, before
anything is read, so that it is the same whatever the number of threads, processes or devices.

grain streams batches and not images: what it does for an element takes longer than to copy an image
of 64 pixels.
"""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from vaejax.data import records
from vaejax.data.order import Order
from vaejax.data.pixels import Buffers, PixelFile, PixelsError
from vaejax.errors import UserError
from vaejax.files import printable

if TYPE_CHECKING:
    import grain  # which imports JAX where that is installed: functions that need it import it
    from array_record.python.array_record_module import ArrayRecordReader

_AHEAD = 8  # batches that are read before they are asked for
# Nothing is read ahead of a record, and none is handed to other threads: grain has its own.
_ONE_RECORD = "readahead_buffer_size:0,max_parallelism:0"


class Images:
    """The images of one split, by index: a few numbers in memory, the pixels on disk.

    Raises UserError if `prepared` is no prepared data set, or a damaged one.

    The pixels are copied out of the mapped files, a batch at a time. Their checksums are compared
    at every read: that takes a fifth of the time, and a page that the system has dropped and read
    again is as much in doubt as a new one.
    """

    def __init__(self, prepared: Path, split: str):
        self._prepared = prepared
        self._parts = records.parts_of(prepared, split)
        self._ends = np.cumsum([part.images for part in self._parts])
        size = records.read_dataset_report(prepared)["size"]
        self.shape = (size, size, 3)  # h, w, c
        self._pixels: dict[int, PixelFile] = {}
        self._records: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(
        self, indices: Int[np.ndarray, " b"], out: UInt8[np.ndarray, "b h w c"] | None = None
    ) -> UInt8[np.ndarray, "b h w c"]:
        """Read images by their indices, from any thread, into `out` or a new array.

        Raises UserError if one is damaged.
        """
        images = np.empty((len(indices), *self.shape), np.uint8) if out is None else out
        if len(self._parts) == 1:
            self._read_part(0, indices, images)
            return images
        numbers = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(numbers).tolist():
            (here,) = np.nonzero(numbers == number)
            some = images[here]
            self._read_part(number, indices[here] - self._first(number), some)
            images[here] = some
        return images

    def metadata(self, index: int) -> records.Metadata:
        """Return the person ("" if unknown), the path and the SHA-256 of an image's file.

        Raises UserError if its record is damaged.
        """
        number = int(np.searchsorted(self._ends, index, side="right"))
        try:
            return records.read_metadata(self._records_of(number), index - self._first(number))
        except (RuntimeError, IndexError, ValueError):
            raise self._damaged(self._parts[number].records, "cannot be read") from None

    def _first(self, number: int) -> int:
        """Return the index of the first image of a part."""
        return int(self._ends[number]) - self._parts[number].images

    def _read_part(
        self, number: int, positions: Int[np.ndarray, " b"], out: UInt8[np.ndarray, "b h w c"]
    ) -> None:
        path = self._parts[number].pixels
        try:
            self._pixels_of(number).read(positions, out)
        except PixelsError as error:
            raise self._damaged(path, f"cannot be read: {error}") from None
        except (OSError, ValueError):
            raise self._damaged(path, "cannot be read") from None

    def _damaged(self, path: Path, what: str) -> UserError:
        name = f"{path.parent.name}/{path.name}"
        return records.damaged(self._prepared, f"{printable(name)} {what}")

    def _pixels_of(self, number: int) -> PixelFile:
        """Map a file. One thread does so when it is first needed."""
        part = self._parts[number]
        with self._lock:
            if number not in self._pixels:
                self._pixels[number] = PixelFile(part.pixels, count=part.images, size=self.shape[0])
            return self._pixels[number]

    def _records_of(self, number: int) -> "ArrayRecordReader":
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if number not in self._records:
                self._records[number] = ArrayRecordReader(
                    os.fsencode(self._parts[number].records),  # as text it takes UTF-8 only
                    options=_ONE_RECORD,
                    file_reader_buffer_size=32768,
                )
            return self._records[number]


class Selection(Images):
    """Some of the images of a split, in their order."""

    def __init__(self, images: Images, indices: np.ndarray):
        self._images, self._indices = images, indices  # and nothing of its own to read

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `(h, w, c)` of an image."""
        return self._images.shape

    def read(
        self, indices: Int[np.ndarray, " b"], out: UInt8[np.ndarray, "b h w c"] | None = None
    ) -> UInt8[np.ndarray, "b h w c"]:
        """Read images by their indices in the selection, into `out` or a new array."""
        return self._images.read(self._indices[indices], out)

    def metadata(self, index: int) -> records.Metadata:
        """Return the person, the path and the SHA-256 of an image's file."""
        return self._images.metadata(int(self._indices[index]))


# The order of training ----------------------------------------------------------------------------


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the number of full batches in one epoch; the rest of an epoch is left out.

    Raises UserError if there are fewer images than a batch holds.
    """
    if batch_size > images:
        raise UserError(
            f"--batch-size {batch_size} is more than the {images} training images: "
            f"take at most {images}"
        )
    return images // batch_size


def stream(
    images: Images, *, batch_size: int, seed: int, shard: int = 0, shards: int = 1
) -> "grain.DatasetIterator":
    """Stream training batches without end: this shard's rows `[batch_size / shards, h, w, c]`.

    Every epoch has an order of its own. The iterator's position is saved by `get_state` and
    restored by `set_state` (or by Orbax); it counts batches handed out, not those read ahead.
    """
    buffers = Buffers(kept=2 * _AHEAD)

    def read(indices: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
        return images.read(indices, buffers.empty(len(indices), *images.shape))

    return _read_ahead(_shard(len(images), batch_size, seed, shard, shards).map(read))


def stream_indices(
    images: int, *, batch_size: int, seed: int, shard: int = 0, shards: int = 1
) -> "grain.DatasetIterator":
    """Stream the indices of the batches of `stream`, `[batch_size / shards]`, of so many images."""
    return _read_ahead(_shard(images, batch_size, seed, shard, shards))


def in_order(
    images: Images, batch_size: int, *, count: int | None = None
) -> Iterator[tuple[Int[np.ndarray, " b"], UInt8[np.ndarray, "b h w c"]]]:
    """Yield the indices and the pixels of the first `count` images, or of all, in their order.

    The last batch may be smaller.
    """
    import grain

    count, buffers = len(images) if count is None else count, Buffers(kept=2 * _AHEAD)

    def read(number: int) -> tuple[np.ndarray, np.ndarray]:
        indices = np.arange(number * batch_size, min((number + 1) * batch_size, count))
        return indices, images.read(indices, buffers.empty(len(indices), *images.shape))

    yield from _read_ahead(grain.MapDataset.range(-(-count // batch_size)).map(read))


def _shard(images: int, batch_size: int, seed: int, shard: int, shards: int) -> "grain.MapDataset":
    import grain

    steps_per_epoch(images, batch_size)  # raises if the batch is too large
    order = Order(images, batch_size=batch_size, seed=seed)
    rows = slice(shard * batch_size // shards, (shard + 1) * batch_size // shards)
    return grain.MapDataset.range(sys.maxsize).map(lambda number: order[number][rows])


def _read_ahead(batches: "grain.MapDataset") -> "grain.DatasetIterator":
    import grain

    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=_AHEAD)
    return iter(batches.to_iter_dataset(options))


def batch_indices(images: Images, number: int, *, batch_size: int, seed: int) -> list[int]:
    """Return the indices of the images in batch `number` of the stream, counted from 0."""
    return Order(len(images), batch_size=batch_size, seed=seed)[number].tolist()


# Two data sets ------------------------------------------------------------------------------------


class DatasetDiff(NamedTuple):
    """The number of images that differ between two prepared sets, by their paths in the source.

    `moved` ones are the same, in another split. `known` is False if the older set cannot be read.
    """

    added: int
    removed: int
    changed: int
    moved: int = 0
    known: bool = True

    def __str__(self) -> str:
        if not self.known:
            return "how is unknown, because the set prepared before is gone or of another version"
        moved = f", {self.moved:,} in another split" if self.moved else ""
        return f"{self.added:,} added, {self.removed:,} removed, {self.changed:,} changed{moved}"


def dataset_diff(before: Path, after: Path) -> DatasetDiff | None:
    """Compare two prepared sets of one source.

    Returns None if they differ in more than their images: in size or crop. Raises UserError if one
    of them is damaged.
    """
    if records.format_of(before) != records.FORMAT:
        return DatasetDiff(0, 0, 0, known=False)
    old, new = records.read_dataset_report(before), records.read_dataset_report(after)
    if old["size"] != new["size"] or _crop(old) != _crop(new):
        return None
    old_places, new_places = _places(before), _places(after)
    common = old_places.keys() & new_places.keys()
    differ = [path for path in common if old_places[path] != new_places[path]]
    changed = sum(old_places[path][0] != new_places[path][0] for path in differ)
    return DatasetDiff(
        added=len(new_places) - len(common),
        removed=len(old_places) - len(common),
        changed=changed,
        moved=len(differ) - changed,
    )


def _crop(report: dict[str, Any]) -> tuple[Any, ...]:
    crop = report.get("crop") or {}
    return crop.get("cascade_sha256"), crop.get("margin")


def _places(prepared: Path) -> dict[str, tuple[str, str]]:
    """Return the SHA-256 of every image's file, and its split, by path."""
    return {
        image["path"]: (image["sha256"], split)
        for split in records.read_dataset_report(prepared)["splits"]
        for images in [Images(prepared, split)]
        for i in range(len(images))
        for image in [images.metadata(i)]
    }
