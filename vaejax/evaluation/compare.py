"""Evaluated runs side by side: tables for the terminal, and an HTML page with their pictures."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import numpy as np

from vaejax import terminal
from vaejax.errors import UserError
from vaejax.evaluation import tables
from vaejax.evaluation.evaluate import FORMAT
from vaejax.evaluation.set_metrics import TRAIN
from vaejax.files import inside, printable, read_json
from vaejax.metrics import MEMORIZATION, METRICS, SETS
from vaejax.pictures import encode_png, read_png
from vaejax.training import run
from vaejax.training.config import RunSpec

# metrics in nats or levels, which depend on the number of pixels
PER_IMAGE = (
    "distortion", "rate", "elbo", "iwae_elbo", "iwae_bound", "likelihood_sigma",
    "mutual_information", "aggregate_posterior_kl",
)  # fmt: skip
SET_METRICS = tuple(name for name, metric in METRICS.items() if metric.group == SETS)
MEMORIZATION_METRICS = tuple(n for n, metric in METRICS.items() if metric.group == MEMORIZATION)
GAPS = ("frechet_gap", "kernel_gap")
FEATURE_METRICS = (
    *SET_METRICS, *GAPS, "nearest_features", "nearest_person", "memorized_features",
    "memorized_person", "persons",
)  # fmt: skip
PICTURES = f"{tables.FOLDER}(/{tables.OWN_FOLDER.pattern})?"


class EvaluatedRun(NamedTuple):
    """A run and its evaluation."""

    name: str  # as on the command line
    folder: Path
    spec: RunSpec
    evaluation: Mapping[str, Any]


def read_run(name: str) -> EvaluatedRun:
    """Read a run and its evaluation. Raises UserError if it has none, or a damaged one, or one of
    another version of vaejax."""
    folder = run.find(name)
    path = folder / "evaluation.json"
    try:
        evaluation = read_json(path)
        if _is_of_other_version(evaluation):
            raise UserError(
                f"{printable(path)} was written by another version of vaejax. "
                f"`vaejax evaluate {quote(name)}` evaluates the run again"
            )
        _check(evaluation)
    except FileNotFoundError:
        raise UserError(f"{folder} is not evaluated yet: vaejax evaluate {quote(name)}") from None
    except ValueError as error:
        raise UserError(
            f"{printable(path)} cannot be read: {error}. `vaejax evaluate {quote(name)}` writes it "
            "again"
        ) from None
    evaluation = {"pictures": tables.FOLDER, **evaluation, "run": name}
    return EvaluatedRun(name, folder, run.read_spec(folder), evaluation)


def _is_of_other_version(evaluation: Any) -> bool:
    written_as = evaluation.get("format") if isinstance(evaluation, dict) else None
    prefix = FORMAT.rpartition(" ")[0]
    return isinstance(written_as, str) and written_as.startswith(prefix) and written_as != FORMAT


def _check(evaluation: Any) -> None:
    """Raise ValueError for anything but an evaluation as `evaluate` returns it."""
    if not isinstance(evaluation, dict) or evaluation.get("format") != FORMAT:
        raise ValueError("it is no evaluation")
    kinds = {"metrics": dict, "left_out": dict, "split": str, "size": int, "images": int}
    kinds |= {"step": int, "data": dict, "seconds": float, "device": str, "config": dict}
    kinds |= {"features": dict | None, "compared_faces": int | None, "peak_memory_bytes": int}
    for field, kind in kinds.items():
        if field not in evaluation or not isinstance(evaluation[field], kind):
            raise ValueError(f'its "{field}" is missing or of another type')
    features = evaluation["features"] or {"name": "", "weights": ""}
    if not all(isinstance(features.get(field), str) for field in ("name", "weights")):
        raise ValueError('its "features" have no name')
    if not re.fullmatch(PICTURES, str(evaluation.get("pictures", tables.FOLDER))):
        raise ValueError(f'its "pictures" are not in {tables.FOLDER}')
    for name, estimate in evaluation["metrics"].items():
        if not isinstance(estimate, dict) or not _is_estimate(estimate):
            raise ValueError(f"its metric {name[:40]!r} has no value")


def _is_estimate(estimate: Mapping[str, Any]) -> bool:
    value, error = estimate.get("value"), estimate.get("error")
    return "error" in estimate and all(
        isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e300
        for n in (value, 0.0 if error is None else error)
    )


def comparable(runs: Sequence[EvaluatedRun]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Return the evaluations without the metrics that cannot be compared, and a remark for each
    reason."""
    evaluations, remarks = [r.evaluation for r in runs], []
    dropped: set[str] = set()

    def differences(field: str) -> str:
        values = [str(_name(e[field])) for e in evaluations]
        return " and ".join(dict.fromkeys(values)) if len(set(values)) > 1 else ""

    if sizes := differences("size"):
        remarks.append(
            f"The images have {sizes} pixels: metrics in nats and metrics of faces are left out."
        )
        dropped |= {*PER_IMAGE, *FEATURE_METRICS, *MEMORIZATION_METRICS}
    elif features := differences("features"):
        remarks.append(f"Faces were compared by {features}: metrics of features are left out.")
        dropped |= {*FEATURE_METRICS}
    elif counts := differences("compared_faces"):
        remarks.append(
            f"Sets of {counts} faces were compared: metrics that depend on the number are left out."
        )
        dropped |= {*SET_METRICS, *GAPS, "persons"}
    if splits := differences("split"):
        remarks.append(f"The splits differ ({splits}): differences may be those of the images.")
    elif _data_differ([e["data"] for e in evaluations]):
        remarks.append("The images of the runs differ: differences may be those of the images.")
    if differences("config"):
        remarks.append("The samples or seeds of the evaluations differ: see each evaluation.json.")
    return [
        {**e, "metrics": {n: v for n, v in e["metrics"].items() if n.split("/")[0] not in dropped}}
        for e in evaluations
    ], remarks


