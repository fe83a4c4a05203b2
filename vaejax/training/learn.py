"""The loop: a `for`, with periodic things as `if`. A run that was stopped goes on where it was."""

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from vaejax.data import batches as data
from vaejax.errors import DivergedError, UserError
from vaejax.log import duration
from vaejax.objectives import Figures, Loss
from vaejax.training import checkpoint, page, parallel, programs, run
from vaejax.training.config import Config, Recipe, build_adam
from vaejax.training.diary import Diary
from vaejax.training.plan import Schedule, refuse_too_much
from vaejax.training.resident import Resident, fits
from vaejax.training.state import TrainState, init


def learn(
    folder: Path,
    settings: Mapping[str, Any],
    config: Config,
    recipe: Recipe,
    plan: Schedule,
    *,
    loss: Loss,
    devices: parallel.Devices,
    stop: run.Stop,
) -> None:
    """Every update that is still to be made, with what is to be seen and saved in between."""
    everywhere = parallel.whole(devices)
    init_key, train_key, validation_key = jax.jit(
        lambda: tuple(jax.random.split(jax.random.key(config.seed), 3)), out_shardings=everywhere
    )()
    optimizer = build_adam(recipe, updates=plan.updates)
    prepared = Path(settings["schedule"]["prepared"])
    images, held_out = data.Images(prepared, "train"), data.Images(prepared, "validation")
    resident = Resident(images, devices) if fits(images, devices) else None
    batches = data.stream(
        images,
        read=resident is None,
        batch_size=recipe.batch_size,
        seed=config.seed,
        shard=jax.process_index(),
        shards=jax.process_count(),
    )

    begin = jax.jit(
        partial(init, model=recipe.model, optimizer=optimizer), out_shardings=everywhere
    )
    checkpoints = checkpoint.manager(folder / "checkpoints", keep=config.keep)
    like = jax.eval_shape(begin, init_key)
    state = checkpoint.restore(checkpoints, like, batches, sharding=everywhere)
    if state is None:
        state = begin(init_key)
    start = int(state.step)
    if start >= plan.updates and parallel.agreed(lambda: run.status(folder)) == "finished":
        if parallel.is_first():
            page.write(folder)
        print(f"{folder} is finished: {start:,} updates are done, {plan.updates:,} were asked for.")
        print(page.what_next(folder))
        return
    if start > plan.updates:
        raise UserError(
            f"{folder} has made {start:,} updates already, more than the {plan.updates:,} asked "
            "for: take more --steps or --epochs, or another --out"
        )

    print(f"{folder}: {start:,} of {plan.updates:,} updates are done; compiling …", flush=True)
    began = time.monotonic()
    shape = (recipe.batch_size, *images.shape)
    train_step = programs.compile_train_step(
        loss,
        optimizer,
        state,
        jax.ShapeDtypeStruct(shape, np.uint8),
        train_key,
        devices=devices,
        micro_batches=recipe.micro_batches,
    )
    refuse_too_much(train_step.memory, recipe, devices)
    print(f"compiled in {duration(time.monotonic() - began)}", flush=True)
    eval_step = programs.compile_eval_step(loss, devices=devices)
    with ExitStack() as stack:
        diary = None
        if parallel.is_first():
            run.write(folder, "config.json", settings)
            diary = Diary(folder, recipe, plan, held_out, devices=devices, done=start)
            stack.enter_context(diary)
        saved = time.monotonic()
        try:
            for n in range(start, plan.updates):
                epoch, done = n // plan.per_epoch + 1, n + 1
                last = done == plan.updates
                if diary and n % plan.per_epoch == 0:
                    diary.epoch_begins(state, epoch)
                batch = next(batches)
                if resident is not None:
                    batch = resident(batch)
                state, figures = train_step.run(state, batch, train_key)

                if n % config.log_steps == 0:
                    line = finite(figures, folder, recipe, step=n)
                    if diary:
                        diary.learned(line, step=n, epoch=epoch)
                if last or done % plan.per_epoch == 0:
                    finite(figures, folder, recipe, step=n)
                    line = validate(
                        eval_step,
                        state,
                        held_out,
                        validation_key,
                        recipe.micro_batch or recipe.batch_size,
                        devices=devices,
                    )
                    finite(line, folder, recipe, step=done)
                    if diary:
                        diary.epoch_ends(state, line, step=done, epoch=epoch)
                late = time.monotonic() - saved > 60 * config.checkpoint_minutes
                asked = stop.signal is not None
                if not parallel.alone():  # which stop and save at the same update
                    meet = n % config.log_steps == 0
                    asked, late = parallel.any_process(asked, late) if meet else (False, False)
                if last or asked or late or done % config.checkpoint_steps == 0:
                    finite(figures, folder, recipe, step=n)
                    if diary:
                        diary.before_a_checkpoint()
                    checkpoint.save(checkpoints, state, batches)
                    parallel.release()
                    if diary:
                        diary.after_a_checkpoint()
                    saved = time.monotonic()
                if asked and not last:
                    stop.signal = stop.signal or signal.SIGTERM
                    if diary:
                        diary.stopped(done)
                    return
        except DivergedError:
            if diary:
                diary.diverged()
            raise
        if diary:
            diary.finished(state)


def validate(
    eval_step: Callable[..., Figures],
    state: TrainState,
    held_out: data.Images,
    key: Key[Array, ""],
    batch_size: int,
    *,
    devices: parallel.Devices,
) -> dict[str, float]:
    """The figures of all held-out images: means over the images, with the same noise each time.

    Those in nats have the variance of their batch, and depend a little on its size.
    """
    began = time.monotonic()
    sums: dict[str, float] = {}
    for first in range(0, len(held_out), batch_size):
        indices = np.arange(first, min(first + batch_size, len(held_out)))
        mine = held_out.read(indices[parallel.rows(devices, len(indices))])
        figures = eval_step(state, mine, key, first, batch=len(indices))
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(indices)
    means = {name: value / len(held_out) for name, value in sums.items()}
    return means | {"images_per_second": len(held_out) / (time.monotonic() - began)}


def finite(
    figures: Mapping[str, Any], folder: Path, recipe: Recipe, *, step: int
) -> dict[str, float]:
    """The figures as numbers; one that is none ends the run before the state is saved."""
    values = {name: float(value) for name, value in figures.items()}
    for name, value in values.items():
        if not np.isfinite(value):
            raise DivergedError(
                f"the {name.replace('_', ' ')} is {value} at step {step:,}. What checkpoints there "
                f"are in {folder / 'checkpoints'} are from before. Try a smaller --learning-rate"
                + (" or --norm batch" if getattr(recipe.model, "norm", "") == "frozen" else "")
            )
    return values
