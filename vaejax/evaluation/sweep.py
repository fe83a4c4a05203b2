"""Points of a rate-distortion curve: what runs that weigh the rate differently cost, held out."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from vaejax import objectives, pictures
from vaejax.data.batches import Images
from vaejax.errors import UserError
from vaejax.evaluation import evaluate, judge
from vaejax.files import whole

FIGURES = ("rate", "distortion", "elbo", "bits_per_dim", "mse", "kl", "effective_beta")
SPLIT = "test"
CALIBRATED = "calibrated"

Point = Mapping[str, Any]


def losses(weights: Sequence[float]) -> dict[str, partial]:
    """The report's loss with each of these weights of its kl, to four digits, by the name of the
    run, as in "kl-0.01"; and the calibrated one, which has none.

    Raises UserError for what is no weight.
    """
    for weight in weights:
        if not 0 <= weight < float("inf"):
            raise UserError(f"--weights {weight}: must be at least 0")
    rounded = sorted({float(f"{weight:.4g}") for weight in weights})
    swept = {f"kl-{w:.4g}": partial(objectives.report, kl_weight=w) for w in rounded}
    return {**swept, CALIBRATED: partial(objectives.calibrated)}


def measure(folder: Path, *, seed: int) -> Point:
    """The figures of a run on the test images, by a likelihood that is fitted on the validation
    images. They are kept in the run's folder, for as long as it does not learn on."""
    judged = judge.find(folder, SPLIT)
    images = len(judged.held_out)
    asked = {"step": judged.step, "seed": seed, "images": images, "data": judged.data}
    path = folder / "rate_distortion.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if all(known[name] == value for name, value in asked.items()):
            return {**asked, **{name: float(known[name]) for name in FIGURES}}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
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
    folder: Path, found: Mapping[str, Point], named: Mapping[str, Point], *, title: str
) -> list[str]:
    """`rate_distortion.json`, `.md` and `.png`; returns the table's lines. `found` has the runs of
    `losses` by their names; `named` those of them that somebody recommends, besides the calibrated
    one."""
    swept = {name.removeprefix("kl-"): one for name, one in found.items() if name != CALIBRATED}
    named = {**named, CALIBRATED: found[CALIBRATED]}
    step, images = found[CALIBRATED]["step"], found[CALIBRATED]["images"]
    title = f"{title}: {step:,} updates, {images:,} held-out images"
    _write(folder / "rate_distortion.json", {"title": title, "curve": swept, "named": named})
    pictures.rate_distortion(
        {name: _place(one) for name, one in swept.items()},
        {name: _place(one) for name, one in named.items()},
        folder / "rate_distortion.png",
        title=title,
    )
    lines = _table(swept, named)
    text = [
        "# Rate and distortion",
        "",
        f"{title}. Rate, distortion and elbo are nats per image: the distortion is that of a "
        "discretised normal likelihood whose one variance is fitted on the validation images, the "
        "elbo is −(rate + distortion). A run is named by the weight of its kl.",
        "",
        *lines,
        "",
        "![Rate and distortion](rate_distortion.png)",
    ]
    with whole(folder / "rate_distortion.md") as unfinished:
        unfinished.write_text("\n".join(text) + "\n", encoding="utf-8")
    return lines


def _place(point: Point) -> tuple[float, float, float]:
    return point["rate"], point["distortion"], point["mse"]


def _table(swept: Mapping[str, Point], named: Mapping[str, Point]) -> list[str]:
    """A line for each run, by its rate; what has a name goes by it."""
    runs: dict[str, Point] = {}
    for name, one in {**swept, **named}.items():
        names = [who for who, other in named.items() if other == one]
        runs[" = ".join(names) or name] = one
    ordered = sorted(runs.items(), key=lambda item: item[1]["rate"])
    rows = [[name, *(f"{one[f]:,.6g}" for f in FIGURES)] for name, one in ordered]
    head = ["run", *FIGURES]
    rule = ["---", *["---:"] * len(FIGURES)]
    return [f"| {' | '.join(row)} |" for row in [head, rule, *rows]]


def _write(path: Path, value: Mapping[str, Any]) -> None:
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
