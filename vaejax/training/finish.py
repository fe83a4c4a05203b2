"""Train a run to its end, from wherever an earlier process came to: autoencoder, then prior."""

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import PyTree

from vaejax import terminal
from vaejax.data import batches as data
from vaejax.errors import CheckpointError, DivergedError, StorageError, UserError, VaejaxError
from vaejax.metrics import read_lines
from vaejax.priors import Prior
from vaejax.system import format_duration
from vaejax.training import checkpoint, environment, flow_prior, guards, plan, run, visualize
from vaejax.training import devices as dev
from vaejax.training import prior as run_prior
from vaejax.training.compiled import (
    TrainStep,
    compile_eval_step,
    compile_init,
    compile_train_step,
    state_bytes,
)
from vaejax.training.config import Recipe, RunSpec, differences
from vaejax.training.devices import Devices
from vaejax.training.guards import DiskGuard, FiniteGuard, MemoryGuard, SignalGuard
from vaejax.training.logger import Logger
from vaejax.training.loop import Checkpoints, Guards, Steps, train, validate
from vaejax.training.step import TrainState, init


class Options(NamedTuple):
    """What training in a folder needs."""

    folder: Path
    spec: RunSpec
    recipe: Recipe
    devices: Devices
    signals: SignalGuard
    max_ram: float | None  # GiB
    strict: bool  # go on in the same environment only


class Arrays(NamedTuple):
    """What a run starts with: its images, its keys and its state."""

    images: data.Images
    held_out: data.Images
    batches: grain.DatasetIterator
    resident: dev.ResidentImages | None  # the training images, where they stay on the device
    frozen: PyTree
    train_key: jax.Array
    validation_key: jax.Array
    state: TrainState
    environment: Mapping[str, str]  # in which the state was saved, {} for a new run


def finish(options: Options) -> None:
    """Train the autoencoder, then its prior, from wherever an earlier process came to.

    Raises DivergedError, Interrupted, MemoryLowError or StorageError, as `fit.fit` says.
    """
    folder, spec, recipe, devices = options[:4]
    arrays = _load_arrays(options)
    start, updates = int(arrays.state.step), spec.schedule.updates
    if start >= updates and dev.broadcast(lambda: _is_finished(options, arrays.state)):
        if dev.is_first():
            visualize.write_readme(folder, run.read_spec(folder), run.last_status(folder))
        print(f"{folder} is finished: {start:,} updates are done, {updates:,} were requested.")
        terminal.say(visualize.what_next(folder, recipe.model))
        return
    if start > updates:
        raise UserError(
            f"{folder} has made {start:,} updates already, more than the {updates:,} requested: "
            "take more --steps or --epochs, or another --out"
        )
    compiled, present = None, environment.present(devices, recipe)
    if start < updates:
        environment.compare(arrays.environment, present, strict=options.strict)
        print(f"{folder}: {start:,} of {updates:,} updates are done; compiling …", flush=True)
        compiled = _compile(options, arrays)
    disk = DiskGuard(folder)
    with ExitStack() as stack:
        logger = None
        if dev.is_first():
            with run.storage_errors(folder):
                logger = Logger(
                    folder,
                    spec,
                    arrays.images,
                    arrays.held_out,
                    environment=present,
                    disk=disk,
                    done=start,
                )
            stack.enter_context(logger)
        state = arrays.state
        if compiled:
            checkpoints = Checkpoints(folder, spec, disk, environment=present)
            state = _train(options, arrays, compiled, logger, checkpoints)
        # what was trained just now is compared already
        before = {} if compiled else arrays.environment
        prior = _fit_prior(options, state, logger, before=before)
        if logger:
            logger.finished(state, prior)
        disk.refuse_failing(checkpoint.newest_path(folder))


def _is_finished(options: Options, state: TrainState) -> bool:
    """Tell whether nothing is left to do, with the prior that this command asks for."""
    folder, prior = options.folder, options.recipe.prior
    if run.status(folder) != "finished" or run.read_spec(folder).schedule.prior != prior:
        return False
    return prior == "normal" or run_prior.is_current(_loaded(options, state))


