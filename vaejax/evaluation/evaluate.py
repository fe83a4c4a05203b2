"""The metrics of a run on images that it was not trained on, computed from its folder.

Nothing is written here: `evaluate` returns the metrics as JSON, and the arrays of the pictures.
"""

import math
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from vaejax import losses, priors
from vaejax.data import assignment
from vaejax.data.batches import Images, Selection
from vaejax.data.records import read_dataset_report
from vaejax.distributions import Normal
from vaejax.errors import UserError
from vaejax.evaluation import likelihood, memorization, passes, set_metrics
from vaejax.evaluation.features import Features
from vaejax.evaluation.passes import FaceSets, ImageScores, TrainedModel
from vaejax.evaluation.set_metrics import HELD_OUT, RECONSTRUCTIONS, SAMPLES, TRAIN, Results
from vaejax.metrics import Estimate
from vaejax.models import autoencoder
from vaejax.nearest import Nearest
from vaejax.priors import Prior
from vaejax.system import versions
from vaejax.training import prior as run_prior
from vaejax.training import run

FORMAT = "vaejax evaluation 2"
REPORT_KL_WEIGHT = 0.01  # of the student report's loss
FACES_IN_ROW = 10  # of the pictures

# what a model without a posterior does not have
POSTERIOR_METRICS = (
    "kl", "report_loss", "rate", "elbo", "bits_per_dim", "effective_beta", "active_units",
    "iwae_elbo", "iwae_bound", "learned_prior_elbo", "mmd", "mutual_information",
    "aggregate_posterior_kl",
)  # fmt: skip

Faces = UInt8[np.ndarray, "n h w c"]


class EvaluationConfig(NamedTuple):
    """What is evaluated, and with how many samples."""

    split: str = "test"
    samples: int = 10_000
    bound_images: int = 128  # of the importance-weighted bound
    bound_samples: int = 64  # of z for each of them
    seed: int = 0


class TrainedRun(NamedTuple):
    """A run with its newest weights and its held-out images."""

    folder: Path
    trained: TrainedModel
    loss: Mapping[str, Any]  # that it was trained with, as JSON
    step: int
    prepared: Path
    data: dict[str, Any]  # identifies the images and their splits
    held_out: Images  # without those that it has learned from, as the next
    validation: Images
    learned_from: int  # images of the split that are left out
    has_persons: bool
    priors: dict[str, Prior]  # by the names of their sets of samples


class Pictures(NamedTuple):
    """The arrays of an evaluation's pictures. A picture's rows have one face in each column."""

    worst_and_best: tuple[Faces, ...]  # rows: held-out faces, reconstructions; in order of PSNR
    reconstructions: tuple[Faces, ...]  # rows: the first held-out faces, reconstructions
    samples: dict[str, Faces]  # by the name of the prior
    nearest: tuple[Faces, ...] | None  # rows: samples, nearest training faces (features, pixels)
    rate_per_dimension: Float[np.ndarray, " d"] | None  # nats; None if any is not finite


class Evaluation(NamedTuple):
    """The metrics of a run as JSON (`evaluation.json`), and the arrays of its pictures."""

    json: dict[str, Any]
    pictures: Pictures


def load_run(folder: Path, split: str, *, prior: priors.PriorName | None = None) -> TrainedRun:
    """Load the newest undamaged weights of a run, and open the images that it was not trained on.

    With `prior` "mixture" a mixture is fitted to the run, unless it has one.

    Raises UserError if the images of a run are gone or have changed, CheckpointError if no
    checkpoint can be used.
    """
    loaded = run.load(folder)
    spec, model, weights = loaded.spec, loaded.model, loaded.weights
    prepared = Path(spec.schedule.prepared)
    try:
        dataset_report = read_dataset_report(prepared)
    except UserError as error:
        kept = assignment.read(folder)
        again = (
            f"`vaejax prepare {quote(spec.schedule.source)} --size {model.size} --out "
            f"{quote(str(prepared))}` "
            "prepares them again (with --crop-faces or --person-depth, if the run had them)"
            if kept is None or not kept.is_own
            else "The command that the run was made by makes them again, with the run's own splits"
        )
        raise UserError(
            f"the images that {folder} was trained on cannot be read: {error} {again}"
        ) from None
    present = assignment.identity(dataset_report)
    if any(present.get(field, value) != value for field, value in spec.data.items()):
        raise UserError(
            f"{prepared} holds other images than {folder} was trained on, or splits them in "
            "another way: its held-out images may have been trained on. Restore the images, or "
            "continue the run with --accept-changed-data"
        )
    held_out, learned_from = _never_learned(folder, prepared, split)
    # a set with the run's own splits has the identity of the set that it is a copy of
    own = {"own_assignment": dataset_report["assignment"]} if "original" in dataset_report else {}
    return TrainedRun(
        folder,
        TrainedModel(model, weights.params, weights.batch_stats),
        spec.loss,
        weights.step,
        prepared,
        {**spec.data, **own},
        held_out,
        _never_learned(folder, prepared, "validation")[0],
        learned_from,
        bool(dataset_report["persons"]),
        _priors(loaded, prior),
    )


