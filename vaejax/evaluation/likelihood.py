"""What held-out images cost in nats: a likelihood fitted to the model, and the bounds with it."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Key, PyTree, UInt8

from vaejax.distributions import DiscretizedNormal, Normal
from vaejax.evaluation import similarity
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.objectives import to_float, to_uint8

GRID = np.linspace(-0.4, 0.4, 9)  # of log-variances, round the one that is the best so far


class Seen(NamedTuple):
    """What a model makes of each image of a batch, without learning from it."""

    output: Float[Array, "b h w c"]  # the decoder's, of one z that is drawn from the posterior
    reconstructions: UInt8[Array, "b h w c"]  # of the posterior's mode
    mse: Float[Array, " b"]  # of the output, over an image's values in [0, 1]
    psnr: Float[Array, " b"]  # of the reconstructions, as files would have them
    ssim: Float[Array, " b"] | None  # None of images that are smaller than its window
    posterior: Normal | None  # of each latent dimension; None where there is but a code
    z: Float[Array, "b d"] | None


@partial(jax.jit, static_argnames="model")
def see(
    params: PyTree,
    statistics: PyTree,
    images: UInt8[Array, "b h w c"],
    keys: Key[Array, " b"],
    *,
    model: Autoencoder,
) -> Seen:
    """A model that denoises is shown noisy images, and is held against the clean ones."""
    x, (noise, draw) = to_float(images), jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    code, _ = autoencoder.encode(model, params, statistics, model.corrupt(x, noise))
    decode = partial(autoencoder.decode, model, params, statistics)
    posterior = z = None
    if isinstance(code, Normal):
        posterior, z = code, jax.vmap(Normal.sample)(code, draw)
        output, mode = decode(z)[0], decode(code.mode)[0]
    else:
        output = mode = decode(code)[0]
    reconstructions = to_uint8(mode)
    return Seen(
        output,
        reconstructions,
        jnp.mean((x - output) ** 2, axis=(1, 2, 3)),
        similarity.psnr(images, reconstructions),
        similarity.ssim(images, reconstructions) if model.size >= similarity.LEAST else None,
        posterior,
        z,
    )


@jax.jit
def distortions(
    output: Float[Array, "b h w c"],
    images: UInt8[Array, "b h w c"],
    log_variances: Float[Array, " g"],
) -> Float[Array, "g b"]:
    """-log p(x|z) over the 256 levels for each of some variances, nats per image."""

    def one(log_variance: Float[Array, ""]) -> Float[Array, " b"]:
        return -DiscretizedNormal(output, log_variance).log_prob(images)

    return jax.lax.map(one, log_variances)


def calibrate(
    totals: Callable[[Float[np.ndarray, " g"]], Float[np.ndarray, " g"]], *, start: float
) -> float:
    """The log-variance with the smallest distortion: one for all values of all images, the one
    parameter that a likelihood needs on top of a model that was trained on means (Rybkin et al.,
    2021, sigma-VAE, section 3: there by its closed form, which is that of a density).

    `totals` gives the distortion of some log-variances, each a pass over the images; `start` is
    where to look first, such as the log of the mse. It is found to 0.002: a hundredth of a nat
    of an image of 64 x 64 pixels.
    """
    centre, best = start, 0
    for _ in range(100):
        values = totals(centre + GRID)
        best = int(np.argmin(values))
        if 0 < best < len(GRID) - 1:
            break
        centre += float(GRID[best])
    else:
        return centre
    below, here, above = values[best - 1 : best + 2]
    step = GRID[1] - GRID[0]
    return float(centre + GRID[best] + step * (below - above) / (2 * (below - 2 * here + above)))


def log_weights(
    posterior: Normal,
    log_likelihood: Callable[[Float[Array, "s d"]], Float[Array, " s"]],
    key: Key[Array, ""],
    samples: int,
) -> Float[Array, " s"]:
    """log p(x|z) + log p(z) - log q(z|x) of some z from the posterior of one image, nats."""
    draw = jax.vmap(posterior.sample)
    z = draw(jax.random.split(key, samples))
    prior = Normal(jnp.zeros_like(z), jnp.zeros_like(z))
    return log_likelihood(z) + prior.log_prob(z) - jax.vmap(posterior.log_prob)(z)


class Bound(NamedTuple):
    """The importance-weighted bound as it grows, sample by sample, in constant memory."""

    total: Float[Array, " b"]  # log of the sum of the weights
    first: Float[Array, " b"]  # sum of their logs
    samples: int

    def add(self, weights: Float[Array, "b s"]) -> "Bound":
        return Bound(
            jnp.logaddexp(self.total, logsumexp(weights, axis=1)),
            self.first + jnp.sum(weights, axis=1),
            self.samples + weights.shape[1],
        )

    @property
    def value(self) -> Float[Array, " b"]:
        """log 1/K sum of K weights: at most log p(x) in expectation, and nearer to it the more
        samples there are (Burda et al., 2016, IWAE, equation 8), nats per image."""
        return self.total - math.log(self.samples)

    @property
    def elbo(self) -> Float[Array, " b"]:
        """The mean of the same weights' logs, which is the bound with K = 1."""
        return self.first / self.samples


def nothing_yet(images: int) -> Bound:
    return Bound(jnp.full(images, -jnp.inf), jnp.zeros(images), 0)


@partial(jax.jit, static_argnames=("model", "samples"))
def image_weights(
    params: PyTree,
    statistics: PyTree,
    images: UInt8[Array, "b h w c"],
    keys: Key[Array, " b"],
    log_variance: Float[Array, ""],
    *,
    model: Autoencoder,
    samples: int,
) -> Float[Array, "b s"]:
    """`log_weights` of images, in the memory of `samples` of them."""
    posterior, _ = autoencoder.encode(model, params, statistics, to_float(images))

    def of_one(inputs) -> Float[Array, " s"]:
        own, image, key = inputs

        def log_likelihood(z: Float[Array, "s d"]) -> Float[Array, " s"]:
            output, _ = autoencoder.decode(model, params, statistics, z)
            copies = jnp.broadcast_to(image, (samples, *image.shape))
            return DiscretizedNormal(output, log_variance).log_prob(copies)

        return log_weights(own, log_likelihood, key, samples)

    return jax.lax.map(of_one, (posterior, images, keys))
