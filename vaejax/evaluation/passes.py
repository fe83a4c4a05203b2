"""Passes of a trained model over the images of a split, in the memory of a batch.

An image's noise depends on the key and on its index in the split, not on the batch size. This is
the only module of evaluation that applies models to data and draws samples.
"""

import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8
from tqdm import tqdm

from vaejax import generate
from vaejax.cache import cache_folder
from vaejax.data.batches import Images, in_order
from vaejax.data.records import read_dataset_report
from vaejax.errors import UserError
from vaejax.evaluation import likelihood
from vaejax.evaluation.features import Features
from vaejax.evaluation.likelihood import BatchEvaluation, ImportanceBound, Latents
from vaejax.files import atomic, open_regular
from vaejax.models.autoencoder import Autoencoder
from vaejax.nearest import Nearest, nearest_of_sets
from vaejax.priors import Prior
from vaejax.training.step import image_keys

BATCH_PIXELS = 2**19  # of a batch: 128 images of 64 x 64
KEPT_FACES = 1000  # of a set, at most, for pictures and for their nearest training faces by pixels
KEPT_BYTES = 2**26  # of those faces
BOUND_BATCH = 4  # images whose importance weights are computed at a time

Faces = UInt8[np.ndarray, "n h w c"]
FeatureMatrix = Float[np.ndarray, "..."]  # [n d], of sets of different sizes


class TrainedModel(NamedTuple):
    """A model with its trained arrays."""

    model: Autoencoder
    params: PyTree
    batch_stats: PyTree


# Batches ------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A batch of constant size, of which the first `valid` images count: the rest is padding."""

    images: UInt8[np.ndarray, "b h w c"]
    indices: Int[np.ndarray, " b"]  # in the split
    valid: int


