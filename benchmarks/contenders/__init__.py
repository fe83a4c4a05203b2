"""The report's VAE as a user of each library would write it, on the weights that all start from.

A module here has `contender(task) -> Contender`. Weights and noise come as arrays in an .npz, whose
names are the paths of vaejax's parameters and whose kernels have Keras' layout.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

RATE, B1, KL_WEIGHT = 1e-4, 0.5, 0.01  # the report's


class Task(NamedTuple):
    size: int  # pixels
    batch: int  # images
    precision: Literal["float32", "bfloat16"]  # of the computation; what is kept is float32
    threads: int
    arrays: Path  # params, images `[b h w c]` uint8, and noise `[2 b d]` of the first two updates

    def load(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        with np.load(self.arrays) as kept:
            arrays = dict(kept)
        images, noise = arrays.pop("images"), arrays.pop("noise")
        return arrays, images, noise

    @property
    def encoder(self) -> list[tuple[str, int, int]]:
        """Name, channels out and stride of the convolutions."""
        channels = [(32, 1), (64, 2), (128, 2), (256, 2), (512, 2)]
        return [(f"conv_{i}", *layer) for i, layer in enumerate(channels, 1)]

    @property
    def decoder(self) -> list[tuple[str, int, int, bool]]:
        """The same of the transposed ones but the last, and whether a norm follows."""
        large = [(256, 2, True), (128, 2, True), (64, 2, False)]
        small = [(256, 2, True), (128, 2, True), (64, 2, True), (32, 2, True)]
        return [
            (f"conv_{i}", *layer) for i, layer in enumerate(large if self.size >= 256 else small, 1)
        ]

    @property
    def seed_image(self) -> tuple[int, int]:
        """Side and channels of what the decoder's convolutions begin with."""
        return (self.size // 32, 128) if self.size >= 256 else (self.size // 16, 512)

    @property
    def last_stride(self) -> int:
        return 4 if self.size >= 256 else 1


class Contender(NamedTuple):
    version: str
    losses: Callable[[], list[float]]  # before each of two updates on the given noise; starts it
    steps: Callable[[int], None]  # so many updates, each on new noise, done when it returns
    matrix_products: Callable[[int], None]  # so many of 4096 by 4096, in the task's precision
    device_memory: Callable[[], int | None]  # bytes at most; None where that is the host's


def operations(task: Task) -> float:
    """Multiplications and additions that training on one image takes: forward, and twice that for
    the gradients, but for the first layer, whose input needs none."""
    side, channels, total, first = task.size, 3, 0.0, 0.0
    for _, out, stride in task.encoder:
        side //= stride
        layer = 2.0 * 25 * channels * out * side**2
        first = first or layer
        total, channels = total + layer, out
    total += 2.0 * (side**2 * channels * 1024 + 2 * 1024 * 512)
    side, channels = task.seed_image
    total += 2.0 * (512 * 1024 + 1024 * side**2 * channels)
    for _, out, stride, _ in [*task.decoder, ("output", 3, task.last_stride, True)]:
        total += 2.0 * 25 * channels * out * side**2
        side, channels = side * stride, out
    return 3 * total - first
