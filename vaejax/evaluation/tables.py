"""Tables of evaluations as text, Markdown and HTML, and the files of an evaluation."""

import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from vaejax import pictures, plots, terminal
from vaejax.errors import StorageError, VaejaxError
from vaejax.evaluation.evaluate import FACES_IN_ROW, Evaluation, Pictures
from vaejax.evaluation.set_metrics import SETS, metric_of_set
from vaejax.files import atomic, atomic_folder, fsync, json_text, printable, write_text
from vaejax.metrics import MEMORIZATION, METRICS, MISSING, Direction, Metric, format_estimate
from vaejax.metrics import SETS as SETS_GROUP
from vaejax.system import format_bytes, format_duration
from vaejax.training.run import refuse_links

# Of the pictures, in the run's folder. Those of each evaluation lie in a folder of their own in it,
# which its JSON names, so that they are complete when the JSON appears.
FOLDER = "evaluation"
OWN_FOLDER = re.compile("[0-9a-f]{8}")

CAPTIONS = {
    "samples_normal.png": "Samples from N(0, I)",
    "samples_mixture.png": "Samples from the Gaussian mixture that is fitted to the latents",
    "samples_flow.png": "Samples from the flow that is trained on the latents",
    "reconstructions.png": "Held-out faces (above) and their reconstructions (below)",
    "worst_and_best.png": "The ten worst reconstructions by PSNR, and the ten best",
    "nearest.png": "The samples that lie nearest to a training face; below, their nearest training "
    "face by features and by pixels",
    "rates.png": "The rate of each latent dimension",
}

ARROWS: dict[Direction, str] = {"higher": "↑", "lower": "↓", "": "", "0": "→ 0", "1": "→ 1"}
BY_SET = (SETS_GROUP, MEMORIZATION)  # groups whose columns are sets, in the table of one evaluation


class Table(NamedTuple):
    """A table of a group of metrics. The first column has the names of the metrics; the last three
    have unit, better direction and meaning; those between them have values."""

    title: str
    head: list[str]
    rows: list[list[str]]


def tables(evaluations: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Build a table for each group of metrics, without empty rows and tables.

    With one evaluation, sets of faces stand side by side; with several, the evaluations do.
    """
    groups: dict[str, dict[str, Metric]] = {}
    for name, metric in METRICS.items():
        groups.setdefault(metric.group, {})[name] = metric
    return [
        table
        for title, metrics in groups.items()
        if (table := _table(title, metrics, evaluations)).rows
    ]


def _table(
    title: str, metrics: Mapping[str, Metric], evaluations: Sequence[Mapping[str, Any]]
) -> Table:
    values = [evaluation["metrics"] for evaluation in evaluations]
    sets = _set_names(metrics, values)
    rows = []
    for name, metric in metrics.items():
        about = [metric.unit, ARROWS[metric.better], metric.meaning]
        keys = [metric_of_set(name, set_name) for set_name in sets]
        if _has_sets_as_columns(title, evaluations):
            rows.append([name, *(format_estimate(values[0].get(key)) for key in keys), *about])
        else:
            for key in [name, *keys]:
                rows.append([key, *(format_estimate(v.get(key)) for v in values), *about])
    columns = sets if _has_sets_as_columns(title, evaluations) else [e["run"] for e in evaluations]
    nonempty = [row for row in rows if any(cell != MISSING for cell in row[1:-3])]
    return Table(title, ["", *columns, "unit", "better", "meaning"], nonempty)


def _has_sets_as_columns(title: str, evaluations: Sequence[Mapping[str, Any]]) -> bool:
    return len(evaluations) == 1 and title in BY_SET


def _set_names(metrics: Collection[str], values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the sets of which there are metrics, such as "samples" or "samples (mixture)"."""
    parts = [key.partition("/") for estimates in values for key in estimates]
    names = dict.fromkeys(name for metric, _, name in parts if name and metric in metrics)

    def position(name: str) -> int:
        kind = name.partition(" (")[0]
        return SETS.index(kind) if kind in SETS else len(SETS)

    return sorted(names, key=position)


# Formats ------------------------------------------------------------------------------------------


def to_text(evaluation: Mapping[str, Any], columns: int | None = None) -> list[str]:
    """Write the tables of an evaluation, and its notes, as lines for a terminal of so many
    columns."""
    lines: list[str] = []
    for table in tables([evaluation]):
        has_head = _has_sets_as_columns(table.title, [evaluation])
        heads = _two_lines(table.head) if has_head else []
        rows = terminal.table([*heads, *table.rows], left=(0, -3, -2, -1), columns=columns)
        lines += ["", table.title, *rows]
    words = "\n".join(map(printable, notes(evaluation)))
    wrapped = terminal.wrap(words, columns).splitlines()
    return [*lines, "", *wrapped]


def _two_lines(head: Sequence[str]) -> list[list[str]]:
    """Break names of sets such as "samples (flow)" into two lines, which keeps columns narrow."""
    parts = [cell.partition(" (") for cell in head]
    second = [f"({rest}" if rest else "" for _, _, rest in parts]
    return [[first for first, _, _ in parts], *([second] if any(second) else [])]


def to_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a table as lines of Markdown. A bar, as in p(x|z), would end a cell: it is escaped."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in escaped),
    ]


