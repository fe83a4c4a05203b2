"""From flags and a recipe to a run's folder: prepare the data, find or begin the run, train it."""

import os
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import PyTree

from vaejax.data import batches as data
from vaejax.data.faces import Crop, crop_from_flags
from vaejax.data.labels import read_labels
from vaejax.data.prepare import find_prepared, prepare
from vaejax.data.records import read_dataset_report
from vaejax.data.sources import drawn_faces, drawn_labels
from vaejax.errors import CheckpointError, DivergedError, StorageError, UserError, VaejaxError
from vaejax.metrics import read_lines
from vaejax.priors import Prior, require_mixture_fits
from vaejax.system import format_duration, versions
from vaejax.training import checkpoint, guards, plan, run, visualize
from vaejax.training import devices as dev
from vaejax.training import prior as run_prior
from vaejax.training.budget import steps_from_minutes
from vaejax.training.compiled import (
    TrainStep,
    compile_eval_step,
    compile_init,
    compile_train_step,
    state_bytes,
)
from vaejax.training.config import Config, Recipe, RunSpec, Schedule, differences, run_spec
from vaejax.training.devices import Devices
from vaejax.training.guards import DiskGuard, FiniteGuard, MemoryGuard, SignalGuard
from vaejax.training.logger import Logger
from vaejax.training.loop import Checkpoints, Guards, Steps, train, validate
from vaejax.training.step import TrainState, init

SOME_IMAGES = 1000  # of which one at least has to have labels


def fit(name: str, config: Config, recipe: Recipe) -> Path | None:
    """Prepare the data, train the model, and leave a run's folder; the same call resumes it.

    Without `data` the drawn faces are used. With `dry_run` nothing is done, the plan is printed and
    None returned. Of several processes the first one prepares and writes, and the others read what
    it wrote: they have to see the same folders.

    Raises UserError before any work for what cannot be done, DivergedError when the loss stops
    being finite (the last checkpoint is from before), Interrupted after a signal and MemoryLowError
    for lack of memory (both after saving), StorageError for what the disk did not take.
    """
    began = time.monotonic() - time.process_time()  # imports are most of what came before
    run.refuse_unwritable(config.out or run.ROOT)
    crop = crop_from_flags(
        crop_faces=config.crop_faces, cascade=config.cascade, margin=config.margin
    )
    devices = dev.choose(config.devices, config.parallel)
    refuse_uneven(recipe, devices)
    if recipe.prior == "mixture":
        require_mixture_fits(recipe.model)
    source = config.data or drawn_faces()
    if config.data is None:
        print(f"No --data: training on the drawn faces of vaejax, {recipe.name} recipe.")
    _refuse_run_among_images(config.out or run.ROOT, source)
    if config.dry_run:
        task = Task(name, config, source, Path())
        _print_plan(task, recipe, crop=crop, began=began, devices=devices)
        return None
    prepared = dev.broadcast(
        lambda: str(
            prepare(
                source,
                size=recipe.model.size,
                allow_refused=config.allow_refused,
                crop=crop,
                debug_sheet=config.debug_sheet,
            )
        )
    )
    training = data.Images(Path(prepared), "train")
    images = len(training)
    recipe = replace(recipe, prior=run_prior.possible(recipe.prior, recipe.model, images=images))
    recipe = _with_labels(recipe, training, drawn=config.data is None)
    task = Task(name, config, source, Path(prepared))
    with ExitStack() as stack:
        folder = Path(dev.broadcast(lambda: str(_open_folder(task, recipe, stack))))
        recipe = _with_length(task, recipe, folder, began=began, devices=devices)
        spec = _spec(task, recipe)
        dev.broadcast(lambda: _write_spec(folder, spec))
        length = plan.make_plan(recipe, images=images)
        print(plan.describe_plan(recipe, length, images=images))
        signals = stack.enter_context(SignalGuard().listening())
        options = Options(folder, spec, recipe, devices, signals, config.max_ram)
        _train_to_the_end(options)
    return folder


class Task(NamedTuple):
    """What a run is made of besides its recipe."""

    name: str  # of the experiment
    config: Config
    source: Path
    prepared: Path


class Options(NamedTuple):
    """What training in a folder needs."""

    folder: Path
    spec: RunSpec
    recipe: Recipe
    devices: Devices
    signals: SignalGuard
    max_ram: float | None  # GiB


# Before ------------------------------------------------------------------------------------------


