"""What a person may say about a run, and the recipes that fill in what they leave unsaid."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optax

from vaejax.errors import UserError
from vaejax.models.autoencoder import Autoencoder
from vaejax.training.adam import adam


@dataclass(frozen=True)
class Config:
    """The flags of every experiment; one of them may add its own. What stays None is the recipe's.

    A flag is named after what it sets: a field of the recipe or of its model, or an argument of its
    loss.
    """

    data: Path | None = None  # folder or zip of faces, or a prepared set (none: the drawn faces)
    recipe: Literal["report", "quick"] | None = None  # with --data the report's, without it quick
    out: Path | None = None  # the run's folder (none: the next runs/NNNNN-name)
    size: int | None = None  # height and width that the images are brought to, pixels
    crop_faces: bool = False  # cut every picture down to its largest face
    cascade: Path | None = None  # what finds faces: OpenCV's XML (none: its own, for frontal ones)
    margin: float | None = None  # around a face, in sides of its box (none: 0.3)
    debug_sheet: Path | None = None  # a PNG that shows which faces were found where
    epochs: int | None = None  # passes over the training images
    steps: int | None = None  # a bound on the updates: whichever of the two comes first
    batch_size: int | None = None  # images an update
    micro_batch: int | None = None  # images of a batch that are in memory at a time (none: all)
    learning_rate: float | None = None  # Adam's
    compute: Literal["float32", "bfloat16"] | None = None  # what is multiplied; bfloat16 for GPUs
    devices: int | None = None  # devices to learn on (none: all that there are)
    parallel: Literal["jit", "pmap"] = "jit"  # how a batch is split over them
    coordinator: str | None = None  # HOST:PORT of the first of several processes
    processes: int | None = None  # how many processes learn together
    process_id: int | None = None  # which of the processes this is, from 0
    seed: int = 0  # of the weights, the noise, and the order of the images
    log_steps: int = 10  # updates between two lines of metrics.jsonl
    checkpoint_minutes: float = 3.0  # minutes between two checkpoints
    checkpoint_steps: int | None = None  # updates after which one is written anyway (none: never)
    keep: int = 3  # checkpoints that are kept
    max_ram: float | None = None  # GiB; a run that holds more saves itself and ends (none: any)
    accept_changed_data: bool = False  # go on although the images are no longer those of the start
    fresh: bool = False  # start anew; an old folder is kept under another name
    dry_run: bool = False  # print the plan and write nothing
    allow_refused: bool = False  # go on although more than 5 % of the files are no usable image


@dataclass(frozen=True)
class Recipe:
    """Settings that belong together. Adam's are the report's, unless they are given."""

    name: str
    model: Autoencoder
    loss: partial  # of one of `objectives`, with its settings as keywords
    epochs: int
    steps: int | None = None
    batch_size: int = 128
    micro_batch: int | None = None
    learning_rate: float = 1e-4
    b1: float = 0.5
    cosine_decay: bool = False  # of the learning rate, down to zero at the last update

    @property
    def micro_batches(self) -> int:
        """In a batch."""
        return self.batch_size // (self.micro_batch or self.batch_size)


Range = tuple[Callable[[Any], bool], str]
COUNT: Range = (lambda value: value >= 1, "at least 1")
WEIGHT: Range = (lambda value: 0 <= value < float("inf"), "at least 0")
POSITIVE: Range = (lambda value: 0 < value < float("inf"), "more than 0")
RANGES: dict[str, Range] = {
    **dict.fromkeys(("epochs", "steps", "batch_size", "micro_batch", "keep", "processes"), COUNT),
    **dict.fromkeys(("latent_dim", "width"), COUNT),
    **dict.fromkeys(("log_steps", "checkpoint_steps"), COUNT),
    **dict.fromkeys(("kl_weight", "noise"), WEIGHT),
    **dict.fromkeys(("learning_rate", "checkpoint_minutes", "max_ram"), POSITIVE),
    "seed": (lambda value: 0 <= value < 2**32 - 1, "from 0 to 4294967294"),
}


def settle(config: Config, *recipes: Recipe) -> Recipe:
    """The recipe that was chosen, with every flag that was given in its place.

    Raises UserError, with the flag's name, for a value that cannot be.
    """
    given = {f.name: v for f in fields(config) if (v := getattr(config, f.name)) is not None}
    for name, value in given.items():
        admits, words = RANGES.get(name, (lambda _: True, ""))
        if not admits(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {words}")
    wanted = config.recipe or ("report" if config.data or len(recipes) == 1 else "quick")
    chosen = next((recipe for recipe in recipes if recipe.name == wanted), None)
    if chosen is None:
        known = " and ".join(recipe.name for recipe in recipes)
        raise UserError(f"--recipe {wanted}: this experiment has the recipe {known} alone")
    settings = {**chosen.loss.keywords, **_among(given, chosen.loss.keywords)}
    model = replace(chosen.model, **_among(given, [f.name for f in fields(chosen.model)]))
    own = [f.name for f in fields(chosen) if f.name not in ("name", "model", "loss")]
    return replace(
        chosen, model=model, loss=partial(chosen.loss.func, **settings), **_among(given, own)
    )


def _among(given: dict[str, Any], names: Any) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


def describe_loss(recipe: Recipe) -> dict[str, Any]:
    """The loss as JSON."""
    return {"kind": recipe.loss.func.__name__, **recipe.loss.keywords}


def build_adam(recipe: Recipe, *, updates: int) -> optax.GradientTransformation:
    """Adam as the recipe has it, for a run of so many updates."""
    rate: optax.ScalarOrSchedule = recipe.learning_rate
    if recipe.cosine_decay:
        rate = optax.cosine_decay_schedule(recipe.learning_rate, updates)
    return adam(rate, b1=recipe.b1)
