"""Several runs side by side: a table for the terminal, and a page that holds all it shows."""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from vaejax.data.entries import printable
from vaejax.errors import UserError
from vaejax.evaluation import show
from vaejax.evaluation.figures import FACES, FIGURES, MEMORY
from vaejax.evaluation.judge import FORMAT
from vaejax.files import whole
from vaejax.training import run

# what a figure is of: where that differs between two runs, it says nothing of which is better
OF_PIXELS = ("distortion", "rate", "elbo", "importance_elbo", "importance_bound", "deviation")
OF_PIXELS += ("index_code", "marginal_kl")
OF_FEATURES = ("frechet_gap", "kernel_gap", "nearest_features", "nearest_person")


class Compared(NamedTuple):
    name: str  # as the person called it
    folder: Path
    settings: Mapping[str, Any]
    evaluation: Mapping[str, Any]


def read(name: str) -> Compared:
    """A run and its evaluation. UserError where it has none yet, or a damaged one."""
    folder = run.find(name)
    path = folder / "evaluation.json"
    if not path.exists():
        raise UserError(f"{folder} is not evaluated yet: vaejax evaluate {name}")
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        _refuse_other(evaluation)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{printable(path)} cannot be read: {error}. `vaejax evaluate {name}` writes it anew"
        ) from None
    return Compared(name, folder, run.read(folder), {**evaluation, "run": name})


def _refuse_other(evaluation: Any) -> None:
    """ValueError for what is no evaluation as this version writes them."""
    if not isinstance(evaluation, dict) or evaluation.get("format") != FORMAT:
        raise ValueError("it is no evaluation of this version")
    kinds = {"figures": dict, "left_out": dict, "split": str, "size": int, "images": int}
    kinds |= {"step": int, "data": dict, "seconds": float, "device": str, "asked": dict}
    kinds |= {"features": dict | None, "compared": int | None}
    for field, kind in kinds.items():
        if not isinstance(evaluation.get(field), kind):
            raise ValueError(f'it has no "{field}"')
    features = evaluation["features"] or {"name": "", "from": ""}
    if not all(isinstance(features.get(field), str) for field in ("name", "from")):
        raise ValueError('"features" have no name')
    for name, estimate in evaluation["figures"].items():
        if not isinstance(estimate, dict) or not _is_estimate(estimate):
            raise ValueError(f"{name[:40]!r} is no figure")


def _is_estimate(estimate: Mapping[str, Any]) -> bool:
    value, error = estimate.get("value"), estimate.get("error")
    return all(
        isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e300
        for n in (value, 0.0 if error is None else error)
    )


