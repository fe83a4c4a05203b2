"""A prepared data set as a stream of uint8 batches: deterministic, resumable, sharded by process.

The order is a function of the seed and the position alone. It is decided over indices, before
anything is read, so that it is the same whatever the number of threads, processes or devices.
"""

from pathlib import Path

import grain
import numpy as np
from jaxtyping import UInt8

from vaejax.data.records import builder
from vaejax.errors import UserError


class Images:
    """The images of one split, by index: a few numbers in memory, the pixels on disk."""

    def __init__(self, prepared: Path, split: str):
        self._records = builder(prepared).as_data_source(split=split)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image, `(h, w, c)`."""
        return self._records[0]["image"].shape

    def read(self, indices: np.ndarray) -> UInt8[np.ndarray, "b h w c"]:
        records = self._records.__getitems__([int(i) for i in indices])
        return np.stack([record["image"] for record in records])


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in one pass; what remains of a pass is left out, other images each time."""
    if batch_size > images:
        raise UserError(
            f"--batch-size {batch_size} is more than the {images} training images: "
            f"take at most {images}"
        )
    return images // batch_size


def stream(
    images: Images, *, batch_size: int, seed: int, shard: int = 0, shards: int = 1
) -> grain.DatasetIterator:
    """Endless training batches `[batch_size / shards, h, w, c]`: this shard's rows of each.

    Every pass has its own order. The iterator's position is saved with `get_state` and restored
    with `set_state` (or by Orbax); it counts batches handed out, not those read ahead.
    """
    steps = steps_per_epoch(len(images), batch_size)
    rows = slice(shard * batch_size // shards, (shard + 1) * batch_size // shards)
    order = grain.MapDataset.range(len(images)).seed(seed).shuffle()
    batches = order[: steps * batch_size].repeat().batch(batch_size)
    read = batches.map(lambda indices: images.read(indices[rows]))
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    return iter(read.to_iter_dataset(options))
