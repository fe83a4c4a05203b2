"""How alike two images are, each pair by itself."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

RADIUS, SIGMA = 5, 1.5  # of the window in which SSIM compares, pixels
LEAST = 2 * RADIUS + 1  # pixels of an image
K1, K2 = 0.01, 0.03
LARGEST = 255


def psnr(a: UInt8[Array, "b h w c"], b: UInt8[Array, "b h w c"]) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio, decibels: 10 log10(255^2 / mse), higher is better.

    Two images that are one another's copy have that of half a level in one value: no infinity, by
    which a mean would say nothing.
    """
    errors = jnp.mean((a.astype(float) - b.astype(float)) ** 2, axis=(1, 2, 3))
    least = 0.25 / a[0].size
    return 10 * jnp.log10(LARGEST**2 / jnp.maximum(errors, least))


def ssim(a: UInt8[Array, "b h w c"], b: UInt8[Array, "b h w c"]) -> Float[Array, " b"]:
    """Structural similarity, 1 for a copy: equation 13 of Wang et al. (2004), in their Gaussian
    window of 11 x 11 pixels, whole windows only, a mean over places and channels.

    Raises ValueError for images of less than 11 pixels.
    """
    if min(a.shape[1:3]) < LEAST:
        raise ValueError(f"SSIM's window has {LEAST} pixels, the images {a.shape[1:3]}")
    x, y = a.astype(float), b.astype(float)
    mean_x, mean_y = _smooth(x), _smooth(y)
    variance_x = _smooth(x * x) - mean_x**2
    variance_y = _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    c1, c2 = (K1 * LARGEST) ** 2, (K2 * LARGEST) ** 2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return jnp.mean(
        alike / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)), axis=(1, 2, 3)
    )


def _smooth(x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    """The Gaussian mean round each place that has all of its window."""
    places = np.arange(-RADIUS, RADIUS + 1)
    window = np.exp(-(places**2) / (2 * SIGMA**2))
    window /= window.sum()
    for axis in (1, 2):
        length = x.shape[axis] - 2 * RADIUS
        shifted = [jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i in range(len(window))]
        x = jnp.tensordot(window.astype(np.float32), jnp.stack(shifted), axes=1)
    return x
