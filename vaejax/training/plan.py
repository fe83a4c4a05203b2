"""What a run is going to do, said before it does it: updates, layers, memory, disk, time."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil

from vaejax.data import batches
from vaejax.log import duration, memory, size
from vaejax.models import autoencoder, summary
from vaejax.objectives import Loss
from vaejax.training import parallel
from vaejax.training.config import Config, Recipe, build_adam, describe_loss
from vaejax.training.state import init

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
    kind, *rest = settings.items()
    return f"{kind[1]}: {', '.join(f'{name} {value}' for name, value in rest)}"


def forecast(
    config: Config,
    recipe: Recipe,
    plan: Schedule,
    loss: Loss,
    *,
    devices: parallel.Devices,
    to_prepare: int,
) -> str:
    """Memory, disk and time of a run on this machine; the time is that of a few real updates.

    `to_prepare` files are not prepared yet, and will lie on the disk as pixels.
    """
    model, key = recipe.model, jax.random.key(config.seed)
    optimizer = build_adam(recipe, updates=plan.updates)
    begin = partial(init, model=model, optimizer=optimizer)
    state = jax.jit(begin, out_shardings=parallel.whole(devices))(key)
    shape = (recipe.batch_size, model.size, model.size, model.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    began = time.monotonic()
    step = parallel.compile_train_step(
        loss,
        optimizer,
        state,
        jax.ShapeDtypeStruct(shape, np.uint8),
        key,
        devices=devices,
        micro_batches=recipe.micro_batches,
    )
    compiling = time.monotonic() - began
    checkpoint = parallel.state_bytes(state)
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        state, figures = step.run(state, images, key)
        jax.block_until_ready(figures)
        seconds.append(time.monotonic() - began)
    each = min(seconds[1:])  # the first one also warms up
    disk = round((config.keep + 1) * checkpoint + plan.epochs * PICTURES * (model.size / 64) ** 2)
    pixels = 2 * to_prepare * model.size**2 * model.channels  # twice, while they are being prepared
    where = "host" if parallel.on_cpu() else "device" if devices.count == 1 else "each device"
    needed = step.memory * (devices.count if parallel.on_cpu() else 1)
    return (
        f"memory   {size(needed)} on the {where} for a step, {size(memory())} in this "
        f"process, of {size(psutil.virtual_memory().total)}\n"
        f"disk     at most {size(disk)}: {config.keep} checkpoints of {size(checkpoint)}, one "
        f"more while it is written, and the pictures; the images {size(pixels)} more\n"
        f"time     {duration(each * plan.updates)} on {devices}: {each:.3g} s an "
        f"update, {recipe.batch_size / each:,.0f} images/s, measured; compiled in "
        f"{duration(compiling)}"
    )
