"""A run is a folder: which one a command means, whose it is at the moment, what it says of itself.

Whatever stands in `config.json` outside its "schedule" identifies a run: the same command finds
its folder by it, and a folder that was made by another command refuses to go on.
"""

import fcntl
import json
import os
import platform
import shlex
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vaejax
from vaejax.errors import UserError

ROOT = Path("runs")


def choose(name: str, settings: Mapping[str, Any], *, out: Path | None, fresh: bool) -> Path:
    """The folder of the run that these settings describe; it need not exist yet.

    Without `out`: the newest `runs/NNNNN-name` with the same identity, else the next number.
    With it: that folder, unless another run lies there (UserError with the fields that differ).
    `fresh` takes a new number, or moves the old folder aside.
    """
    if out is None:
        mine = [] if fresh else [f for f in numbered(name) if not _differences(f, settings)]
        return mine[-1] if mine else ROOT / f"{_next_number():05}-{name}"
    refuse_running(out)
    found = [f.name for f in out.iterdir()] if out.exists() else []
    if "config.json" not in found:
        # a kill in the first moment leaves the lock alone
        if not all(n == "run.lock" or n.startswith(".partial-") for n in found):
            raise UserError(f"{out} is neither empty nor a run's folder: take another --out")
    elif fresh:
        aside = next(p for i in range(1, 10**6) if not (p := Path(f"{out}.{i}")).exists())
        try:
            os.rename(out, aside)
        except OSError as error:
            raise UserError(f"{out} cannot be moved to {aside}: {error.strerror}") from None
        print(f"{out} was kept as {aside}")
    elif differences := _differences(out, settings):
        raise UserError(
            f"cannot go on with {out}: {'; '.join(differences)} (there → in this command). "
            "Repeat the command it was made by, name another --out, or add --fresh"
        )
    return out


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
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{folder / name} does not hold an object")
    return value


def write(folder: Path, name: str, value: Mapping[str, Any]) -> None:
    partial = folder / f".partial-{name}"
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, folder / name)


def record(folder: Path, state: str, *, devices: str) -> None:
    """Write `run.json`: what a reader needs to know to believe the figures, and how it stands."""
    config = read(folder)
    old = read(folder, "run.json") if (folder / "run.json").exists() else {}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    value = {
        "status": state,
        "started": old.get("started", now),
        "changed": now,
        # without --fresh, with which the same command would not go on but start anew
        "command": shlex.join(["python", *(word for word in sys.argv if word != "--fresh")]),
        "seed": config["seed"],
        "data": config["data"],
        "devices": devices,
        "host": socket.gethostname(),
        "versions": {
            "vaejax": vaejax.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }
    write(folder, "run.json", value)


def status(folder: Path) -> str:
    """ "running", "stopped", "finished" or "diverged", as the run last said of itself."""
    return read(folder, "run.json").get("status", "") if (folder / "run.json").exists() else ""


def standing(folder: Path) -> str:
    """How a run stands: what it last said, unless it says that it is running and nobody is."""
    said = status(folder)
    return "stopped" if said == "running" and not _is_locked(folder) else said


def ends(folder: Path) -> tuple[dict[str, dict], dict[str, dict]]:
    """The first and the last line of metrics.jsonl of each split."""
    first: dict[str, dict] = {}
    last: dict[str, dict] = {}
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        with metrics.open(encoding="utf-8") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:
                    break  # cut off, by a kill or a full disk
                first.setdefault(entry["split"], entry)
                last[entry["split"]] = entry
    return first, last


def refuse_unwritable(folder: Path) -> None:
    """Before hours are spent: can `folder` be made, and can it be written to?"""
    nearest = folder.absolute()
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "run.lock").open("a+")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is already being trained by {file.read().strip()}: "
                "wait for it, or name another --out"
            ) from None
        file.truncate(0)
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        file.flush()
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


class Stop:
    """Ctrl-C and SIGTERM ask for a stop between two steps; a second one stops at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        old = {s: signal.signal(s, self._asked) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: object) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        print(f"\n{self.signal.name}: finishing the step and saving …", file=sys.stderr)


def _next_number() -> int:
    return 1 + max((int(folder.name[:5]) for folder in numbered()), default=-1)


def _differences(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """The fields by which the run in `folder` is another one: "model.size 64 → 128"."""
    try:
        # what runs that were begun before there was a choice did
        there, here = {"model.compute": "float32"} | _flat(read(folder)), _flat(settings)
    except UserError as error:
        return [str(error)]
    return [
        f"{key} {there.get(key)} → {here.get(key)}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if prefix or key != "schedule":
            flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat
