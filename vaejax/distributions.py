"""Distributions as immutable pytrees. Log-densities, log-masses and divergences are in nats."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float, Key, UInt8

LEVELS = 256  # an image's values are uint8, 0..255


class Normal(NamedTuple):
    """Independent normals over the latent dimensions: the posterior q(z|x)."""

    mean: Float[Array, "*b d"]
    log_variance: Float[Array, "*b d"]

    def sample(self, key: Key[Array, ""]) -> Float[Array, "*b d"]:
        """z = mean + sigma * eps, differentiable in both (Kingma and Welling, 2014, 2.4).

        For noise that an image keeps in whatever batch, on whatever device it stands, give each
        image a key of its own: `jax.vmap(Normal.sample)(posterior, keys)`.
        """
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self.log_variance / 2) * noise

    def log_prob(self, z: Float[Array, "*b d"]) -> Float[Array, " *b"]:
        """log q(z|x), nats per image."""
        squares = (z - self.mean) ** 2 * jnp.exp(-self.log_variance)
        return -0.5 * jnp.sum(squares + self.log_variance + jnp.log(2 * jnp.pi), axis=-1)

    @property
    def mode(self) -> Float[Array, "*b d"]:
        return self.mean

    def kl(self) -> Float[Array, "*b d"]:
        """KL(q || N(0, 1)) of each dimension, nats (Kingma and Welling, 2014, appendix B)."""
        # expm1 keeps the digits where the log-variance is near zero, as it is at the start
        return 0.5 * (self.mean**2 + jnp.expm1(self.log_variance) - self.log_variance)


class DiscretizedNormal(NamedTuple):
    """The likelihood p(x|z) over the 256 levels of every value of an image.

    A level has the mass that N(mean, variance) gives to the interval of 1/255 round it; the two
    extreme levels take the tails, so that the 256 masses sum to one. As in Salimans et al. (2017),
    PixelCNN++, section 2.1, with a normal in the place of the logistic: its mode is what a squared
    error asks for, and its variance is that error.
    """

    mean: Float[Array, "b h w c"]  # in units of x, where the levels lie from 0 to 1
    log_variance: Float[Array, ""]

    def log_prob(self, images: UInt8[Array, "b h w c"]) -> Float[Array, " b"]:
        """log p(x|z), nats per image."""
        centre = images.astype(self.mean.dtype) / (LEVELS - 1) - self.mean
        half = 0.5 / (LEVELS - 1)
        precision = jnp.exp(-self.log_variance / 2)
        low, high = (centre - half) * precision, (centre + half) * precision
        # The difference of two numbers near one has lost its digits: look from the lower tail.
        upper = centre > 0
        low, high = jnp.where(upper, -high, low), jnp.where(upper, -low, high)
        log_low, log_high = log_ndtr(low), log_ndtr(high)
        # The extreme levels have no outer edge, which seen from the lower side is either end.
        first, last = images == 0, images == LEVELS - 1
        log_low = jnp.where(jnp.where(upper, last, first), -jnp.inf, log_low)
        log_high = jnp.where(jnp.where(upper, first, last), 0.0, log_high)
        masses = log_high + jnp.log(-jnp.expm1(log_low - log_high))
        return jnp.sum(masses, axis=(1, 2, 3))

    @property
    def mode(self) -> Float[Array, "b h w c"]:
        return jnp.clip(self.mean, 0, 1)
