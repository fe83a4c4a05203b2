"""Judge a model on images that it never saw: all of its figures, in the memory of a batch."""

import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8
from tqdm import tqdm

from vaejax.data.batches import Images
from vaejax.errors import UserError
from vaejax.evaluation import latents, likelihood
from vaejax.evaluation.figures import Estimate
from vaejax.models.autoencoder import Autoencoder
from vaejax.training.step import image_keys

PIXELS = 2**19  # of a batch: 128 images of 64 x 64
REPORTED = 0.01  # the report's weight of the kl


class Subject(NamedTuple):
    """What is judged."""

    model: Autoencoder
    params: PyTree
    statistics: PyTree
    kl_weight: float | None  # of the loss that it was trained with; None where there is none
    in_nats: bool = False  # whether that loss was an ELBO, with a weight of 1 on the rate


class Walked(NamedTuple):
    """What was found of each held-out image, in their order."""

    mse: Float[np.ndarray, " n"]
    psnr: Float[np.ndarray, " n"]
    ssim: Float[np.ndarray, " n"] | None  # of images that are as large as its window
    distortion: Float[np.ndarray, " n"]
    means: Float[np.ndarray, "n d"] | None  # of the posterior, if there is one
    log_variances: Float[np.ndarray, "n d"] | None
    z: Float[np.ndarray, "n d"] | None
    kl: Float[np.ndarray, "n d"] | None  # of each latent dimension, nats


