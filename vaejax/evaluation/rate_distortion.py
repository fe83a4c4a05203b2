"""Rate-distortion curves: runs whose losses weigh the rate differently, on the same images."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from vaejax import losses, plots
from vaejax.errors import UserError
from vaejax.evaluation import evaluate, passes, tables
from vaejax.files import read_json, write_json, write_text
from vaejax.metrics import Estimate

METRICS = ("rate", "distortion", "elbo", "bits_per_dim", "mse", "kl", "effective_beta")
SPLIT = "test"
SIGMA_VAE = "sigma_vae"  # the name of the run with the loss that has no weight

Point = Mapping[str, Any]  # the metrics of a run


def sweep(weights: Sequence[float]) -> dict[str, partial]:
    """Return the losses of a sweep by the names of their runs: mse_kl with each of these weights of
    the kl, rounded to four digits, such as "kl-0.01"; and sigma_vae.

    Raises UserError for a negative or infinite weight.
    """
    for weight in weights:
        if not 0 <= weight < float("inf"):
            raise UserError(f"--weights {weight}: must be at least 0")
    rounded = sorted({float(f"{weight:.4g}") for weight in weights})
    weighted = {f"kl-{w:.4g}": partial(losses.mse_kl, kl_weight=w) for w in rounded}
    return {**weighted, SIGMA_VAE: partial(losses.sigma_vae)}


def measure(folder: Path, *, seed: int) -> Point:
    """Compute the metrics of a run on the test images, with a likelihood fitted to the validation
    images.

    They are kept in the run's folder, and computed again if the run has been trained further.
    """
    run = evaluate.load_run(folder, SPLIT)
    facts = {"step": run.step, "seed": seed, "images": len(run.held_out), "data": run.data}
    path = folder / "rate_distortion.json"
    if (kept := _read_point(path, facts)) is not None:
        return kept
    fit_key, noise_key = jax.random.split(jax.random.key(seed))
    log_variance = passes.fit_log_variance(run.trained, run.validation, fit_key)
    scores = passes.evaluate_images(run.trained, run.held_out, noise_key, log_variance)
    results = evaluate.image_results(scores, log_variance, run)
    metrics = {n: r.value for n in METRICS if isinstance(r := results[n], Estimate)}
    if missing := [n for n in METRICS if not math.isfinite(metrics.get(n, math.nan))]:
        raise UserError(
            f"{folder} has no point on a rate-distortion curve: {', '.join(missing)} cannot be "
            "computed, or are not finite"
        )
    point = {**facts, **metrics}
    write_json(path, point)
    return point


def _read_point(path: Path, facts: Mapping[str, Any]) -> Point | None:
    """Return the metrics that were kept, or None if there are none, or they are of other facts."""
    try:
        kept = read_json(path)
        if all(kept[name] == value for name, value in facts.items()):
            return {**facts, **{name: float(kept[name]) for name in METRICS}}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or damaged
    return None


def write(
    folder: Path, points: Mapping[str, Point], recommended: Mapping[str, Point], *, title: str
) -> list[str]:
    """Write `rate_distortion.json`, `.md` and `.png`, and return the lines of the table.

    `points` has the runs of `sweep` by their names. `recommended` has those of them that other
    projects recommend, by their names; sigma_vae is added to them.
    """
    curve = {name.removeprefix("kl-"): p for name, p in points.items() if name != SIGMA_VAE}
    recommended = {**recommended, SIGMA_VAE: points[SIGMA_VAE]}
    step, images = points[SIGMA_VAE]["step"], points[SIGMA_VAE]["images"]
    title = f"{title}: {step:,} updates, {images:,} held-out images"
    value = {"title": title, "curve": curve, "recommended": recommended}
    write_json(folder / "rate_distortion.json", value)
    plots.rate_distortion(
        {name: _position(point) for name, point in curve.items()},
        {name: _position(point) for name, point in recommended.items()},
        folder / "rate_distortion.png",
        title=title,
    )
    lines = tables.to_markdown(["run", *METRICS], _rows(curve, recommended))
    text = [
        "# Rate and distortion",
        "",
        f"{title}. Rate, distortion and elbo are in nats per image. The distortion is that of a "
        "discretized normal likelihood with one variance, which is fitted to the validation "
        "images; the elbo is −(rate + distortion). A run is named by the weight of its kl.",
        "",
        *lines,
        "",
        "![Rate and distortion](rate_distortion.png)",
    ]
    write_text(folder / "rate_distortion.md", "\n".join(text) + "\n")
    return lines


def _position(point: Point) -> tuple[float, float, float]:
    return point["rate"], point["distortion"], point["mse"]


def _rows(curve: Mapping[str, Point], recommended: Mapping[str, Point]) -> list[list[str]]:
    """Return a row for each run, sorted by its rate; a recommended run has the names of those who
    recommend it."""
    runs: dict[str, Point] = {}
    for name, point in {**curve, **recommended}.items():
        names = [other for other, recommended_ in recommended.items() if recommended_ == point]
        runs[" = ".join(names) or name] = point
    ordered = sorted(runs.items(), key=lambda item: item[1]["rate"])
    return [[name, *(f"{point[m]:,.6g}" for m in METRICS)] for name, point in ordered]
