"""What a run is going to do, said before it does it: updates, layers, memory, disk, time."""

import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vaejax.data import batches
from vaejax.log import duration, memory, size
from vaejax.memory import limit
from vaejax.models import autoencoder, summary
from vaejax.training import parallel, programs
from vaejax.training.config import Config, Recipe, build_adam, describe_loss
from vaejax.training.memory import refuse_too_much
from vaejax.training.state import init
from vaejax.training.step import train_step

PICTURES = 600_000  # bytes an epoch, about, at 64 pixels: two grids and the reconstructions


class Schedule(NamedTuple):
    per_epoch: int  # updates in a pass over the training images
    updates: int  # in the whole run

    @property
    def epochs(self) -> int:
        return -(-self.updates // self.per_epoch)


def schedule(recipe: Recipe, *, images: int) -> Schedule:
    """Raises UserError where a batch is larger than the data set."""
    per_epoch = batches.steps_per_epoch(images, recipe.batch_size)
    updates = recipe.epochs * per_epoch
    return Schedule(per_epoch, min(updates, recipe.steps or updates))


def describe(recipe: Recipe, plan: Schedule, *, images: int) -> str:
    """The table of layers and what is done with them."""
    decay = ", falling to 0 along a cosine" if recipe.cosine_decay else ""
    model, loss = autoencoder.describe(recipe.model), describe_loss(recipe)
    return (
        f"{summary.table(recipe.model)}\n"
        f"recipe   {recipe.name}\n"
        f"model    {_words(model)}\n"
        f"loss     {_words(loss)}\n"
        f"Adam     {recipe.learning_rate:g}{decay}, b1 {recipe.b1:g}\n"
        f"updates  {plan.updates:,} of {recipe.batch_size} images: {plan.epochs:,} epochs of at "
        f"most {plan.per_epoch:,}, {images:,} training images"
    )


def _words(settings: Mapping[str, Any]) -> str:
    (_, kind), *rest = settings.items()
    return f"{kind}: {', '.join(f'{name} {value}' for name, value in rest)}" if rest else kind


class Measured(NamedTuple):
    compiling: float  # seconds
    seconds: float  # of an update, compiled
    memory: int  # bytes that a step needs, on the host or on each device
    checkpoint: int  # bytes
    finite: bool  # whether the figures are numbers


def measure(recipe: Recipe, *, devices: parallel.Devices, updates: int = 1) -> Measured:
    """A few updates of a run of so many, made in earnest, on noise."""
    model, everywhere = recipe.model, parallel.whole(devices)
    optimizer = build_adam(recipe, updates=updates)
    begin = partial(init, model=model, optimizer=optimizer)
    key = jax.jit(lambda: jax.random.key(0), out_shardings=everywhere)()
    state = programs.compile_init(begin, devices=devices)(key)
    shape = (recipe.batch_size, model.size, model.size, model.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mine = images[parallel.rows(devices, recipe.batch_size)]
    began = time.monotonic()
    step = programs.compile_train_step(
        partial(recipe.loss, model=model),
        optimizer,
        state,
        jax.ShapeDtypeStruct(shape, np.uint8),
        key,
        devices=devices,
        micro_batches=recipe.micro_batches,
    )
    compiling = time.monotonic() - began
    checkpoint = programs.state_bytes(state)
    refuse_too_much(step.memory, checkpoint, recipe, devices)
    seconds, finite = [], True
    for _ in range(3):
        began = time.monotonic()
        state, figures = step.run(state, mine, key)
        finite &= all(bool(np.isfinite(value)) for value in figures.values())
        seconds.append(time.monotonic() - began)
    memory = step.memory * (devices.count if parallel.on_cpu() else 1)
    # the first one also warms up
    return Measured(compiling, min(seconds[1:]), memory, checkpoint, finite)


def disk_needed(config: Config, recipe: Recipe, plan: Schedule, *, checkpoint: int) -> int:
    """Bytes that a run will write, about: checkpoints of so many each, one more while it is
    written, and the pictures."""
    pictures = plan.epochs * PICTURES * (recipe.model.size / 64) ** 2
    return round((config.keep + 1) * checkpoint + pictures)


def warn_of_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        print(
            f"warning: a run of this kind needs about {size(needed)} of disk, {size(free)} are "
            f"free in {folder}: --keep 1 needs less",
            file=sys.stderr,
        )


def operations(recipe: Recipe) -> float:
    """Multiplications and additions in an update, about, as XLA counts them."""
    model, optimizer = recipe.model, build_adam(recipe, updates=1)
    step = partial(train_step, loss=partial(recipe.loss, model=model), optimizer=optimizer)
    key = jax.random.key(0)
    state = jax.eval_shape(partial(init, model=model, optimizer=optimizer), key)
    shape = (recipe.batch_size, model.size, model.size, model.channels)
    lowered = jax.jit(step).lower(state, jax.ShapeDtypeStruct(shape, np.uint8), key)
    return float((lowered.cost_analysis() or {})["flops"])


def forecast(
    config: Config, recipe: Recipe, plan: Schedule, *, devices: parallel.Devices, to_prepare: int
) -> str:
    """Memory, disk and time of a run on this machine; the time is that of a few real updates.

    `to_prepare` files are not prepared yet, and will lie on the disk as pixels.
    """
    model, found = recipe.model, measure(recipe, devices=devices, updates=plan.updates)
    disk = disk_needed(config, recipe, plan, checkpoint=found.checkpoint)
    pixels = 2 * to_prepare * model.size**2 * model.channels  # twice, while they are being prepared
    where = "host" if parallel.on_cpu() else "device" if devices.count == 1 else "each device"
    return (
        f"memory   {size(found.memory)} on the {where} for a step, {size(memory())} in this "
        f"process, of {size(limit())}\n"
        f"disk     about {size(disk)}: {config.keep} checkpoints of {size(found.checkpoint)}, "
        f"one more while it is written, and the pictures; the images {size(pixels)} more\n"
        f"time     {duration(found.seconds * plan.updates)} on {devices}: {found.seconds:.3g} s an "
        f"update, {recipe.batch_size / found.seconds:,.0f} images/s, measured; compiled in "
        f"{duration(found.compiling)}"
    )
