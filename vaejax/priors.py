"""Distributions over z to draw new faces from: N(0, I), or a mixture or a flow fitted to a run.

A prior is an object with a `name`, `sample(seeds) -> z` and `log_prob(z) -> [b]`, in nats. A seed
determines a face, whatever other seeds are drawn with it. z is a pytree of arrays `[b ...]`, as the
model's decoder takes it. A temperature below 1 draws nearer to the average face.
"""

import math
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Key, PyTree
from scipy.cluster.vq import kmeans2
from scipy.linalg import cholesky
from scipy.linalg import solve_triangular as solve_triangular_numpy
from scipy.special import logsumexp as logsumexp_numpy

from vaejax import flow
from vaejax.errors import UserError
from vaejax.files import atomic, open_regular
from vaejax.models.autoencoder import Autoencoder, latent_spec

PriorName = Literal["normal", "mixture", "flow"]
FORMAT = "vaejax mixture 1"
FOLDER = "priors"  # in the run's folder
MAX_FILE_BYTES = 1 << 30  # of a mixture

CANDIDATES = 1, 2, 5, 10, 20, 50  # numbers of a mixture's components to choose from
IMAGES_PER_COMPONENT = 50  # at least
MAX_LATENTS = 2048  # of a mixture: its covariances have their square
SAMPLER_STEPS = 40  # of a flow, two evaluations of its network each
FLOW_BATCH = 100  # faces that a flow draws at a time
MAX_ITERATIONS, MIN_GAIN = 100, 1e-4  # of EM; the gain is in nats per image


@runtime_checkable
class Prior(Protocol):
    """A distribution over z."""

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        ...

    def sample(self, seeds: Iterable[int], *, temperature: float = 1.0) -> PyTree:
        """Return a z for each seed, `[b ...]`."""
        ...

    def log_prob(self, z: PyTree) -> Float[Array, " b"]:
        """Return log p(z), nats."""
        ...


@runtime_checkable
class NoisePrior(Prior, Protocol):
    """A prior that makes each z of normal noise `[b d]`, and can tell the noise of a z."""

    def noise(self, seeds: Iterable[int]) -> Float[Array, "b d"]:
        """Return the noise of each seed, of which `sample` makes its z."""
        ...

    def from_noise(self, noise: Float[Array, "b d"]) -> PyTree:
        """Return the z of each noise, `[b ...]`."""
        ...

    def to_noise(self, z: PyTree) -> Float[Array, "b d"]:
        """Return the noise of each z."""
        ...


def seed_keys(seeds: Iterable[int]) -> Key[Array, " b"]:
    """Return a key for each seed, the same in every run; seeds are below 2**32."""
    root = jax.random.key(2**32 - 1)  # no run's --seed: its noise and these are independent
    return jax.vmap(partial(jax.random.fold_in, root))(jnp.asarray(list(seeds), jnp.uint32))


class StandardNormal:
    """N(0, I) over every latent dimension of a model."""

    name = "normal"

    def __init__(self, model: Autoencoder):
        self._leaves, self._tree = jax.tree.flatten(latent_spec(model))
        self._unravel = unraveler(model)

    def sample(self, seeds: Iterable[int], *, temperature: float = 1.0) -> PyTree:
        """Return a z for each seed, `[b ...]`."""
        keys = jax.vmap(lambda key: jax.random.split(key, len(self._leaves)))(seed_keys(seeds))
        drawn = [
            jax.vmap(partial(jax.random.normal, shape=leaf.shape, dtype=leaf.dtype))(keys[:, i])
            for i, leaf in enumerate(self._leaves)
        ]
        return self._tree.unflatten([temperature * leaf for leaf in drawn])

    def noise(self, seeds: Iterable[int]) -> Float[Array, "b d"]:
        """Return the noise of each seed, which is its z as a vector."""
        return flatten_latents(self.sample(seeds))

    def from_noise(self, noise: Float[Array, "b d"]) -> PyTree:
        """Return noise in the shapes of z."""
        return jax.vmap(self._unravel)(noise)

    def to_noise(self, z: PyTree) -> Float[Array, "b d"]:
        """Return z as vectors."""
        return flatten_latents(z)

    def log_prob(self, z: PyTree) -> Float[Array, " b"]:
        """Return log N(z; 0, I), nats."""
        return standard_normal_log_prob(z)


