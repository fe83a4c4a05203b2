"""The learned prior of a run: fitted after training, or on first use, and kept in its folder."""

import sys
import time
from pathlib import Path

import jax
import numpy as np

from vaejax import generate, priors
from vaejax.data.batches import Images
from vaejax.errors import UserError
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.priors import GaussianMixture, Prior, StandardNormal
from vaejax.system import format_duration
from vaejax.training import run
from vaejax.training.checkpoint import Weights
from vaejax.training.visualize import commands

MAX_IMAGES = 100_000  # whose posterior means are fitted


def default_name(loaded: run.LoadedRun) -> priors.PriorName:
    """Return the prior that a run's recipe names."""
    return "mixture" if loaded.spec.schedule.prior == "mixture" else "normal"


def has_mixture(loaded: run.LoadedRun) -> bool:
    """Tell whether a run has a mixture that was fitted to these weights."""
    return _load(loaded.folder, loaded.model, loaded.weights) is not None


def load_or_fit(loaded: run.LoadedRun, name: priors.PriorName) -> Prior:
    """Return a prior of a run by its name.

    A mixture is read from the run's folder if it was fitted to these weights. Otherwise it is
    fitted now and saved there, under the run's lock. Raises UserError where there is no such prior,
    or another process trains in the folder.
    """
    model, weights = loaded.model, loaded.weights
    if name == "normal":
        if not autoencoder.is_variational(model):
            raise UserError(
                f"{loaded.folder} is a {model.title}, which has no prior to draw new faces from: "
                "`--prior mixture` fits one to its latents; see what it makes of yours with "
                f"{' or '.join(f'`{command}`' for command in commands(model, loaded.folder))}, or "
                "train a VAE with experiments/anime.py"
            )
        return StandardNormal(model)
    priors.require_mixture_fits(model)
    if (mixture := _load(loaded.folder, model, weights)) is None:
        with run.locked(loaded.folder):
            mixture = fit_and_save(loaded.folder, loaded.spec.schedule.prepared, model, weights)
    return GaussianMixture(mixture, model)


def fit_and_save(
    folder: Path, prepared: str, model: Autoencoder, weights: Weights
) -> priors.Mixture:
    """Fit a mixture to the posterior means of a run's training images, and save it.

    The caller holds the run's lock.
    """
    began = time.monotonic()
    images = Images(Path(prepared), "train")
    params, stats = weights.params, weights.batch_stats
    means = generate.posterior_means(params, stats, images, model=model, most=MAX_IMAGES)
    mixture = priors.fit_mixture(means)
    priors.save(mixture, folder, digest=weights.digest)
    print(
        f"fitted a mixture of {len(mixture.log_weights)} Gaussians to the posterior means of "
        f"{len(means):,} training images in {format_duration(time.monotonic() - began)}",
        file=sys.stderr,
    )
    return mixture


def _load(folder: Path, model: Autoencoder, weights: Weights) -> priors.Mixture | None:
    latents = sum(
        int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(autoencoder.latent_spec(model))
    )
    return priors.load(folder, digest=weights.digest, latents=latents)
