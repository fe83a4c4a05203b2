"""From minutes to numbers of updates: the speed of this machine, measured once before a run.

The numbers are stored before the first update, so that a run which is interrupted ends with the
same bits. Another machine, or another day, gives another run.
"""

import time
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

from vaejax import generate
from vaejax.data.batches import Images, steps_per_epoch
from vaejax.errors import UserError
from vaejax.system import format_duration
from vaejax.training import devices as dev
from vaejax.training import flow_prior, plan
from vaejax.training.compiled import compile_eval_step, compile_init
from vaejax.training.config import Recipe
from vaejax.training.devices import Devices

PRIOR_SHARE = 0.25  # of the time that is left for training
MIN_UPDATES = 300  # of the autoencoder, and of a flow: with fewer there is nothing to see
REPEATS = 15  # of what is measured, of which the median counts
EPOCH_SECONDS, END_SECONDS = 2.0, 20.0  # of pictures and a checkpoint; of the pictures of the end
SLACK = 1.04  # what an update takes in a run: metrics, reading, the checks between two of them


class Speed(NamedTuple):
    """What a run of a recipe takes on this machine, in seconds."""

    fixed: float  # before the first update and after the last one
    update: float  # with its share of an epoch's validation, pictures and checkpoint
    prior_update: float  # 0 where no flow is trained

    def updates_in(self, minutes: float) -> tuple[int, int]:
        """Return the updates of the autoencoder and of the flow that fit into the minutes."""
        left = 60 * minutes - self.fixed
        if not self.prior_update:
            return int(left / self.update), 0
        prior = PRIOR_SHARE * left
        return int((left - prior) / self.update), int(prior / self.prior_update)


def steps_from_minutes(
    recipe: Recipe, images: Images, held_out: Images, *, elapsed: float, devices: Devices
) -> Recipe:
    """Return the recipe with the `steps` and `prior_steps` that fit into its `minutes`.

    `elapsed` are the seconds that the command has taken so far. All processes have to call it
    together. Raises UserError if too little can be learned in that time.
    """
    print("measuring the speed of this machine …", flush=True)
    speed = measure_speed(recipe, images, held_out, elapsed=elapsed, devices=devices)
    steps, prior_steps = speed.updates_in(recipe.minutes or 0)
    flow = speed.prior_update > 0
    enough = min(steps, prior_steps if flow else steps) >= MIN_UPDATES
    if not dev.broadcast(lambda: enough):
        share = PRIOR_SHARE if flow else 0.0
        needed = speed.fixed + MIN_UPDATES * max(
            speed.update / (1 - share), speed.prior_update / (share or 1)
        )
        raise UserError(
            f"--minutes {recipe.minutes:g} is too little to draw anything here: preparing, "
            f"compiling and the pictures of the end take {format_duration(speed.fixed)}. Take "
            f"--minutes {needed / 60 + 0.5:.0f} or more"
        )
    if not flow:
        prior_steps = recipe.prior_steps
    steps, prior_steps = dev.broadcast(lambda: [steps, prior_steps])
    return replace(recipe, steps=steps, prior_steps=prior_steps)


def measure_speed(
    recipe: Recipe, images: Images, held_out: Images, *, elapsed: float, devices: Devices
) -> Speed:
    """Measure what a run takes; `elapsed` seconds of its command have passed, and count as well."""
    began = time.monotonic()
    measured = plan.measure(recipe, devices=devices, updates=1000, repeats=REPEATS)
    validating, encoding = _seconds_an_image(recipe, images, devices=devices)
    flow = 0.0
    if recipe.prior == "flow":
        flow = flow_prior.measure(recipe, images=len(images), devices=devices, repeats=REPEATS)
    ready = elapsed + time.monotonic() - began + measured.compile_seconds
    per_epoch = steps_per_epoch(len(images), recipe.batch_size)
    epoch = EPOCH_SECONDS + 2 * len(held_out) * validating
    end = END_SECONDS
    if recipe.prior != "normal":
        end += (len(images) * (1 + recipe.flip) + len(held_out)) * encoding
    return Speed(ready + end, SLACK * measured.seconds + epoch / per_epoch, SLACK * flow)


def _seconds_an_image(recipe: Recipe, images: Images, *, devices: Devices) -> tuple[float, float]:
    """Measure what it takes to validate an image, once, and to encode one."""
    trainer = recipe.trainer(updates=1)
    frozen = recipe.frozen() if recipe.frozen else None
    key = jax.jit(lambda: jax.random.key(0), out_shardings=dev.replicated(devices))()
    state = compile_init(trainer, devices=devices)(key)
    batch = recipe.micro_batch or recipe.batch_size
    eval_step = compile_eval_step(trainer, frozen, devices=devices)
    some = images.read(np.arange(min(batch, len(images))))
    mine = some[dev.rows(devices, len(some))]
    validate = partial(eval_step, state, mine, key, 0, 1.0, batch=len(some))
    local = dev.local(state)
    encode = partial(
        generate.posterior_means,
        local.best_params,
        local.batch_stats,
        images,
        model=recipe.model,
        most=generate.BATCH,
    )
    encoded = min(generate.BATCH, len(images))
    return _seconds(validate) / len(some), _seconds(encode) / encoded


def _seconds(act: Any) -> float:
    jax.block_until_ready(act())  # which compiles
    times = []
    for _ in range(REPEATS // 3):
        began = time.monotonic()
        jax.block_until_ready(act())
        times.append(time.monotonic() - began)
    return median(times)
