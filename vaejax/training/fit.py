"""From flags and a recipe to a run's folder: prepare the data, find or begin the run, train it."""

import os
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from vaejax import terminal
from vaejax.data import assignment
from vaejax.data import batches as data
from vaejax.data.faces import Crop, crop_from_flags
from vaejax.data.labels import read_labels
from vaejax.data.prepare import find_prepared, prepare
from vaejax.data.records import enclosing_set, read_dataset_report
from vaejax.data.sources import drawn_faces, drawn_labels
from vaejax.errors import UserError
from vaejax.priors import require_mixture_fits
from vaejax.training import checkpoint, plan, run
from vaejax.training import devices as dev
from vaejax.training import prior as run_prior
from vaejax.training.budget import steps_from_minutes
from vaejax.training.config import Config, Recipe, RunSpec, Schedule, differences, run_spec
from vaejax.training.devices import Devices
from vaejax.training.finish import Options, finish
from vaejax.training.guards import SignalGuard

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
                person_depth=config.person_depth,
            )
        )
    )
    training = data.Images(Path(prepared), "train")
    images = len(training)
    recipe = replace(recipe, prior=run_prior.possible(recipe.prior, recipe.model, images=images))
    recipe = _with_labels(recipe, training, drawn=config.data is None)
    task = Task(name, config, source, Path(prepared))
    with ExitStack() as stack:
        folder, prepared = map(Path, dev.broadcast(lambda: _open_folder(task, recipe, stack)))
        if dev.is_first():
            stack.enter_context(terminal.copied_to(folder / "log.txt"))
        task = task._replace(prepared=prepared)
        images = len(data.Images(prepared, "train"))
        recipe = _with_length(task, recipe, folder, began=began, devices=devices)
        spec = _spec(task, recipe)
        dev.broadcast(lambda: _write_spec(folder, spec))
        dev.broadcast(lambda: _remember(folder, prepared))
        length = plan.make_plan(recipe, images=images)
        terminal.say(plan.describe_plan(recipe, length, images=images))
        signals = stack.enter_context(SignalGuard().listening())
        options = Options(folder, spec, recipe, devices, signals, config.max_ram)
        finish(options)
    return folder


class Task(NamedTuple):
    """What a run is made of besides its recipe."""

    name: str  # of the experiment
    config: Config
    source: Path
    prepared: Path


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
    if prepared := enclosing_set(out):
        raise UserError(
            f"the run's folder would lie in {prepared}, which is a prepared data set: name an "
            "--out elsewhere"
        )


def _print_plan(
    task: Task, recipe: Recipe, *, crop: Crop | None, began: float, devices: Devices
) -> None:
    name, source = task.name, task.source
    prepared, files = find_prepared(
        source, size=recipe.model.size, crop=crop, person_depth=task.config.person_depth
    )
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
                f"images: `vaejax prepare {quote(str(source))} --size {recipe.model.size}` "
                "prepares them"
            )
        some, held_out = (data.Images(prepared, split) for split in ("train", "validation"))
        elapsed = time.monotonic() - began
        recipe = steps_from_minutes(recipe, some, held_out, elapsed=elapsed, devices=devices)
    length = plan.make_plan(recipe, images=images)
    terminal.say(plan.describe_plan(recipe, length, images=images))
    to_prepare = files if prepared is None else 0
    keep = task.config.keep
    terminal.say(plan.forecast(recipe, length, devices=devices, keep=keep, to_prepare=to_prepare))
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
    facts = assignment.identity(report)
    return run_spec(task.name, config, recipe, data=facts, schedule=schedule)


def _open_folder(task: Task, recipe: Recipe, stack: ExitStack) -> list[str]:
    """Find or create the run's folder, and lock it until the stack is closed.

    Returns it, and the set that the run reads: the prepared one, or a copy with its own splits.
    """
    config, prepared = task.config, task.prepared

    def spec_in(folder: Path) -> RunSpec:
        own = assignment.set_of_run(folder, prepared)
        return _spec(task._replace(prepared=own), recipe)

    folder = run.choose_folder(
        task.name,
        spec_in,
        out=config.out,
        fresh=config.fresh,
        accept_changed_data=config.accept_changed_data,
    )
    stack.enter_context(run.locked(folder))
    before = None
    with suppress(run.UnreadableSpec):  # there is none yet, or `choose_folder` has warned about it
        saved = run.read_spec(folder)
        if run.changed_data(saved, spec_in(folder)):
            before = Path(saved.schedule.prepared)
    return [str(folder), str(assignment.split_for_run(folder, prepared, before=before))]


def _remember(folder: Path, prepared: Path) -> None:
    with run.storage_errors(folder / assignment.FILE):
        assignment.remember(folder, prepared)


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