def refuse_uneven(recipe: Recipe, devices: Devices) -> None:
    """Raise UserError, with the nearest that would do, for images that do not divide over the
    devices, or a batch that does not divide into its micro-batches."""
    count, batch = devices.count, recipe.batch_size
    if batch % count:
        nearest = [str(n) for n in (batch // count * count, (batch // count + 1) * count) if n]
        fewer = max(n for n in range(1, count) if batch % n == 0)
        hint = f", or --devices {fewer}" if dev.is_single_process() else ""
        raise UserError(
            f"--batch-size {batch} does not divide over {count} devices: "
            f"take {' or '.join(nearest)}{hint}"
        )
    micro = recipe.micro_batch
    if micro is not None and (batch % micro or micro % count):
        possible = [n for n in range(count, batch + 1, count) if batch % n == 0]
        below, above = [n for n in possible if n < micro], [n for n in possible if n > micro]
        nearest = [str(n) for n in (below[-1:] + above[:1])]
        over = f" over {count} devices" if count > 1 else ""
        raise UserError(
            f"--micro-batch {micro}: a batch of {batch} images does not divide into them{over}: "
            f"take {' or '.join(nearest)}"
        )


def _with_labels(recipe: Recipe, images: data.Images, *, drawn: bool) -> Recipe:
    """Return the recipe with the labels of the drawn faces, if it is conditional.

    Raises UserError for labels that cannot be read, that no prior uses, or of no training image.
    """
    if recipe.conditional and recipe.labels is None:
        if not drawn:
            raise UserError("--conditional: --labels FILE.csv has to say what your faces show")
        recipe = replace(recipe, labels=drawn_labels())
    if recipe.labels is None:
        return recipe
    if recipe.prior != "flow":
        raise UserError(
            f"--labels {recipe.labels}: only a flow as the prior uses them: add --prior flow"
        )
    labels = read_labels(recipe.labels)
    paths = [images.metadata(i)["path"] for i in range(min(len(images), SOME_IMAGES))]
    if not any(path in labels.files for path in paths):
        raise UserError(
            f"--labels {recipe.labels}: it has no row for any of {len(paths):,} training images. "
            f"Its column 'file' begins with {next(iter(labels.files))}, the images with {paths[0]}"
        )
    return recipe


def _refuse_run_among_images(out: Path, source: Path) -> None:
    if os.path.isdir(source) and out.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"the run's folder would lie in {source}, and its pictures among the images to train "
            "on: name an --out elsewhere, or start from another folder"
        )


def _print_plan(
    task: Task, recipe: Recipe, *, crop: Crop | None, began: float, devices: Devices
) -> None:
    name, source = task.name, task.source
    prepared, files = find_prepared(source, size=recipe.model.size, crop=crop)
    if prepared is None:
        images = round(0.9 * files)
        print(f"{name}: {source}, {files:,} files that are not prepared yet; 90 % for training")
    else:
        images = len(data.Images(prepared, "train"))
        print(f"{name}: {source}, prepared in {prepared}")
    if not images:
        raise UserError(f"no images in {source}: no file there could be one")
    if recipe.minutes:
        if prepared is None:
            raise UserError(
                f"how much can be trained in {recipe.minutes:g} minutes is measured on prepared "
                f"images: `vaejax prepare {source} --size {recipe.model.size}` prepares them"
            )
        some, held_out = (data.Images(prepared, split) for split in ("train", "validation"))
        elapsed = time.monotonic() - began
        recipe = steps_from_minutes(recipe, some, held_out, elapsed=elapsed, devices=devices)
    length = plan.make_plan(recipe, images=images)
    print(plan.describe_plan(recipe, length, images=images))
    to_prepare = files if prepared is None else 0
    keep = task.config.keep
    print(plan.forecast(recipe, length, devices=devices, keep=keep, to_prepare=to_prepare))
    print("a dry run: nothing was written, but for kernels in the cache")


def _spec(task: Task, recipe: Recipe) -> RunSpec:
    """Return what identifies the run.

    The updates of a recipe of so many minutes are no part of that, and 1 until they are known.
    """
    config, prepared = task.config, task.prepared
    images = len(data.Images(prepared, "train"))
    if recipe.minutes and not recipe.steps:
        recipe = replace(recipe, steps=1)
    length = plan.make_plan(recipe, images=images)
    report = read_dataset_report(prepared)
    schedule = Schedule(
        recipe=recipe.name,
        source=str(task.source.absolute()),
        prepared=str(prepared.absolute()),
        images=images,
        updates=length.updates,
        updates_per_epoch=length.per_epoch,
        log_steps=config.log_steps,
        checkpoint_steps=config.checkpoint_steps,
        checkpoint_minutes=config.checkpoint_minutes,
        keep=config.keep,
        prior=recipe.prior,
        prior_steps=recipe.prior_steps,
        prior_width=recipe.prior_width,
        prior_depth=recipe.prior_depth,
        labels=str(recipe.labels.absolute()) if recipe.labels else None,
    )
    # the same images by person are split in another way
    facts = {field: report[field] for field in ("fingerprint", "persons", "splits")}
    return run_spec(task.name, config, recipe, data=facts, schedule=schedule)


def _open_folder(task: Task, recipe: Recipe, stack: ExitStack) -> Path:
    """Find or create the run's folder, and lock it until the stack is closed."""
    config = task.config
    folder = run.choose_folder(
        _spec(task, recipe),
        out=config.out,
        fresh=config.fresh,
        accept_changed_data=config.accept_changed_data,
    )
    stack.enter_context(run.locked(folder))
    return folder


def _with_length(
    task: Task, recipe: Recipe, folder: Path, *, began: float, devices: Devices
) -> Recipe:
    """Return the recipe with the numbers of updates that its minutes allow.

    They are measured for a new run, and read from the folder of one that goes on.
    """
    if not recipe.minutes:
        return recipe
    saved = dev.broadcast(lambda: _stored_length(folder))
    if saved is not None:
        steps, prior_steps = saved
        return replace(recipe, steps=steps, prior_steps=prior_steps)
    images, held_out = (data.Images(task.prepared, split) for split in ("train", "validation"))
    return steps_from_minutes(
        recipe, images, held_out, elapsed=time.monotonic() - began, devices=devices
    )


def _stored_length(folder: Path) -> list[int] | None:
    """Return the updates of a run and of its prior, as its folder or a checkpoint has them."""
    try:
        try:
            schedule = run.read_spec(folder).schedule
        except run.UnreadableSpec:
            schedule = RunSpec.from_json(checkpoint.saved_spec(folder)).schedule
    except ValueError:
        return None
    return [schedule.updates, schedule.prior_steps]


def _write_spec(folder: Path, spec: RunSpec) -> None:
    try:
        saved = run.read_spec(folder)
    except run.UnreadableSpec:  # there is none yet, or `choose_folder` has warned about it
        with run.storage_errors(folder / "config.json"):
            run.write_spec(folder, spec)
        return
    if differences(saved, spec, without_data=True):
        raise UserError(f"another run was begun in {folder} at this moment: start again")


# Training -----------------------------------------------------------------------------------------


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


def _train_to_the_end(options: Options) -> None:
    """Train the autoencoder, then its prior, from wherever an earlier process came to."""
    folder, spec, recipe, devices = options[:4]
    arrays = _load_arrays(options)
    start, updates = int(arrays.state.step), spec.schedule.updates
    if start >= updates and dev.broadcast(lambda: _is_finished(options, arrays.state)):
        if dev.is_first():
            visualize.write_readme(folder, run.read_spec(folder), run.last_status(folder))
        print(f"{folder} is finished: {start:,} updates are done, {updates:,} were requested.")
        print(visualize.what_next(folder, recipe.model))
        return
    if start > updates:
        raise UserError(
            f"{folder} has made {start:,} updates already, more than the {updates:,} requested: "
            "take more --steps or --epochs, or another --out"
        )
    compiled = None
    if start < updates:
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
                    devices=str(devices),
                    disk=disk,
                    done=start,
                )
            stack.enter_context(logger)
        state = arrays.state
        if compiled:
            state = _train(options, arrays, compiled, logger, disk)
        prior = _fit_prior(options, state, logger)
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
    disk: DiskGuard,
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
            checkpoints=Checkpoints(folder, spec, disk),
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


