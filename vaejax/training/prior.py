"""The learned prior of a run: fitted when its autoencoder is trained, and kept in its folder.

    priors/mixture.npz   a Gaussian mixture
    priors/flow/         a flow: a run of its own, with checkpoints and metrics.jsonl

Either belongs to the weights that it was fitted to, and is used with no others.
"""

import sys
import time
from shlex import quote

from vaejax import priors
from vaejax.errors import CheckpointError, UserError
from vaejax.files import printable
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.priors import GaussianMixture, Prior, StandardNormal
from vaejax.system import format_duration
from vaejax.training import devices as dev
from vaejax.training import flow_prior, run
from vaejax.training.visualize import commands

MIN_IMAGES = 100  # of a flow


def load(
    loaded: run.LoadedRun,
    name: priors.PriorName,
    *,
    steps: int = priors.SAMPLER_STEPS,
    condition: str = "",
) -> Prior:
    """Return a prior of a run by its name; a mixture that it does not have yet is fitted now.

    `steps` are those of a flow's sampler, `condition` the attributes of the faces that it draws.
    Raises UserError where there is no such prior, or another process trains in the folder.
    """
    model = loaded.model
    if condition and name != "flow":
        raise UserError(
            f"--condition {condition}: only a flow draws faces with some attributes. `vaejax "
            f"fit-prior {quote(str(loaded.folder))} --labels FILE.csv` fits one"
        )
    if name == "normal":
        if not autoencoder.is_variational(model):
            raise UserError(
                f"{loaded.folder} is a {model.title}, which has no prior to draw new faces from: "
                "`--prior mixture` fits one to its latents; see what it makes of yours with "
                f"{' or '.join(f'`{command}`' for command in commands(model, loaded.folder))}, or "
                "train a VAE with experiments/anime.py"
            )
        return StandardNormal(model)
    if name == "flow":
        return flow_prior.load(loaded, steps=steps, condition=condition)
    priors.require_mixture_fits(model)
    if (mixture := _load_mixture(loaded)) is None:
        with run.locked(loaded.folder):
            mixture = _fit_mixture(loaded)
    return GaussianMixture(mixture, model)


def default_name(loaded: run.LoadedRun) -> priors.PriorName:
    """Return the prior that a run's recipe names, or "normal" where that is not fitted yet."""
    name = loaded.spec.schedule.prior
    if name == "mixture":  # which is fitted on first use
        return "mixture"
    if name != "flow":
        return "normal"
    try:
        flow_prior.load(loaded, steps=1)
    except (UserError, CheckpointError) as error:
        if autoencoder.is_variational(loaded.model):
            text = f"warning: {error}. New faces are drawn from N(0, I)"
            print(printable(text), file=sys.stderr)
            return "normal"
    return "flow"


def is_fitted(loaded: run.LoadedRun, name: priors.PriorName) -> bool:
    """Tell whether a run has this prior, fitted to its weights."""
    if name == "mixture":
        return _load_mixture(loaded) is not None
    try:
        load(loaded, name)
    except (UserError, CheckpointError):
        return False
    return True


def is_current(loaded: run.LoadedRun) -> bool:
    """Tell whether a run has the prior that its schedule describes, fitted to its weights."""
    name = loaded.spec.schedule.prior
    return is_fitted(loaded, name) and (name != "flow" or flow_prior.is_as_scheduled(loaded))


def possible(name: priors.PriorName, model: Autoencoder, *, images: int) -> priors.PriorName:
    """Return the prior that so many images allow; warn where it is not the one that was asked for.

    Raises UserError for a model with too many latents for a mixture.
    """
    if name == "flow" and images < MIN_IMAGES:
        fallback = "mixture" if priors.latent_dimensions(model) <= priors.MAX_LATENTS else "normal"
        words = "a Gaussian mixture" if fallback == "mixture" else "N(0, I)"
        print(
            f"warning: {images} training images are too few for a flow as the prior (at least "
            f"{MIN_IMAGES}): it will be {words}",
            file=sys.stderr,
        )
        return fallback
    if name == "mixture":
        priors.require_mixture_fits(model)
    return name


def fit(loaded: run.LoadedRun, resources: flow_prior.Resources) -> Prior | None:
    """Fit the prior that a run's recipe names, unless it is there; None for N(0, I).

    The caller holds the run's lock. All processes have to call it together.
    """
    name = loaded.spec.schedule.prior
    if name == "flow":
        if not dev.broadcast(lambda: is_current(loaded)):
            flow_prior.fit(loaded, resources)
        return flow_prior.load(loaded, steps=priors.SAMPLER_STEPS)
    if name == "mixture" and dev.is_first():
        return GaussianMixture(_load_mixture(loaded) or _fit_mixture(loaded), loaded.model)
    return None


def _fit_mixture(loaded: run.LoadedRun) -> priors.Mixture:
    """Fit a mixture to the posterior means of a run's training images, and save it."""
    began = time.monotonic()
    means = flow_prior.posterior_means(loaded, "train")
    held_out = flow_prior.posterior_means(loaded, "validation")
    mixture = priors.choose_mixture(means, held_out)
    priors.save(mixture, loaded.folder, digest=loaded.weights.digest)
    print(
        f"fitted a mixture of {len(mixture.log_weights)} Gaussians to the posterior means of "
        f"{len(means):,} training images in {format_duration(time.monotonic() - began)}",
        file=sys.stderr,
    )
    return mixture


def _load_mixture(loaded: run.LoadedRun) -> priors.Mixture | None:
    latents = priors.latent_dimensions(loaded.model)
    return priors.load(loaded.folder, digest=loaded.weights.digest, latents=latents)