def standard_normal_log_prob(z: PyTree) -> Float[Array, " b"]:
    """Return log N(z; 0, I) over all latents of an image, nats."""
    flat = flatten_latents(z)
    return -0.5 * jnp.sum(flat**2 + jnp.log(2 * jnp.pi), axis=-1)


def flatten_latents(z: PyTree) -> Float[Array, "b d"]:
    """Lay the latents of each image side by side as one vector."""
    leaves = jax.tree.leaves(z)
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def unraveler(model: Autoencoder) -> Callable[[Float[Array, " d"]], PyTree]:
    """Return the function that brings one image's latents from a vector to their shapes."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), latent_spec(model))
    return ravel_pytree(zeros)[1]


def latent_dimensions(model: Autoencoder) -> int:
    """Return the number of latent dimensions of an image."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(latent_spec(model)))


# The flow -----------------------------------------------------------------------------------------


class FlowPrior:
    """A flow that was trained on a run's posterior means; a face is drawn in `steps` of Heun's."""

    name = "flow"

    def __init__(
        self,
        network: Any,
        params: PyTree,
        stats: PyTree,
        model: Autoencoder,
        *,
        steps: int = SAMPLER_STEPS,
        condition: Sequence[int] = (),
    ):
        self.network, self.params, self.stats, self.steps = network, params, stats, steps
        self._labels = jnp.asarray(condition or [0] * len(network.labels), jnp.int32)[None]
        self._unravel = unraveler(model)

    def sample(self, seeds: Iterable[int], *, temperature: float = 1.0) -> PyTree:
        """Return a z for each seed, `[b ...]`; the temperature scales the noise."""
        return self.from_noise(temperature * self.noise(seeds))

    def noise(self, seeds: Iterable[int]) -> Float[Array, "b d"]:
        """Return the noise of each seed."""
        normal = partial(jax.random.normal, shape=(self.network.latents,))
        return jax.vmap(normal)(seed_keys(seeds))

    def from_noise(self, noise: Float[Array, "b d"]) -> PyTree:
        """Return the z to which the flow moves each noise, `[b ...]`."""
        return jax.vmap(self._unravel)(self._in_batches(flow.sample, noise))

    def to_noise(self, z: PyTree) -> Float[Array, "b d"]:
        """Return the noise that the flow moves to each z, up to the error of its steps."""
        return self._in_batches(flow.to_noise, flatten_latents(z))

    def log_prob(self, z: PyTree) -> Float[Array, " b"]:
        """Return log p(z), nats."""
        return self._in_batches(flow.log_prob, flatten_latents(z))

    def _in_batches(self, function: Callable[..., Array], vectors: Float[Array, "b d"]) -> Array:
        """Call a function on batches of one size, so that it is compiled once, and no face depends
        on how many there are."""
        count = len(vectors)
        padded = jnp.pad(vectors, ((0, -count % FLOW_BATCH), (0, 0)))
        labels = jnp.broadcast_to(self._labels, (FLOW_BATCH, self._labels.shape[1]))
        parts = [
            function(self.params, self.stats, part, labels, flow=self.network, steps=self.steps)
            for part in jnp.split(padded, len(padded) // FLOW_BATCH)
        ]
        return jnp.concatenate(parts)[:count]


# The mixture --------------------------------------------------------------------------------------


class Mixture(NamedTuple):
    """The arrays of a Gaussian mixture over z as a vector."""

    log_weights: Float[Array, " k"]
    means: Float[Array, "k d"]
    choleskys: Float[Array, "k d d"]  # lower triangular: covariance = L L^T


class GaussianMixture:
    """A mixture of Gaussians with full covariances."""

    name = "mixture"

    def __init__(self, mixture: Mixture, model: Autoencoder):
        self.mixture = Mixture(*(jnp.asarray(a, jnp.float32) for a in mixture))
        self._unravel = unraveler(model)

    def sample(self, seeds: Iterable[int], *, temperature: float = 1.0) -> PyTree:
        """Return a z for each seed, `[b ...]`; the temperature scales every component."""
        keys = seed_keys(seeds)
        return jax.vmap(self._unravel)(
            _sample_mixture(self.mixture, keys, jnp.float32(temperature))
        )

    def log_prob(self, z: PyTree) -> Float[Array, " b"]:
        """Return log p(z), nats."""
        return _mixture_log_prob(self.mixture, flatten_latents(z))


@jax.jit
def _sample_mixture(
    mixture: Mixture, keys: Key[Array, " b"], temperature: Float[Array, ""]
) -> Float[Array, "b d"]:
    components, noise = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    index = jax.vmap(lambda key: jax.random.categorical(key, mixture.log_weights))(components)
    normal = jax.vmap(lambda key: jax.random.normal(key, mixture.means.shape[1:]))(noise)
    # One after the other: the last bits of a matrix product depend on the number of its rows.
    offsets = jax.lax.map(lambda seed: mixture.choleskys[seed[0]] @ seed[1], (index, normal))
    return mixture.means[index] + temperature * offsets


@jax.jit
def _mixture_log_prob(mixture: Mixture, z: Float[Array, "b d"]) -> Float[Array, " b"]:
    def component(mean: Float[Array, " d"], factor: Float[Array, "d d"]) -> Float[Array, " b"]:
        white = solve_triangular(factor, (z - mean[None]).T, lower=True)
        log_det = jnp.sum(jnp.log(jnp.diagonal(factor)))
        return -0.5 * jnp.sum(white**2 + jnp.log(2 * jnp.pi), axis=0) - log_det

    logs = jax.lax.map(lambda c: component(*c), (mixture.means, mixture.choleskys))
    return logsumexp(logs + mixture.log_weights[:, None], axis=0)


def require_mixture_fits(model: Autoencoder) -> None:
    """Raise UserError for a model with too many latent dimensions for a mixture."""
    _require_few(latent_dimensions(model))


def _require_few(latents: int) -> None:
    if latents > MAX_LATENTS:
        raise UserError(
            f"a mixture prior has full covariances: {latents:,} latent dimensions are too many for "
            f"it (at most {MAX_LATENTS:,})"
        )


def choose_mixture(
    means: Float[np.ndarray, "n d"], held_out: Float[np.ndarray, "m d"], *, seed: int = 0
) -> Mixture:
    """Fit mixtures of 1, 2, 5, 10, ... components, and return the one that held-out images favour.

    The search ends at the first number under which the posterior means of the held-out images are
    no more probable than under the one before, by more than the standard error of that gain: few
    images favour a second component by chance. Raises UserError as `fit_mixture` does.
    """
    if not np.isfinite(held_out).all():
        raise UserError("a mixture prior needs held-out images with finite posterior means")
    x = held_out.astype(np.float64)
    best, highest = None, np.empty(0)
    for components in CANDIDATES:
        if best is not None and components > len(means) // IMAGES_PER_COMPONENT:
            break
        mixture = fit_mixture(means, components=components, seed=seed)
        log_weights, centers, factors = (np.asarray(a, np.float64) for a in mixture)
        logs = log_weights + _log_densities(x, centers, factors)
        scores = np.asarray(logsumexp_numpy(logs, axis=1))
        if best is not None:
            gains = scores - highest
            if not np.mean(gains) > np.std(gains) / math.sqrt(len(gains)):
                break
        best, highest = mixture, scores
    assert best is not None
    return best


def fit_mixture(means: Float[np.ndarray, "n d"], *, components: int, seed: int = 0) -> Mixture:
    """Fit a Gaussian mixture to the posterior means of training images, by EM in float64.

    Dempster, Laird and Rubin (1977), from a k-means start. There are fewer `components` where they
    would have less than 50 images each. Where images are few, covariances are shrunk: a component's
    towards the pooled one, as by d more images, and that towards its diagonal, likewise (a Wishart
    prior's mode). Raises UserError for less than two images or more than 2,048 dimensions.
    """
    n, d = means.shape
    _require_few(d)
    if n < 2 or not np.isfinite(means).all():
        raise UserError("a mixture prior needs two images or more, with finite posterior means")
    x = means.astype(np.float64)
    k = max(1, min(components, n // IMAGES_PER_COMPONENT))
    scale = np.maximum(x.std(axis=0), 1e-12)
    with warnings.catch_warnings(action="ignore"), np.errstate(invalid="ignore"):
        # of clusters without images, which are left out, and of images that are all the same
        labels = kmeans2(x / scale, k, minit="++", rng=np.random.default_rng(seed))[1]
    shares = np.eye(k)[np.asarray(labels)]  # responsibilities [n k]
    shares = shares[:, shares.any(axis=0)]
    weights, centers, factors = _maximization(x, shares)
    best = -np.inf
    for _ in range(MAX_ITERATIONS):
        logs = np.log(weights) + _log_densities(x, centers, factors)
        total = np.asarray(logsumexp_numpy(logs, axis=1))
        if np.mean(total) - best < MIN_GAIN:
            break
        best = np.mean(total)
        weights, centers, factors = _maximization(x, np.exp(logs - total[:, None]))
    return Mixture(*(jnp.asarray(a, jnp.float32) for a in (np.log(weights), centers, factors)))


def _maximization(
    x: Float[np.ndarray, "n d"], shares: Float[np.ndarray, "n k"]
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "k d"], Float[np.ndarray, "k d d"]]:
    """Return weights, means and Cholesky factors of the shrunk covariances."""
    n, d = x.shape
    counts = shares.sum(axis=0) + 1e-9
    centers = (shares.T @ x) / counts[:, None]
    scatters = []
    for i in range(len(counts)):
        away = x - centers[i]
        scatters.append((shares[:, i, None] * away).T @ away)
    pooled = np.sum(scatters, axis=0) / n
    diagonal = np.diag(np.diag(pooled) + 1e-6 * np.trace(pooled) / d + 1e-12)
    pooled = (n * pooled + d * diagonal) / (n + d)
    factors = [
        cholesky((scatter + d * pooled) / (count + d), lower=True)
        for scatter, count in zip(scatters, counts, strict=True)
    ]
    return counts / counts.sum(), centers, np.stack(factors)


def _log_densities(
    x: Float[np.ndarray, "n d"],
    centers: Float[np.ndarray, "k d"],
    factors: Float[np.ndarray, "k d d"],
) -> Float[np.ndarray, "n k"]:
    columns = []
    for center, factor in zip(centers, factors, strict=True):
        white = solve_triangular_numpy(factor, (x - center).T, lower=True)
        log_det = np.sum(np.log(np.diag(factor)))
        columns.append(-0.5 * np.sum(white**2 + np.log(2 * np.pi), axis=0) - log_det)
    return np.stack(columns, axis=1)


# In the run's folder ------------------------------------------------------------------------------


def save(mixture: Mixture, run: Path, *, digest: str) -> None:
    """Write `priors/mixture.npz`, with the digest of the weights that it was fitted to."""
    path = run / FOLDER / "mixture.npz"
    arrays: dict[str, Any] = {name: np.asarray(a) for name, a in mixture._asdict().items()}
    with atomic(path) as partial_path, partial_path.open("wb") as file:
        np.savez(file, format=FORMAT, digest=digest, **arrays)


def load(run: Path, *, digest: str, latents: int) -> Mixture | None:
    """Read a run's mixture; None if there is none, or it is damaged or of other weights."""
    try:
        path = run / FOLDER / "mixture.npz"
        with open_regular(path, max_bytes=MAX_FILE_BYTES) as file, np.load(file) as arrays:
            # `save` packs nothing: a small file holds nothing large
            if any(member.compress_type != zipfile.ZIP_STORED for member in arrays.zip.infolist()):
                return None
            if (str(arrays["format"]), str(arrays["digest"])) != (FORMAT, digest):
                return None
            mixture = Mixture(*(arrays[name] for name in Mixture._fields))
    except Exception:  # whatever NumPy and zipfile raise for a damaged file
        return None
    k = mixture.log_weights.size
    shapes: Sequence[tuple[int, ...]] = ((k,), (k, latents), (k, latents, latents))
    good = all(
        array.dtype == np.float32 and array.shape == shape and np.isfinite(array).all()
        for array, shape in zip(mixture, shapes, strict=True)
    )
    return mixture if good else None