def _fit_prior(options: Options, state: TrainState, logger: Logger | None) -> Prior | None:
    """Fit the prior that the recipe asks for; None is N(0, I)."""
    if options.recipe.prior == "normal":
        return None
    resources = run_prior.Resources(options.devices, options.signals, options.max_ram)
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
        lambda: tuple(jax.random.split(jax.random.key(spec.seed), 3)), out_shardings=replicated
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
    if saved is None:
        state = compile_init(trainer, devices=devices)(init_key)
    else:
        newest = checkpoint.Checkpoint(Path(saved[0]), *saved[1:])
        _warn_of_versions(newest)
        like = jax.eval_shape(partial(init, trainer=trainer), init_key)
        state, position = checkpoint.restore(newest, like, sharding=replicated)
        batches.set_state(dict(position))
    # placed here, so that the programs share one copy
    frozen = jax.device_put(recipe.frozen(), replicated) if recipe.frozen else None
    return Arrays(images, held_out, batches, resident, frozen, train_key, validation_key, state)


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


def _warn_of_versions(newest: checkpoint.Checkpoint) -> None:
    saved, present = newest.versions, versions()
    other = [f"{n} {saved.get(n)} → {present[n]}" for n in present if saved.get(n) != present[n]]
    if other:
        print(
            f"warning: saved with other versions ({', '.join(other)}): the end may differ in its "
            "last bits from that of a run that nothing interrupted",
            file=sys.stderr,
        )


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
    print(guards.refuse_too_much(compiled.memory, size, recipe, devices))
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