def _data_differ(data: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether images or splits differ, so far as all say: earlier versions say less."""
    unsaid = set() if all("assignment" in d for d in data) else {"assignment"}
    said = [{name: value for name, value in d.items() if name not in unsaid} for d in data]
    return any(d != said[0] for d in said)


def _name(value: Any) -> Any:
    return value.get("name") if isinstance(value, dict) and "name" in value else value


def to_text(
    evaluations: Sequence[Mapping[str, Any]], remarks: Sequence[str], columns: int | None = None
) -> list[str]:
    """Write the tables as lines for a terminal of so many columns; a star marks the best of a
    row."""
    lines: list[str] = []
    for title, head, cells in tables.tables(evaluations):
        starred = [_star(row, evaluations) for row in cells]
        rows = [row[:-1] for row in [head, *starred]]
        lines += ["", title, *terminal.table(rows, left=(0,), columns=columns)]
    return [*lines, "", *terminal.wrap("\n".join(map(printable, remarks)), columns).splitlines()]


def _star(row: Sequence[str], evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    marked = {column + 1 for column in best(row[0], evaluations)}
    return [f"* {cell}" if i in marked else cell for i, cell in enumerate(row)]


def best(name: str, evaluations: Sequence[Mapping[str, Any]]) -> set[int]:
    """Return the positions of the evaluations with the best value of a metric.

    There are none if the metric has no better direction, if all values are equal, or for metrics of
    the training set, which do not depend on the run.
    """
    metric, _, set_name = name.partition("/")
    values = {
        i: e["metrics"][name]["value"] for i, e in enumerate(evaluations) if name in e["metrics"]
    }
    if set_name == TRAIN or len(set(values.values())) < 2:
        return set()
    direction = METRICS[metric].better
    if direction == "higher":
        losses = {i: -value for i, value in values.items()}
    elif direction == "lower":
        losses = values
    elif direction:  # a number to be near to
        losses = {i: abs(value - float(direction)) for i, value in values.items()}
    else:
        return set()
    return {i for i, loss in losses.items() if loss == min(losses.values())}


# The page -----------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2a78; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1500px; margin: 2rem auto; }
body { padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.runs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); }
figure, .card { margin: 0; padding: .8rem; border: 1px solid var(--line); border-radius: .6rem; }
figure img { width: 100%; image-rendering: auto; border-radius: .3rem; }
figcaption, .card p, .remark { color: #888; font-size: .9rem; margin: .3rem 0 0; }
.card b { font-size: 1.05rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
th.n, td.n { text-align: right; white-space: nowrap; }
td.best { background: var(--good); font-weight: 600; }
td.about { color: #888; font-size: .88rem; }
tr:hover td { background: var(--soft); } tr:hover td.best { background: var(--good); }
"""


def page(
    runs: Sequence[EvaluatedRun],
    evaluations: Sequence[Mapping[str, Any]],
    remarks: Sequence[str],
) -> str:
    """Return an HTML page with all tables and pictures inside: one file that can be sent."""
    names = [r.name for r in runs]
    title = f"{len(runs)} runs side by side" if len(runs) > 1 else f"Evaluation of {names[0]}"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{STYLE}</style><h1>{escape(title)}</h1>",
        *_remarks(remarks),
        *_row(_card(r) for r in runs),
    ]
    for name, caption in tables.CAPTIONS.items():
        if any((r.folder / r.evaluation["pictures"] / name).exists() for r in runs):
            parts += [f"<h2>{escape(caption)}</h2>", *_row(_picture(r, name) for r in runs)]
    for table in tables.tables(evaluations):
        parts += tables.to_html(table, [best(row[0], evaluations) for row in table.rows])
    sources = {f["name"]: f["weights"] for e in evaluations if (f := e["features"])}
    parts += _remarks(f"Faces are compared by {n} ({weights})." for n, weights in sources.items())
    return "\n".join(parts) + "</html>\n"