def _never_learned(folder: Path, prepared: Path, split: str) -> tuple[Images, int]:
    """Return the images of a split that a run has never learned from, and the number of others.

    Raises UserError if there are no such images.
    """
    images = Images(prepared, split)
    learned = assignment.learned_from(folder, images)
    if len(learned) == len(images):
        raise UserError(
            f"{folder} has learned from all {len(images):,} images of the {split} split of "
            f"{prepared}: none is left to evaluate it on"
        )
    others = np.setdiff1d(np.arange(len(images)), learned)
    return (Selection(images, others) if len(learned) else images), len(learned)


def _priors(loaded: run.LoadedRun, name: priors.PriorName | None) -> dict[str, Prior]:
    """Return the priors of a run by the names of their sets of samples.

    They are N(0, I) of a variational model; the learned ones that it has; and the one that is asked
    for, or that its recipe names, last.
    """
    found: dict[str, Prior] = {}
    if autoencoder.is_variational(loaded.model):
        found[SAMPLES] = run_prior.load(loaded, "normal")
    learned: tuple[priors.PriorName, ...] = "mixture", "flow"
    last = name or run_prior.default_name(loaded)
    for other in learned:
        if other != last and run_prior.is_fitted(loaded, other):
            found[f"{SAMPLES} ({other})"] = run_prior.load(loaded, other)
    if last != "normal":
        found[f"{SAMPLES} ({last})"] = run_prior.load(loaded, last)
    return found


