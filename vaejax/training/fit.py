"""The loop: a `for`, with periodic things as `if`. A run that was stopped goes on where it was."""

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from vaejax.data import batches as data
from vaejax.data.demo import drawn_faces
from vaejax.data.prepare import look, prepare
from vaejax.data.records import read_report
from vaejax.errors import DivergedError, UserError
from vaejax.log import Metrics, Progress, duration
from vaejax.models import autoencoder
from vaejax.objectives import Figures, Loss
from vaejax.training import checkpoint, page, parallel, run
from vaejax.training.album import Album
from vaejax.training.config import Config, Recipe, build_adam, describe_loss
from vaejax.training.plan import Schedule, describe, forecast, schedule
from vaejax.training.state import TrainState, init


def fit(name: str, config: Config, recipe: Recipe) -> Path | None:
    """Prepare the data, train the model, and leave a run's folder; the same call resumes it.

    Without data of its own it learns from the drawn faces. With `dry_run` it only says what it
    would do, and there is no folder.

    Raises UserError before any work for what cannot be done, DivergedError when the loss stops
    being finite: the last checkpoint is then from before.
    """
    run.refuse_unwritable(config.out or run.ROOT)
    source, model = config.data or drawn_faces(), recipe.model
    loss = partial(recipe.loss, model=model)
    if config.data is None:
        print(
            f"No --data: learning from the drawn faces that ship with vaejax, {recipe.name} recipe."
        )
    if source.is_dir() and (config.out or run.ROOT).resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"the run's folder would lie in {source}, and its pictures among the images to learn "
            "from: name an --out elsewhere, or start from another folder"
        )
    if config.dry_run:
        _say_plan(name, config, recipe, source=source, loss=loss)
        return None
    prepared = prepare(source, size=model.size, allow_refused=config.allow_refused)
    images = data.Images(prepared, "train")
    plan = schedule(recipe, images=len(images))
    print(describe(recipe, plan, images=len(images)))
    report = read_report(prepared)
    settings = {
        "experiment": name,
        "model": autoencoder.describe(model),
        "loss": describe_loss(recipe),
        "optimizer": {
            "learning_rate": recipe.learning_rate,
            "b1": recipe.b1,
            "cosine_decay_updates": plan.updates if recipe.cosine_decay else None,
        },
        "batch_size": recipe.batch_size,
        "seed": config.seed,
        # the same images by person are split in another way
        "data": {name: report[name] for name in ("fingerprint", "persons", "splits")},
        "schedule": {
            "recipe": recipe.name,
            "source": str(source.absolute()),
            "prepared": str(prepared.absolute()),
            "images": len(images),
            "updates": plan.updates,
            "updates_per_epoch": plan.per_epoch,
            "log_steps": config.log_steps,
            "checkpoint_steps": config.checkpoint_steps,
            "checkpoint_minutes": config.checkpoint_minutes,
            "keep": config.keep,
        },
    }
    folder = run.choose(name, settings, out=config.out, fresh=config.fresh)
    with run.locked(folder), run.Stop().listening() as stop:
        if not (folder / "config.json").exists():
            run.write(folder, "config.json", settings)
        learn(folder, settings, config, recipe, plan, loss=loss, stop=stop)
    if stop.signal is not None and run.status(folder) == "stopped":
        sys.exit(128 + stop.signal)
    return folder


def _say_plan(name: str, config: Config, recipe: Recipe, *, source: Path, loss: Loss) -> None:
    prepared, files = look(source, size=recipe.model.size)
    if prepared is None:
        images = round(0.9 * files)
        print(f"{name}: {source}, {files:,} files that are not prepared yet; 90 % for training")
    else:
        images = len(data.Images(prepared, "train"))
        print(f"{name}: {source}, prepared in {prepared}")
    plan = schedule(recipe, images=images)
    print(describe(recipe, plan, images=images))
    to_prepare = files if prepared is None else 0
    print(forecast(config, recipe, plan, loss, to_prepare=to_prepare))
    print("a dry run: nothing was written")