def to_html(table: Table, best: Sequence[Collection[int]]) -> list[str]:
    """Write a table as HTML; `best` has the value columns, from 0, to be marked in each row."""
    values = range(1, len(table.head) - 3)
    head = [
        f"<th{' class=n' if i in values else ''}>{escape(cell)}</th>"
        for i, cell in enumerate(table.head)
    ]
    lines = [f'<h2>{escape(table.title)}</h2><div class="wide"><table><tr>', *head]
    for row, marked in zip(table.rows, best, strict=True):
        lines.append("</tr><tr>")
        for i, cell in enumerate(row):
            style = "about" if i > values[-1] else "n" if i in values else ""
            style += " best" if i in values and i - 1 in marked else ""
            lines.append(f'<td class="{style}">{escape(cell)}</td>')
    return [*lines, "</tr></table></div>"]


def notes(evaluation: Mapping[str, Any]) -> list[str]:
    """Say what the metrics of an evaluation are of, and which are left out and why."""
    lines = [
        f"{evaluation['images']:,} {evaluation['split']} images of {evaluation['size']} pixels, "
        f"step {evaluation['step']:,}. It took {format_duration(evaluation['seconds'])} and "
        f"{format_bytes(evaluation['peak_memory_bytes'])} on {evaluation['device']}."
    ]
    if learned := evaluation["learned_from"]:
        lines.append(
            f"{learned:,} more images of that split are left out, because the run has learned from "
            "them: at some time they were among its training images."
        )
    if features := evaluation["features"]:
        lines.append(f"Faces are compared by {features['name']} ({features['weights']}).")
    if evaluation["compared_faces"]:
        lines.append(
            "± is a standard error over images, and for sets of faces the standard deviation over "
            f"groups of {evaluation['compared_faces']:,} faces. A perfect generator would have the "
            "metrics of train."
        )
    reasons: dict[str, list[str]] = {}
    for name, reason in evaluation["left_out"].items():
        reasons.setdefault(reason, []).append(name)
    return lines + [f"Left out: {', '.join(names)}: {why}." for why, names in reasons.items()]


# Files in the run's folder ------------------------------------------------------------------------


def write(folder: Path, evaluation: Evaluation) -> None:
    """Write an evaluation into its run's folder, and delete the pictures of earlier ones.

    The renaming of evaluation.json puts the new evaluation in the place of the old one. The
    pictures are complete by then, in a folder that no earlier evaluation names; the old ones are
    deleted when nothing shows them any more. A file that cannot be written does not keep the others
    from being written.

    Raises UserError if the run's folder leads elsewhere, and StorageError, with the reason for
    each, if files could not be written.
    """
    refuse_links(folder)
    content = {**evaluation.json, "pictures": f"{FOLDER}/{secrets.token_hex(4)}"}
    failures: list[str] = []
    path = folder / "evaluation.json"
    with _told(path, failures):
        with atomic(path) as partial:
            partial.write_text(json_text(content), encoding="utf-8")
            fsync(partial)  # it has its place on the disk before the pictures, which need more
            _draw(folder / content["pictures"], evaluation.pictures, failures)
        path = folder / "evaluation.md"
        with _told(path, failures):
            write_text(path, "\n".join(evaluation_markdown(folder, content)) + "\n")
    if failures:
        raise StorageError(f"not everything could be written: {'; '.join(failures)}")
    _delete_earlier(folder, content["pictures"])


@contextmanager
def _told(path: Path, failures: list[str]) -> Iterator[None]:
    """Add the file and the reason to `failures` if it cannot be written."""
    try:
        yield
    except OSError as error:
        failures.append(f"{path}: {error.strerror or error}")
    except VaejaxError as error:
        failures.append(f"{path}: {error}")


def _draw(folder: Path, arrays: Pictures, failures: list[str]) -> None:
    """Write the pictures into a new folder, without those that cannot be written."""
    with _told(folder, failures), atomic_folder(folder) as partial:
        for name, draw in drawings(arrays).items():
            with _told(folder / name, failures):
                draw(partial / name)


def drawings(arrays: Pictures) -> dict[str, Callable[[Path], None]]:
    """Return functions that write the pictures as PNG files, by the names of the files."""

    def png(picture: pictures.Picture) -> Callable[[Path], None]:
        return lambda path: pictures.save_png(path, picture)

    columns = len(arrays.worst_and_best[0]) // 2
    found = {
        "worst_and_best.png": png(pictures.stack_rows(arrays.worst_and_best, columns=columns)),
        "reconstructions.png": png(pictures.stack_rows(arrays.reconstructions)),
    }
    for prior, faces in arrays.samples.items():
        found[f"samples_{prior}.png"] = png(pictures.grid(faces, columns=FACES_IN_ROW))
    if arrays.nearest is not None:
        found["nearest.png"] = png(pictures.stack_rows(arrays.nearest))
    if (rates := arrays.rate_per_dimension) is not None:
        found["rates.png"] = lambda path: plots.rates(rates, path)
    return found


def _delete_earlier(folder: Path, present: str) -> None:
    for path in (folder / FOLDER).iterdir():
        if OWN_FOLDER.fullmatch(path.name) and path != folder / present:
            shutil.rmtree(path, ignore_errors=True)  # which deletes nothing behind a link
        elif path.name in CAPTIONS:  # of an older version of vaejax
            with suppress(OSError):
                path.unlink()


def evaluation_markdown(folder: Path, evaluation: Mapping[str, Any]) -> list[str]:
    """Return the lines of evaluation.md: tables, notes, and the pictures that the folder has."""
    lines = [f"# Evaluation of {evaluation['run']} on held-out images", ""]
    for title, head, rows in tables([evaluation]):
        lines += [f"## {title}", "", *to_markdown(head, rows), ""]
    for note in notes(evaluation):
        lines += [note, ""]
    place = evaluation["pictures"]
    for name, caption in CAPTIONS.items():
        if (folder / place / name).exists():
            lines += [f"![{caption}]({place}/{name})", "", f"*{caption}*", ""]
    return lines
