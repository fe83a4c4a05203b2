"""A prepared data set as a stream of uint8 batches: deterministic, resumable, sharded by process.

The order is a function of the seed and the position alone. It is decided over indices, before
anything is read, so that it is the same whatever the number of threads, processes or devices.
"""

import bisect
import itertools
import os
import threading
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import UInt8

from vaejax.data.entries import printable
from vaejax.data.records import builder, damaged
from vaejax.errors import UserError

# Nothing is read ahead of a record, and none is handed to other threads: grain has its own.
_ONE_RECORD = "readahead_buffer_size:0,max_parallelism:0"


class Images:
    """The images of one split, by index: a few numbers in memory, the pixels on disk.

    Each record is read as a range of one. TFDS's own source asks for a list of indices, for which
    ArrayRecord (0.8) fills a table as long as the file, batch after batch: a batch of 32 took five
    times as long from a file of a million images, thirty times from one of ten million.
    """

    def __init__(self, prepared: Path, split: str):
        import tensorflow_datasets as tfds

        self._prepared, info = prepared, builder(prepared).info
        try:
            self._files = info.splits[split].file_instructions  # which records of which file
            self._ends = list(itertools.accumulate(file.take for file in self._files))
            # the texts, which nobody asks for here, would take longer than the pixels
            self._features: Any = tfds.features.FeaturesDict({"image": info.features["image"]})
            texts = {name: info.features[name] for name in ("person", "path", "sha256")}
            self._texts: Any = tfds.features.FeaturesDict(texts)
        except Exception:  # whatever TFDS makes of what it did not write
            raise damaged(prepared, "its metadata cannot be used") from None
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image, `(h, w, c)`."""
        return self._image(0).shape

    def read(self, indices: np.ndarray) -> UInt8[np.ndarray, "b h w c"]:
        return np.stack([self._image(int(i)) for i in indices])

    def texts(self, index: int) -> dict[str, str]:
        """Whose face it is ("person", "" if not known) and where it came from: the "path" and the
        "sha256" of its file."""
        found = self._example(index, self._texts)
        return {name: value.decode() for name, value in found.items()}

    def _image(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        return self._example(index, self._features)["image"]

    def _example(self, index: int, features: Any) -> dict[str, Any]:
        """UserError if the file does not hold it: its checksums tell, or it is cut or gone."""
        number = bisect.bisect_right(self._ends, index)
        file = self._files[number]
        place = index - self._ends[number] + file.take + file.skip
        try:
            record = self._reader(number).read(place, place + 1)[0]
            return features.deserialize_example_np(record)
        except (RuntimeError, IndexError, ValueError):
            name = f"records/{os.path.basename(file.filename)}"
            raise damaged(self._prepared, f"{printable(name)} cannot be read") from None

    def _reader(self, number: int) -> ArrayRecordReader:
        """Of a file, opened when it is first needed, by one thread: it has the file's index."""
        with self._lock:
            if number not in self._readers:
                self._readers[number] = ArrayRecordReader(
                    os.fsencode(self._files[number].filename),  # it takes no text but UTF-8
                    options=_ONE_RECORD,
                    file_reader_buffer_size=32768,
                )
            return self._readers[number]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in one pass; what remains of a pass is left out, other images each time."""
    if batch_size > images:
        raise UserError(
            f"--batch-size {batch_size} is more than the {images} training images: "
            f"take at most {images}"
        )
    return images // batch_size


def stream(
    images: Images,
    *,
    batch_size: int,
    seed: int,
    shard: int = 0,
    shards: int = 1,
    read: bool = True,
) -> grain.DatasetIterator:
    """Endless training batches `[batch_size / shards, h, w, c]`: this shard's rows of each; or
    their indices `[batch_size / shards]`, where they are not to be read.

    Every pass has its own order. The iterator's position is saved with `get_state` and restored
    with `set_state` (or by Orbax); it counts batches handed out, not those read ahead.
    """
    rows = slice(shard * batch_size // shards, (shard + 1) * batch_size // shards)
    mine = _order(len(images), batch_size, seed).map(lambda indices: indices[rows])
    found = mine.map(images.read) if read else mine
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    return iter(found.to_iter_dataset(options))


def drawn(images: Images, number: int, *, batch_size: int, seed: int) -> list[int]:
    """Which images the batch of this number holds, from 0."""
    return np.asarray(_order(len(images), batch_size, seed)[number]).tolist()


def _order(images: int, batch_size: int, seed: int) -> grain.MapDataset:
    """The indices of every batch, without end; by its number any of them can be had."""
    steps = steps_per_epoch(images, batch_size)
    order = grain.MapDataset.range(images).seed(seed).shuffle()
    return order[: steps * batch_size].repeat().batch(batch_size)
