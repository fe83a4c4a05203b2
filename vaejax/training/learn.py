"""The loop: a `for`, with periodic things as `if`. A run that was stopped goes on where it was."""

import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from vaejax.data import batches as data
from vaejax.errors import DivergedError, StorageError, UserError
from vaejax.log import duration, lines
from vaejax.objectives import Loss
from vaejax.training import checkpoint, memory, page, parallel, programs, run, saving
from vaejax.training.config import Config, Recipe, build_adam
from vaejax.training.diary import Diary
from vaejax.training.disk import Disk, refused_by_disk
from vaejax.training.divergence import Watch
from vaejax.training.plan import Schedule, disk_needed, warn_of_disk
from vaejax.training.resident import Resident, fits
from vaejax.training.state import TrainState, init
from vaejax.training.stop import Stop
from vaejax.training.validation import validate


def learn(
    folder: Path,
    settings: Mapping[str, Any],
    config: Config,
    recipe: Recipe,
    plan: Schedule,
    *,
    loss: Loss,
    devices: parallel.Devices,
    stop: Stop,
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

    begin = partial(init, model=recipe.model, optimizer=optimizer)
    state = _found(folder, settings, jax.eval_shape(begin, init_key), batches, everywhere)
    if state is None:
        state = programs.compile_init(begin, devices=devices)(init_key)
    start = int(state.step)
    if start >= plan.updates and parallel.agreed(lambda: run.status(folder)) == "finished":
        if parallel.is_first():
            page.write(folder, run.read(folder), run.remembered(folder))
        print(f"{folder} is finished: {start:,} updates are done, {plan.updates:,} were asked for.")
        print(page.what_next(folder, recipe.model))
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
    held = programs.state_bytes(state)
    if start == 0:
        warn_of_disk(folder, disk_needed(config, recipe, plan, checkpoint=held))
    print(memory.refuse_too_much(train_step.memory, held, recipe, devices))
    print(f"compiled in {duration(time.monotonic() - began)}", flush=True)
    eval_step = programs.compile_eval_step(loss, devices=devices)
    guard = memory.Guard(held, most=_bytes(config.max_ram))
    disk = Disk(folder)
    with ExitStack() as stack:
        diary = None
        if parallel.is_first():
            with refused_by_disk(folder):
                diary = Diary(
                    folder, settings, recipe, plan, held_out, devices=devices, disk=disk, done=start
                )
            stack.enter_context(diary)
        watch = Watch(
            folder,
            per_epoch=plan.per_epoch,
            advice=_advice(recipe),
            sources=partial(_sources, images, recipe, config),
            last_good=partial(saving.last, folder),
            write=parallel.is_first(),
        )
        saved, programs_known = time.monotonic(), None
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
                watch.see(n, figures)

                if n % config.log_steps == 0:
                    line = {name: float(value) for name, value in figures.items()}
                    if diary:
                        diary.learned(line, step=n, epoch=epoch)
                if last or done % plan.per_epoch == 0:
                    watch.catch_up()
                    line = validate(
                        eval_step,
                        state,
                        held_out,
                        validation_key,
                        recipe.micro_batch or recipe.batch_size,
                        devices=devices,
                    )
                    watch.held_out(line, step=done)
                    if diary:
                        diary.epoch_ends(state, line, step=done, epoch=epoch)
                    programs_known = _say_compiled(programs_known)
                late = time.monotonic() - saved > 60 * config.checkpoint_minutes
                due = config.checkpoint_steps is not None and done % config.checkpoint_steps == 0
                asked, full = stop.signal is not None, guard.full()
                if not parallel.alone():  # which stop and save at the same update
                    meet = n % config.log_steps == 0
                    asked, late, any_full = (
                        parallel.any_process(asked, late, bool(full)) if meet else (False,) * 3
                    )
                    full = (full or "another process is short of memory") if any_full else ""
                ends = last or asked or bool(full)
                # what was not applied has changed nothing since the last checkpoint that was due
                if ((late or due) and watch.catch_up()) or ends:
                    watch.catch_up()
                    saving.save(folder, state, batches, settings, config, disk, diary)
                    saved = time.monotonic()
                if ends and not last:
                    if asked:
                        stop.signal = stop.signal or signal.SIGTERM
                    if diary:
                        diary.stopped(done, saved=not disk.failing)
                    saving.refuse_unsaved(folder, disk)
                    if full:
                        raise guard.stopped(full, recipe=recipe)
                    return
        except DivergedError:
            if diary:
                diary.diverged()
            raise
        except UserError as error:  # images that are no longer as they were prepared
            if diary:
                diary.stopped(0, saved=False)
            newest = saving.last(folder)
            raise StorageError(
                f"{error} The run was stopped: the same command "
                + (f"goes on from {newest}" if newest else "begins again")
            ) from None
        except jax.errors.JaxRuntimeError as error:
            told = memory.out_of_memory(error, train_step.memory, held, recipe, devices)
            if told is None:
                raise
            raise told from None
        if diary:
            diary.finished(state)
        saving.refuse_unsaved(folder, disk)


def _found(
    folder: Path,
    settings: Mapping[str, Any],
    like: TrainState,
    batches: grain.DatasetIterator,
    sharding: jax.sharding.Sharding,
) -> TrainState | None:
    """The state of the newest whole checkpoint, if there is one yet."""

    def newest() -> dict[str, Any] | None:
        checkpoint.clear(folder)
        known = run.remembered(folder)
        if not known and (folder / "run.json").exists():
            print("warning: run.json is damaged, and is written anew", file=sys.stderr)
        learned = not known and any(lines(folder / "metrics.jsonl"))
        return checkpoint.newest(folder, settings, begun="saved" in known or learned)

    facts = parallel.agreed(newest)
    if facts is None:
        return None
    then, now = facts["versions"], run.versions()
    if other := [
        f"{name} {then.get(name)} → {now[name]}" for name in now if then.get(name) != now[name]
    ]:
        print(
            f"warning: saved with other versions ({', '.join(other)}): the end may differ in its "
            "last bits from that of a run that nothing interrupted",
            file=sys.stderr,
        )
    return checkpoint.restore(folder, facts, like, batches, sharding=sharding)


def _sources(images: data.Images, recipe: Recipe, config: Config, update: int) -> list[str]:
    """The paths of the images of an update."""
    drawn = data.drawn(images, update, batch_size=recipe.batch_size, seed=config.seed)
    return [images.texts(index)["path"] for index in drawn]


def _say_compiled(known: int | None) -> int:
    """A warning where programs were compiled since this was last asked, after the first epoch."""
    names = parallel.compiled()
    if known is not None and len(names) > known:
        print(
            f"warning: {len(names) - known} programs were compiled after the first epoch "
            f"({', '.join(sorted(set(names[known:])))}): each costs time and memory that stays; "
            "shapes that change from batch to batch would be a reason",
            file=sys.stderr,
        )
    return len(names)


def _advice(recipe: Recipe) -> str:
    frozen = getattr(recipe.model, "norm", "") == "frozen"
    return "Try a smaller --learning-rate" + (" or --norm batch" if frozen else "")


def _bytes(gibibytes: float | None) -> int | None:
    return None if gibibytes is None else round(gibibytes * 2**30)