@np.errstate(over="ignore", invalid="ignore")  # metrics that are not finite are left out
def evaluate(
    trained_run: TrainedRun,
    config: EvaluationConfig,
    features: Features | None,
    *,
    missing_features: str = "",
) -> Evaluation:
    """Compute every metric of a run, or the reason why it is left out.

    Without `features`, for the reason `missing_features`, the metrics that need them are left out.
    In memory are a batch, the latents of the held-out images, the features of all faces including
    the training faces (2 KiB each with VGG16), and at most 64 MiB of faces of each set.
    """
    started = time.monotonic()
    trained, held_out = trained_run.trained, trained_run.held_out
    fit_key, noise_key, bound_key = jax.random.split(jax.random.key(config.seed), 3)
    log_variance = passes.fit_log_variance(trained, trained_run.validation, fit_key)
    sets = FaceSets(trained.model, features)

    def add_to_sets(images: Faces, reconstructions: Faces) -> None:
        sets.add(HELD_OUT, images)
        sets.add(RECONSTRUCTIONS, reconstructions)

    scores = passes.evaluate_images(
        trained, held_out, noise_key, log_variance, on_batch=add_to_sets
    )
    results = image_results(scores, log_variance, trained_run)
    if scores.latents is not None:
        bound = passes.importance_bound(
            trained,
            held_out,
            bound_key,
            log_variance,
            images=config.bound_images,
            samples=config.bound_samples,
        )
        results["iwae_elbo"] = _mean(np.asarray(bound.elbo))
        results["iwae_bound"] = _mean(np.asarray(bound.iwae_bound))
        name, prior = next(reversed(trained_run.priors.items()))
        results["learned_prior_elbo"] = (
            learned_prior_elbo(scores, prior, images=config.bound_images)
            if name != SAMPLES
            else "the run has no learned prior"
        )
    for name, prior in trained_run.priors.items():
        for faces in passes.sample_batches(trained, prior, config.samples):
            sets.add(name, faces)
    if not trained_run.priors:
        results[SAMPLES] = f"a {trained.model.title} has no prior to draw faces from"
    nearest, compared, more = _face_results(trained_run, sets, features)
    results |= more
    if features is None:
        results["features"] = missing_features
    return Evaluation(
        {
            **_facts(trained_run, config, features, compared),
            **_to_json(results),
            **_rates(scores),
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
        _pictures(trained_run, scores, sets.first_faces(), nearest, noise_key),
    )


# Results ------------------------------------------------------------------------------------------


def image_results(scores: ImageScores, log_variance: float, trained_run: TrainedRun) -> Results:
    """Average the metrics of held-out images, with the standard errors of the means."""
    model, latents = trained_run.trained.model, scores.latents
    values = model.size**2 * model.channels
    bits = values * math.log(2)
    results: Results = {
        "mse": _mean(scores.mse),
        "likelihood_sigma": Estimate(255 * math.exp(log_variance / 2)),
        "distortion": _mean(scores.distortion),
        "psnr": _mean(scores.psnr),
        "ssim": f"the images are smaller than its window of {likelihood.WINDOW} pixels"
        if scores.ssim is None
        else _mean(scores.ssim),
    }
    if latents is None:
        reason = f"a {model.title} has z, and no distribution over z"
        results["distortion_bits"] = _mean(scores.distortion / bits)
        return results | dict.fromkeys(POSTERIOR_METRICS, reason)
    kl, rate = latents.kl.mean(axis=1), latents.kl.sum(axis=1)
    results |= {
        "kl": _mean(kl),
        "report_loss": _mean(scores.mse + REPORT_KL_WEIGHT * kl),
        "rate": _mean(rate),
        "elbo": _mean(-(scores.distortion + rate)),
        "bits_per_dim": _mean((scores.distortion + rate) / bits),
        "effective_beta": _effective_beta(
            trained_run.loss, math.exp(log_variance), values=values, latents=latents.kl.shape[1]
        ),
        "active_units": Estimate(likelihood.active_units(latents.mean)),
    }
    names = ("mmd", *likelihood.RateParts._fields)
    if len(latents.z) < 2:
        return results | dict.fromkeys(names, "one held-out image has no distance from others")
    parts = likelihood.split_rate(latents.mean, latents.log_variance, latents.z)
    distances = (likelihood.prior_mmd(latents.z), *parts)
    return results | {name: Estimate(v) for name, v in zip(names, distances, strict=True)}


def learned_prior_elbo(scores: ImageScores, prior: Prior, *, images: int) -> Estimate:
    """Estimate the ELBO of the first images with a learned prior in place of N(0, I), nats.

    log p(x|z) + log p(z) - log q(z|x), with the one z of each image that its distortion is of.
    """
    latents = scores.latents
    assert latents is not None
    z, mean, log_variance = (
        jnp.asarray(a[:images]) for a in (latents.z, latents.mean, latents.log_variance)
    )
    log_posterior = Normal(mean, log_variance).log_prob(z)
    log_prior = prior.log_prob(z)
    return _mean(np.asarray(log_prior - log_posterior) - scores.distortion[:images])


def _effective_beta(
    loss: Mapping[str, Any], variance: float, *, values: int, latents: int
) -> Estimate | str:
    beta = losses.effective_beta(loss, variance, values=values, latents=latents)
    if beta is None:
        return f"the loss {loss['kind']} has no known weight of the rate"
    return Estimate(float(beta))


def _mean(values: Float[np.ndarray, " n"]) -> Estimate:
    """Return the mean with its standard error, if there is more than one value."""
    values = values.astype(np.float64)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(float(values.mean()), error)


def _face_results(
    trained_run: TrainedRun, sets: FaceSets, features: Features | None
) -> tuple[dict[str, dict[str, Nearest]], int | None, Results]:
    """Return the nearest training faces by "features" (if there are any) and "pixels", of each set;
    the number of faces that are compared at a time; and the metrics of sets of faces."""
    model = trained_run.trained.model
    training = Images(trained_run.prepared, "train")
    by_pixels = passes.nearest_training_images(sets.first_faces(), training, model)
    results = memorization.memorization_metrics("pixels", _distances(by_pixels))
    if features is None:
        return {"pixels": by_pixels}, None, results
    trained_on = passes.training_features(trained_run.prepared, features, model)
    by_set = sets.features()
    others = {name: faces for name, faces in by_set.items() if name != HELD_OUT}
    results |= set_metrics.compare_sets({**others, TRAIN: trained_on}, by_set[HELD_OUT])
    results |= set_metrics.gaps(results)
    by_features = {
        name: memorization.nearest_by_features(faces, trained_on) for name, faces in by_set.items()
    }
    results |= memorization.memorization_metrics("features", _distances(by_features))
    compared = min(map(len, [trained_on, *by_set.values()]))
    if trained_run.has_persons:
        persons = [training.metadata(i)["person"] for i in range(len(training))]
        distances = memorization.person_distances(by_set, trained_on, persons)
        results |= memorization.memorization_metrics("person", distances)
        for name, nearest in by_features.items():
            if names := [persons[i] for i in nearest.indices[:compared] if persons[i]]:
                count = Estimate(memorization.effective_persons(names))
                results[set_metrics.metric_of_set("persons", name)] = count
    return {"features": by_features, "pixels": by_pixels}, compared, results


def _distances(nearest: dict[str, Nearest]) -> dict[str, np.ndarray]:
    return {name: neighbours.distances for name, neighbours in nearest.items()}


# JSON and pictures --------------------------------------------------------------------------------


def _facts(
    trained_run: TrainedRun,
    config: EvaluationConfig,
    features: Features | None,
    compared: int | None,
) -> dict[str, Any]:
    """Describe what was evaluated, and how."""
    return {
        "format": FORMAT,
        "run": trained_run.folder.name,
        "step": trained_run.step,
        "split": config.split,
        "images": len(trained_run.held_out),
        "learned_from": trained_run.learned_from,
        "config": config._asdict(),
        "data": trained_run.data,
        "size": trained_run.trained.model.size,
        "features": features and {"name": features.name, "weights": features.weights},
        "compared_faces": compared,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


def _to_json(results: Results) -> dict[str, Any]:
    """Separate the metrics from those that are left out, which are also those that are not finite,
    such as the rate of a posterior that has left float32."""
    metrics, left_out = {}, {}
    for name, result in results.items():
        if isinstance(result, str):
            left_out[name] = result
        elif math.isfinite(result.value) and math.isfinite(result.error or 0):
            metrics[name] = result._asdict()
        else:
            left_out[name] = f"it is not finite: {result.value}"
    return {"metrics": metrics, "left_out": left_out}


def _rates(scores: ImageScores) -> dict[str, Any]:
    rates = [] if scores.latents is None else scores.latents.kl.mean(axis=0).tolist()
    return {"rate_per_dimension": [rate if math.isfinite(rate) else None for rate in rates]}


def _pictures(
    trained_run: TrainedRun,
    scores: ImageScores,
    faces: dict[str, Faces],
    nearest: dict[str, dict[str, Nearest]],
    key: Key[Array, ""],
) -> Pictures:
    """Choose the faces of the pictures. The nearest training faces are those of the samples that
    lie nearest to one, by features if there are any."""

    def reconstruct(indices: np.ndarray) -> tuple[Faces, ...]:
        images = trained_run.held_out.read(indices)
        result = passes.evaluate_batch(trained_run.trained, images, indices, key)
        return images, np.asarray(result.reconstructions)

    order = np.argsort(scores.psnr, kind="stable")
    count = min(FACES_IN_ROW, len(order) // 2) or len(order)
    extremes = np.concatenate([order[:count], order[-count:][::-1]])
    rates = None if scores.latents is None else scores.latents.kl.mean(axis=0)
    rows, best = None, next(reversed(trained_run.priors), None)  # a learned prior's, if any
    if best is not None:
        samples, training = faces[best], Images(trained_run.prepared, "train")
        neighbours = [by_set[best] for by_set in nearest.values()]
        chosen = np.argsort(neighbours[0].distances[: len(samples)], kind="stable")[:FACES_IN_ROW]
        rows = (samples[chosen], *(training.read(n.indices[chosen]) for n in neighbours))
    return Pictures(
        worst_and_best=reconstruct(extremes),
        reconstructions=reconstruct(np.arange(min(FACES_IN_ROW, len(order)))),
        samples={
            prior.name: faces[name][: 4 * FACES_IN_ROW]
            for name, prior in trained_run.priors.items()
        },
        nearest=rows,
        rate_per_dimension=None if rates is None or not np.isfinite(rates).all() else rates,
    )
