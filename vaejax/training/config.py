"""What a person may set, the recipes that fill in the rest, and what identifies a run."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from jaxtyping import PyTree

from vaejax.errors import UserError
from vaejax.losses import is_batch_coupled, keyword_settings
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.priors import PriorName
from vaejax.training.optimizer import adam, schedule
from vaejax.training.step import Trainer

RUN_FORMAT = "vaejax run 2"  # of config.json; another number when old runs can no longer be read


# Flags --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFlags:
    """The flags of every experiment that say where and how a run takes place."""

    data: Path | None = None  # folder or zip of faces, or a prepared set (none: the drawn faces)
    # with --data the report's, without it quick; "faces" draws better ones from your own images
    recipe: Literal["report", "quick", "faces"] | None = None
    out: Path | None = None  # the run's folder (none: the next runs/NNNNN-name)
    crop_faces: bool = False  # cut every picture down to its largest face
    cascade: Path | None = None  # what finds faces: OpenCV's XML (none: its own, for frontal ones)
    margin: float | None = None  # around a face, in sides of its box (none: 0.3)
    debug_sheet: Path | None = None  # a PNG that shows which faces were found where
    devices: int | None = None  # devices to train on (none: all that there are)
    parallel: Literal["jit", "pmap"] = "jit"  # how a batch is split over them
    coordinator: str | None = None  # HOST:PORT of the first of several processes
    processes: int | None = None  # how many processes train together
    process_id: int | None = None  # which of the processes this is, from 0
    seed: int = 0  # of the weights, the noise, and the order of the images
    log_steps: int = 10  # updates between two lines of metrics.jsonl
    checkpoint_minutes: float = 3.0  # minutes between two checkpoints
    checkpoint_steps: int | None = None  # updates after which one is written anyway (none: never)
    keep: int = 3  # checkpoints that are kept
    max_ram: float | None = None  # GiB; a run that holds more saves itself and ends (none: any)
    accept_changed_data: bool = False  # go on although the images are no longer those of the start
    fresh: bool = False  # start anew; an old folder is kept under another name
    # which folder of a file's path names the person, 1 the outermost (none: the first that not all
    # images share; 0: none does)
    person_depth: int | None = None
    dry_run: bool = False  # print the plan and write nothing
    allow_refused: bool = False  # go on although more than 5 % of the files are no usable image


@dataclass(frozen=True)
class Config(RunFlags):
    """The flags of every experiment; an experiment may add its own.

    The fields below replace a setting of the chosen recipe, and so do those that an experiment
    adds; None (or no flag) leaves it as it is. A flag has the name of what it sets: a field of the
    recipe or of its model, or a keyword argument of its loss or its optimizer.
    """

    size: int | None = None  # height and width that the images are brought to, pixels
    epochs: int | None = None  # passes over the training images
    steps: int | None = None  # a bound on the updates: whichever of the two comes first
    minutes: float | None = None  # of the entire command, instead of epochs or steps
    batch_size: int | None = None  # images an update
    micro_batch: int | None = None  # images of a batch that are in memory at a time (none: all)
    learning_rate: float | None = None  # Adam's, after the warm-up
    warmup_steps: int | None = None  # updates in which the learning rate rises from 0
    clip_norm: float | None = None  # gradients whose norm is larger are scaled down to it
    ema_decay: float | None = None  # of a moving average of the weights, which is then evaluated
    flip: bool = False  # mirror every second training image, at random
    prior: PriorName | None = None  # where new faces come from; all but "normal" are fitted
    prior_steps: int | None = None  # updates of a flow
    prior_width: int | None = None  # of a flow's layers
    prior_depth: int | None = None  # residual layers of a flow
    labels: Path | None = None  # CSV of attributes (file,hair_colour,...), for faces with some
    conditional: bool = False  # learn the attributes of the drawn faces, which have labels
    compute: Literal["float32", "bfloat16"] | None = None  # what is multiplied; bfloat16 for GPUs


# Recipes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Settings that belong together. Adam's are the report's, unless they are given."""

    name: str
    model: Autoencoder
    loss: partial  # of a loss, such as those of `vaejax.losses`, with its settings as keywords
    epochs: int | None = None  # None: the updates follow from `minutes`, or `steps` alone
    steps: int | None = None
    # of the entire command: the speed of this machine decides on `steps` and `prior_steps`
    minutes: float | None = None
    batch_size: int = 128
    micro_batch: int | None = None
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    cosine_decay: bool = False  # of the learning rate, down to zero at the last update
    # of a function of the learning rate (or its schedule) that returns an optax optimizer
    optimizer: partial = field(default_factory=lambda: partial(adam, b1=0.5))
    ema_decay: float | None = None
    flip: bool = False
    prior: PriorName = "normal"
    prior_steps: int = 2700
    prior_width: int = 512
    prior_depth: int = 4
    labels: Path | None = None  # of the faces; a flow can then be asked for some of them
    conditional: bool = False  # take the labels of the drawn faces
    frozen: Callable[[], PyTree] | None = None  # loads networks that the loss uses, not trained

    @property
    def micro_batches(self) -> int:
        """The number of parts that a batch is computed in."""
        return self.batch_size // (self.micro_batch or self.batch_size)

    @property
    def batch_coupled(self) -> bool:
        """Whether the images of a batch meet, in a norm or in the loss.

        Where they do not, micro-batches change no more than the rounding.
        """
        return self.model.batch_coupled or is_batch_coupled(self.loss)

    def trainer(self, *, updates: int) -> Trainer:
        """Return what an update of a run of so many updates does."""
        rate = schedule(
            self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=updates if self.cosine_decay else None,
        )
        return Trainer(
            self.model,
            self.loss,
            self.optimizer(rate),
            ema_decay=self.ema_decay,
            flip=self.flip,
            micro_batches=self.micro_batches,
        )


