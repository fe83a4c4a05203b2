"""Metrics of held-out images: likelihood and its bounds, PSNR, SSIM, and where their z lie.

Functions over a batch of images are JAX; those over the z of all images are NumPy, in float64.
Elsewhere a model's z may be any pytree; here the latents of an image are one vector `[d]`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Key, PyTree, UInt8
from scipy.special import logsumexp as logsumexp_numpy

from vaejax.distributions import DiscretizedNormal, Normal
from vaejax.losses import to_float, to_uint8
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.priors import flatten_latents, standard_normal_log_prob

GRID = np.linspace(-0.4, 0.4, 9)  # of log-variances, around the best one so far
ACTIVE = 0.01  # variance of a dimension's mean over images (Burda et al., 2016, section 5.3)
BLOCK = 512  # images that are compared with all others at a time
RADIUS, SIGMA = 5, 1.5  # of the Gaussian window of SSIM, pixels
WINDOW = 2 * RADIUS + 1  # pixels, which an image must have at least
K1, K2 = 0.01, 0.03  # of SSIM (Wang et al., 2004, section III-B)
MAX_LEVEL = 255


# The model, applied to a batch --------------------------------------------------------------------


class Latents(NamedTuple):
    """The posterior of each image of a batch, and a z that was drawn from it."""

    mean: Float[Any, "b d"]
    log_variance: Float[Any, "b d"]
    z: Float[Any, "b d"]
    kl: Float[Any, "b d"]  # of each latent dimension from N(0, 1), nats


class BatchEvaluation(NamedTuple):
    """A batch in evaluation mode: the model's output, and metrics of each image."""

    output: Float[Array, "b h w c"]  # of the decoder, for one z drawn from the posterior
    reconstructions: UInt8[Array, "b h w c"]  # of the posterior's mode
    mse: Float[Array, " b"]  # of the output, over an image's values in [0, 1]
    psnr: Float[Array, " b"]  # of the reconstructions
    ssim: Float[Array, " b"] | None  # None for images that are smaller than its window
    latents: Latents | None  # None for a model without a posterior


@partial(jax.jit, static_argnames="model")
def evaluate_batch(
    params: PyTree,
    batch_stats: PyTree,
    images: UInt8[Array, "b h w c"],
    keys: Key[Array, " b"],
    *,
    model: Autoencoder,
) -> BatchEvaluation:
    """Encode and decode images, each with its own key.

    A denoising model gets noisy images; its output is compared with the clean ones.
    """
    x = to_float(images)
    noise_keys, sample_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    decode = partial(autoencoder.decode, model, params, batch_stats)
    posterior = autoencoder.encode(model, params, batch_stats, model.corrupt(x, noise_keys))
    z = autoencoder.sample(posterior, sample_keys)
    output = decode(z)
    reconstructions = to_uint8(decode(autoencoder.mode(posterior)))
    latents = _flatten_posterior(posterior, z) if autoencoder.is_variational(model) else None
    has_ssim = model.size >= WINDOW
    return BatchEvaluation(
        output,
        reconstructions,
        jnp.mean((x - output) ** 2, axis=(1, 2, 3)),
        psnr(images, reconstructions),
        ssim(images, reconstructions) if has_ssim else None,
        latents,
    )


def _flatten_posterior(posterior: Any, z: PyTree) -> Latents:
    """Lay the latents of each image side by side as one vector."""

    def flatten(get: Callable[[Normal], Array]) -> Float[Array, "b d"]:
        is_normal = lambda node: isinstance(node, Normal)  # noqa: E731
        return flatten_latents(jax.tree.map(get, posterior, is_leaf=is_normal))

    return Latents(
        flatten(lambda normal: normal.mean),
        flatten(lambda normal: normal.log_variance),
        flatten_latents(z),
        flatten(Normal.kl),
    )


# The likelihood's variance ------------------------------------------------------------------------


@jax.jit
def distortions(
    output: Float[Array, "b h w c"],
    images: UInt8[Array, "b h w c"],
    log_variances: Float[Array, " g"],
) -> Float[Array, "g b"]:
    """Compute -log p(x|z) over the 256 levels for each of some variances, nats per image."""

    def distortion(log_variance: Float[Array, ""]) -> Float[Array, " b"]:
        return -DiscretizedNormal(output, log_variance).log_prob(images)

    return jax.lax.map(distortion, log_variances)