def comparable(runs: Sequence[Compared]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The evaluations without the figures that cannot be held against each other, and a line for
    each reason."""
    evaluations, remarks = [r.evaluation for r in runs], []
    drop: set[str] = set()

    def differ(field: str) -> str:
        values = [str(_plain(e[field])) for e in evaluations]
        return " and ".join(dict.fromkeys(values)) if len(set(values)) > 1 else ""

    if sizes := differ("size"):
        remarks.append(f"Images of {sizes} pixels: no figure in nats, and none of faces, is given.")
        drop |= {n for n, f in FIGURES.items() if f.group in (FACES, MEMORY)}
        drop |= {*OF_PIXELS, *OF_FEATURES}
    elif features := differ("features"):
        remarks.append(f"Faces were compared by {features}: no figure that rests on them is given.")
        drop |= {n for n, f in FIGURES.items() if f.group == FACES}
        drop |= {*OF_FEATURES, "copies_features", "copies_person", "persons"}
    elif numbers := differ("compared"):
        remarks.append(f"Faces were compared {numbers} at a time: no figure of so many is given.")
        drop |= {n for n, f in FIGURES.items() if f.group == FACES}
        drop |= {"frechet_gap", "kernel_gap", "persons"}
    if split := differ("split"):
        remarks.append(f"Not judged on one split, but on {split}: differences may be the images'.")
    elif differ("data"):
        remarks.append("The runs have other images: differences may be the images'.")
    if differ("asked"):
        remarks.append("Not asked the same (samples, seed, latents): see each evaluation.json.")
    return [
        {**e, "figures": {n: v for n, v in e["figures"].items() if n.split("/")[0] not in drop}}
        for e in evaluations
    ], remarks


def _plain(value: Any) -> Any:
    return value.get("name") if isinstance(value, dict) and "name" in value else value


def table(evaluations: list[Mapping[str, Any]], remarks: list[str]) -> list[str]:
    """For the terminal; the best of a row has a star."""
    lines: list[str] = []
    for title, head, rows in show.sections(evaluations):
        starred = [_starred(row, evaluations) for row in rows]
        widths = [max(len(row[i]) for row in [head, *starred]) for i in range(len(head) - 1)]
        lines += ["", title]
        for row in [head, *starred]:
            cells = [row[0].ljust(widths[0])]
            cells += [c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True)]
            lines.append("  " + "  ".join(cells).rstrip())
    return [*lines, "", *remarks]


def _starred(row: list[str], evaluations: list[Mapping[str, Any]]) -> list[str]:
    best = _best(row[0], evaluations)
    marked = [
        f"{'* ' if i in best else ''}{cell}" for i, cell in enumerate(row[1 : len(evaluations) + 1])
    ]
    return [row[0], *marked, *row[len(evaluations) + 1 :]]


def _best(name: str, evaluations: list[Mapping[str, Any]]) -> set[int]:
    """Which of them have the best of a figure that has a good direction; of the training set, which
    is no run's doing, none has."""
    figure, _, faces = name.partition("/")
    direction = FIGURES[figure].better
    values = {
        i: e["figures"][name]["value"] for i, e in enumerate(evaluations) if name in e["figures"]
    }
    if not direction or faces == "train" or len(set(values.values())) < 2:
        return set()
    score = {
        "higher": lambda v: -v,
        "lower": lambda v: v,
        "0": abs,
        "1": lambda v: abs(v - 1),
    }[direction]
    least = min(map(score, values.values()))
    return {i for i, value in values.items() if score(value) == least}


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


def page(runs: Sequence[Compared], evaluations: list[Mapping[str, Any]], remarks: list[str]) -> str:
    """All of it as HTML, with the pictures inside: one file that can be sent to somebody."""
    title = f"{len(runs)} runs side by side" if len(runs) > 1 else f"{runs[0].name}, judged"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{STYLE}</style><h1>{escape(title)}</h1>",
        *(f'<p class="remark">{escape(remark)}</p>' for remark in remarks),
        '<div class="runs">',
        *(_card(r) for r in runs),
        "</div>",
    ]
    for name, caption in show.TITLES.items():
        shown = [_picture(r, name) for r in runs]
        if any(shown):
            parts += [f"<h2>{escape(caption)}</h2>", '<div class="runs">', *shown, "</div>"]
    for heading, head, rows in show.sections(evaluations):
        parts += [f"<h2>{escape(heading)}</h2>", '<div class="wide"><table><tr>']
        numbers = range(1, len(head) - 3)
        parts += [
            f"<th{' class=n' if i in numbers else ''}>{escape(cell)}</th>"
            for i, cell in enumerate(head)
        ]
        for row in rows:
            best = _best(row[0], evaluations)
            parts.append("</tr><tr>")
            for i, cell in enumerate(row):
                kind = "n best" if i - 1 in best and i in numbers else "n" if i in numbers else ""
                kind = kind or ("about" if i > numbers[-1] else "")
                parts.append(f'<td class="{kind}">{escape(cell)}</td>')
        parts.append("</tr></table></div>")
    features = {f["name"]: f["from"] for e in evaluations if (f := e["features"])}
    parts += [
        f'<p class="remark">Faces are compared by {escape(name)} ({escape(source)}).</p>'
        for name, source in features.items()
    ]
    return "\n".join(parts) + "</html>\n"


def _card(compared: Compared) -> str:
    settings, evaluation = compared.settings, compared.evaluation
    schedule, loss = settings["schedule"], settings["loss"]
    weight = f", kl_weight {loss['kl_weight']:g}" if "kl_weight" in loss else ""
    about = (
        f"{schedule['recipe']} recipe, {loss['kind']}{weight}, seed {settings['seed']}; "
        f"{evaluation['step']:,} updates of {settings['batch_size']} images, "
        f"{schedule['images']:,} training images of {evaluation['size']} pixels; judged on "
        f"{evaluation['images']:,} {evaluation['split']} images."
    )
    return f'<div class="card"><b>{escape(compared.name)}</b><p>{escape(about)}</p></div>'


def _picture(compared: Compared, name: str) -> str:
    path = compared.folder / show.FOLDER / name
    if not path.exists():
        return f"<figure><figcaption>{escape(compared.name)}: none</figcaption></figure>"
    data = base64.b64encode(path.read_bytes()).decode()
    label = escape(compared.name)
    return (
        f'<figure><img alt="{label}" src="data:image/png;base64,{data}">'
        f"<figcaption>{label}</figcaption></figure>"
    )


def write(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
