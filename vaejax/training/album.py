"""The pictures of a run: the same latents and the same held-out faces, from first to last."""

from pathlib import Path

import jax
import numpy as np

from vaejax import generate, pictures
from vaejax.data.batches import Images
from vaejax.models.autoencoder import Autoencoder
from vaejax.training.state import TrainState

SAMPLES = 25  # 5 x 5, as in the report
RECONSTRUCTIONS = 10


class Album:
    """Draws into the run's folder; holds 25 latents and ten held-out faces, and no picture.

    What is watched, at the beginning and at the end of each epoch, and makes the film, are samples;
    of a model without a prior, reconstructions.
    """

    def __init__(self, folder: Path, model: Autoencoder, held_out: Images):
        self._folder, self._model = folder, model
        self._watched = folder / ("samples" if model.has_prior else "reconstructions")
        if model.has_prior:
            self._latents = generate.latents(range(SAMPLES), latent_dim=model.code[0])
        faces = held_out.read(np.arange(min(RECONSTRUCTIONS, len(held_out))))
        shown = np.asarray(generate.corrupt(faces, jax.random.key(0), model=model))
        self._faces, self._shown = faces, shown

    def begin(self, state: TrainState, epoch: int) -> None:
        """What is to be seen before an epoch."""
        self._draw(state, self._watched / f"epoch-{epoch:04}-begin.png")

    def end(self, state: TrainState, epoch: int) -> None:
        """What is to be seen after an epoch."""
        self._draw(state, self._watched / f"epoch-{epoch:04}-end.png")
        if self._model.has_prior:
            self._reconstructions(state, self._folder / "reconstructions" / f"epoch-{epoch:04}.png")

    def _draw(self, state: TrainState, path: Path) -> None:
        if self._model.has_prior:
            pictures.save(path, pictures.grid(self._decode(state, self._latents), columns=5))
        else:
            self._reconstructions(state, path)

    def _decode(self, state: TrainState, latents) -> np.ndarray:
        faces = generate.decode(state.params, state.statistics, latents, model=self._model)
        return np.asarray(faces)

    def _reconstructions(self, state: TrainState, path: Path) -> None:
        """What the model is shown above what it makes of it, and below both the clean faces where
        it was shown noisy ones."""
        again = generate.reconstruct(state.params, state.statistics, self._shown, model=self._model)
        rows = [self._shown, np.asarray(again)]
        if self._model.denoises:
            rows.append(self._faces)
        pictures.save(path, pictures.strips(rows))

    def curves(self) -> None:
        """The figures over the steps."""
        pictures.curves(self._folder / "metrics.jsonl", self._folder / "curves.png")

    def faces(self, state: TrainState) -> None:
        """New faces, from other latents than those that were watched, where there is a prior."""
        if not self._model.has_prior:
            return
        rows = []
        for first in range(SAMPLES, 5 * SAMPLES, SAMPLES):  # as many at a time as was compiled for
            seeds = range(first, first + SAMPLES)
            rows.append(
                self._decode(state, generate.latents(seeds, latent_dim=self._model.code[0]))
            )
        pictures.save(self._folder / "faces.png", pictures.grid(np.concatenate(rows), columns=10))

    def film(self) -> None:
        """The grids as a film; an epoch begins as the last one ended, so that one of them does."""
        first = self._watched / "epoch-0001-begin.png"
        frames = [first, *sorted(self._watched.glob("epoch-*-end.png"))]
        pictures.film(frames, mp4=self._folder / "learning.mp4", gif=self._folder / "learning.gif")
