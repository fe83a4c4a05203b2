"""Whether a model repeats its training faces: the nearest training face of each face.

The distances of held-out faces, which the model cannot have memorized, say how near a face lies by
chance.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from numpy.typing import ArrayLike

from vaejax.evaluation.set_metrics import (
    HELD_OUT,
    AnyFeatures,
    Features,
    OtherFeatures,
    Results,
    euclidean_distances,
    metric_of_set,
)
from vaejax.metrics import Estimate

ROWS, COLUMNS = 512, 8192  # of a block of distances between features
PIXEL_VALUES = 2**23  # of images that are converted to floats at a time: 32 MiB
RARE = 0.01  # share of held-out faces that count as near
MIN_HELD_OUT = 100  # faces of which a hundredth is one

Distances = Float[np.ndarray, "..."]  # [n] of each set, whose sizes differ


# Nearest neighbours -------------------------------------------------------------------------------


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


def nearest_by_features(faces: Features, candidates: OtherFeatures) -> Nearest:
    """Find the candidate at the smallest Euclidean distance from each face."""
    blocks = (candidates[i : i + COLUMNS] for i in range(0, len(candidates), COLUMNS))
    return nearest(faces, blocks, euclidean_distances, rows=ROWS)


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


def person_distances(
    sets: Mapping[str, AnyFeatures], training: OtherFeatures, persons: Sequence[str]
) -> dict[str, Distances]:
    """Compute the distance of each face from the nearest training person, of each set.

    A person's position is the mean of the features of her or his training faces. Training faces of
    no known person ("") are left out.
    """
    names, numbers = np.unique(persons, return_inverse=True)
    means = np.stack([training[numbers == i].mean(axis=0) for i, name in enumerate(names) if name])
    return {name: nearest_by_features(faces, means).distances for name, faces in sets.items()}


# Metrics ------------------------------------------------------------------------------------------


def memorization_metrics(kind: str, distances: Mapping[str, Distances]) -> Results:
    """Compute the median distance of each set from its nearest training faces, and the share of
    each set but the held-out one that is memorized.

    `kind` says what the distances are of: "pixels", "features" or "person".
    """
    results: Results = {
        metric_of_set(f"nearest_{kind}", name): Estimate(float(np.median(values)))
        for name, values in distances.items()
    }
    held_out = distances[HELD_OUT]
    for name, values in distances.items():
        if name == HELD_OUT:
            continue
        results[metric_of_set(f"memorized_{kind}", name)] = (
            memorized_share(values, held_out)
            if len(held_out) >= MIN_HELD_OUT
            else f"with {len(held_out)} held-out faces, less than {MIN_HELD_OUT}, their nearest "
            "hundredth is less than one face"
        )
    return results


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


def effective_persons(persons: Sequence[str]) -> float:
    """Compute the effective number of persons, exp of the entropy (Hill, 1973, N1).

    It is the number of different persons if all occur equally often, and 1 if one occurs alone.
    """
    _, counts = np.unique(persons, return_counts=True)
    shares = counts / counts.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))