def minimize_distortion(
    total_distortions: Callable[[Float[np.ndarray, " g"]], Float[np.ndarray, " g"]],
    *,
    start: float,
) -> float:
    """Find the log-variance with the smallest distortion: one for all values of all images.

    It is the one parameter that a likelihood needs besides a model that was trained on means
    (Rybkin et al., 2021, sigma-VAE, section 3; their closed form is that of a density, not of one
    over levels).
    `total_distortions` returns the distortions of some log-variances, each time by a pass over the
    images; `start` is where the search begins, such as the log of the mse. The result is exact to
    0.002, which is a hundredth of a nat of an image of 64 x 64 pixels.
    """
    center, best = start, 0
    for _ in range(100):
        values = total_distortions(center + GRID)
        best = int(np.argmin(values))
        if 0 < best < len(GRID) - 1:
            break
        center += float(GRID[best])
    else:
        return center
    below, lowest, above = values[best - 1 : best + 2]
    step = GRID[1] - GRID[0]  # the vertex of the parabola through three values
    vertex = step * (below - above) / (2 * (below - 2 * lowest + above))
    return float(center + GRID[best] + vertex)


# Reconstructions ----------------------------------------------------------------------------------


def psnr(a: UInt8[Array, "b h w c"], b: UInt8[Array, "b h w c"]) -> Float[Array, " b"]:
    """Compute the peak signal-to-noise ratio in dB, 10 log10(255² / mse): higher is better.

    Identical images count as images that differ by half a level in one value: an infinite ratio
    would make a mean over images infinite as well.
    """
    errors = jnp.mean((a.astype(float) - b.astype(float)) ** 2, axis=(1, 2, 3))
    min_error = 0.25 / a[0].size
    return 10 * jnp.log10(MAX_LEVEL**2 / jnp.maximum(errors, min_error))


def ssim(a: UInt8[Array, "b h w c"], b: UInt8[Array, "b h w c"]) -> Float[Array, " b"]:
    """Compute the structural similarity, 1 for identical images (Wang et al., 2004, equation 13).

    The window is their Gaussian one of 11 x 11 pixels. The result is a mean over channels and over
    the positions at which the window lies inside the image.

    Raises ValueError for images of less than 11 pixels.
    """
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM's window has {WINDOW} pixels, the images {a.shape[1:3]}")
    x, y = a.astype(float), b.astype(float)
    mean_x, mean_y = _smooth(x), _smooth(y)
    variance_x = _smooth(x * x) - mean_x**2
    variance_y = _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    c1, c2 = (K1 * MAX_LEVEL) ** 2, (K2 * MAX_LEVEL) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return jnp.mean(numerator / denominator, axis=(1, 2, 3))