Range = tuple[Callable[[Any], bool], str]
COUNT: Range = (lambda value: value >= 1, "at least 1")
WEIGHT: Range = (lambda value: 0 <= value < float("inf"), "at least 0")
POSITIVE: Range = (lambda value: 0 < value < float("inf"), "more than 0")
RANGES: dict[str, Range] = {
    **dict.fromkeys(("epochs", "steps", "batch_size", "micro_batch", "keep", "processes"), COUNT),
    **dict.fromkeys(("latent_dim", "latent_channels", "width", "blocks"), COUNT),
    **dict.fromkeys(("prior_steps", "prior_width", "prior_depth"), COUNT),
    **dict.fromkeys(("log_steps", "checkpoint_steps"), COUNT),
    **dict.fromkeys(("kl_weight", "beta", "gradient_weight", "l1_weight"), WEIGHT),
    **dict.fromkeys(("noise", "warmup_steps"), WEIGHT),
    **dict.fromkeys(("learning_rate", "checkpoint_minutes", "max_ram", "clip_norm"), POSITIVE),
    "person_depth": (lambda value: value >= 0, "at least 0"),
    "minutes": POSITIVE,
    "ema_decay": (lambda value: 0 <= value < 1, "from 0 to below 1"),
    "seed": (lambda value: 0 <= value < 2**32 - 1, "from 0 to 4294967294"),
}


def resolve(config: Config, *recipes: Recipe) -> Recipe:
    """Return the recipe that was chosen, with every flag that was set in its place.

    Raises UserError, with the flag's name, for a value out of range, a recipe that does not exist,
    and a flag that sets nothing in the chosen recipe.
    """
    flags = {f.name: v for f in fields(config) if (v := getattr(config, f.name)) is not None}
    for name, value in flags.items():
        admits, words = RANGES.get(name, (lambda _: True, ""))
        if not admits(value):
            raise UserError(f"{_flag(name)} {value}: must be {words}")
    default = "report" if config.data else "quick"
    wanted = config.recipe or (recipes[0].name if len(recipes) == 1 else default)
    chosen = next((recipe for recipe in recipes if recipe.name == wanted), None)
    if chosen is None:
        names = " and ".join(recipe.name for recipe in recipes)
        raise UserError(f"--recipe {wanted}: this experiment has the recipe {names} alone")
    # a flag with a default of its own is the experiment's business
    own = {f.name for f in fields(config) if f.default is not None and f.default is not False}
    own |= {f.name for f in fields(RunFlags)} | {n for n, v in flags.items() if v is False}
    settings = {name: value for name, value in flags.items() if name not in own}
    lengths = [name for name in ("epochs", "steps") if name in settings]
    if lengths and "minutes" in settings:
        raise UserError(
            f"--minutes {config.minutes:g} and {_flag(lengths[0])}: both say how long the run is. "
            "Leave one of them out"
        )
    if lengths:
        settings["minutes"] = None
    elif "minutes" in settings:
        settings |= {"epochs": None, "steps": None}
    return _with_settings(chosen, settings)


