"""What a person sees of an evaluation: its pictures, a table for the terminal, a page."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vaejax import pictures
from vaejax.data.batches import Images
from vaejax.evaluation.copies import Nearest
from vaejax.evaluation.evaluate import Batch, Walked
from vaejax.evaluation.figures import FACES, FIGURES, MEMORY, SAMPLES, SETS
from vaejax.evaluation.sets import Sets
from vaejax.files import whole

FOLDER = "evaluation"  # in the run's folder, where the pictures lie
SHOWN = 10  # faces in a row


# Pictures -----------------------------------------------------------------------------------------


def draw(
    folder: Path,
    walked: Walked,
    sets: Sets,
    training: Images,
    by_pixels: Mapping[str, Nearest],
    by_features: Mapping[str, Nearest] | None,
    again: Callable[[np.ndarray], Batch],
) -> None:
    """The worst and best reconstructions, the first ones, samples, and those of the samples that
    lie nearest to a training face, above what they are near to."""
    place = folder / FOLDER
    order = np.argsort(walked.psnr, kind="stable")
    count = min(SHOWN, len(order) // 2) or len(order)
    chosen = np.concatenate([order[:count], order[-count:][::-1]])
    extreme = again(chosen)
    rows = [extreme.images, extreme.reconstructions]
    pictures.save(place / "worst_and_best.png", pictures.strips(rows, columns=count))
    first = again(np.arange(min(SHOWN, len(order))))
    pictures.save(place / "reconstructions.png", pictures.strips(list(first)))
    if walked.kl is not None and np.isfinite(walked.kl).all():
        pictures.rates(walked.kl.mean(axis=0), place / "rates.png")
    if SAMPLES not in sets.first:
        return
    faces = sets.images(SAMPLES)
    pictures.save(place / "samples.png", pictures.grid(faces[: 4 * SHOWN], columns=SHOWN))
    judge = (by_features or by_pixels)[SAMPLES]
    nearest = np.argsort(judge.distance[: len(faces)], kind="stable")[:SHOWN]
    rows = [faces[nearest], training.read(by_pixels[SAMPLES].place[nearest])]
    if by_features is not None:
        rows.insert(1, training.read(by_features[SAMPLES].place[nearest]))
    pictures.save(place / "nearest.png", pictures.strips(rows))


TITLES = {
    "samples.png": "Samples from the prior",
    "reconstructions.png": "Held-out faces above their reconstructions",
    "worst_and_best.png": "The ten worst reconstructions by PSNR, and the ten best",
    "nearest.png": "The samples that lie nearest to a training face; below, the nearest training "
    "face by features and by pixels",
    "rates.png": "The rate of each latent dimension",
}


# Words --------------------------------------------------------------------------------------------


def write(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """`evaluation.json`, which is the evaluation itself, and `evaluation.md`."""
    with whole(folder / "evaluation.json") as partial:
        partial.write_text(json.dumps(evaluation, indent=1, allow_nan=False) + "\n")
    with whole(folder / "evaluation.md") as partial:
        partial.write_text("\n".join(markdown(folder, evaluation)) + "\n", encoding="utf-8")


def number(estimate: Mapping[str, Any] | None) -> str:
    """Digits that can be believed: two of the error, five where there is none."""
    if estimate is None:
        return "–"
    value, error = estimate["value"], estimate["error"]
    if not error:
        return f"{value:,.5g}" if abs(value) < 1e5 else f"{value:,.0f}"
    digits = max(0, 1 - int(np.floor(np.log10(abs(error)))))
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def sections(evaluations: list[Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables: a title, a head, rows. Of one evaluation the sets of faces stand beside each other,
    of several the evaluations do."""
    alone = len(evaluations) == 1
    found = []
    for group in dict.fromkeys(figure.group for figure in FIGURES.values()):
        names = [n for n, figure in FIGURES.items() if figure.group == group]
        by_set = alone and group in (FACES, MEMORY)
        given = {name for e in evaluations for name in e["figures"]}
        sets = [one for one in SETS if any(f"{name}/{one}" in given for name in names)]
        rows = []
        for name in names:
            figure = FIGURES[name]
            about = [figure.unit, _better(figure.better), figure.meaning]
            keys = [name, *(f"{name}/{one}" for one in sets)]
            if by_set:
                cells = [number(evaluations[0]["figures"].get(key)) for key in keys[1:]]
                if any(cell != "–" for cell in cells):
                    rows.append([name, *cells, *about])
                continue
            for key in keys:
                cells = [number(e["figures"].get(key)) for e in evaluations]
                if any(cell != "–" for cell in cells):
                    rows.append([key, *cells, *about])
        columns = sets if by_set else [e["run"] for e in evaluations]
        if rows:
            found.append((group, ["", *columns, "unit", "better", "what it is"], rows))
    return found


def _better(direction: str) -> str:
    return {"higher": "↑", "lower": "↓", "": "", "0": "→ 0", "1": "→ 1"}[direction]


def table(evaluation: Mapping[str, Any]) -> list[str]:
    """For the terminal."""
    lines = []
    for title, head, rows in sections([evaluation]):
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines += ["", title]
        for row in [head, *rows] if title in (FACES, MEMORY) else rows:
            cells = [row[0].ljust(widths[0])]
            cells += [c.rjust(w) for c, w in zip(row[1:-3], widths[1:-3], strict=True)]
            cells += [c.ljust(w) for c, w in zip(row[-3:], widths[-3:], strict=True)]
            lines.append("  " + "  ".join(cells).rstrip())
    return [*lines, "", *_about(evaluation)]


def _about(evaluation: Mapping[str, Any]) -> list[str]:
    """What the figures rest on, and what there is none of."""
    lines = [
        f"{evaluation['images']:,} {evaluation['split']} images of {evaluation['size']} pixels, "
        f"after update {evaluation['step']:,}; {evaluation['seconds']:,.0f} s, "
        f"{evaluation['peak_memory_bytes'] / 2**30:.1f} GiB at most, on {evaluation['device']}."
    ]
    if features := evaluation["features"]:
        lines.append(f"Faces are compared by {features['name']} ({features['from']}).")
    if evaluation["compared"]:
        lines.append(
            "± is a standard error over images, and for faces the standard deviation over groups "
            f"of {evaluation['compared']:,} faces; train is the floor of the samples."
        )
    reasons: dict[str, list[str]] = {}
    for name, reason in evaluation["left_out"].items():
        reasons.setdefault(reason, []).append(name)
    return lines + [f"Left out: {', '.join(names)}: {why}." for why, names in reasons.items()]


def markdown(folder: Path, evaluation: Mapping[str, Any]) -> list[str]:
    lines = [f"# {evaluation['run']}, judged on what it never saw", ""]
    for title, head, rows in sections([evaluation]):
        lines += [f"## {title}", "", *_markdown_table(head, rows), ""]
    for text in _about(evaluation):
        lines += [text, ""]
    for name, title in TITLES.items():
        if (folder / FOLDER / name).exists():
            lines += [f"![{title}]({FOLDER}/{name})", "", f"*{title}*", ""]
    return lines


def _markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in escaped),
    ]
