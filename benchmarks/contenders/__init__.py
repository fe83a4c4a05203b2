"""The report's VAE as a user of each library would write it, all on the same initial weights.

Each module has a function `contender(task) -> Contender`. Weights and noise are arrays in an .npz
file: the names are the paths of vaejax's parameters, and the kernels have Keras' layout.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

LEARNING_RATE, B1, KL_WEIGHT = 1e-4, 0.5, 0.01  # the report's
LATENT_DIM = 512


class Task(NamedTuple):
    """What all contenders compute: updates of the report's VAE on a batch."""

    size: int  # pixels
    batch: int  # images
    precision: Literal["float32", "bfloat16"]  # of the computation; parameters are float32
    threads: int
    arrays: Path  # params, images `[b h w c]` uint8, and noise `[2 b d]` of the first two updates

    def load(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Read the parameters by their paths, the images, and the noise of two updates."""
        with np.load(self.arrays) as file:
            arrays = dict(file)
        images, noise = arrays.pop("images"), arrays.pop("noise")
        return arrays, images, noise

    @property
    def encoder(self) -> list[tuple[str, int, int]]:
        """The convolutions of the encoder: name, output channels, stride."""
        channels = [(32, 1), (64, 2), (128, 2), (256, 2), (512, 2)]
        return [(f"conv_{i}", *layer) for i, layer in enumerate(channels, 1)]

    @property
    def decoder(self) -> list[tuple[str, int, int, bool]]:
        """The transposed convolutions of the decoder but the last: name, output channels, stride,
        and whether a norm follows."""
        large = [(256, 2, True), (128, 2, True), (64, 2, False)]
        small = [(256, 2, True), (128, 2, True), (64, 2, True), (32, 2, True)]
        layers = large if self.size >= 256 else small
        return [(f"conv_{i}", *layer) for i, layer in enumerate(layers, 1)]

    @property
    def decoder_input(self) -> tuple[int, int]:
        """The side and the channels of what the decoder's first convolution gets."""
        return (self.size // 32, 128) if self.size >= 256 else (self.size // 16, 512)

    @property
    def last_stride(self) -> int:
        """The stride of the decoder's last convolution."""
        return 4 if self.size >= 256 else 1


class Contender(NamedTuple):
    """A library's implementation of a task, ready to run."""

    version: str
    losses: Callable[[], list[float]]  # make two updates with the task's noise; losses before each
    updates: Callable[[int], None]  # make and finish so many updates, each with new noise
    matrix_products: Callable[[int], None]  # so many of 4096 by 4096, in the task's precision
    device_memory: Callable[[], int | None]  # the peak, bytes; None where it is the host's memory


def operations(task: Task) -> float:
    """Count the multiplications and additions of an update, per image.

    The gradients take twice those of the forward pass, but the first layer's input needs none.
    """
    side, channels, total, first = task.size, 3, 0.0, 0.0
    for _, out, stride in task.encoder:
        side //= stride
        layer = 2.0 * 25 * channels * out * side**2
        first = first or layer
        total, channels = total + layer, out
    total += 2.0 * (side**2 * channels * 1024 + 2 * 1024 * LATENT_DIM)
    side, channels = task.decoder_input
    total += 2.0 * (LATENT_DIM * 1024 + 1024 * side**2 * channels)
    for _, out, stride, _ in [*task.decoder, ("output", 3, task.last_stride, True)]:
        total += 2.0 * 25 * channels * out * side**2
        side, channels = side * stride, out
    return 3 * total - first
