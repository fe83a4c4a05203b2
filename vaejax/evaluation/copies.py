"""Whether a face was learned by heart: the training face that lies nearest to it."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

AT_A_TIME = 2**23  # values of images, as floats: 32 MiB
RARE = 0.01  # the share of held-out images that count as near by chance
LEAST = 100  # held-out images, for the nearest hundredth of them to be one


class Nearest(NamedTuple):
    place: Int[np.ndarray, " n"]  # of the training image
    distance: Float[np.ndarray, " n"]


def by_pixels(
    images: UInt8[np.ndarray, "n h w c"],
    training: Iterator[UInt8[np.ndarray, "b h w c"]],
    read: Callable[[Int[np.ndarray, " n"]], UInt8[np.ndarray, "n h w c"]],
) -> Nearest:
    """The training image with the least squared difference from each image, and the root of its
    mean over values in [0, 1]: the unit of the root of an mse.

    The training images stream by; `read` gives some of them by their indices again, since a small
    difference of two large products is not exact.
    """
    best = np.full(len(images), np.inf, np.float32)
    index = np.zeros(len(images), int)
    some = max(1, AT_A_TIME // images[0].size)
    first = 0
    for batch in training:
        for i in range(0, len(images), some):
            part = slice(i, i + some)
            distance, place = map(np.asarray, _least(images[part], batch))
            nearer = distance < best[part]
            best[part] = np.where(nearer, distance, best[part])
            index[part] = np.where(nearer, first + place, index[part])
        first += len(batch)
    return Nearest(index, _exactly(images, index, read))


@jax.jit
def _least(
    images: UInt8[Array, "n h w c"], others: UInt8[Array, "b h w c"]
) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
    """The squared distance from the nearest of the others, and which it is."""

    def flat(x: UInt8[Array, "k h w c"]) -> Float[Array, "k v"]:
        return x.reshape(len(x), -1) / 127.5 - 1  # small products lose less

    a, b = flat(images), flat(others)
    squares = (
        jnp.sum(a**2, axis=1)[:, None]
        + jnp.sum(b**2, axis=1)[None]
        - 2 * jnp.matmul(a, b.T, precision="highest")
    )
    return jnp.min(squares, axis=1), jnp.argmin(squares, axis=1)


def _exactly(images, index, read) -> Float[np.ndarray, " n"]:
    some = max(1, AT_A_TIME // images[0].size)
    found = np.empty(len(images))
    for i in range(0, len(images), some):
        own = images[i : i + some].astype(np.float32)
        away = (own - read(index[i : i + some])) / 255
        found[i : i + some] = np.sqrt(np.mean(away**2, axis=(1, 2, 3)))
    return found


class Share(NamedTuple):
    value: float
    error: float  # standard error of the share, by the numbers of both sets of faces


def share_near(distances: Float[np.ndarray, " n"], held_out: Float[np.ndarray, " m"]) -> Share:
    """The share of faces that lie nearer to a training face than 99 in 100 held-out faces do.

    A generator that has learned the distribution and not the faces has 0.01, one that gives its
    training faces back has 1. The error has that of the threshold in it, an order statistic of the
    held-out faces. Raises ValueError for less than 100 held-out faces.
    """
    if len(held_out) < LEAST:
        raise ValueError(f"{len(held_out)} held-out faces have no nearest hundredth")
    # of all definitions of a quantile the one below which RARE of other faces are to be expected
    near = np.quantile(held_out, RARE, method="weibull")
    share = float(np.mean(distances < near))
    own, threshold = share * (1 - share), RARE * (1 - RARE)
    return Share(share, math.sqrt(own / len(distances) + threshold / (len(held_out) + 2)))


def persons_hit(persons: list[str]) -> float:
    """How many persons the nearest training faces belong to, effectively: the exponential of the
    entropy of who it is (Hill, 1973, N1). All alike often: their number; always the same one: 1."""
    _, counts = np.unique(persons, return_counts=True)
    shares = counts / counts.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))
