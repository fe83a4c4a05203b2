"""From a config to a run's folder: the data prepared, the run found or begun, the model trained."""

import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from vaejax import objectives
from vaejax.data import batches as data
from vaejax.data import faces
from vaejax.data.demo import drawn_faces
from vaejax.data.prepare import look, prepare
from vaejax.data.records import read_report
from vaejax.errors import UserError
from vaejax.models import autoencoder
from vaejax.training import identity, parallel, run
from vaejax.training.config import Config, Recipe, describe_loss
from vaejax.training.disk import refused_by_disk
from vaejax.training.learn import learn
from vaejax.training.plan import describe, forecast, schedule
from vaejax.training.settings import differences, without_data
from vaejax.training.stop import Stop


def fit(name: str, config: Config, recipe: Recipe) -> Path | None:
    """Prepare the data, train the model, and leave a run's folder; the same call resumes it.

    Without data of its own it learns from the drawn faces. With `dry_run` it only says what it
    would do, and there is no folder. Of several processes the first one prepares and writes, and
    the others read what it wrote: they have to see the same folders.

    Raises UserError before any work for what cannot be done, DivergedError when the loss stops
    being finite: the last checkpoint is then from before.
    """
    run.refuse_unwritable(config.out or run.ROOT)
    crop = faces.asked(crop_faces=config.crop_faces, cascade=config.cascade, margin=config.margin)
    devices = parallel.choose(config.devices, config.parallel)
    refuse_uneven(recipe, devices)
    source, model = config.data or drawn_faces(), recipe.model
    loss = partial(recipe.loss, model=model)
    if config.data is None:
        print(
            f"No --data: learning from the drawn faces that ship with vaejax, {recipe.name} recipe."
        )
    if os.path.isdir(source) and (config.out or run.ROOT).resolve().is_relative_to(
        source.resolve()
    ):
        raise UserError(
            f"the run's folder would lie in {source}, and its pictures among the images to learn "
            "from: name an --out elsewhere, or start from another folder"
        )
    if config.dry_run:
        _say_plan(name, config, recipe, source=source, crop=crop, devices=devices)
        return None
    prepared = parallel.agreed(
        lambda: str(
            prepare(
                source,
                size=model.size,
                allow_refused=config.allow_refused,
                crop=crop,
                debug_sheet=config.debug_sheet,
            )
        )
    )
    images = data.Images(Path(prepared), "train")
    plan = schedule(recipe, images=len(images))
    print(describe(recipe, plan, images=len(images)))
    report = read_report(Path(prepared))
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
        "micro_batch": recipe.micro_batch if _meet(recipe) else None,
        "seed": config.seed,
        # the same images by person are split in another way
        "data": {name: report[name] for name in ("fingerprint", "persons", "splits")},
        "schedule": {
            "recipe": recipe.name,
            "source": str(source.absolute()),
            "prepared": str(Path(prepared).absolute()),
            "images": len(images),
            "updates": plan.updates,
            "updates_per_epoch": plan.per_epoch,
            "log_steps": config.log_steps,
            "checkpoint_steps": config.checkpoint_steps,
            "checkpoint_minutes": config.checkpoint_minutes,
            "keep": config.keep,
        },
    }
    with ExitStack() as stack:

        def begin() -> str:
            folder = identity.choose(
                name,
                settings,
                out=config.out,
                fresh=config.fresh,
                accept_changed_data=config.accept_changed_data,
            )
            stack.enter_context(run.locked(folder))
            try:
                there = run.read(folder)
            except UserError:  # there is none yet, or `choose` has told what is wrong with it
                there = None
            if there is None:
                with refused_by_disk(folder / "config.json"):
                    run.write(folder, "config.json", settings)
            elif differences(without_data(there), without_data(settings)):
                raise UserError(f"another run was begun in {folder} at this moment: start again")
            return str(folder)

        folder = Path(parallel.agreed(begin))
        stop = stack.enter_context(Stop().listening())
        learn(folder, settings, config, recipe, plan, loss=loss, devices=devices, stop=stop)
    if parallel.agreed(lambda: run.status(folder)) == "stopped" and stop.signal is not None:
        sys.exit(128 + stop.signal)
    return folder


def refuse_uneven(recipe: Recipe, devices: parallel.Devices) -> None:
    """UserError, with the nearest that would do, for images that do not divide over the devices, or
    a batch over its micro-batches."""
    count, batch = devices.count, recipe.batch_size
    if batch % count:
        nearest = [str(n) for n in (batch // count * count, (batch // count + 1) * count) if n]
        fewer = max(n for n in range(1, count) if batch % n == 0)
        raise UserError(
            f"--batch-size {batch} does not divide over {count} devices: "
            f"take {' or '.join(nearest)}" + (f", or --devices {fewer}" if parallel.alone() else "")
        )
    micro = recipe.micro_batch
    if micro is not None and (batch % micro or micro % count):
        can = [n for n in range(count, batch + 1, count) if batch % n == 0]
        below, above = [n for n in can if n < micro], [n for n in can if n > micro]
        nearest = [str(n) for n in (below[-1:] + above[:1])]
        over = f" over {count} devices" if count > 1 else ""
        raise UserError(
            f"--micro-batch {micro}: a batch of {batch} images is no whole number of them{over}: "
            f"take {' or '.join(nearest)}"
        )


def _meet(recipe: Recipe) -> bool:
    """Whether the images of a batch meet, in a norm or in the loss: where they do not,
    micro-batches change no more than the rounding."""
    norm = getattr(recipe.model, "norm", None)
    return norm == "batch" or recipe.loss.func is objectives.calibrated


def _say_plan(
    name: str,
    config: Config,
    recipe: Recipe,
    *,
    source: Path,
    crop: faces.Crop | None,
    devices: parallel.Devices,
) -> None:
    prepared, files = look(source, size=recipe.model.size, crop=crop)
    if prepared is None:
        images = round(0.9 * files)
        print(f"{name}: {source}, {files:,} files that are not prepared yet; 90 % for training")
    else:
        images = len(data.Images(prepared, "train"))
        print(f"{name}: {source}, prepared in {prepared}")
    if not images:
        raise UserError(f"no images in {source}: no file there could be one")
    plan = schedule(recipe, images=images)
    print(describe(recipe, plan, images=images))
    to_prepare = files if prepared is None else 0
    print(forecast(config, recipe, plan, devices=devices, to_prepare=to_prepare))
    print("a dry run: nothing was written, but for kernels in the cache")