def _train(
    options: Options,
    arrays: Arrays,
    compiled: TrainStep,
    logger: Logger | None,
    checkpoints: Checkpoints,
) -> TrainState:
    """Make every update of the autoencoder that is left, or say why not, for people."""
    folder, spec, recipe, devices = options[:4]
    size = state_bytes(arrays.state)
    try:
        return train(
            arrays.state,
            arrays.batches,
            spec=spec,
            steps=_steps(options, arrays, compiled),
            logger=logger,
            checkpoints=checkpoints,
            guards=_guards(options, arrays.images, size),
        )
    except DivergedError:
        if logger:
            logger.diverged()
        raise
    except UserError as error:  # images that are no longer as they were prepared
        if logger:
            logger.stopped(0, saved=False)
        newest = checkpoint.newest_path(folder)
        raise StorageError(
            f"{error} The run was stopped: the same command "
            + (f"resumes from {newest}" if newest else "starts again")
        ) from None
    except jax.errors.JaxRuntimeError as error:
        told = guards.out_of_memory(error, compiled.memory, size, recipe, devices)
        if told is None:
            raise
        raise told from None


def _loaded(options: Options, state: TrainState) -> run.LoadedRun:
    """Return the run with these weights, as if it was loaded from its folder."""
    local = dev.local(state)
    params, stats = local.best_params, local.batch_stats
    digest = checkpoint.weights_digest(params, stats)
    weights = checkpoint.Weights(params, stats, int(local.step), digest)
    return run.LoadedRun(options.folder, options.spec, options.recipe.model, weights)


def _fit_prior(
    options: Options, state: TrainState, logger: Logger | None, *, before: Mapping[str, str]
) -> Prior | None:
    """Fit the prior that the recipe asks for; None is N(0, I).

    `before` is the environment of the autoencoder's last checkpoint, if it is yet to be compared.
    """
    if options.recipe.prior == "normal":
        return None
    resources = flow_prior.Resources(
        options.devices, options.signals, options.max_ram, before=before, strict=options.strict
    )
    if logger:
        resources = resources._replace(say=logger.say)
    try:
        with logger.attempt("the prior") if logger else nullcontext():
            return run_prior.fit(_loaded(options, state), resources)
    except VaejaxError:
        if logger:
            logger.stopped_in_prior()
        raise


def _load_arrays(options: Options) -> Arrays:
    """Open the images, and restore the state of the newest checkpoint or initialize it."""
    folder, spec, recipe, devices = options[:4]
    replicated = dev.replicated(devices)
    init_key, train_key, validation_key = jax.jit(
        lambda: tuple(jax.random.split(jax.random.key(spec.seed, impl="threefry2x32"), 3)),
        out_shardings=replicated,
    )()
    prepared = Path(spec.schedule.prepared)
    images, held_out = data.Images(prepared, "train"), data.Images(prepared, "validation")
    resident = dev.ResidentImages(images, devices) if dev.fit_on_device(images, devices) else None
    order = {
        "batch_size": recipe.batch_size,
        "seed": spec.seed,
        "shard": jax.process_index(),
        "shards": jax.process_count(),
    }
    if resident is None:
        batches = data.stream(images, **order)
    else:
        batches = data.stream_indices(len(images), **order)
    trainer = recipe.trainer(updates=spec.schedule.updates)
    saved = dev.broadcast(lambda: _newest_checkpoint(folder, spec))
    before: Mapping[str, str] = {}
    if saved is None:
        state = compile_init(trainer, devices=devices)(init_key)
    else:
        newest = checkpoint.Checkpoint(Path(saved[0]), *saved[1:])
        before = newest.environment
        like = jax.eval_shape(partial(init, trainer=trainer), init_key)
        state, position = checkpoint.restore(newest, like, sharding=replicated)
        batches.set_state(dict(position))
    # placed here, so that the programs share one copy
    frozen = jax.device_put(recipe.frozen(), replicated) if recipe.frozen else None
    keys = train_key, validation_key
    return Arrays(images, held_out, batches, resident, frozen, *keys, state, before)


