"""A prepared data set as a stream of uint8 batches: deterministic, resumable, sharded by process.

The order is a function of the seed and the position alone. It is decided over indices, before
anything is read, so that it is the same whatever the number of threads, processes or devices.
"""

import bisect
import itertools
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import UInt8

from vaejax.data import records
from vaejax.errors import UserError
from vaejax.files import printable

if TYPE_CHECKING:
    import grain  # which imports JAX where that is installed: functions that need it import it

# Nothing is read ahead of a record, and none is handed to other threads: grain has its own.
_ONE_RECORD = "readahead_buffer_size:0,max_parallelism:0"


class Images:
    """The images of one split, by index: a few numbers in memory, the pixels on disk.

    Raises UserError if `prepared` is no prepared data set, or a damaged one.

    Each record is read as a range of one. TFDS's own source asks for a list of indices, for which
    ArrayRecord (0.8) fills a table as long as the file, batch after batch: a batch of 32 took five
    times as long from a file of a million images, thirty times from one of ten million.
    """

    def __init__(self, prepared: Path, split: str):
        import tensorflow_datasets as tfds

        self._prepared, info = prepared, records.builder(prepared).info
        try:
            self._files = info.splits[split].file_instructions  # which records of which file
            self._ends = list(itertools.accumulate(file.take for file in self._files))
            # two parts, because decoding the texts takes longer than decoding the pixels
            self._pixels: Any = tfds.features.FeaturesDict({"image": info.features["image"]})
            texts = {name: info.features[name] for name in records.Metadata.__annotations__}
            self._texts: Any = tfds.features.FeaturesDict(texts)
        except Exception:  # whatever TFDS raises for what it did not write
            raise records.damaged(prepared, "its metadata cannot be used") from None
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `(h, w, c)` of an image."""
        return self._read_pixels(0).shape

    def read(self, indices: np.ndarray) -> UInt8[np.ndarray, "b h w c"]:
        """Read images by their indices, from any thread. Raises UserError if one is damaged."""
        return np.stack([self._read_pixels(int(i)) for i in indices])

    def metadata(self, index: int) -> records.Metadata:
        """Return the person ("" if unknown), the path and the SHA-256 of an image's file."""
        example = self._read_example(index, self._texts)
        return records.Metadata(**{name: value.decode() for name, value in example.items()})

    def _read_pixels(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        return self._read_example(index, self._pixels)["image"]

    def _read_example(self, index: int, features: Any) -> dict[str, Any]:
        """Read these features of a record. Its checksum tells damage."""
        number = bisect.bisect_right(self._ends, index)
        file = self._files[number]
        position = index - self._ends[number] + file.take + file.skip
        try:
            record = self._reader(number).read(position, position + 1)[0]
            return features.deserialize_example_np(record)
        except (RuntimeError, IndexError, ValueError):
            name = f"records/{os.path.basename(file.filename)}"
            raise records.damaged(self._prepared, f"{printable(name)} cannot be read") from None

    def _reader(self, number: int) -> ArrayRecordReader:
        """Return the reader of a file. One thread opens it when it is first needed."""
        with self._lock:
            if number not in self._readers:
                self._readers[number] = ArrayRecordReader(
                    os.fsencode(self._files[number].filename),  # as text it takes UTF-8 only
                    options=_ONE_RECORD,
                    file_reader_buffer_size=32768,
                )
            return self._readers[number]


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

    def read(self, indices: np.ndarray) -> UInt8[np.ndarray, "b h w c"]:
        """Read images by their indices in the selection."""
        return self._images.read(self._indices[indices])

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
    batches = _shard(len(images), batch_size, seed, shard, shards).map(images.read)
    return _read_ahead(batches)


def stream_indices(
    images: int, *, batch_size: int, seed: int, shard: int = 0, shards: int = 1
) -> "grain.DatasetIterator":
    """Stream the indices of the batches of `stream`, `[batch_size / shards]`, of so many images."""
    return _read_ahead(_shard(images, batch_size, seed, shard, shards))


def _shard(images: int, batch_size: int, seed: int, shard: int, shards: int) -> "grain.MapDataset":
    rows = slice(shard * batch_size // shards, (shard + 1) * batch_size // shards)
    return _order(images, batch_size, seed).map(lambda indices: indices[rows])


def _read_ahead(batches: "grain.MapDataset") -> "grain.DatasetIterator":
    import grain

    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    return iter(batches.to_iter_dataset(options))


def batch_indices(images: Images, number: int, *, batch_size: int, seed: int) -> list[int]:
    """Return the indices of the images in batch `number` of the stream, counted from 0."""
    return np.asarray(_order(len(images), batch_size, seed)[number]).tolist()


def _order(images: int, batch_size: int, seed: int) -> "grain.MapDataset":
    """Return the indices of every batch: an endless sequence with random access."""
    import grain

    steps = steps_per_epoch(images, batch_size)
    order = grain.MapDataset.range(images).seed(seed).shuffle()
    return order[: steps * batch_size].repeat().batch(batch_size)


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
