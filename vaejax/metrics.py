"""The one table of metrics: unit, good direction, meaning and where each is shown.

To add a metric, return it from a loss (training and validation) or from `evaluation`, and give it
a row here: tables, curves, the progress line, the run's README and `vaejax runs` read this table.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vaejax.files import open_regular

Place = Literal["progress", "epoch", "readme", "curves", "runs", "evaluation"]
MISSING = "–"  # in a table, for a metric that was not measured
Direction = Literal["higher", "lower", "1", "0", ""]  # or nearer to 1 or 0; "": neither


class Estimate(NamedTuple):
    """A measured value, with its uncertainty where one is known."""

    value: float
    error: float | None = None  # standard error, or standard deviation over groups of images


def format_estimate(estimate: Mapping[str, Any] | None) -> str:
    """Format a metric with two digits of its error, or with five digits if it has none."""
    if estimate is None:
        return MISSING
    value, error = estimate["value"], estimate["error"]
    if not error:
        return f"{value:,.5g}" if abs(value) < 1e5 else f"{value:,.0f}"
    digits = max(0, 1 - math.floor(math.log10(abs(error))))
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


class Metric(NamedTuple):
    """A row of the table."""

    group: str  # the title of its table in an evaluation
    unit: str
    better: Direction
    meaning: str
    shown: tuple[Place, ...] = ("evaluation",)


TRAINING = "Training"
REPORT, LIKELIHOOD = "The report's metrics", "Likelihood"
RECONSTRUCTION, SETS = "Reconstructions", "Sets of faces"
PRIOR, MEMORIZATION = "Prior and aggregate posterior", "Memorization"

EVERYWHERE: tuple[Place, ...] = ("progress", "epoch", "readme", "curves", "evaluation")

METRICS: dict[str, Metric] = {
    "loss": Metric(
        TRAINING, "", "lower", "what is minimized", ("progress", "epoch", "readme", "curves")
    ),
    "mse": Metric(
        REPORT,
        "in [0, 1]²",
        "lower",
        "mean squared error of the output for a sampled z",
        (*EVERYWHERE, "runs"),
    ),
    "bce": Metric(
        TRAINING, "nats/value", "lower", "binary cross-entropy, values in [0, 1]", ("readme",)
    ),
    "gradient_mse": Metric(
        TRAINING,
        "in [0, 1]²",
        "lower",
        "mse of differences between neighbouring pixels",
        ("readme",),
    ),
    "l1": Metric(TRAINING, "in [0, 1]", "lower", "mean absolute error", ("readme",)),
    "kl": Metric(
        REPORT,
        "nats/dim",
        "",
        "KL(q(z|x) ‖ N(0, I)), a mean over latent dimensions",
        (*EVERYWHERE, "runs"),
    ),
    "report_loss": Metric(REPORT, "", "lower", "mse + 0.01 · kl"),
    "likelihood_sigma": Metric(
        LIKELIHOOD, "levels", "lower", "σ of the likelihood, fitted on the validation split"
    ),
    "distortion": Metric(
        LIKELIHOOD,
        "nats/image",
        "lower",
        "−log p(x|z) over the 256 levels",
        ("readme", "evaluation"),
    ),
    "rate": Metric(LIKELIHOOD, "nats/image", "", "KL(q(z|x) ‖ p(z))", ("readme", "evaluation")),
    "elbo": Metric(
        LIKELIHOOD, "nats/image", "higher", "−(distortion + rate)", ("readme", "evaluation")
    ),
    "bits_per_dim": Metric(
        LIKELIHOOD,
        "bits/value",
        "lower",
        "(distortion + rate) / (values · log 2)",
        ("epoch", "readme", "curves", "runs", "evaluation"),
    ),
    "distortion_bits": Metric(
        LIKELIHOOD, "bits/value", "lower", "distortion / (values · log 2): z is not counted"
    ),
    "effective_beta": Metric(
        LIKELIHOOD,
        "",
        "1",
        "weight of the rate against the distortion: 1 is the ELBO",
        ("readme", "evaluation"),
    ),
    "gradient_norm": Metric(TRAINING, "", "", "Euclidean norm of all gradients", ()),
    "iwae_elbo": Metric(LIKELIHOOD, "nats/image", "higher", "the ELBO of the images of iwae_bound"),
    "learned_prior_elbo": Metric(
        LIKELIHOOD, "nats/image", "higher", "iwae_elbo with the learned prior in place of N(0, I)"
    ),
    "iwae_bound": Metric(
        LIKELIHOOD, "nats/image", "higher", "importance-weighted lower bound of log p(x)"
    ),
    "active_units": Metric(
        LIKELIHOOD, "dims", "", "dimensions whose posterior mean varies by more than 0.01"
    ),
    "psnr": Metric(RECONSTRUCTION, "dB", "higher", "peak signal-to-noise ratio"),
    "ssim": Metric(RECONSTRUCTION, "", "higher", "structural similarity, 1 for a copy"),
    "frechet": Metric(SETS, "", "lower", "Fréchet distance of two Gaussians over the features"),
    "kernel": Metric(SETS, "", "lower", "kernel distance: squared MMD over the features"),
    "precision": Metric(SETS, "", "higher", "share of the faces that lie among held-out ones"),
    "recall": Metric(SETS, "", "higher", "share of held-out faces that lie among these"),
    "density": Metric(SETS, "", "higher", "number of held-out neighbourhoods a face lies in"),
    "coverage": Metric(SETS, "", "higher", "share of held-out faces with one of these near"),
    "mmd": Metric(PRIOR, "", "0", "squared MMD of z from N(0, I), below 2"),
    "mutual_information": Metric(
        PRIOR,
        "nats/image",
        "",
        "the part of the rate that tells images apart (≤ log of their number)",
    ),
    "aggregate_posterior_kl": Metric(
        PRIOR, "nats/image", "lower", "the rest of the rate: KL(q(z) ‖ N(0, I))"
    ),
    "frechet_gap": Metric(PRIOR, "", "", "frechet of samples − of reconstructions"),
    "kernel_gap": Metric(PRIOR, "", "", "kernel of samples − of reconstructions"),
    "nearest_pixels": Metric(
        MEMORIZATION, "rms in [0, 1]", "", "median distance to the nearest training face, pixels"
    ),
    "nearest_features": Metric(
        MEMORIZATION, "", "", "median distance to the nearest training face, features"
    ),
    "nearest_person": Metric(
        MEMORIZATION, "", "", "median distance to the nearest training person's mean features"
    ),
    "memorized_pixels": Metric(
        MEMORIZATION,
        "",
        "lower",
        "share nearer to a training face than 99 % of held-out ones, pixels: 0.01 by chance",
    ),
    "memorized_features": Metric(MEMORIZATION, "", "lower", "the same by features"),
    "memorized_person": Metric(
        MEMORIZATION, "", "lower", "the same to a training person's mean features"
    ),
    "persons": Metric(
        MEMORIZATION, "persons", "higher", "effective number of persons nearest to the faces"
    ),
}


def shown_in(place: Place) -> dict[str, Metric]:
    """Return the metrics that are shown in a place, in the order of the table."""
    return {name: metric for name, metric in METRICS.items() if place in metric.shown}


# metrics.jsonl ------------------------------------------------------------------------------------

MAX_LINE_BYTES, MAX_FILE_BYTES = 1 << 20, 1 << 30  # a line has a kilobyte


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every line of a `metrics.jsonl` with its parsed content.

    Lines that a kill or a full disk has cut off, and damaged ones, are left out; nothing is yielded
    if there is no such file. Raises OSError for anything but a regular file, and a huge one.
    """
    try:
        file = open_regular(path, max_bytes=MAX_FILE_BYTES)
    except FileNotFoundError:
        return
    with file:
        while data := file.readline(MAX_LINE_BYTES):
            line = data.decode(errors="replace")
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and line.endswith("\n") and _is_valid(entry):
                yield line, entry


def first_and_last(path: Path) -> tuple[dict[str, dict], dict[str, dict]]:
    """Return the first and the last line of each split of a `metrics.jsonl`, by the split."""
    first: dict[str, dict] = {}
    last: dict[str, dict] = {}
    for _, entry in read_lines(path):
        first.setdefault(entry["split"], entry)
        last[entry["split"]] = entry
    return first, last


def _is_valid(entry: Mapping[str, Any]) -> bool:
    numbers = all(_is_number(value) for key, value in entry.items() if key != "split")
    counts = all(isinstance(n := entry.get(k), int) and n >= 0 for k in ("step", "epoch"))
    return numbers and counts and entry.get("split") in ("train", "validation")


def _is_number(value: Any) -> bool:
    """Tell whether a value is a finite number, which can be summed and plotted."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
