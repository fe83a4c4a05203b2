"""A run is a folder: what lies in it, whose it is at the moment, what it says of itself."""

import fcntl
import json
import os
import platform
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vaejax
from vaejax.data.sources import printable
from vaejax.errors import UserError
from vaejax.files import whole
from vaejax.log import lines
from vaejax.training.disk import refused_by_disk

ROOT = Path("runs")
# what the files of a run's folder must hold for the rest of the program to read them
NEEDED: dict[str, dict[str, Any]] = {
    "config.json": {
        "experiment": str,
        "model": {"kind": str, "size": int},
        "loss": {"kind": str},
        "optimizer": {},
        "batch_size": int,
        "seed": int,
        "data": {},
        "schedule": {
            "recipe": str,
            "source": str,
            "prepared": str,
            "images": int,
            "updates": int,
            "updates_per_epoch": int,
        },
    },
    "run.json": {"status": str, "started": str, "changed": str, "command": str, "devices": str},
}


def numbered(name: str = "*") -> list[Path]:
    """The run folders below `runs/`, oldest first."""
    return sorted(f for f in ROOT.glob(f"[0-9][0-9][0-9][0-9][0-9]-{name}") if f.is_dir())


def find(run: str) -> Path:
    """The folder that a person means by a path, a number or "latest"."""
    if run == "latest":
        begun = [folder for folder in numbered() if (folder / "run.json").exists()]
        folders = sorted(begun, key=lambda f: (f / "run.json").stat().st_mtime)
        if not folders:
            raise UserError(
                f"there is no run in {ROOT.absolute()} yet: start one, or give its path"
            )
        return folders[-1]
    if run.isdigit() and (matches := [f for f in numbered() if int(f.name[:5]) == int(run)]):
        return matches[-1]
    if os.path.isfile(Path(run) / "config.json"):
        return Path(run)
    known = ", ".join(f.name for f in numbered()[-5:]) or "none"
    raise UserError(
        f"no run {run!r}: neither a run's folder, nor a number in {ROOT.absolute()} "
        f"(there: {known}), nor 'latest'"
    )


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """`config.json` or `run.json`; UserError where it is not there or not what was written."""
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{printable(folder / name)} cannot be read: {error}") from None
    if wrong := problem(value, name):
        raise UserError(f"{printable(folder / name)} is damaged: {wrong}")
    return value


def remembered(folder: Path) -> dict[str, Any]:
    """`run.json`; nothing where it is not there or damaged: the run goes on without it."""
    try:
        return read(folder, "run.json")
    except UserError:
        return {}


def problem(value: Any, name: str) -> str | None:
    """Where a JSON value has not the form of the file of that name."""
    return _problem(value, NEEDED[name])


def _problem(value: Any, needed: Any, field: str = "it") -> str | None:
    if not isinstance(needed, dict):
        if not isinstance(value, needed) or isinstance(value, bool):
            return f"{field} is not of the kind {needed.__name__}"
        least = 0 if field == '"seed"' else 1
        return None if needed is str or least <= value < 2**53 else f"{field} is {value}"
    if not isinstance(value, dict):
        return f"{field} is not an object"
    problems = (_problem(value.get(name), inner, f'"{name}"') for name, inner in needed.items())
    return next((problem for problem in problems if problem), None)


def write(folder: Path, name: str, value: Mapping[str, Any]) -> None:
    with whole(folder / name) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")


def describe(
    settings: Mapping[str, Any], *, devices: str, before: Mapping[str, Any]
) -> dict[str, Any]:
    """The `run.json` of a run that begins or goes on: what a reader needs to know to believe the
    figures. Of what it was `before` stay the start, and the updates of the last checkpoint."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    value = {
        "status": "running",
        "started": before.get("started", now),
        "changed": now,
        # without --fresh, with which the same command would not go on but start anew
        "command": shlex.join(["python", *(word for word in sys.argv if word != "--fresh")]),
        "seed": settings["seed"],
        "data": settings["data"],
        "devices": devices,
        "host": socket.gethostname(),
        "versions": versions(),
    }
    return value | ({"saved": before["saved"]} if "saved" in before else {})


def record(folder: Path, value: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Write `run.json` with these changes, and return it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    new = {**value, **changes, "changed": now}
    write(folder, "run.json", new)
    return new


def versions() -> dict[str, str]:
    """Of what computes, reads and writes."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    ours = {"vaejax": vaejax.__version__, "python": platform.python_version()}
    return ours | {name: version(name) for name in packages}


def status(folder: Path) -> str:
    """ "running", "stopped", "finished" or "diverged", as the run last said of itself."""
    return remembered(folder).get("status", "")


def standing(folder: Path) -> str:
    """How a run stands: what it last said, unless it says that it is running and nobody is."""
    said = status(folder)
    return "stopped" if said == "running" and not _is_locked(folder) else said


def ends(folder: Path) -> tuple[dict[str, dict], dict[str, dict]]:
    """The first and the last line of metrics.jsonl of each split."""
    first: dict[str, dict] = {}
    last: dict[str, dict] = {}
    for _, entry in lines(folder / "metrics.jsonl"):
        first.setdefault(entry["split"], entry)
        last[entry["split"]] = entry
    return first, last


def refuse_unwritable(folder: Path) -> None:
    """Before hours are spent: can `folder` be made, and can it be written to?"""
    nearest = folder.absolute()
    try:
        os.lstat(nearest)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # for those the nearest folder that is there has better words
    except OSError as error:  # a name that is too long, a loop of links
        raise UserError(f"{printable(folder)} cannot be a folder: {error.strerror}") from None
    while not os.path.exists(nearest):  # Path.exists raises where it may not look
        nearest = nearest.parent
    if not os.path.isdir(nearest):
        raise UserError(f"{folder} cannot be a folder: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: no permission for {nearest}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and keep every other process from training in it.

    The kernel frees the lock when the process ends, however it ends: none is ever stale.
    """
    with refused_by_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "run.lock").open("a+b", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).decode(errors="replace").strip()
            raise UserError(
                f"{folder} is already being trained by {owner}: wait for it, or name another --out"
            ) from None
        except OSError as error:
            raise UserError(
                f"{folder}: files cannot be locked there ({error.strerror}), and without it two "
                "runs could write over each other: name an --out on another disk"
            ) from None
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        with refused_by_disk(folder / "run.lock"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
        yield


def refuse_running(folder: Path) -> None:
    """UserError where another process trains in `folder`."""
    if _is_locked(folder):
        with locked(folder):
            pass


def _is_locked(folder: Path) -> bool:
    try:
        with (folder / "run.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it is not ours to read
        return False
    return False