def batch_size(model: Autoencoder) -> int:
    """Return the number of images of a batch."""
    return max(4, min(128, BATCH_PIXELS // model.size**2))


def batches(images: Images, size: int, *, description: str) -> Iterator[Batch]:
    """Yield all images in their order, with a progress bar; the next are read meanwhile."""
    with progress_bar(len(images), description) as bar:
        for indices, pixels in in_order(images, size):
            valid = len(indices)
            if valid < size:  # only the last
                rows = np.minimum(np.arange(size), valid - 1)
                indices, pixels = indices[rows], pixels[rows]
            yield Batch(pixels, indices, valid)
            bar.update(valid)


def progress_bar(total: int, description: str) -> tqdm:
    """Return a progress bar over images; without a terminal, print one line instead."""
    if not sys.stderr.isatty():
        print(f"{description}: {total:,} images …", file=sys.stderr, flush=True)
    return tqdm(
        total=total, desc=description, unit=" images", smoothing=0.05, disable=None, leave=False
    )


# Held-out images ----------------------------------------------------------------------------------


class ImageScores(NamedTuple):
    """Metrics of each held-out image, in their order."""

    mse: Float[np.ndarray, " n"]
    psnr: Float[np.ndarray, " n"]
    ssim: Float[np.ndarray, " n"] | None  # None for images that are smaller than its window
    distortion: Float[np.ndarray, " n"]
    latents: Latents | None  # [n d]; None for a model without a posterior


def evaluate_batch(
    trained: TrainedModel,
    images: UInt8[np.ndarray, "b h w c"],
    indices: Int[np.ndarray, " b"],
    key: Key[Array, ""],
) -> BatchEvaluation:
    """Apply the model to images, each with the noise of its index."""
    keys = image_keys(key, jnp.asarray(indices))
    return likelihood.evaluate_batch(
        trained.params, trained.batch_stats, jnp.asarray(images), keys, model=trained.model
    )


def fit_log_variance(trained: TrainedModel, validation: Images, key: Key[Array, ""]) -> float:
    """Fit the log-variance of the likelihood to the validation images.

    Raises UserError if the model's output is not finite.
    """

    def evaluated() -> Iterator[tuple[Batch, BatchEvaluation]]:
        size = batch_size(trained.model)
        for batch in batches(validation, size, description="fitting the likelihood"):
            yield batch, evaluate_batch(trained, batch.images, batch.indices, key)

    def total_distortions(log_variances: Float[np.ndarray, " g"]) -> Float[np.ndarray, " g"]:
        total = np.zeros(len(log_variances))
        grid = jnp.asarray(log_variances, jnp.float32)
        for batch, result in evaluated():
            nats = likelihood.distortions(result.output, jnp.asarray(batch.images), grid)
            total += np.asarray(nats[:, : batch.valid], np.float64).sum(axis=1)
        return total

    mse = sum(float(result.mse[: batch.valid].sum()) for batch, result in evaluated())
    mse /= len(validation)
    if not math.isfinite(mse):
        raise UserError(
            f"the model's output for the validation images is not finite: their mse is {mse}. "
            "Such weights cannot be evaluated"
        )
    return likelihood.minimize_distortion(total_distortions, start=math.log(max(mse, 1e-12)))


def evaluate_images(
    trained: TrainedModel,
    images: Images,
    key: Key[Array, ""],
    log_variance: float,
    *,
    on_batch: Callable[[Faces, Faces], None] | None = None,
) -> ImageScores:
    """Evaluate every image once; call `on_batch(images, reconstructions)` for each batch."""
    parts = []
    grid = jnp.full(1, log_variance, jnp.float32)
    for batch in batches(images, batch_size(trained.model), description="held-out images"):
        result = evaluate_batch(trained, batch.images, batch.indices, key)
        distortion = likelihood.distortions(result.output, jnp.asarray(batch.images), grid)[0]
        scores = (result.mse, result.psnr, result.ssim, distortion, result.latents)
        parts.append(ImageScores(*_first(batch.valid, scores)))
        if on_batch is not None:
            on_batch(*_first(batch.valid, (batch.images, result.reconstructions)))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _first(count: int, tree: PyTree) -> PyTree:
    """Cut every array of a tree to its first `count` rows, as NumPy arrays."""
    return jax.tree.map(lambda array: np.asarray(array[:count]), tree)


def importance_bound(
    trained: TrainedModel,
    held_out: Images,
    key: Key[Array, ""],
    log_variance: float,
    *,
    images: int,
    samples: int,
) -> ImportanceBound:
    """Compute the importance-weighted bound of the first `images` held-out images, with `samples`
    of z for each."""
    model = trained.model
    images = min(images, len(held_out))
    part_size = min(samples, batch_size(model))
    bounds = []
    with progress_bar(images, "importance weights") as bar:
        for first in range(0, images, BOUND_BATCH):
            indices = np.minimum(np.arange(first, first + BOUND_BATCH), images - 1)
            batch = jnp.asarray(held_out.read(indices))
            weigh = partial(
                likelihood.image_log_weights,
                trained.params,
                trained.batch_stats,
                batch,
                log_variance=jnp.float32(log_variance),
                model=model,
                samples=part_size,
            )
            bound = ImportanceBound.zero(len(batch))
            for part in range(-(-samples // part_size)):
                keys = image_keys(jax.random.fold_in(key, part), jnp.asarray(indices))
                remaining = samples - part * part_size
                bound = bound.add(weigh(keys=keys)[:, :remaining])
            count = min(BOUND_BATCH, images - first)
            bounds.append(_first(count, bound[:2]))
            bar.update(count)
    log_totals, sums_of_logs = map(jnp.concatenate, zip(*bounds, strict=True))
    return ImportanceBound(log_totals, sums_of_logs, samples)


# Sets of faces ------------------------------------------------------------------------------------


def sample_batches(trained: TrainedModel, prior: Prior, count: int) -> Iterator[Faces]:
    """Yield the faces of the seeds 0, 1, 2, …, as `vaejax sample` draws them."""
    size = batch_size(trained.model)
    with progress_bar(count, f"samples ({prior.name} prior)") as bar:
        for first in range(0, count, size):
            seeds = range(first, first + size)  # the last batch is as large as the others
            z = prior.sample(seeds)
            faces = generate.decode(trained.params, trained.batch_stats, z, model=trained.model)
            batch = np.asarray(faces)[: count - first]
            yield batch
            bar.update(len(batch))


class FaceSets:
    """Sets of faces by their names: the features of all, and the first faces of each."""

    def __init__(self, model: Autoencoder, features: Features | None):
        self._features, self._batch_size = features, batch_size(model)
        self._max_kept = min(KEPT_FACES, KEPT_BYTES // (model.size**2 * model.channels))
        self._kept: dict[str, list[Faces]] = defaultdict(list)
        self._parts: dict[str, list[np.ndarray]] = defaultdict(list)

    def add(self, name: str, images: Faces) -> None:
        """Add a batch of faces to a set."""
        if self._features is not None:
            self._parts[name].append(self._features.of(images, batch_size=self._batch_size))
        room = self._max_kept - sum(map(len, self._kept[name]))
        if room > 0:
            self._kept[name].append(images[:room])

    def first_faces(self) -> dict[str, Faces]:
        """Return the first faces of each set."""
        return {name: np.concatenate(parts) for name, parts in self._kept.items()}

    def features(self) -> dict[str, FeatureMatrix]:
        """Return the features `[n d]` of each set; empty without a network."""
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


def training_features(prepared: Path, features: Features, model: Autoencoder) -> FeatureMatrix:
    """Compute the features `[n d]` of all training images, or read them from the cache: they take
    longest of all."""
    training = Images(prepared, "train")
    report = read_dataset_report(prepared)
    facts = [features.name, features.weights]
    names = ("fingerprint", "persons", "splits", "assignment")
    facts += [report[name] for name in names if name in report]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    path = cache_folder() / "features" / f"{digest}.npy"
    try:
        with open_regular(path) as file:
            cached = np.load(file)
    except (OSError, ValueError, EOFError):
        cached = np.zeros(0)
    if cached.shape == (len(training), features.dim) and cached.dtype == np.float32:
        return cached
    size = batch_size(model)
    computed = np.concatenate(
        [
            features.of(batch.images, batch_size=size)[: batch.valid]
            for batch in batches(training, size, description="features of training images")
        ]
    )
    try:
        with atomic(path) as partial_path:
            np.save(partial_path, computed)
    except OSError as error:
        print(
            f"warning: {path} cannot be written: {error.strerror}; the next evaluation computes "
            "these features again",
            file=sys.stderr,
        )
    return computed


def nearest_training_images(
    sets: dict[str, Faces], training: Images, model: Autoencoder
) -> dict[str, Nearest]:
    """Find the nearest training image by pixels of each face, in one pass for all sets."""

    def training_batches() -> Iterator[Faces]:
        size = batch_size(model)
        for batch in batches(training, size, description="nearest training images"):
            yield batch.images[: batch.valid]

    return nearest_of_sets(sets, training_batches(), training.read)
