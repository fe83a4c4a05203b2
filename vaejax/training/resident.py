"""Training images that fit are kept on the devices, and their batches gathered there."""

import jax
import numpy as np
from jaxtyping import Array, Int

from vaejax.data.batches import Images
from vaejax.training import parallel

SHARE = 8  # of a device's memory the images may fill one part in so many: the rest is a step's
CHUNK = 1024  # images that are read at a time


class Resident:
    """All images of a split, uint8, whole on every device; called with indices, a batch of them.

    An accelerator takes in a batch sooner than a host reads it. The indices are those of the
    stream, so that batches are the same bit for bit.
    """

    def __init__(self, images: Images, devices: parallel.Devices):
        pixels = np.empty((len(images), *images.shape), np.uint8)
        for first in range(0, len(images), CHUNK):
            some = np.arange(first, min(first + CHUNK, len(images)))
            pixels[some] = images.read(some)
        self._pixels = jax.device_put(pixels, parallel.whole(devices))
        split = jax.NamedSharding(devices.mesh, jax.P(parallel.AXIS))
        self._gather = jax.jit(lambda pixels, indices: pixels[indices], out_shardings=split)

    def __call__(self, indices: Int[np.ndarray, " b"]) -> Array:
        return self._gather(self._pixels, indices)


def fits(images: Images, devices: parallel.Devices) -> bool:
    """Whether the images can and should be there. On a CPU they would only be in memory twice."""
    if parallel.on_cpu() or devices.how == "pmap" or not parallel.alone():
        return False
    needed = len(images) * int(np.prod(images.shape))
    return needed <= (parallel.memory_limit() or 0) // SHARE
