"""All that can be said of a run, by images that it never saw: from its folder to its figures."""

import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from vaejax.data.batches import Images
from vaejax.data.records import read_report
from vaejax.errors import UserError
from vaejax.evaluation import copies, distances, evaluate, faces, show
from vaejax.evaluation.evaluate import Batch, Subject, Walked
from vaejax.evaluation.faces import Found
from vaejax.evaluation.features import Features
from vaejax.evaluation.figures import HELD_OUT, RECONSTRUCTIONS, SAMPLES, TRAIN, Estimate, name
from vaejax.evaluation.sets import Sets, near_in_pixels, sample, training_features
from vaejax.models import autoencoder
from vaejax.training import checkpoint, run

FORMAT = "vaejax evaluation 1"


class Questions(NamedTuple):
    """What is asked of a run, besides what it costs nothing to answer."""

    split: str = "test"
    samples: int = 10_000
    bound_images: int = 128  # of the importance-weighted bound
    bound_samples: int = 64  # of each of them
    seed: int = 0


class Judged(NamedTuple):
    """A run as it is judged."""

    folder: Path
    subject: Subject
    step: int
    prepared: Path
    data: dict[str, Any]  # what tells these images, and how they are split, from others
    held_out: Images
    persons: bool


def find(folder: Path, split: str) -> Judged:
    """The newest whole weights of a run, and the images that it never saw.

    Raises UserError for a run whose images are gone or others, CheckpointError where no checkpoint
    can be used.
    """
    settings = run.read(folder)
    model = autoencoder.build(settings["model"])
    weights = checkpoint.weights(folder, model)
    loss, prepared = settings["loss"], Path(settings["schedule"]["prepared"])
    try:
        report = read_report(prepared)
    except UserError as error:
        raise UserError(
            f"the images that {folder} learned from cannot be read: {error} `vaejax prepare "
            f"{settings['schedule']['source']} --size {model.size} --out {prepared}` prepares them "
            "again (with --crop-faces, if they were cropped)"
        ) from None
    if any(report[field] != value for field, value in settings["data"].items()):
        raise UserError(
            f"{prepared} holds other images than {folder} learned from, or splits them in another "
            "way: what is held out there may have been learned. Put them back, or let the run go "
            "on with --accept-changed-data"
        )
    subject = Subject(
        model,
        weights.params,
        weights.statistics,
        loss.get("kl_weight"),
        in_nats=loss["kind"] == "calibrated",
    )
    held_out = Images(prepared, split)
    persons = bool(report["persons"])
    return Judged(folder, subject, weights.step, prepared, settings["data"], held_out, persons)


@np.errstate(over="ignore", invalid="ignore")  # what is no number is left out, and said so
def judge(judged: Judged, questions: Questions, features: Features | None, why: str = "") -> dict:
    """Every figure, as JSON; the pictures go into the run's folder.

    Without `features`, which is because of `why`, the figures that need them are left out. The
    memory is that of a batch, the codes of the held-out images, the features of all faces, training
    faces included (2 KiB each by VGG16), and 64 MiB of faces of each set.
    """
    began = time.monotonic()
    subject, model = judged.subject, judged.subject.model
    keys = jax.random.split(jax.random.key(questions.seed), 3)
    log_variance = evaluate.calibrate(subject, Images(judged.prepared, "validation"), keys[0])
    sets = Sets(model, features)
    sets.begin(HELD_OUT, RECONSTRUCTIONS)

    def look(batch: Batch) -> None:
        sets.add(HELD_OUT, batch.images)
        sets.add(RECONSTRUCTIONS, batch.reconstructions)

    walked = evaluate.walk(subject, judged.held_out, keys[1], log_variance, look=look)
    found = Found(evaluate.likelihoods(subject, walked, log_variance), {})
    found |= _ask_of_codes(judged, questions, walked, log_variance, keys[2])
    if model.has_prior:
        sets.begin(SAMPLES)
        sample(subject, questions.samples, sets)
    if walked.ssim is None:
        found.left_out["ssim"] = "the images are smaller than its window of 11 pixels"
    training = Images(judged.prepared, "train")
    near = near_in_pixels(sets, training, model)
    found |= faces.memory("pixels", {one: each.distance for one, each in near.items()})
    by_features, n = None, None
    if features is None:
        found.left_out["features"] = why
    else:
        by_features, n, more = _ask_of_features(judged, sets, training, features)
        found |= more
    if not model.has_prior:
        found.left_out[SAMPLES] = f"a {model.title} has no prior to draw faces from"
    found = _numbers(found)
    show.draw(judged.folder, walked, sets, training, near, by_features, _again(judged, keys[1]))
    rates = [] if walked.kl is None else walked.kl.mean(axis=0).tolist()
    return {
        "format": FORMAT,
        "run": judged.folder.name,
        "step": judged.step,
        "split": questions.split,
        "images": len(judged.held_out),
        "asked": questions._asdict(),
        "data": judged.data,
        "size": model.size,
        "features": None if features is None else {"name": features.name, "from": features.weights},
        "compared": n,
        "figures": {key: value._asdict() for key, value in found.figures.items()},
        "left_out": found.left_out,
        "rate_per_dimension": [rate if math.isfinite(rate) else None for rate in rates],
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": jax.devices()[0].device_kind,
        "versions": run.versions(),
    }