def _newest_checkpoint(folder: Path, spec: RunSpec) -> list | None:
    """Return the newest undamaged checkpoint as JSON values, if there is one yet."""
    checkpoint.delete_unfinished(folder)
    status = run.last_status(folder)
    if not status and (folder / "run.json").exists():
        print("warning: run.json is damaged, and is written anew", file=sys.stderr)
    trained = not status and any(read_lines(folder / "metrics.jsonl"))
    newest = checkpoint.newest(folder, expected="saved" in status or trained)
    if newest is None:
        return None
    # whether the images are those of the run was decided when its folder was chosen
    try:
        saved = RunSpec.from_json(newest.spec)
    except ValueError as error:
        raise CheckpointError(f"{newest.path} cannot be used: of its run, {error}") from None
    if fields := differences(saved, spec, without_data=True):
        raise CheckpointError(
            f"{newest.path} is of another run: {'; '.join(fields)} (saved → present). "
            "Take it away, or start anew with --fresh, which keeps the folder"
        )
    return [str(newest.path), *newest[1:]]


def _compile(options: Options, arrays: Arrays) -> TrainStep:
    """Compile the update, and say what memory and disk it will take."""
    folder, spec, recipe, devices = options[:4]
    began = time.monotonic()
    batch = jax.ShapeDtypeStruct((recipe.batch_size, *arrays.images.shape), np.uint8)
    trainer = recipe.trainer(updates=spec.schedule.updates)
    compiled = compile_train_step(
        trainer, arrays.state, arrays.frozen, batch, arrays.train_key, devices=devices
    )
    size = state_bytes(arrays.state)
    if int(arrays.state.step) == 0:
        length = plan.Plan(spec.schedule.updates_per_epoch, spec.schedule.updates)
        needed = plan.disk_needed(recipe, length, keep=spec.schedule.keep, checkpoint=size)
        plan.warn_of_disk(folder, needed)
    terminal.say(guards.refuse_too_much(compiled.memory, size, recipe, devices))
    print(f"compiled in {format_duration(time.monotonic() - began)}", flush=True)
    return compiled


def _steps(options: Options, arrays: Arrays, compiled: TrainStep) -> Steps:
    """Bind what stays the same from update to update."""
    recipe, devices = options.recipe, options.devices
    trainer = recipe.trainer(updates=options.spec.schedule.updates)
    eval_step = compile_eval_step(trainer, arrays.frozen, devices=devices)
    batch_size = recipe.micro_batch or recipe.batch_size

    def train_batch(state: TrainState, batch):
        if arrays.resident is not None:  # the batch is of indices
            batch = arrays.resident(batch)
        return compiled.run(state, batch, arrays.train_key)

    def validate_state(state: TrainState) -> dict[str, float]:
        return validate(
            eval_step, state, arrays.held_out, arrays.validation_key, batch_size, devices=devices
        )

    return Steps(train_batch, validate_state)


def _guards(options: Options, images: data.Images, state_size: int) -> Guards:
    folder, spec, recipe = options[:3]
    norm = getattr(recipe.model, "norm", "")
    advice = "Try a smaller --learning-rate" + (" or --norm batch" if norm == "affine" else "")

    def image_paths(update: int) -> list[str]:
        indices = data.batch_indices(images, update, batch_size=recipe.batch_size, seed=spec.seed)
        return [images.metadata(index)["path"] for index in indices]

    finite = FiniteGuard(
        folder,
        updates_per_epoch=spec.schedule.updates_per_epoch,
        advice=advice,
        image_paths=image_paths,
        last_checkpoint=partial(checkpoint.newest_path, folder),
        writes=dev.is_first(),
    )
    memory = MemoryGuard(
        state_size, images=recipe.micro_batch or recipe.batch_size, max_ram=options.max_ram
    )
    return Guards(options.signals, finite, memory)