def at_a_time(model: Autoencoder) -> int:
    """Images of a batch."""
    return max(4, min(128, PIXELS // model.size**2))


def batches(
    images: Images, size: int, *, doing: str
) -> Iterator[tuple[Int[np.ndarray, " b"], UInt8[np.ndarray, "b h w c"]]]:
    """All images in order, with their places; the last batch is as large as the others, by its last
    image again and again: whoever takes what it gives cuts that off."""
    with progress(len(images), doing) as bar:
        for first in range(0, len(images), size):
            places = np.minimum(np.arange(first, first + size), len(images) - 1)
            yield places, images.read(places)
            bar.update(min(size, len(images) - first))


def progress(total: int, doing: str, unit: str = " images") -> tqdm:
    """How far it is, and how long it takes; a plain line where there is no terminal."""
    if not sys.stderr.isatty():
        print(f"{doing}: {total:,}{unit} …", file=sys.stderr, flush=True)
    return tqdm(total=total, desc=doing, unit=unit, smoothing=0.05, disable=None, leave=False)


def calibrate(subject: Subject, validation: Images, key: Key[Array, ""]) -> float:
    """The log-variance of the likelihood, by images of another split than it is judged on. Raises
    UserError where the model's output is no number."""
    size = at_a_time(subject.model)

    def seen() -> Iterator[tuple[int, UInt8[np.ndarray, "b h w c"], likelihood.Seen]]:
        for places, images in batches(validation, size, doing="calibrating"):
            count = len(np.unique(places))
            yield count, images, see_batch(subject, images, places, key)

    def totals(log_variances: Float[np.ndarray, " g"]) -> Float[np.ndarray, " g"]:
        total = np.zeros(len(log_variances))
        for count, images, found in seen():
            grid = jnp.asarray(log_variances, jnp.float32)
            nats = likelihood.distortions(found.output, jnp.asarray(images), grid)
            total += np.asarray(nats[:, :count], np.float64).sum(axis=1)
        return total

    mse = sum(float(found.mse[:count].sum()) for count, _, found in seen()) / len(validation)
    if not math.isfinite(mse):
        raise UserError(
            f"what the model makes of the validation images is no number: their mse is {mse}. "
            "Nothing can be said of such weights"
        )
    return likelihood.calibrate(totals, start=math.log(max(mse, 1e-12)))


def see_batch(
    subject: Subject,
    images: UInt8[np.ndarray, "b h w c"],
    places: Int[np.ndarray, " b"],
    key: Key[Array, ""],
) -> likelihood.Seen:
    """Each image with its own noise, by its place among all of them."""
    model, params, statistics = subject[:3]
    keys = image_keys(key, jnp.asarray(places))
    return likelihood.see(params, statistics, jnp.asarray(images), keys, model=model)


class Batch(NamedTuple):
    """What a walk shows of a batch on its way."""

    images: UInt8[np.ndarray, "b h w c"]
    reconstructions: UInt8[np.ndarray, "b h w c"]


def walk(
    subject: Subject, held_out: Images, key: Key[Array, ""], log_variance: float, *, look
) -> Walked:
    """Every held-out image once; `look` is shown each `Batch`, without what fills up the last."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Walked._fields}
    variance = jnp.full(1, log_variance, jnp.float32)
    for places, images in batches(held_out, at_a_time(subject.model), doing="held-out images"):
        count = len(np.unique(places))
        found = see_batch(subject, images, places, key)
        nats = likelihood.distortions(found.output, jnp.asarray(images), variance)[0]
        values = {"mse": found.mse, "psnr": found.psnr, "ssim": found.ssim, "distortion": nats}
        if found.posterior is not None:
            own = found.posterior
            values |= {"means": own.mean, "log_variances": own.log_variance}
            values |= {"z": found.z, "kl": own.kl()}
        for name, value in values.items():
            if value is not None:
                columns[name].append(np.asarray(value[:count]))
        look(Batch(images[:count], np.asarray(found.reconstructions[:count])))
    whole: dict[str, Any] = {
        name: np.concatenate(parts) if parts else None for name, parts in columns.items()
    }
    return Walked(**whole)


def likelihoods(subject: Subject, walked: Walked, log_variance: float) -> dict[str, Estimate]:
    """The report's figures and the field's, of a walk."""
    model = subject.model
    values = model.size**2 * model.channels
    bits = values * math.log(2)
    figures = {
        "mse": _mean(walked.mse),
        "deviation": Estimate(255 * math.exp(log_variance / 2)),
        "distortion": _mean(walked.distortion),
        "psnr": _mean(walked.psnr),
    }
    if walked.ssim is not None:
        figures["ssim"] = _mean(walked.ssim)
    if walked.kl is None or walked.means is None:
        figures["distortion_bits"] = _mean(walked.distortion / bits)
        return figures
    kl, rate = walked.kl.mean(axis=1), walked.kl.sum(axis=1)
    figures |= {
        "kl": _mean(kl),
        "report_loss": _mean(walked.mse + REPORTED * kl),
        "rate": _mean(rate),
        "elbo": _mean(-(walked.distortion + rate)),
        "bits_per_dim": _mean((walked.distortion + rate) / bits),
        "active_units": Estimate(latents.active_units(walked.means)),
    }
    if subject.in_nats:
        figures["effective_beta"] = Estimate(1.0)
    elif subject.kl_weight is not None:
        # mse + w kl, times values / 2 variance, has the distortion's nats and w so many of the kl
        latent_dim = walked.means.shape[1]
        ours = subject.kl_weight * values / (2 * math.exp(log_variance) * latent_dim)
        figures["effective_beta"] = Estimate(ours)
    return figures


def _mean(values: Float[np.ndarray, " n"]) -> Estimate:
    """With its standard error, if there is more than one value."""
    values = values.astype(np.float64)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(float(values.mean()), error)


def importance(
    subject: Subject,
    held_out: Images,
    key: Key[Array, ""],
    log_variance: float,
    *,
    images: int,
    samples: int,
) -> dict[str, Estimate]:
    """The importance-weighted bound, and the ELBO, of the first held-out images."""
    model, params, statistics = subject[:3]
    size, some = 4, min(samples, at_a_time(model))
    bounds, elbos = [], []
    images = min(images, len(held_out))
    with progress(images, "importance weights") as bar:
        for first in range(0, images, size):
            places = np.minimum(np.arange(first, first + size), images - 1)
            shown = jnp.asarray(held_out.read(places))
            weigh = partial(likelihood.image_weights, params, statistics, shown, model=model)
            bound = likelihood.nothing_yet(size)
            for part in range(-(-samples // some)):
                own = image_keys(jax.random.fold_in(key, part), jnp.asarray(places))
                weights = weigh(own, jnp.float32(log_variance), samples=some)
                bound = bound.add(weights[:, : samples - part * some])
            count = min(size, images - first)
            bounds.append(np.asarray(bound.value[:count]))
            elbos.append(np.asarray(bound.elbo[:count]))
            bar.update(count)
    return {
        "importance_elbo": _mean(np.concatenate(elbos)),
        "importance_bound": _mean(np.concatenate(bounds)),
    }


def hole(walked: Walked) -> dict[str, Estimate]:
    """How far the codes of the held-out images, all together, lie from the prior."""
    if walked.means is None or walked.log_variances is None or walked.z is None:
        return {}
    rate = latents.split_rate(walked.means, walked.log_variances, walked.z)
    return {
        "mmd": Estimate(latents.prior_mmd(walked.z)),
        "index_code": Estimate(rate.index_code),
        "marginal_kl": Estimate(rate.marginal_kl),
    }
