"""Tables of a model's layers and of the runs in this folder; checks of this machine."""

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
from vaejax import kernels, losses, terminal
from vaejax.cache import cache_folder
from vaejax.errors import UserError
from vaejax.files import printable
from vaejax.metrics import first_and_last, shown_in
from vaejax.models import autoencoder
from vaejax.models import summary as layers
from vaejax.models.vae import VAE
from vaejax.system import format_bytes, format_duration, memory_free, memory_limit
from vaejax.training import devices as dev
from vaejax.training import plan, run
from vaejax.training.config import Recipe

EXPERIMENTS = (Path("experiments"), Path(__file__).parents[1] / "experiments")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")
# REPORT's two runs: images, epochs, pixels
ANIME = ("the report's anime run", 30_750, 150, 64)
STUDENTS = ("the report's students run", 832, 1500, 256)


# Layers -------------------------------------------------------------------------------------------


def summary(name: str) -> str:
    """Return the table of layers of an experiment, by its name or file, or of a run.

    Raises UserError where there is neither.
    """
    script = _experiment(name)
    if script is None:
        model = autoencoder.from_json(run.read_spec(run.find(name)).model)
        return f"{name}: {model.title}\n{layers.table(model)}"
    recipes = [r for r in runpy.run_path(str(script)).values() if isinstance(r, Recipe)]
    if not recipes:
        raise UserError(f"{script} has no recipe, so that there is no model to show")
    names: dict[autoencoder.Autoencoder, list[str]] = {}
    for recipe in recipes:
        if recipe.name not in names.setdefault(recipe.model, []):
            names[recipe.model].append(recipe.name)
    return "\n\n".join(
        f"{script.stem}, {' and '.join(of)} recipe: {model.title}\n{layers.table(model)}"
        for model, of in names.items()
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


def runs(columns: int | None = None) -> str:
    """Return a table of every run below `runs/`: status, progress, held-out metrics, size; for a
    terminal of so many columns."""
    table = [["run", "state", "epoch", "held out", "changed", "size", "updates"]]
    for folder in run.numbered():
        try:
            row = _row(folder)
        except (UserError, OSError) as error:
            row = (folder.name, "unreadable", "", str(error), "", "", "")
        table.append([printable(cell) for cell in row])  # the run may be a stranger's
    if len(table) == 1:
        return f"there is no run in {run.ROOT.absolute()} yet"
    return "\n".join(terminal.table(table, left=range(len(table[0])), columns=columns))


def _row(folder: Path) -> tuple[str, ...]:
    schedule = run.read_spec(folder).schedule
    _, last = first_and_last(folder / "metrics.jsonl")
    done = max((line["step"] + (split == "train") for split, line in last.items()), default=0)
    held_out = last.get("validation", {})
    metrics = [f"{name} {held_out[name]:.5g}" for name in shown_in("runs") if name in held_out]
    changed = run.read_status(folder)["changed"][:16].replace("T", " ")
    return (
        folder.name,
        run.actual_status(folder),
        f"{-(-done // schedule.updates_per_epoch)}/{schedule.epochs}",
        "  ".join(metrics),
        changed,
        format_bytes(_bytes(folder)),
        f"{done:,}/{schedule.updates:,}",
    )


def _bytes(folder: Path) -> int:
    """Return the size of all files in a folder, from which a run may be deleting some."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total


# The machine --------------------------------------------------------------------------------------


def doctor() -> Iterator[str]:
    """Yield lines about this machine; the last ones take some seconds."""
    python = platform.python_version()
    yield f"vaejax   {vaejax.__version__} on Python {python}, {platform.platform()}"
    yield f"versions {', '.join(f'{name} {_version(name)}' for name in PACKAGES)}"
    devices = dev.choose()
    yield f"devices  {devices}, {os.cpu_count()} cores"
    text = f"memory   {format_bytes(memory_free())} of {format_bytes(memory_limit())} free"
    if limit := dev.device_memory_limit():
        text += f", {format_bytes(limit)} on each device"
    yield text
    if dev.on_cpu():
        why = kernels.unavailable_reason()
        yield "kernels  convolutions: " + (
            f"XLA's, about one and a half times slower than our own ({why})"
            if why
            else "our own, built for this processor"
            if devices.count == 1
            else "XLA's, since there are several devices"
        )
    for what, folder in (("runs", run.ROOT), ("cache", cache_folder(make=False))):
        nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        usage = shutil.disk_usage(nearest)
        state = "" if os.access(nearest, os.W_OK) else ", and it cannot be written"
        yield f"disk     {format_bytes(usage.free)} free for {what} in {folder.absolute()}{state}"

    name, images, epochs, pixels = ANIME
    recipe = _report(pixels, epochs)
    recipe = _even(recipe, devices)
    yield f"step     compiling the report's VAE at {pixels} pixels, batch of {recipe.batch_size} …"
    measured = plan.measure(recipe, devices=devices)
    if not measured.finite:
        raise UserError(
            "the test step's metrics are not finite: this installation of JAX computes wrongly"
        )
    yield (
        f"step     compiled in {format_duration(measured.compile_seconds)}; "
        f"{recipe.batch_size / measured.seconds:,.0f} images/s, "
        f"{format_bytes(measured.memory)} a step"
    )
    updates = epochs * (images * 9 // 10 // recipe.batch_size)
    yield f"time     {name}: {format_duration(measured.seconds * updates)} ({updates:,} updates)"

    name, images, epochs, pixels = STUDENTS
    large = _even(_report(pixels, epochs), devices)
    work = plan.operations(large) / plan.operations(recipe)
    updates = epochs * (images * 9 // 10 // large.batch_size)
    yield (
        f"time     {name}: about {format_duration(measured.seconds * work * updates)} "
        f"({updates:,} updates), if it is as fast in its multiplications"
    )


def _report(pixels: int, epochs: int) -> Recipe:
    loss = partial(losses.mse_kl, kl_weight=0.01)
    return Recipe("report", VAE(size=pixels), loss, epochs=epochs)


def _even(recipe: Recipe, devices: dev.Devices) -> Recipe:
    """Return the recipe with the nearest batch that divides over the devices."""
    batch = max(1, round(recipe.batch_size / devices.count)) * devices.count
    return replace(recipe, batch_size=batch)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