def _with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """Put each setting where its name belongs. UserError for one that belongs nowhere."""
    of_recipe = {f.name for f in fields(recipe)} - {"name", "model", "loss", "optimizer", "frozen"}
    of_model = set(autoencoder.hyperparameters(type(recipe.model)))
    of_loss, of_optimizer = _keywords(recipe.loss), _keywords(recipe.optimizer)
    for name, value in settings.items():
        if name not in of_recipe | of_model | of_loss | of_optimizer:
            raise UserError(
                f"{_flag(name)} {value}: it sets nothing in the {recipe.name} recipe, whose model "
                f"is {type(recipe.model).__name__}, whose loss is {recipe.loss.func.__name__}. "
                "Leave it out"
            )

    def among(names: set[str]) -> dict[str, Any]:
        return {name: value for name, value in settings.items() if name in names}

    return replace(
        recipe,
        model=recipe.model.clone(**among(of_model)),
        loss=partial(recipe.loss, **among(of_loss)),
        optimizer=partial(recipe.optimizer, **among(of_optimizer)),
        **among(of_recipe),
    )


def _keywords(function: partial) -> set[str]:
    parameters = inspect.signature(function.func).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# What identifies a run ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How far and how often: what may differ when a run goes on."""

    recipe: str
    source: str  # where the images came from, an absolute path
    prepared: str  # the prepared set, an absolute path
    images: int  # for training
    updates: int  # of the run
    updates_per_epoch: int
    log_steps: int
    checkpoint_steps: int | None
    checkpoint_minutes: float
    keep: int
    prior: PriorName
    prior_steps: int = 2700
    prior_width: int = 512
    prior_depth: int = 4
    labels: str | None = None  # an absolute path

    @property
    def epochs(self) -> int:
        """The passes over the training images, the last one perhaps cut short."""
        return -(-self.updates // self.updates_per_epoch)


@dataclass(frozen=True)
class RunSpec:
    """What `config.json` holds: all that makes a run this one and no other, and its schedule."""

    experiment: str
    model: Mapping[str, Any]
    loss: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    batch_size: int
    micro_batch: int | None  # only where it changes the result by more than rounding
    ema_decay: float | None
    flip: bool
    minutes: float | None  # of the entire command, whatever updates followed from them
    seed: int
    data: Mapping[str, Any]  # which images, and how they are split
    schedule: Schedule

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON values."""
        return {"format": RUN_FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> "RunSpec":
        """Check and convert the content of a `config.json`.

        Raises OtherVersion for another format, and ValueError with the field that is wrong.
        """
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
        check_format(value, RUN_FORMAT)
        schedule_ = value.get("schedule")
        if not isinstance(schedule_, dict):
            raise ValueError('"schedule" is not an object')
        values = {f.name: value.get(f.name) for f in fields(cls)}
        # the last ones have defaults: runs without a flow did not always have them
        defaults = {f.name: f.default for f in fields(Schedule) if f.default is not MISSING}
        spec = {f.name: schedule_.get(f.name, defaults.get(f.name)) for f in fields(Schedule)}
        for name, item in [*values.items(), *spec.items()]:
            if problem := _problem(name, item):
                raise ValueError(problem)
        numbers: dict[str, Any] = {**spec, **values}  # JSON's 3 is an integer, for 3.0
        spec["checkpoint_minutes"] = float(numbers["checkpoint_minutes"])
        for name in ("minutes", "ema_decay"):
            values[name] = None if numbers[name] is None else float(numbers[name])
        return cls(**{**values, "schedule": Schedule(**spec)})  # pyright: ignore


class OtherVersion(ValueError):
    """What was read has another format: another version of vaejax has written it."""


def check_format(value: Mapping[str, Any], expected: str) -> None:
    """Raise OtherVersion unless a JSON object says that it has the expected format.

    A run without any format was written before formats had numbers.
    """
    format_ = value.get("format")
    if format_ == expected:
        return
    if isinstance(format_, str) or (format_ is None and "experiment" in value):
        version = str(format_ or "no format")[:40]
        raise OtherVersion(f"it was written by another version of vaejax ({version})")
    raise ValueError('it has no "format"')


_OBJECTS = ("model", "loss", "optimizer", "data", "schedule")
_TEXTS = ("experiment", "recipe", "source", "prepared", "labels")
_COUNTS = ("batch_size", "images", "updates", "updates_per_epoch", "log_steps", "keep")
_COUNTS += ("prior_steps", "prior_width", "prior_depth")
_OPTIONAL_COUNTS = ("micro_batch", "checkpoint_steps")


def _problem(name: str, value: Any) -> str | None:
    """Say what is wrong with a field of a `config.json`, which may be damaged or anybody's."""
    if name in _OBJECTS:
        good = isinstance(value, dict)
        if good and name in ("model", "loss", "optimizer"):
            good = isinstance(value.get("kind"), str)
        return None if good else f'"{name}" is not an object, or has no kind'
    if name == "prior":
        return None if value in get_args(PriorName) else f'"prior" is {str(value)[:40]}'
    if name == "labels" and value is None:
        return None
    if name in _TEXTS:
        return None if isinstance(value, str) else f'"{name}" is not a text'
    if name == "flip":
        return None if isinstance(value, bool) else f'"{name}" is not true or false'
    if isinstance(value, bool):
        return f'"{name}" is not a number'
    if name in _OPTIONAL_COUNTS and value is None:
        return None
    if name in (*_COUNTS, *_OPTIONAL_COUNTS, "seed"):
        low = 0 if name == "seed" else 1
        good = isinstance(value, int) and low <= value < 2**53
        return None if good else f'"{name}" is {str(value)[:40]}'
    if name == "checkpoint_minutes":
        good = isinstance(value, int | float) and 0 < value < float("inf")
        return None if good else f'"{name}" is {str(value)[:40]}'
    good = value is None or (isinstance(value, int | float) and 0 <= value < 2**53)
    return None if good else f'"{name}" is {str(value)[:40]}'


def run_spec(
    name: str, config: Config, recipe: Recipe, *, data: Mapping[str, Any], schedule: Schedule
) -> RunSpec:
    """Return what identifies the run of a recipe on these images."""
    optimizer = {
        **describe(recipe.optimizer),
        "learning_rate": recipe.learning_rate,
        "warmup_steps": recipe.warmup_steps,
        # another length is another run only where the learning rate depends on it
        "decay_steps": schedule.updates if recipe.cosine_decay and not recipe.minutes else None,
    }
    return RunSpec(
        experiment=name,
        model=autoencoder.to_json(recipe.model),
        loss=describe(recipe.loss),
        optimizer=optimizer,
        batch_size=recipe.batch_size,
        micro_batch=recipe.micro_batch if recipe.batch_coupled else None,
        ema_decay=recipe.ema_decay,
        flip=recipe.flip,
        minutes=recipe.minutes,
        seed=config.seed,
        data=data,
        schedule=schedule,
    )


def describe(function: partial) -> dict[str, Any]:
    """Describe a loss or an optimizer by JSON values: its name and its settings."""
    return {"kind": function.func.__name__, **keyword_settings(function)}


def differences(saved: RunSpec, present: RunSpec, *, without_data: bool = False) -> list[str]:
    """List the fields in which two runs differ, as "model.size 64 → 128".

    The schedule does not count; `without_data` leaves out the images, and the updates that follow
    from their number. The digest of which image is in which split counts if both have one: a run of
    an earlier version does not.
    """
    old, new = (_flat(_identity(spec, without_data=without_data)) for spec in (saved, present))
    if not ("data.assignment" in old and "data.assignment" in new):
        for flat in (old, new):
            flat.pop("data.assignment", None)
    keys = sorted(old.keys() | new.keys())
    values = ((k, str(old.get(k)), str(new.get(k))) for k in keys if old.get(k) != new.get(k))
    return [f"{k[:60]} {before[:60]} → {after[:60]}" for k, before, after in values]


def _identity(spec: RunSpec, *, without_data: bool) -> dict[str, Any]:
    left = {**asdict(spec)}
    del left["schedule"]
    if without_data:
        del left["data"]
        left["optimizer"] = {**left["optimizer"], "decay_steps": None}
    return left


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat
