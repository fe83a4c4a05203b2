"""What a run shows of itself: pictures while it trains, and the README of its folder."""

from collections.abc import Iterable, Mapping
from operator import itemgetter
from pathlib import Path
from shlex import quote
from typing import Any

import jax
import numpy as np

from vaejax import generate, pictures, plots
from vaejax.data.batches import Images
from vaejax.errors import UserError
from vaejax.files import printable, write_text
from vaejax.metrics import first_and_last, shown_in
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.priors import Prior, StandardNormal, unraveler
from vaejax.training import copies
from vaejax.training.config import RunSpec
from vaejax.training.devices import local
from vaejax.training.step import TrainState

SAMPLES = 25  # 5 x 5, as in the report
RECONSTRUCTIONS = 10
PAIRS = 10  # of a sample and its nearest training face
MOMENT_IMAGES = 200  # whose posterior means have the moments of the watched samples


class Visualizer:
    """Draws into the run's folder; holds 25 latents and some faces, and no picture.

    The watched pictures, drawn before the first epoch and at the end of each, make the film:
    samples, or, of a model without a prior, reconstructions. Where a prior will be fitted, and so
    some `training` images are given, samples are of the normal distribution with the mean and
    covariance that the posterior means of those images have at the time.
    """

    def __init__(
        self, folder: Path, model: Autoencoder, held_out: Images, *, training: Images | None = None
    ):
        self._folder, self._model, self._training = folder, model, training
        self._samples = autoencoder.is_variational(model) or training is not None
        self._watched = folder / ("samples" if self._samples else "reconstructions")
        if training is not None:
            shape = (SAMPLES, min(MOMENT_IMAGES, len(training)))
            self._weights = np.random.default_rng(0).standard_normal(shape, np.float32)
        elif self._samples:
            self._prior = StandardNormal(model)
            self._z = self._prior.sample(range(SAMPLES))
        faces = held_out.read(np.arange(min(RECONSTRUCTIONS, len(held_out))))
        inputs = np.asarray(generate.corrupt(faces, jax.random.key(0), model=model))
        self._faces, self._inputs = faces, inputs

    def draw_beginning(self, state: TrainState) -> None:
        """Draw what is to be seen before the first epoch; the others begin as the last ended."""
        self._draw_watched(state, self._watched / "epoch-0001-begin.png")

    def draw_epoch_end(self, state: TrainState, epoch: int) -> dict[str, np.ndarray]:
        """Draw what is to be seen after an epoch; return the pictures by their names."""
        drawn = {}
        path = self._watched / f"epoch-{epoch:04}-end.png"
        drawn[self._watched.name] = self._draw_watched(state, path)
        if self._samples:
            path = self._folder / "reconstructions" / f"epoch-{epoch:04}.png"
            drawn["reconstructions"] = self._draw_reconstructions(state, path)
        return drawn

    def _draw_watched(self, state: TrainState, path: Path) -> np.ndarray:
        if not self._samples:
            return self._draw_reconstructions(state, path)
        z = self._z if self._training is None else self._matched_samples(state)
        picture = pictures.grid(self._decode(state, z), columns=5)
        pictures.save_png(path, picture)
        return picture

    def _matched_samples(self, state: TrainState) -> Any:
        """Draw from the normal distribution with the moments of some posterior means.

        Sums of the centered means, weighted by fixed draws of N(0, I), have their covariance.
        """
        local_state, weights = local(state), self._weights
        params, stats, training = local_state.best_params, local_state.batch_stats, self._training
        assert training is not None
        means = generate.posterior_means(
            params, stats, training, model=self._model, most=weights.shape[1]
        )
        center = means.mean(axis=0)
        z = center + weights @ (means - center) / np.sqrt(len(means))
        return jax.vmap(unraveler(self._model))(z)

    def _decode(self, state: TrainState, z: Any) -> np.ndarray:
        state = local(state)
        return np.asarray(
            generate.decode(state.best_params, state.batch_stats, z, model=self._model)
        )

    def _decode_in_parts(self, state: TrainState, z: Any) -> np.ndarray:
        """Decode latents, whose number is a multiple of 25, as many at a time as was compiled."""
        parts = []
        for first in range(0, len(jax.tree.leaves(z)[0]), SAMPLES):
            part = slice(first, first + SAMPLES)
            parts.append(self._decode(state, jax.tree.map(itemgetter(part), z)))
        return np.concatenate(parts)

    def _reconstruct(self, state: TrainState, inputs: np.ndarray) -> np.ndarray:
        state, size = local(state), len(self._inputs)  # as many at a time as was compiled for
        parts = []
        for first in range(0, len(inputs), size):
            part = inputs[np.minimum(np.arange(first, first + size), len(inputs) - 1)]
            outputs = generate.reconstruct(
                state.best_params, state.batch_stats, part, model=self._model
            )
            parts.append(np.asarray(outputs))
        return np.concatenate(parts)[: len(inputs)]

    def _prior_of_faces(self, prior: Prior | None) -> Prior | None:
        """Return what new faces are drawn from: the learned prior, or N(0, I) of a variational
        model, or nothing."""
        if prior is None and autoencoder.is_variational(self._model):
            return StandardNormal(self._model)
        return prior

    def _draw_reconstructions(self, state: TrainState, path: Path) -> np.ndarray:
        """Draw the inputs above their reconstructions, and below both the clean faces if noisy."""
        rows = [self._inputs, self._reconstruct(state, self._inputs)]
        if self._model.denoises:
            rows.append(self._faces)
        picture = pictures.stack_rows(rows)
        pictures.save_png(path, picture)
        return picture

    def draw_curves(self) -> None:
        """Plot the metrics over the steps."""
        plots.curves(self._folder / "metrics.jsonl", self._folder / "curves.png")

    def draw_faces(self, state: TrainState, prior: Prior | None) -> None:
        """Draw new faces, from other latents than the watched ones.

        They come from `prior`, or from N(0, I); a deterministic model without a prior has none.
        """
        prior = self._prior_of_faces(prior)
        if prior is None:
            return
        faces = self._decode_in_parts(state, prior.sample(range(SAMPLES, 5 * SAMPLES)))
        pictures.save_png(self._folder / "faces.png", pictures.grid(faces, columns=10))

    def draw_nearest(
        self, state: TrainState, prior: Prior | None, training: Images, held_out: Images
    ) -> dict[str, Any] | None:
        """Draw the samples that lie nearest to a training face, above those faces.

        Returns the report on copies as JSON, or None for a model that draws no new faces.
        """
        prior = self._prior_of_faces(prior)
        if prior is None:
            return None
        picture = self._folder / "nearest.png"
        picture.unlink(missing_ok=True)  # of a shorter run
        if reason := copies.too_few(training, held_out):
            return {"left_out": reason}
        try:
            samples = self._decode_in_parts(state, prior.sample(range(copies.FACES)))
            known = copies.first_faces(training)
            sets = {
                copies.SAMPLES: samples,
                copies.HELD_OUT: copies.first_faces(held_out),
                copies.RECONSTRUCTIONS: self._reconstruct(state, known),
            }
            found = copies.nearest_training_faces(sets, training)
            indices, distances = found[copies.SAMPLES]
            pairs = np.argsort(distances, kind="stable")[:PAIRS]
            pictures.save_png(
                picture, pictures.stack_rows([samples[pairs], training.read(indices[pairs])])
            )
        except UserError as error:  # a damaged image is no reason to end a trained run
            return {"left_out": str(error).removesuffix(".")}
        step = int(local(state).step)
        return copies.report(found, step=step, prior=prior.name, training=training)

    def draw_film(self, *, updates: int, per_epoch: int) -> None:
        """Make a film of the watched pictures of a run of so many updates."""
        frames = {self._watched / "epoch-0001-begin.png": "epoch 0, step 0"}
        for path in sorted(self._watched.glob("epoch-*-end.png")):
            epoch = int(path.name.split("-")[1])
            frames[path] = f"epoch {epoch:,}, step {min(epoch * per_epoch, updates):,}"
        mp4, gif = self._folder / "learning.mp4", self._folder / "learning.gif"
        pictures.film(list(frames), mp4=mp4, gif=gif, captions=list(frames.values()))


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
    # a run that is finished may be a stranger's, and so may every text in its files
    state, command, devices = (printable(status[n]) for n in ("status", "command", "devices"))
    lines = [
        f"# {folder.name}: {state}",
        "",
        f"A {model.title} for faces of {model.size}×{model.size} pixels with {latents} latents, by "
        f"the {printable(schedule.recipe)} recipe, on {schedule.images:,} training images: "
        f"{schedule.updates:,} updates of {spec.batch_size} images. Seed {spec.seed}, on "
        f"{devices}.",
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
    shown = _pictures(folder, model, schedule.prior)
    lines += ["", _steps(columns), "", *_evaluation(folder), *shown, "", *_copies(folder, status)]
    lines += ["## Commands", "", "```"]
    lines += [
        f"{command}     # resumes, if it is not finished",
        *commands(model, folder),
        "```",
        "",
        "`config.json` is what identifies this run, `run.json` where it was made, `metrics.jsonl` "
        "and `tensorboard/` hold every metric.",
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))


