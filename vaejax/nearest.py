"""The nearest training image of each face, and the share of faces that are too near one.

The distances of held-out faces, which a model cannot have memorized, say how near a face lies by
chance. The evaluation of a run uses this, and so does the end of its training.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from numpy.typing import ArrayLike

from vaejax.metrics import Estimate

PIXEL_VALUES = 2**23  # of images that are converted to floats at a time: 32 MiB
RARE = 0.01  # share of held-out faces that count as near
MIN_HELD_OUT = 100  # faces of which a hundredth is one

Faces = UInt8[np.ndarray, "..."]  # [n h w c] of each set, whose sizes differ


class Nearest(NamedTuple):
    """The nearest candidate of each query, the first of several."""

    indices: Int[np.ndarray, " n"]
    distances: Float[np.ndarray, " n"]


def nearest(
    queries: np.ndarray,
    blocks: Iterable[np.ndarray],
    distances: Callable[..., ArrayLike],
    *,
    rows: int,
) -> Nearest:
    """Find the nearest candidate of each query, in the memory of a block of distances.

    The candidates come in `blocks`, and are numbered in their order. `distances` computes a matrix
    `[n m]` of at most `rows` queries and a block.
    """
    indices, smallest = np.zeros(len(queries), int), np.full(len(queries), np.inf)
    first = 0
    for block in blocks:
        for row in range(0, len(queries), rows):
            part = slice(row, row + rows)
            matrix = np.asarray(distances(queries[part], block))
            least = matrix.min(axis=1)
            nearer = least < smallest[part]
            indices[part] = np.where(nearer, first + matrix.argmin(axis=1), indices[part])
            smallest[part] = np.where(nearer, least, smallest[part])
        first += len(block)
    return Nearest(indices, smallest)


def nearest_by_pixels(
    images: UInt8[np.ndarray, "n h w c"],
    training: Iterable[UInt8[np.ndarray, "b h w c"]],
    read: Callable[[Int[np.ndarray, " n"]], UInt8[np.ndarray, "n h w c"]],
) -> Nearest:
    """Find the training image with the smallest root mean squared difference from each image.

    Distances are of values in [0, 1]: their unit is that of the root of an mse. The training images
    come in batches. `read` returns some of them by their indices, to compute the distances exactly:
    as differences of products they would have lost digits.
    """
    rows = max(1, PIXEL_VALUES // images[0].size)
    indices = nearest(images, training, _squared_distances, rows=rows).indices
    distances = np.empty(len(images))
    for first in range(0, len(images), rows):
        part = slice(first, first + rows)
        difference = (images[part].astype(np.float32) - read(indices[part])) / 255
        distances[part] = np.sqrt(np.mean(difference**2, axis=(1, 2, 3)))
    return Nearest(indices, distances)


@jax.jit
def _squared_distances(
    images: UInt8[Array, "n h w c"], others: UInt8[Array, "m h w c"]
) -> Float[Array, "n m"]:
    def flatten(x: UInt8[Array, "k h w c"]) -> Float[Array, "k v"]:
        return x.reshape(len(x), -1) / 127.5 - 1  # centred: smaller products lose fewer digits

    a, b = flatten(images), flatten(others)
    products = jnp.matmul(a, b.T, precision="highest")
    return jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)[None] - 2 * products


def nearest_of_sets(
    sets: Mapping[str, Faces],
    training: Iterable[Faces],
    read: Callable[[Int[np.ndarray, " n"]], Faces],
) -> dict[str, Nearest]:
    """Find the nearest training image by pixels of each face, in one pass for all sets."""
    found = nearest_by_pixels(np.concatenate(list(sets.values())), training, read)
    ends = np.cumsum([len(images) for images in sets.values()])[:-1]
    parts = zip(*(np.split(array, ends) for array in found), strict=True)
    return {name: Nearest(*part) for name, part in zip(sets, parts, strict=True)}


def memorized_share(
    distances: Float[np.ndarray, " n"], held_out: Float[np.ndarray, " m"]
) -> Estimate:
    """Compute the share of faces that lie nearer to a training face than 99 % of held-out ones.

    It is 0.01 for a generator of the training distribution that does not repeat the training faces,
    and 1 for one that does. The standard error includes that of the threshold, which is an order
    statistic of the held-out faces.

    Raises ValueError for less than 100 held-out faces.
    """
    if len(held_out) < MIN_HELD_OUT:
        raise ValueError(f"{len(held_out)} held-out faces have no nearest hundredth")
    # the definition of a quantile below which a share of RARE of new faces is to be expected
    threshold = np.quantile(held_out, RARE, method="weibull")
    share = float(np.mean(distances < threshold))
    own_variance = share * (1 - share) / len(distances)
    threshold_variance = RARE * (1 - RARE) / (len(held_out) + 2)
    return Estimate(share, math.sqrt(own_variance + threshold_variance))
