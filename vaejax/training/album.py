"""The pictures of a run: the same latents and the same held-out faces, from first to last."""

from pathlib import Path

import numpy as np

from vaejax import generate, pictures
from vaejax.data.batches import Images
from vaejax.models.vae import VAE
from vaejax.training.state import TrainState

SAMPLES = 25  # 5 x 5, as in the report
RECONSTRUCTIONS = 10


class Album:
    """Draws into the run's folder; holds 25 latents and ten held-out faces, and no picture."""

    def __init__(self, folder: Path, model: VAE, held_out: Images):
        self._folder, self._model = folder, model
        self._latents = generate.latents(range(SAMPLES), latent_dim=model.latent_dim)
        self._faces = held_out.read(np.arange(min(RECONSTRUCTIONS, len(held_out))))

    def samples(self, state: TrainState, name: str) -> None:
        """The decoder's faces at the fixed latents."""
        faces = generate.decode(state.params, state.statistics, self._latents, model=self._model)
        picture = pictures.grid(np.asarray(faces), columns=5)
        pictures.save(self._folder / "samples" / f"{name}.png", picture)

    def reconstructions(self, state: TrainState, name: str) -> None:
        """Held-out faces above what the model makes of them."""
        again = generate.reconstruct(state.params, state.statistics, self._faces, model=self._model)
        picture = pictures.strips([self._faces, np.asarray(again)])
        pictures.save(self._folder / "reconstructions" / f"{name}.png", picture)

    def curves(self) -> None:
        """The figures over the steps."""
        pictures.curves(self._folder / "metrics.jsonl", self._folder / "curves.png")

    def faces(self, state: TrainState) -> None:
        """New faces, from other latents than those that were watched."""
        rows = []
        for first in range(SAMPLES, 5 * SAMPLES, SAMPLES):  # as many at a time as was compiled for
            seeds = range(first, first + SAMPLES)
            z = generate.latents(seeds, latent_dim=self._model.latent_dim)
            faces = generate.decode(state.params, state.statistics, z, model=self._model)
            rows.append(np.asarray(faces))
        pictures.save(self._folder / "faces.png", pictures.grid(np.concatenate(rows), columns=10))

    def film(self) -> None:
        """The grids as a film; an epoch begins as the last one ended, so that one of them does."""
        first = self._folder / "samples" / "epoch-0001-begin.png"
        frames = [first, *sorted((self._folder / "samples").glob("epoch-*-end.png"))]
        pictures.film(frames, mp4=self._folder / "learning.mp4", gif=self._folder / "learning.gif")
