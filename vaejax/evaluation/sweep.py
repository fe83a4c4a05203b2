"""Points of a rate-distortion curve: what runs that weigh the rate differently cost, held out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vaejax import pictures
from vaejax.data.batches import Images
from vaejax.evaluation import evaluate, judge
from vaejax.files import whole

FIGURES = ("rate", "distortion", "mse", "elbo", "bits_per_dim", "kl", "active_units")
SPLIT = "test"


def measure(folder: Path, *, seed: int) -> dict[str, Any]:
    """The figures of a run on the test images, by a likelihood that is fitted on the validation
    images. They are kept in the run's folder, for as long as it does not learn on."""
    judged = judge.find(folder, SPLIT)
    asked = {"step": judged.step, "seed": seed, "images": len(judged.held_out)}
    path = folder / "rate_distortion.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if all(known[name] == value for name, value in asked.items()):
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or not as it was written
    keys = jax.random.split(jax.random.key(seed), 2)
    validation = Images(judged.prepared, "validation")
    log_variance = evaluate.calibrate(judged.subject, validation, keys[0])
    walked = evaluate.walk(
        judged.subject, judged.held_out, keys[1], log_variance, look=lambda _: None
    )
    figures = evaluate.likelihoods(judged.subject, walked, log_variance)
    value = {**asked, **{name: figures[name].value for name in FIGURES}}
    _write(path, value)
    return value


def write(
    folder: Path,
    curve: Mapping[str, Mapping[str, Any]],
    named: Mapping[str, Mapping[str, Any]],
    *,
    title: str,
) -> list[str]:
    """`rate_distortion.json`, `.md` and `.png`; returns the table's lines. `curve` has the runs of
    the sweep by their names, `named` the points on it that somebody recommends."""
    _write(folder / "rate_distortion.json", {"title": title, "curve": curve, "named": named})
    points = {
        name: (one["rate"], one["distortion"], one["mse"])
        for name, one in {**curve, **named}.items()
    }
    pictures.rate_distortion(
        [points[name] for name in curve],
        {name: points[name] for name in named},
        folder / "rate_distortion.png",
        title=title,
    )
    head = ["run", *FIGURES]
    rows = [
        [name, *(f"{one[figure]:,.6g}" for figure in FIGURES)]
        for name, one in sorted({**curve, **named}.items(), key=lambda item: item[1]["rate"])
    ]
    lines = [" | ".join(row) for row in [head, ["---"] * len(head), *rows]]
    lines = [f"| {line} |" for line in lines]
    text = [
        "# Rate and distortion",
        "",
        f"{title}. Nats per image: the distortion is that of a discretised normal likelihood whose "
        "one variance is fitted on the validation images, the elbo is −(rate + distortion).",
        "",
        *lines,
        "",
        "![Rate and distortion](rate_distortion.png)",
    ]
    with whole(folder / "rate_distortion.md") as partial:
        partial.write_text("\n".join(text) + "\n", encoding="utf-8")
    return lines


def _write(path: Path, value: Mapping[str, Any]) -> None:
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