def _evaluation(folder: Path) -> list[str]:
    if not (folder / "evaluation.md").exists():
        return []
    return ["Evaluated on held-out images, in [evaluation.md](evaluation.md).", ""]


def _copies(folder: Path, status: Mapping[str, Any]) -> list[str]:
    """Return the section on copies of training faces; empty before the end of a run."""
    lines = [printable(line) for line in copies.section(status.get("copies"))]
    if lines and (folder / "nearest.png").exists():
        title = "The samples that lie nearest to a training face, above those faces"
        lines += ["", f"![{title}](nearest.png)", "", f"*{title}*"]
    return [*lines, ""] if lines else []


def _steps(columns: tuple[dict | None, ...]) -> str:
    names = ("first batch", "last batch", "held out")
    steps = [f"{n}: step {c['step']:,}" for n, c in zip(names, columns, strict=True) if c]
    if not steps:
        return "No metrics yet: they are written here at every checkpoint and after every epoch."
    return "; ".join(steps) + ". On a batch the likelihood's variance is that batch's mse."


def _pictures(folder: Path, model: Autoencoder, prior: str) -> list[str]:
    """Return the Markdown of the pictures in the folder, the newest of each kind."""
    faces, samples = "New faces, drawn from N(0, I)", "Samples from N(0, I)"
    if prior != "normal":
        faces = f"New faces, drawn from the {prior} prior"
        samples = (
            "Samples of the normal distribution with the moments that the posterior means of "
            f"{MOMENT_IMAGES} training faces had at the time, before there was a prior"
        )
    held_out = "Held-out faces above their reconstructions"
    if model.denoises:
        held_out = "Held-out faces with noise, what the model makes of them, and without noise"
    shown = [
        (faces, folder / "faces.png"),
        (samples, _newest(folder / "samples")),
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
