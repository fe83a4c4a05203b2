"""What a person may say about a run, and the recipes that fill in what they leave unsaid."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import optax

from vaejax.errors import UserError
from vaejax.models.layers import Norm
from vaejax.models.vae import VAE


@dataclass(frozen=True)
class Config:
    """The flags of every experiment. What stays None is the recipe's."""

    data: Path | None = None  # folder or zip of faces, or a prepared set (none: the drawn faces)
    recipe: Literal["report", "quick"] | None = None  # with --data the report's, without it quick
    out: Path | None = None  # the run's folder (none: the next runs/NNNNN-name)
    epochs: int | None = None  # passes over the training images
    steps: int | None = None  # a bound on the updates: whichever of the two comes first
    batch_size: int | None = None  # images an update
    learning_rate: float | None = None  # Adam's
    kl_weight: float | None = None  # loss = mse + kl_weight * kl, both means
    latent_dim: int | None = None  # numbers that describe a face
    norm: Norm | None = None  # "frozen": what the report really trained; "batch": real batch norm
    seed: int = 0  # of the weights, the noise, and the order of the images
    log_steps: int = 10  # updates between two lines of metrics.jsonl
    checkpoint_steps: int = 500  # updates between two checkpoints, and
    checkpoint_minutes: float = 5.0  # minutes after which one is written anyway
    keep: int = 3  # checkpoints that are kept
    fresh: bool = False  # start anew; an old folder is kept under another name
    dry_run: bool = False  # print the plan and write nothing
    allow_refused: bool = False  # go on although more than 5 % of the files are no usable image


@dataclass(frozen=True)
class Recipe:
    """Settings that belong together. The defaults are the report's."""

    name: str
    epochs: int
    steps: int | None = None
    batch_size: int = 128
    learning_rate: float = 1e-4
    kl_weight: float = 0.01
    latent_dim: int = 512
    norm: Norm = "frozen"
    # from here on what no flag changes
    width: int = 32
    output_norm: bool = True
    log_variance_bound: float | None = None
    b1: float = 0.5
    cosine_decay: bool = False  # of the learning rate, down to zero at the last update


def settle(config: Config, *recipes: Recipe) -> Recipe:
    """The recipe that was chosen, with every flag that was given in its place.

    Raises UserError, with the flag's name, for a value that cannot be.
    """
    for flag in ("epochs", "steps", "batch_size", "latent_dim", "log_steps", "checkpoint_steps"):
        _refuse(config, flag, lambda value: value >= 1, "at least 1")
    _refuse(config, "keep", lambda value: value >= 1, "at least 1")
    _refuse(config, "seed", lambda value: 0 <= value < 2**32 - 1, "from 0 to 4294967294")
    _refuse(config, "kl_weight", lambda value: 0 <= value < float("inf"), "at least 0")
    for flag in ("learning_rate", "checkpoint_minutes"):
        _refuse(config, flag, lambda value: 0 < value < float("inf"), "more than 0")
    name = config.recipe or ("report" if config.data else "quick")
    recipe = next(recipe for recipe in recipes if recipe.name == name)
    given = {
        field.name: value
        for field in fields(recipe)
        if field.name != "name" and (value := getattr(config, field.name, None)) is not None
    }
    return replace(recipe, **given)


def _refuse(config: Config, name: str, admits, range_: str) -> None:
    value = getattr(config, name)
    if value is not None and not admits(value):
        raise UserError(f"--{name.replace('_', '-')} {value}: must be {range_}")


def build_vae(recipe: Recipe, *, size: int) -> VAE:
    """The report's VAE at `size` pixels, as the recipe has it."""
    return VAE(
        size=size,
        latent_dim=recipe.latent_dim,
        width=recipe.width,
        norm=recipe.norm,
        output_norm=recipe.output_norm,
        log_variance_bound=recipe.log_variance_bound,
    )


def build_adam(recipe: Recipe, *, updates: int) -> optax.GradientTransformation:
    """Adam as the recipe has it, for a run of so many updates."""
    rate: optax.ScalarOrSchedule = recipe.learning_rate
    if recipe.cosine_decay:
        rate = optax.cosine_decay_schedule(recipe.learning_rate, updates)
    return optax.adam(rate, b1=recipe.b1)
