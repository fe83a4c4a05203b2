"""Normal distributions as immutable pytrees: the posterior and the likelihood.

Log-densities, log-masses and divergences are in nats. The first axis of every array is the batch;
`*z` and `*x` stand for the axes of a latent and of an image, of which there may be any number.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float, Key, UInt8

LEVELS = 256  # an image's values are uint8, 0..255


def _axes(array: Array) -> tuple[int, ...]:
    """Return all axes but the first, which is the batch's."""
    return tuple(range(1, array.ndim))


class Normal(NamedTuple):
    """Independent normal distributions, one for each value of z, such as the posterior q(z|x)."""

    mean: Float[Array, "b *z"]
    log_variance: Float[Array, "b *z"]

    def sample(self, key: Key[Array, ""]) -> Float[Array, "*shape"]:
        """Draw z = mean + sigma * eps, differentiable in both (Kingma and Welling, 2014, 2.4).

        `jax.vmap(Normal.sample)(posterior, keys)` gives each image a key of its own, so that its
        noise does not depend on the rest of the batch or on the number of devices.
        """
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self.log_variance / 2) * noise

    def log_prob(self, z: Float[Array, "b *z"]) -> Float[Array, " b"]:
        """Return the log-density of z, summed over all axes but the batch's: nats per image."""
        squares = (z - self.mean) ** 2 * jnp.exp(-self.log_variance)
        log_densities = squares + self.log_variance + jnp.log(2 * jnp.pi)
        return -0.5 * jnp.sum(log_densities, axis=_axes(z))

    @property
    def mode(self) -> Float[Array, "*shape"]:
        """Return the most probable z, which is the mean."""
        return self.mean

    def kl(self) -> Float[Array, "*shape"]:
        """Return KL(q || N(0, 1)) of each value of z, nats (Kingma and Welling, 2014, appendix B).

        Equals `kl_normal` for p = N(0, I).
        """
        # expm1 keeps the digits where the log-variance is near zero, as it is when training starts
        return 0.5 * (self.mean**2 + jnp.expm1(self.log_variance) - self.log_variance)

    def rate(self) -> Float[Array, " b"]:
        """Return KL(q || N(0, I)), summed over all axes but the batch's: nats per image."""
        return jnp.sum(self.kl(), axis=_axes(self.mean))


def kl_normal(q: Normal, p: Normal) -> Float[Array, "*shape"]:
    """Return KL(q || p) of two normal distributions for each value of z, nats.

    log(sigma_p / sigma_q) + (sigma_q^2 + (mu_q - mu_p)^2) / (2 sigma_p^2) - 1/2, with the ratio of
    the variances written as an exponential. `q` and `p` have the same shape.
    """
    log_ratio = q.log_variance - p.log_variance
    squares = (q.mean - p.mean) ** 2 * jnp.exp(-p.log_variance)
    # expm1 keeps the digits where both variances are nearly equal
    return 0.5 * (squares + jnp.expm1(log_ratio) - log_ratio)


class DiscretizedNormal(NamedTuple):
    """The likelihood p(x|z) over the 256 levels of every value of an image.

    A level has the mass that N(mean, variance) gives to the interval of width 1/255 around it; the
    two extreme levels take the tails, so that the 256 masses sum to one. This is the likelihood of
    Salimans et al. (2017), PixelCNN++, section 2.1, with a normal instead of a logistic: minimizing
    a squared error fits its mean, and that error is the best value of its variance.
    """

    mean: Float[Array, "b *x"]  # in units of x, where the levels go from 0 to 1
    log_variance: Float[Array, ""]  # one for all values, in squared units of x

    def log_prob(self, images: UInt8[Array, "b *x"]) -> Float[Array, " b"]:
        """Return log p(x|z), summed over all axes but the batch's: nats per image."""
        centre = images.astype(self.mean.dtype) / (LEVELS - 1) - self.mean
        half = 0.5 / (LEVELS - 1)
        precision = jnp.exp(-self.log_variance / 2)
        low, high = (centre - half) * precision, (centre + half) * precision
        # Two cumulative probabilities near one have lost the digits of their difference: above the
        # mean, mirror the interval into the lower tail.
        upper = centre > 0
        low, high = jnp.where(upper, -high, low), jnp.where(upper, -low, high)
        log_low, log_high = log_ndtr(low), log_ndtr(high)
        # The extreme levels have no outer edge; mirroring swaps which of the two edges that is.
        first, last = images == 0, images == LEVELS - 1
        log_low = jnp.where(jnp.where(upper, last, first), -jnp.inf, log_low)
        log_high = jnp.where(jnp.where(upper, first, last), 0.0, log_high)
        log_masses = log_high + jnp.log(-jnp.expm1(log_low - log_high))
        return jnp.sum(log_masses, axis=_axes(images))