def _smooth(x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    """Average over the Gaussian window at each position where it lies inside the image."""
    offsets = np.arange(-RADIUS, RADIUS + 1)
    window = np.exp(-(offsets**2) / (2 * SIGMA**2))
    window /= window.sum()
    for axis in (1, 2):
        length = x.shape[axis] - 2 * RADIUS
        shifted = [jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i in range(len(window))]
        x = jnp.tensordot(window.astype(np.float32), jnp.stack(shifted), axes=1)
    return x


# The importance-weighted bound --------------------------------------------------------------------


def log_weights(
    posterior: Any,
    log_likelihood: Callable[[PyTree], Float[Array, " s"]],
    key: Key[Array, ""],
    samples: int,
) -> Float[Array, " s"]:
    """Compute log p(x|z) + log p(z) - log q(z|x) for z drawn from the posterior of one image,
    nats. `posterior` has no batch axis; the z given to `log_likelihood` have one, `[s ...]`."""
    repeated = jax.tree.map(lambda a: jnp.broadcast_to(a, (samples, *a.shape)), posterior)
    z = autoencoder.sample(repeated, jax.random.split(key, samples))
    return log_likelihood(z) + standard_normal_log_prob(z) - autoencoder.log_prob(repeated, z)


@partial(jax.jit, static_argnames=("model", "samples"))
def image_log_weights(
    params: PyTree,
    batch_stats: PyTree,
    images: UInt8[Array, "b h w c"],
    keys: Key[Array, " b"],
    log_variance: Float[Array, ""],
    *,
    model: Autoencoder,
    samples: int,
) -> Float[Array, "b s"]:
    """Compute the `log_weights` of images one by one, in the memory of `samples` images."""
    posterior = autoencoder.encode(model, params, batch_stats, to_float(images))

    def weigh(inputs) -> Float[Array, " s"]:
        image_posterior, image, key = inputs

        def log_likelihood(z: PyTree) -> Float[Array, " s"]:
            output = autoencoder.decode(model, params, batch_stats, z)
            repeated = jnp.broadcast_to(image, (samples, *image.shape))
            return DiscretizedNormal(output, log_variance).log_prob(repeated)

        return log_weights(image_posterior, log_likelihood, key, samples)

    return jax.lax.map(weigh, (posterior, images, keys))


class ImportanceBound(NamedTuple):
    """The importance-weighted bound of some images, to which samples are added in any parts."""

    log_total: Float[Array, " b"]  # log of the sum of the weights
    sum_of_logs: Float[Array, " b"]
    samples: int

    @staticmethod
    def zero(images: int) -> "ImportanceBound":
        """Return the bound before the first sample."""
        return ImportanceBound(jnp.full(images, -jnp.inf), jnp.zeros(images), 0)

    def add(self, weights: Float[Array, "b s"]) -> "ImportanceBound":
        """Return the bound with the samples of these log-weights as well."""
        return ImportanceBound(
            jnp.logaddexp(self.log_total, logsumexp(weights, axis=1)),
            self.sum_of_logs + jnp.sum(weights, axis=1),
            self.samples + weights.shape[1],
        )

    @property
    def iwae_bound(self) -> Float[Array, " b"]:
        """Return log 1/K Σ of the K weights, nats per image.

        It is at most log p(x) in expectation, and the nearer to it the more samples there are
        (Burda et al., 2016, IWAE, equation 8).
        """
        return self.log_total - math.log(self.samples)

    @property
    def elbo(self) -> Float[Array, " b"]:
        """Return the mean of the same log-weights, which is the bound with K = 1."""
        return self.sum_of_logs / self.samples


# The aggregate posterior --------------------------------------------------------------------------


Matrix = Float[np.ndarray, "n d"]


def active_units(means: Matrix) -> int:
    """Count the latent dimensions whose posterior mean has a variance above 0.01 over the images:
    those that tell images apart (Burda et al., 2016, equation 9)."""
    return int(np.sum(np.var(means.astype(np.float64), axis=0) > ACTIVE))


class RateParts(NamedTuple):
    """The two parts of a rate, nats per image."""

    mutual_information: float  # what z tells of which image it came from
    aggregate_posterior_kl: float  # KL(q(z) ‖ N(0, I))


def split_rate(means: Matrix, log_variances: Matrix, z: Matrix) -> RateParts:
    """Split the rate into mutual information and the KL of the aggregate posterior from the prior.

    With q(z) = 1/n Σ q(z|x_i) over these images, the rate is the mutual information I(i; z) of
    image and z, at most log n, plus KL(q(z) ‖ p(z)) (Hoffman and Johnson, 2016, ELBO surgery,
    equation 8). Both are estimated at one z for each image; their sum is the rate's estimate there.
    """
    means, log_variances, z = (a.astype(np.float64) for a in (means, log_variances, z))
    precisions = np.exp(-log_variances)
    # log q(z_i|x_j) + d/2 log 2π = -1/2 Σ (z_i - m_j)² / v_j + log v_j, as products
    constant = np.sum(means**2 * precisions + log_variances, axis=1)
    log_posterior, log_aggregate = np.empty(len(z)), np.empty(len(z))
    for first in range(0, len(z), BLOCK):
        rows = slice(first, first + BLOCK)
        squares = z[rows] ** 2 @ precisions.T - 2 * z[rows] @ (means * precisions).T
        logs = -0.5 * (squares + constant)
        log_aggregate[rows] = logsumexp_numpy(logs, axis=1) - np.log(len(z))
        log_posterior[rows] = logs[np.arange(len(logs)), np.arange(first, first + len(logs))]
    log_prior = -0.5 * np.sum(z**2, axis=1)
    return RateParts(
        float(np.mean(log_posterior - log_aggregate)), float(np.mean(log_aggregate - log_prior))
    )


def prior_mmd(z: Matrix) -> float:
    """Compute the squared maximum mean discrepancy of z from N(0, I).

    It is 0 in expectation for z from N(0, I), and then sometimes negative; it is below 2.
    This is the unbiased estimate of Gretton et al. (2012), equation 3, for the kernel
    exp(-|x - y|² / 2d). The expectations over the prior are exact, so that no samples of it add
    noise.

    Raises ValueError for less than two z.
    """
    n, d = z.shape
    if n < 2:
        raise ValueError("one z has no distance from others")
    z = z.astype(np.float64)
    squares = np.sum(z**2, axis=1)
    within = -float(n)  # the pairs of a z with itself
    for first in range(0, n, BLOCK):
        rows = slice(first, first + BLOCK)
        distances = squares[rows, None] + squares[None] - 2 * z[rows] @ z.T
        within += float(np.sum(np.exp(-np.maximum(distances, 0) / (2 * d))))
    # the kernel's mean over one or two arguments from N(0, I): Gaussian integrals, width² = d
    across = np.mean((d / (d + 1)) ** (d / 2) * np.exp(-squares / (2 * (d + 1))))
    prior = (d / (d + 2)) ** (d / 2)
    return float(within / (n * (n - 1)) - 2 * across + prior)