def _numbers(found: Found) -> Found:
    """Without figures that are none, as the rate is of a posterior that has left float32."""
    bad = {
        key: f"it is {one.value}"
        for key, one in found.figures.items()
        if not math.isfinite(one.value) or not math.isfinite(one.error or 0)
    }
    figures = {key: one for key, one in found.figures.items() if key not in bad}
    return Found(figures, found.left_out | bad)


def _ask_of_codes(
    judged: Judged, questions: Questions, walked: Walked, log_variance: float, key: Key[Array, ""]
) -> Found:
    if walked.means is None:
        reason = f"a {judged.subject.model.title} has a code, and no distribution over codes"
        names = ("kl", "report_loss", "rate", "elbo", "bits_per_dim", "active_units")
        names += ("effective_beta", "importance_bound", "mmd", "index_code", "marginal_kl")
        return Found({}, dict.fromkeys(names, reason))
    figures = evaluate.importance(
        judged.subject,
        judged.held_out,
        key,
        log_variance,
        images=questions.bound_images,
        samples=questions.bound_samples,
    )
    if len(judged.held_out) < 2:
        reason = "one held-out image has no distance from others"
        return Found(figures, dict.fromkeys(("mmd", "index_code", "marginal_kl"), reason))
    return Found(figures | evaluate.hole(walked), {})


def _ask_of_features(
    judged: Judged, sets: Sets, training: Images, features: Features
) -> tuple[dict[str, copies.Nearest], int, Found]:
    """The nearest training face of each face, and of how many faces the figures are, as well."""
    learned = training_features(judged.prepared, features, judged.subject.model)
    all_of = sets.features()
    others = {one: each for one, each in all_of.items() if one != HELD_OUT}
    found = faces.compare({**others, TRAIN: learned}, all_of[HELD_OUT])
    n = faces.common([learned, *all_of.values()])
    found |= faces.gaps(found.figures)
    near = {one: distances.nearest(each, learned) for one, each in all_of.items()}
    found |= faces.memory("features", {one: each.distance for one, each in near.items()})
    if judged.persons:
        people = [training.texts(i)["person"] for i in range(len(training))]
        found |= faces.memory("person", faces.from_persons(all_of, learned, people))
        for one, each in near.items():
            if hit := [people[i] for i in each.place[:n] if people[i]]:
                found.figures[name("persons", one)] = Estimate(copies.persons_hit(hit))
    return near, n, found


def _again(judged: Judged, key: Key[Array, ""]) -> Callable[[np.ndarray], Batch]:
    """To see some of the held-out images once more, as in the walk."""

    def see(places: np.ndarray) -> Batch:
        images = judged.held_out.read(places)
        found = evaluate.see_batch(judged.subject, images, places, key)
        return Batch(images, np.asarray(found.reconstructions))

    return see