def learn(
    folder: Path,
    settings: Mapping[str, Any],
    config: Config,
    recipe: Recipe,
    plan: Schedule,
    *,
    loss: Loss,
    stop: run.Stop,
) -> None:
    """Every update that is still to be made, with what is to be seen and saved in between."""
    model = recipe.model
    key = jax.random.key(config.seed)
    init_key, train_key, validation_key = jax.random.split(key, 3)
    optimizer = build_adam(recipe, updates=plan.updates)
    prepared = Path(settings["schedule"]["prepared"])
    images, held_out = data.Images(prepared, "train"), data.Images(prepared, "validation")
    batches = data.stream(images, batch_size=recipe.batch_size, seed=config.seed)

    begin = jax.jit(partial(init, model=model, optimizer=optimizer))
    checkpoints = checkpoint.manager(folder / "checkpoints", keep=config.keep)
    state = checkpoint.restore(checkpoints, jax.eval_shape(begin, init_key), batches)
    if state is None:
        state = begin(init_key)
    start = int(state.step)
    if start >= plan.updates and run.status(folder) == "finished":
        page.write(folder)
        print(f"{folder} is finished: {start:,} updates are done, {plan.updates:,} were asked for.")
        print(page.what_next(folder))
        return
    if start > plan.updates:
        raise UserError(
            f"{folder} has made {start:,} updates already, more than the {plan.updates:,} asked "
            "for: take more --steps or --epochs, or another --out"
        )

    run.write(folder, "config.json", settings)
    run.record(folder, "running", devices=parallel.describe())
    print(f"{folder}: {start:,} of {plan.updates:,} updates are done; compiling …", flush=True)
    began = time.monotonic()
    shape = (recipe.batch_size, model.size, model.size, model.channels)
    train_step = parallel.compile_train_step(
        loss, optimizer, state, jax.ShapeDtypeStruct(shape, np.uint8), train_key
    )
    print(f"compiled in {duration(time.monotonic() - began)}", flush=True)
    eval_step = parallel.compile_eval_step(loss)
    album = Album(folder, model, held_out)
    progress = Progress(
        updates=plan.updates, epochs=plan.epochs, batch_size=recipe.batch_size, done=start
    )
    saved = time.monotonic()
    with Metrics(folder, step=start) as metrics:
        page.write(folder)
        for n in range(start, plan.updates):
            epoch, done = n // plan.per_epoch + 1, n + 1
            last = done == plan.updates
            if n % plan.per_epoch == 0:
                album.begin(state, epoch)
            state, figures = train_step.run(state, next(batches), train_key)

            if n % config.log_steps == 0:
                line = finite(figures, folder, config, step=n)
                line["images_per_second"] = progress.images_per_second(done)
                metrics.write(step=n, epoch=epoch, split="train", figures=line)
                progress.show(done, epoch, line, device_memory=parallel.memory_in_use())
            if last or done % plan.per_epoch == 0:
                finite(figures, folder, config, step=n)
                album.end(state, epoch)
                line = validate(eval_step, state, held_out, validation_key, recipe.batch_size)
                finite(line, folder, config, step=done)
                metrics.write(step=done, epoch=epoch, split="validation", figures=line)
                progress.say(page.epoch_line(epoch, plan.epochs, line))
                page.write(folder)
            due = last or done % config.checkpoint_steps == 0 or stop.signal is not None
            if due or time.monotonic() - saved > 60 * config.checkpoint_minutes:
                finite(figures, folder, config, step=n)
                metrics.sync()
                checkpoint.save(checkpoints, state, batches)
                album.curves()
                saved = time.monotonic()
            if stop.signal is not None and not last:
                run.record(folder, "stopped", devices=parallel.describe())
                page.write(folder)
                progress.say(
                    f"stopped after update {done:,}, saved: the same command goes on there"
                )
                return
    album.curves()
    album.faces(state)
    album.film()
    run.record(folder, "finished", devices=parallel.describe())
    page.write(folder)
    progress.say(page.what_next(folder))


def validate(
    eval_step: Callable[..., Figures],
    state: TrainState,
    held_out: data.Images,
    key: Key[Array, ""],
    batch_size: int,
) -> dict[str, float]:
    """The figures of all held-out images: means over the images, with the same noise each time."""
    began = time.monotonic()
    sums: dict[str, float] = {}
    for i, images in enumerate(data.in_order(held_out, batch_size=batch_size)):
        figures = eval_step(state, images, jax.random.fold_in(key, i))
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(images)
    means = {name: value / len(held_out) for name, value in sums.items()}
    return means | {"images_per_second": len(held_out) / (time.monotonic() - began)}


def finite(
    figures: Mapping[str, Any], folder: Path, config: Config, *, step: int
) -> dict[str, float]:
    """The figures as numbers; one that is none ends the run before the state is saved."""
    values = {name: float(value) for name, value in figures.items()}
    for name, value in values.items():
        if not np.isfinite(value):
            run.record(folder, "diverged", devices=parallel.describe())
            page.write(folder)
            raise DivergedError(
                f"the {name.replace('_', ' ')} is {value} at step {step:,}. The checkpoints "
                f"in {folder / 'checkpoints'} are from before. Try a smaller --learning-rate"
                + (", --norm batch, or --recipe quick" if hasattr(config, "norm") else "")
            )
    return values
