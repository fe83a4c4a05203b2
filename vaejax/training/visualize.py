"""What a run shows of itself: pictures while it trains, and the README of its folder."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import jax
import numpy as np

from vaejax import generate, pictures, plots
from vaejax.data.batches import Images
from vaejax.files import write_text
from vaejax.metrics import first_and_last, shown_in
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.priors import Prior, StandardNormal
from vaejax.training.config import RunSpec
from vaejax.training.devices import local
from vaejax.training.step import TrainState

SAMPLES = 25  # 5 x 5, as in the report
RECONSTRUCTIONS = 10


class Visualizer:
    """Draws into the run's folder; holds 25 latents and ten held-out faces, and no picture.

    The watched pictures, drawn at the beginning and at the end of each epoch, make the film:
    samples, or, of a model without a prior, reconstructions.
    """

    def __init__(self, folder: Path, model: Autoencoder, held_out: Images):
        self._folder, self._model = folder, model
        self._samples = autoencoder.is_variational(model)
        self._watched = folder / ("samples" if self._samples else "reconstructions")
        if self._samples:
            self._prior = StandardNormal(model)
            self._z = self._prior.sample(range(SAMPLES))
        faces = held_out.read(np.arange(min(RECONSTRUCTIONS, len(held_out))))
        inputs = np.asarray(generate.corrupt(faces, jax.random.key(0), model=model))
        self._faces, self._inputs = faces, inputs

    def draw_epoch_begin(self, state: TrainState, epoch: int) -> None:
        """Draw what is to be seen before an epoch."""
        self._draw_watched(state, self._watched / f"epoch-{epoch:04}-begin.png")

    def draw_epoch_end(self, state: TrainState, epoch: int) -> None:
        """Draw what is to be seen after an epoch."""
        self._draw_watched(state, self._watched / f"epoch-{epoch:04}-end.png")
        if self._samples:
            path = self._folder / "reconstructions" / f"epoch-{epoch:04}.png"
            self._draw_reconstructions(state, path)

    def _draw_watched(self, state: TrainState, path: Path) -> None:
        if self._samples:
            pictures.save_png(path, pictures.grid(self._decode(state, self._z), columns=5))
        else:
            self._draw_reconstructions(state, path)

    def _decode(self, state: TrainState, z: Any) -> np.ndarray:
        state = local(state)
        return np.asarray(
            generate.decode(state.best_params, state.batch_stats, z, model=self._model)
        )

    def _draw_reconstructions(self, state: TrainState, path: Path) -> None:
        """Draw the inputs above their reconstructions, and below both the clean faces if noisy."""
        state = local(state)
        outputs = generate.reconstruct(
            state.best_params, state.batch_stats, self._inputs, model=self._model
        )
        rows = [self._inputs, np.asarray(outputs)]
        if self._model.denoises:
            rows.append(self._faces)
        pictures.save_png(path, pictures.stack_rows(rows))

    def draw_curves(self) -> None:
        """Plot the metrics over the steps."""
        plots.curves(self._folder / "metrics.jsonl", self._folder / "curves.png")

    def draw_faces(self, state: TrainState, prior: Prior | None) -> None:
        """Draw new faces, from other latents than the watched ones.

        They come from `prior`, or from N(0, I); a deterministic model without a prior has none.
        """
        if prior is None and not self._samples:
            return
        prior = prior or self._prior
        rows = []
        for first in range(SAMPLES, 5 * SAMPLES, SAMPLES):  # as many at a time as was compiled for
            rows.append(self._decode(state, prior.sample(range(first, first + SAMPLES))))
        pictures.save_png(
            self._folder / "faces.png", pictures.grid(np.concatenate(rows), columns=10)
        )

    def draw_film(self) -> None:
        """Make a film of the watched pictures; an epoch begins as the last one ended."""
        first = self._watched / "epoch-0001-begin.png"
        frames = [first, *sorted(self._watched.glob("epoch-*-end.png"))]
        pictures.film(frames, mp4=self._folder / "learning.mp4", gif=self._folder / "learning.gif")


# Words --------------------------------------------------------------------------------------------


def epoch_line(epoch: int, epochs: int, metrics: Mapping[str, float]) -> str:
    """Format the line that stays in the terminal after an epoch."""
    words = "  ".join(f"{n} {metrics[n]:.5g}" for n in shown_in("epoch") if n in metrics)
    return f"epoch {epoch}/{epochs} held out: {words}"


def what_next(folder: Path, model: Autoencoder) -> str:
    """Say, at the end of a run, where its results are and what can be done with it."""
    faces = folder / "faces.png"
    start = f"New faces are in {faces}, the" if faces.exists() else "The"
    return (
        f"{start} film of the training is in {folder / 'learning.mp4'}, everything else in "
        f"{folder / 'README.md'}.\nMore:  " + "\n       ".join(commands(model, folder))
    )


def commands(model: Autoencoder, folder: Path | str) -> list[str]:
    """List the commands that work with such a run."""
    variational = autoencoder.is_variational(model)
    known: Iterable[tuple[str, str, bool]] = (
        ("sample", "--seeds 0-24", variational),
        ("denoise", "IMAGE...", model.denoises),
        ("reconstruct", "IMAGE...", True),
        ("evaluate", "", True),
    )
    lines = [f"vaejax {verb} {quote(str(folder))} {rest}" for verb, rest, can in known if can]
    return [line.rstrip() for line in lines]


def write_readme(folder: Path, spec: RunSpec, status: Mapping[str, Any]) -> None:
    """Write the run's README.md from its spec, its `run.json` and what else is in the folder."""
    first, last = first_and_last(folder / "metrics.jsonl")
    model, schedule = autoencoder.from_json(spec.model), spec.schedule
    shapes = jax.tree.leaves(autoencoder.latent_spec(model))
    latents = " and ".join("×".join(map(str, leaf.shape)) for leaf in shapes)
    lines = [
        f"# {folder.name}: {status['status']}",
        "",
        f"A {model.title} for faces of {model.size}×{model.size} pixels with {latents} latents, by "
        f"the {schedule.recipe} recipe, on {schedule.images:,} training images: "
        f"{schedule.updates:,} updates of {spec.batch_size} images. Seed {spec.seed}, on "
        f"{status['devices']}.",
        "",
        "| metric | first batch | last batch | held out | unit | what it is |",
        "|---|---|---|---|---|---|",
    ]
    columns = (first.get("train"), last.get("train"), last.get("validation"))
    for name, metric in shown_in("readme").items():
        values = [f"{c[name]:.5g}" if c and name in c else "" for c in columns]
        if any(values):
            # the bar of a conditional density would end a Markdown table's cell
            cells = [name, *values, metric.unit, metric.meaning]
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    lines += ["", _steps(columns), "", *_pictures(folder, model), "", "## Commands", "", "```"]
    lines += [
        f"{status['command']}     # resumes, if it is not finished",
        *commands(model, folder),
        "```",
        "",
        "`config.json` is what identifies this run, `run.json` where it was made, `metrics.jsonl` "
        "and `tensorboard/` hold every metric.",
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))


def _steps(columns: tuple[dict | None, ...]) -> str:
    names = ("first batch", "last batch", "held out")
    steps = [f"{n}: step {c['step']:,}" for n, c in zip(names, columns, strict=True) if c]
    if not steps:
        return "No update was made yet."
    return "; ".join(steps) + ". On a batch the likelihood's variance is that batch's mse."


def _pictures(folder: Path, model: Autoencoder) -> list[str]:
    """Return the Markdown of the pictures in the folder, the newest of each kind."""
    held_out = "Held-out faces above their reconstructions"
    if model.denoises:
        held_out = "Held-out faces with noise, what the model makes of them, and without noise"
    shown = [
        ("New faces", folder / "faces.png"),
        ("Samples", _newest(folder / "samples")),
        (held_out, _newest(folder / "reconstructions")),
        ("Training", folder / "learning.gif"),
        ("Curves", folder / "curves.png"),
    ]
    return [
        f"![{title}]({path.relative_to(folder).as_posix()})\n\n*{title}*\n"
        for title, path in shown
        if path and path.exists()
    ]


def _newest(folder: Path) -> Path | None:
    return max(folder.glob("epoch-*.png"), default=None)
