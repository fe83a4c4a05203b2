"""Looking after things: a model's layers, the runs in this folder, what this machine can do."""

import os
import platform
import runpy
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import vaejax
from vaejax import cache, memory, native, objectives
from vaejax.errors import UserError
from vaejax.log import duration, size
from vaejax.models import autoencoder
from vaejax.models import summary as layers
from vaejax.models.vae import VAE
from vaejax.training import parallel, plan, run
from vaejax.training.config import Recipe

EXPERIMENTS = (Path("experiments"), Path(__file__).parents[1] / "experiments")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")
# REPORT's two runs: images, epochs, pixels
ANIME = ("the report's anime run", 30_750, 150, 64)
STUDENTS = ("the report's students run", 832, 1500, 256)


# Layers -------------------------------------------------------------------------------------------


def summary(name: str) -> str:
    """The table of layers of an experiment, by its name or file, or of a run.

    Raises UserError where there is neither.
    """
    script = _experiment(name)
    if script is None:
        model = autoencoder.build(run.read(run.find(name)).get("model", {}))
        return f"{name}: {model.title}\n{layers.table(model)}"
    found = [r for r in runpy.run_path(str(script)).values() if isinstance(r, Recipe)]
    if not found:
        raise UserError(f"{script} has no recipe, so that there is no model to show")
    names: dict[autoencoder.Autoencoder, list[str]] = {}
    for recipe in found:
        if recipe.name not in names.setdefault(recipe.model, []):
            names[recipe.model].append(recipe.name)
    return "\n\n".join(
        f"{script.stem}, {' and '.join(recipes)} recipe: {model.title}\n{layers.table(model)}"
        for model, recipes in names.items()
    )


def _experiment(name: str) -> Path | None:
    if name.endswith(".py"):
        if not os.path.isfile(name):
            raise UserError(f"there is no experiment {name}")
        return Path(name)
    plain = name.replace("-", "_")  # as the folders of runs are called
    files = (folder / f"{plain}.py" for folder in EXPERIMENTS)
    return next((file for file in files if file.is_file()), None) if plain.isidentifier() else None


# Runs ---------------------------------------------------------------------------------------------


def runs() -> str:
    """A table of every run below `runs/`: what it is, how far it came, how it stands."""
    table: list[tuple[str, ...]] = [
        ("run", "state", "epoch", "updates", "held out", "size", "changed")
    ]
    for folder in run.numbered():
        try:
            table.append(_row(folder))
        except UserError as error:
            table.append((folder.name, "unreadable", "", "", str(error), "", ""))
    if len(table) == 1:
        return f"there is no run in {run.ROOT.absolute()} yet"
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _row(folder: Path) -> tuple[str, ...]:
    schedule = run.read(folder).get("schedule", {})
    updates, per_epoch = schedule.get("updates", 0), schedule.get("updates_per_epoch", 1)
    _, last = run.ends(folder)
    done = max((line["step"] + (split == "train") for split, line in last.items()), default=0)
    held_out = last.get("validation", {})
    figures = [f"{n} {held_out[n]:.5g}" for n in ("mse", "kl", "bits_per_dim") if n in held_out]
    changed = run.read(folder, "run.json").get("changed", "")[:16].replace("T", " ")
    return (
        folder.name,
        run.standing(folder),
        f"{-(-done // per_epoch)}/{-(-updates // per_epoch)}",
        f"{done:,}/{updates:,}",
        "  ".join(figures),
        size(_bytes(folder)),
        changed,
    )


def _bytes(folder: Path) -> int:
    """Of all files, while a run may be taking some of them away."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(path, name)).st_size
    return total


# The machine --------------------------------------------------------------------------------------


def doctor() -> Iterator[str]:
    """Lines about this machine, as they are found out; the last ones take some seconds."""
    python = platform.python_version()
    yield f"vaejax   {vaejax.__version__} on Python {python}, {platform.platform()}"
    yield f"versions {', '.join(f'{name} {_version(name)}' for name in PACKAGES)}"
    devices = parallel.choose()
    yield f"devices  {devices}, {os.cpu_count()} cores"
    text = f"memory   {size(memory.room())} of {size(memory.limit())} free"
    if limit := parallel.memory_limit():
        text += f", {size(limit)} on each device"
    yield text
    if parallel.on_cpu():
        why = native.missing()
        yield "kernels  convolutions: " + (
            f"XLA's, about one and a half times slower than our own ({why})"
            if why
            else "our own, built for this processor"
            if devices.count == 1
            else "XLA's, since there are several devices"
        )
    for what, folder in (("runs", run.ROOT), ("cache", cache.folder())):
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        usage = shutil.disk_usage(there)
        state = "" if os.access(there, os.W_OK) else ", and it cannot be written"
        yield f"disk     {size(usage.free)} free for {what} in {folder.absolute()}{state}"

    name, images, epochs, pixels = ANIME
    recipe = _report(pixels, epochs)
    recipe = _even(recipe, devices)
    yield f"step     compiling the report's VAE at {pixels} pixels, batch of {recipe.batch_size} …"
    measured = plan.measure(recipe, devices=devices)
    if not measured.finite:
        raise UserError(
            "the test step's figures are no numbers: this installation of JAX computes wrongly"
        )
    yield (
        f"step     compiled in {duration(measured.compiling)}; "
        f"{recipe.batch_size / measured.seconds:,.0f} images/s, {size(measured.memory)} a step"
    )
    updates = epochs * (images * 9 // 10 // recipe.batch_size)
    yield f"time     {name}: {duration(measured.seconds * updates)} ({updates:,} updates)"

    name, images, epochs, pixels = STUDENTS
    large = _even(_report(pixels, epochs), devices)
    work = plan.operations(large) / plan.operations(recipe)
    updates = epochs * (images * 9 // 10 // large.batch_size)
    yield (
        f"time     {name}: about {duration(measured.seconds * work * updates)} "
        f"({updates:,} updates), if it is as fast in its multiplications"
    )


def _report(pixels: int, epochs: int) -> Recipe:
    loss = partial(objectives.report, kl_weight=0.01)
    return Recipe("report", VAE(size=pixels), loss, epochs=epochs)


def _even(recipe: Recipe, devices: parallel.Devices) -> Recipe:
    """With the nearest batch that divides over the devices."""
    batch = max(1, round(recipe.batch_size / devices.count)) * devices.count
    return replace(recipe, batch_size=batch)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
