"""What a run is worth on the images that it holds out while it learns."""

import time
from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Key

from vaejax.data.batches import Images
from vaejax.objectives import Figures
from vaejax.training import parallel
from vaejax.training.state import TrainState


def validate(
    eval_step: Callable[..., Figures],
    state: TrainState,
    held_out: Images,
    key: Key[Array, ""],
    batch_size: int,
    *,
    devices: parallel.Devices,
) -> dict[str, float]:
    """The figures of all held-out images: means over the images, with the same noise each time.

    Those in nats have the variance of their batch, and depend a little on its size.
    """
    began = time.monotonic()
    sums: dict[str, float] = {}
    for first in range(0, len(held_out), batch_size):
        indices = np.arange(first, min(first + batch_size, len(held_out)))
        mine = held_out.read(indices[parallel.rows(devices, len(indices))])
        figures = eval_step(state, mine, key, first, batch=len(indices))
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(indices)
    means = {name: value / len(held_out) for name, value in sums.items()}
    return means | {"images_per_second": len(held_out) / (time.monotonic() - began)}