def _remarks(remarks: Iterable[str]) -> list[str]:
    return [f'<p class="remark">{escape(remark)}</p>' for remark in remarks]


def _row(items: Iterable[str]) -> list[str]:
    return ['<div class="runs">', *items, "</div>"]


def _card(evaluated: EvaluatedRun) -> str:
    spec, evaluation = evaluated.spec, evaluated.evaluation
    schedule, loss = spec.schedule, spec.loss
    weight = f", kl_weight {loss['kl_weight']:g}" if "kl_weight" in loss else ""
    about = (
        f"{schedule.recipe} recipe, loss {loss['kind']}{weight}, seed {spec.seed}; "
        f"{evaluation['step']:,} updates of {spec.batch_size} images, "
        f"{schedule.images:,} training images of {evaluation['size']} pixels; evaluated on "
        f"{evaluation['images']:,} {evaluation['split']} images."
    )
    return f'<div class="card"><b>{escape(evaluated.name)}</b><p>{escape(about)}</p></div>'


def _picture(evaluated: EvaluatedRun, name: str) -> str:
    """Return a picture of a run, its pixels encoded anew.

    The run may be a stranger's: what its file holds besides a picture, or a link leads to, does not
    get into a page that is sent to others.
    """
    label = escape(evaluated.name)
    try:
        path = inside(evaluated.folder, f"{evaluated.evaluation['pictures']}/{name}")
        picture = np.asarray(read_png(path).convert("RGB"))
    except FileNotFoundError:
        return f"<figure><figcaption>{label}: none</figcaption></figure>"
    except (OSError, ValueError) as error:
        reason = escape(str(error.strerror if isinstance(error, OSError) else error))
        return f"<figure><figcaption>{label}: left out, {reason}</figcaption></figure>"
    data = base64.b64encode(encode_png(picture)).decode()
    return (
        f'<figure><img alt="{label}" src="data:image/png;base64,{data}">'
        f"<figcaption>{label}</figcaption></figure>"
    )
