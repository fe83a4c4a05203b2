"""What a run is going to do, told before it does it: updates, layers, memory, disk, time."""

import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

from vaejax.data import batches
from vaejax.errors import UserError
from vaejax.models import autoencoder, summary
from vaejax.system import format_bytes, format_duration, memory_limit, process_memory
from vaejax.training import flow_prior
from vaejax.training.compiled import compile_init, compile_train_step, state_bytes
from vaejax.training.config import MAX_COUNT, Recipe, describe
from vaejax.training.devices import Devices, device_memory_limit, on_cpu, replicated, rows
from vaejax.training.guards import refuse_too_much
from vaejax.training.step import init, train_step

PICTURE_BYTES = 600_000  # an epoch, about, at 64 pixels: two grids and the reconstructions


class Plan(NamedTuple):
    """How long a run is."""

    per_epoch: int  # updates in a pass over the training images
    updates: int  # in the entire run

    @property
    def epochs(self) -> int:
        """The passes over the training images, the last one perhaps cut short."""
        return -(-self.updates // self.per_epoch)


def make_plan(recipe: Recipe, *, images: int) -> Plan:
    """Count the updates of a run.

    Raises UserError where a batch is larger than the data set, or an int32 cannot count them.
    """
    per_epoch = batches.steps_per_epoch(images, recipe.batch_size)
    bounds = recipe.steps, recipe.epochs and recipe.epochs * per_epoch
    updates = min(bound for bound in bounds if bound)
    if updates > MAX_COUNT:
        raise UserError(
            f"{updates:,} updates are more than a run can count (at most {MAX_COUNT:,}): take "
            "fewer --epochs, or --steps as well"
        )
    return Plan(per_epoch, updates)


def refuse_too_large(recipe: Recipe, *, devices: Devices) -> None:
    """Raise UserError, before anything is allocated, if the parameters alone do not fit.

    Those of the flow count as well, if the recipe has one.
    """
    key = jax.random.key(0, impl="threefry2x32")
    trainers = {"model": (recipe.trainer(updates=1), "--latent-dim, --width or --size")}
    if recipe.prior == "flow":
        trainers["flow"] = flow_prior.trainer(recipe), "--prior-width or --prior-depth"
    copies, total = 1, device_memory_limit()
    if on_cpu():
        copies, total = devices.count, memory_limit()
    for name, (trainer, flags) in trainers.items():
        shapes = jax.eval_shape(partial(init, trainer=trainer), key)
        needed = copies * state_bytes(shapes)
        if total is not None and needed > total:
            raise UserError(
                f"the {name} has {summary.count(shapes.params):,} parameters: with the optimizer's "
                f"state they need {format_bytes(needed)} of {format_bytes(total)} of memory. Take "
                f"a smaller {flags}"
            )


def describe_plan(recipe: Recipe, plan: Plan, *, images: int) -> str:
    """Return the table of layers, and the settings of the training."""
    rate = f"learning_rate {recipe.learning_rate:g}"
    if recipe.warmup_steps:
        rate += f", rising from 0 over {recipe.warmup_steps:,} updates"
    if recipe.cosine_decay:
        rate += ", falling to 0 along a cosine"
    weights = "" if recipe.ema_decay is None else f"EMA      of the weights, {recipe.ema_decay:g}\n"
    return (
        f"{summary.table(recipe.model)}\n"
        f"recipe   {recipe.name}\n"
        f"model    {_words(autoencoder.to_json(recipe.model))}\n"
        f"loss     {_words(describe(recipe.loss))}\n"
        f"updates  by {_words(describe(recipe.optimizer))}, {rate}\n"
        f"{weights}"
        f"length   {plan.updates:,} updates of {recipe.batch_size} images: {plan.epochs:,} epochs "
        f"of {plan.per_epoch:,}, {images:,} training images"
        + (", flipped at random" * recipe.flip)
        + _prior_words(recipe)
    )


def _prior_words(recipe: Recipe) -> str:
    if recipe.prior == "normal":
        return ""
    words = f"\nprior    {recipe.prior}, fitted to the posterior means at the end"
    if recipe.prior == "flow":
        width, depth = recipe.prior_width, recipe.prior_depth
        words += f": {recipe.prior_steps:,} updates, width {width}, depth {depth}"
    return words


def _words(settings: Mapping[str, Any]) -> str:
    (_, kind), *rest = settings.items()
    return f"{kind}: {', '.join(f'{name} {value}' for name, value in rest)}" if rest else kind


class Measured(NamedTuple):
    """What a few updates took."""

    compile_seconds: float
    seconds: float  # of an update, compiled
    memory: int  # bytes that a step needs, on the host or on each device
    checkpoint: int  # bytes
    finite: bool  # whether all metrics are


def measure(recipe: Recipe, *, devices: Devices, updates: int = 1, repeats: int = 2) -> Measured:
    """Make a few real updates, on noise, of a run of so many; `seconds` are the median."""
    model, trainer = recipe.model, recipe.trainer(updates=updates)
    frozen = recipe.frozen() if recipe.frozen else None
    key = jax.jit(
        lambda: jax.random.key(0, impl="threefry2x32"), out_shardings=replicated(devices)
    )()
    state = compile_init(trainer, devices=devices)(key)
    shape = (recipe.batch_size, model.size, model.size, model.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mine = images[rows(devices, recipe.batch_size)]
    began = time.monotonic()
    batch = jax.ShapeDtypeStruct(shape, np.uint8)
    step = compile_train_step(trainer, state, frozen, batch, key, devices=devices)
    compile_seconds = time.monotonic() - began
    checkpoint = state_bytes(state)
    refuse_too_much(step.memory, checkpoint, recipe, devices)
    seconds, finite = [], True
    for _ in range(1 + repeats):
        began = time.monotonic()
        state, metrics = step.run(state, mine, key)
        finite &= all(bool(np.isfinite(value)) for value in metrics.values())
        seconds.append(time.monotonic() - began)
    memory = step.memory * (devices.count if on_cpu() else 1)
    # the first update also warms up
    return Measured(compile_seconds, median(seconds[1:]), memory, checkpoint, finite)


def disk_needed(recipe: Recipe, plan: Plan, *, keep: int, checkpoint: int) -> int:
    """Estimate the bytes that a run writes: its checkpoints, one more while it is written, and the
    pictures."""
    picture_bytes = plan.epochs * PICTURE_BYTES * (recipe.model.size / 64) ** 2
    return round((keep + 1) * checkpoint + picture_bytes)


def warn_of_disk(folder: Path, needed: int) -> None:
    """Warn if fewer bytes are free than a run needs."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        print(
            f"warning: a run of this kind needs about {format_bytes(needed)} of disk, "
            f"{format_bytes(free)} are free in {folder}: --keep 1 needs less",
            file=sys.stderr,
        )


def operations(recipe: Recipe) -> float:
    """Estimate the multiplications and additions of an update, as XLA counts them."""
    model, trainer = recipe.model, recipe.trainer(updates=1)
    key = jax.random.key(0, impl="threefry2x32")
    state = jax.eval_shape(partial(init, trainer=trainer), key)
    shape = (recipe.batch_size, model.size, model.size, model.channels)
    step = jax.jit(partial(train_step, trainer=trainer))
    lowered = step.lower(state, None, jax.ShapeDtypeStruct(shape, np.uint8), key)
    return float((lowered.cost_analysis() or {})["flops"])


def forecast(recipe: Recipe, plan: Plan, *, devices: Devices, keep: int, to_prepare: int) -> str:
    """Measure and describe memory, disk and time of a run on this machine.

    `to_prepare` files are not prepared yet, and will be on the disk as pixels.
    """
    model, measured = recipe.model, measure(recipe, devices=devices, updates=plan.updates)
    disk = disk_needed(recipe, plan, keep=keep, checkpoint=measured.checkpoint)
    # three times while they are being prepared, twice afterwards
    pixels = 3 * to_prepare * model.size**2 * model.channels
    where = "host" if on_cpu() else "device" if devices.count == 1 else "each device"
    return (
        f"memory   {format_bytes(measured.memory)} on the {where} for a step, "
        f"{format_bytes(process_memory())} in this process, of {format_bytes(memory_limit())}\n"
        f"disk     about {format_bytes(disk)}: {keep} checkpoints of "
        f"{format_bytes(measured.checkpoint)}, one more while it is written, and the pictures; "
        f"the images {format_bytes(pixels)} more\n"
        f"time     {format_duration(measured.seconds * plan.updates)} on {devices}: "
        f"{measured.seconds:.3g} s an update, {recipe.batch_size / measured.seconds:,.0f} "
        f"images/s, measured; compiled in {format_duration(measured.compile_seconds)}"
    )
