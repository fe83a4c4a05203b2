"""What the networks of others are made of, for images as they are here."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from vaejax.models.convolution import correlate

Padding = Literal["SAME", "VALID"]


def coloured(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
    """The levels in three channels, of grey images too."""
    return jnp.broadcast_to(images.astype(jnp.float32), (*images.shape[:3], 3))


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k l c o"],
    stride: int = 1,
    padding: Padding = "SAME",
) -> Float[Array, "b i j o"]:
    """Of kernels of odd sizes; in full float32 on a GPU too, so that figures are the same there."""
    around = [k // 2 if padding == "SAME" else 0 for k in kernel.shape[:2]]
    with jax.default_matmul_precision("highest"):
        return correlate(x, kernel, [(n, n) for n in around], stride=stride)


def largest(
    x: Float[Array, "b h w c"], *, size: int, stride: int, padding: Padding = "VALID"
) -> Float[Array, "b i j c"]:
    """The maximum of each window of `size` by `size` pixels, of what of it lies in the image."""
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def mean_of_neighbours(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The mean of the up to nine pixels round each that lie in the image."""
    window, strides = (1, 3, 3, 1), (1, 1, 1, 1)
    ones = jnp.ones((1, *x.shape[1:3], 1))
    count = lax.reduce_window(ones, 0.0, lax.add, window, strides, "SAME")
    return lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME") / count
