"""A run is a folder: which one a command means, its files, its lock and its status."""

import fcntl
import os
import shlex
import socket
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from vaejax.data.batches import DatasetDiff, dataset_diff
from vaejax.data.records import enclosing_set
from vaejax.errors import CheckpointError, StorageError, UserError
from vaejax.files import (
    PARTIAL,
    make_folder,
    open_regular,
    open_to_append,
    printable,
    read_json,
    write_json,
)
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.system import source_commit, versions
from vaejax.training import checkpoint
from vaejax.training.config import OtherVersion, RunSpec, differences

ROOT = Path("runs")
LOCK = "run.lock"
EVALUATION_LOCK = "evaluation.lock"  # another, so that a run is evaluated while it trains
# A run writes into these folders, and appends to these files. A link in their place would let it
# write, and delete, elsewhere. What else it writes replaces whatever has that name.
FOLDERS = (
    *("samples", "reconstructions", "evaluation", "tensorboard"),
    *(checkpoint.FOLDER, f"{checkpoint.FOLDER}/{checkpoint.DAMAGED}", "priors"),
)
FLOW_FOLDERS = ("priors/flow", *(f"priors/flow/{name}" for name in FOLDERS))
PICTURES = ("faces.png", "nearest.png", "curves.png")
APPENDED = (LOCK, EVALUATION_LOCK, "metrics.jsonl", "log.txt", "priors/flow/metrics.jsonl")


# Finding a run ------------------------------------------------------------------------------------


def numbered(name: str = "*") -> list[Path]:
    """List the run folders below `runs/`, oldest first."""
    return sorted(f for f in ROOT.glob(f"[0-9][0-9][0-9][0-9][0-9]-{name}") if f.is_dir())


def find(run: str) -> Path:
    """Return the folder that a person means by a path, a number or "latest"."""
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


def choose_folder(
    experiment: str,
    spec_in: Callable[[Path], RunSpec],
    *,
    out: Path | None,
    fresh: bool,
    accept_changed_data: bool,
) -> Path:
    """Return the folder of the run that a command means; it need not exist yet.

    `spec_in(folder)` describes that run, if it is the one in the folder: with its own splits.

    Without `out`: the newest `runs/NNNNN-experiment` with the same identity, else the next number.
    With it: that folder, unless another run lies there (UserError with the fields that differ).
    `fresh` takes a new number, or renames the old folder. A run from the same source, of which the
    images have changed meanwhile, is the same one if that is accepted, and else a UserError.
    """
    if out is None:
        readable = [] if fresh else list(_readable(experiment))
        same = [folder for folder, saved in readable if not differences(saved, spec_in(folder))]
        for folder, saved in reversed(readable if not same else []):
            unfinished = accept_changed_data or actual_status(folder) != "finished"
            if unfinished and (diff := changed_data(saved, spec_in(folder))):
                _require_accepted(folder, diff, accepted=accept_changed_data)
                return folder
        return same[-1] if same else ROOT / f"{_next_number():05}-{experiment}"
    refuse_running(out)
    if not _is_run(out):
        names = os.listdir(out) if out.exists() else []
        # a kill in the first moment leaves the lock alone
        if not all(n == LOCK or n.startswith(PARTIAL) for n in names):
            raise UserError(f"{out} is neither empty nor a run's folder: take another --out")
    elif fresh:
        _rename_aside(out)
    elif diff := changed_data(saved := read_or_recover_spec(out), spec := spec_in(out)):
        _require_accepted(out, diff, accepted=accept_changed_data)
    elif fields := differences(saved, spec):
        raise UserError(
            f"cannot resume {out}: {'; '.join(fields)} (saved → in this command). "
            "Repeat the command it was made by, name another --out, or add --fresh"
        )
    return out


def _rename_aside(out: Path) -> None:
    aside = next(p for i in range(1, 10**6) if not (p := Path(f"{out}.{i}")).exists())
    try:
        os.rename(out, aside)
    except OSError as error:
        raise UserError(f"{out} cannot be moved to {aside}: {error.strerror}") from None
    print(f"{out} was kept as {aside}")


def _is_run(folder: Path) -> bool:
    """Tell whether a run was begun there, whatever has become of its files since."""
    names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    ours = {"run.json", "metrics.jsonl", checkpoint.FOLDER}
    return "config.json" in names or (LOCK in names and bool(ours & names))


def changed_data(saved: RunSpec, spec: RunSpec) -> DatasetDiff | None:
    """Say how the images have changed, if two runs differ in nothing but them.

    None otherwise, or if the images come from another source or were cropped in another way.
    """
    if not differences(saved, spec) or differences(saved, spec, without_data=True):
        return None
    if saved.schedule.source != spec.schedule.source:
        return None
    return dataset_diff(Path(saved.schedule.prepared), Path(spec.schedule.prepared))


def _require_accepted(folder: Path, diff: DatasetDiff, *, accepted: bool) -> None:
    text = f"the images have changed since {folder} was last trained on them: {diff}"
    if not accepted:
        raise UserError(
            f"{text}. --accept-changed-data goes on with them, --fresh starts anew; or put the "
            "images back as they were"
        )
    print(f"{text}; going on with the present ones, of which none changes its split")


def _next_number() -> int:
    return 1 + max((int(folder.name[:5]) for folder in numbered()), default=-1)


def _readable(name: str) -> Iterator[tuple[Path, RunSpec]]:
    """Yield the numbered runs, oldest first, with their specs; warn of unreadable ones."""
    for folder in numbered(name):
        if _is_run(folder):
            try:
                yield folder, read_or_recover_spec(folder)
            except UserError as error:
                print(printable(f"warning: {error}. It is left alone"), file=sys.stderr)


class LoadedRun(NamedTuple):
    """A run as samples, pictures and evaluations need it."""

    folder: Path
    spec: RunSpec
    model: Autoencoder
    weights: checkpoint.Weights


def load(folder: Path) -> LoadedRun:
    """Load the model and the newest undamaged weights of a run, or their moving average.

    Raises UserError for a folder that is no readable run, CheckpointError for one without weights.
    """
    spec = read_spec(folder)
    model = autoencoder.from_json(spec.model)
    try:
        weights = checkpoint.load_weights(folder, model, ema=spec.ema_decay is not None)
    except CheckpointError:
        if not checkpoint.steps(folder) and status(folder) == "diverged":
            raise CheckpointError(f"{folder} diverged before its first checkpoint") from None
        raise
    return LoadedRun(folder, spec, model, weights)


# Its files ----------------------------------------------------------------------------------------


class UnreadableSpec(UserError):
    """A `config.json` that is missing or damaged: a checkpoint may know what it held."""


def read_spec(folder: Path) -> RunSpec:
    """Read a run's `config.json`.

    Raises UnreadableSpec where it is missing or damaged, UserError where another version of vaejax
    has written it.
    """
    path = folder / "config.json"
    try:
        return RunSpec.from_json(read_json(path))
    except OtherVersion as error:
        raise UserError(f"{printable(folder)} cannot be used: {error}. It stays as it is") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UnreadableSpec(f"{printable(path)} cannot be read: {reason}") from None


def read_or_recover_spec(folder: Path) -> RunSpec:
    """Read a run's spec from `config.json`, or, with a warning, from its newest checkpoint.

    Raises UserError where neither can be read.
    """
    try:
        return read_spec(folder)
    except UnreadableSpec as error:
        try:
            spec = RunSpec.from_json(checkpoint.saved_spec(folder))
        except ValueError:
            raise UserError(
                f"{error}, and no checkpoint tells what it held. Put it back, or start anew with "
                "--fresh, which keeps the folder"
            ) from None
        text = f"warning: {error}; its newest checkpoint tells what it held"
        print(printable(text), file=sys.stderr)
        return spec


def write_spec(folder: Path, spec: RunSpec) -> None:
    """Write `config.json`."""
    write_json(folder / "config.json", spec.to_json(), indent=2)


STATUS_FIELDS = ("status", "started", "changed", "command", "devices")


def read_status(folder: Path) -> dict[str, Any]:
    """Read `run.json`: status, command, devices, versions. UserError if missing or damaged."""
    path = folder / "run.json"
    try:
        value = read_json(path)
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
        if wrong := [name for name in STATUS_FIELDS if not isinstance(value.get(name), str)]:
            raise ValueError(f'"{wrong[0]}" is not a text')
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{printable(path)} cannot be read: {reason}") from None
    return value


def last_status(folder: Path) -> dict[str, Any]:
    """Read `run.json`, or return {} where it is missing or damaged: a run goes on without it."""
    try:
        return read_status(folder)
    except UserError:
        return {}


def initial_status(spec: RunSpec, *, devices: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `run.json` of a run that starts or resumes.

    It holds what a reader needs in order to trust the metrics. The start, and the step of the last
    checkpoint, are kept from what it was `before`.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    value = {
        "status": "running",
        "started": before.get("started", now),
        "changed": now,
        # without --fresh, with which the same command would start anew instead of resuming
        "command": shlex.join(["python", *(word for word in sys.argv if word != "--fresh")]),
        "seed": spec.seed,
        "data": dict(spec.data),
        "devices": devices,
        "host": socket.gethostname(),
        "versions": versions(),
        "commit": source_commit(),
    }
    return value | ({"saved": before["saved"]} if "saved" in before else {})


def write_status(folder: Path, value: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Write `run.json` with these changes, and return it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    new = {**value, **changes, "changed": now}
    write_json(folder / "run.json", new, indent=2)
    return new


def status(folder: Path) -> str:
    """Return "running", "stopped", "finished", "diverged" or "", as the run has last written."""
    return last_status(folder).get("status", "")


def actual_status(folder: Path) -> str:
    """Return the status; "stopped" for a run that was killed before it could write so."""
    written = status(folder)
    return "stopped" if written == "running" and not is_locked(folder) else written


# The folder ---------------------------------------------------------------------------------------


def refuse_unwritable(folder: Path) -> None:
    """Raise UserError, before hours are spent, if `folder` cannot be made or written to."""
    nearest = folder.absolute()
    try:
        os.lstat(nearest)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # for those the nearest folder that exists gives a better message
    except OSError as error:  # a name that is too long, a loop of links
        raise UserError(f"{printable(folder)} cannot be a folder: {error.strerror}") from None
    while not os.path.exists(nearest):  # Path.exists raises where it has no permission
        nearest = nearest.parent
    if not os.path.isdir(nearest):
        raise UserError(f"{folder} cannot be a folder: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: no permission for {nearest}")


def refuse_output(out: Path, *, inputs: Iterable[Path | str]) -> None:
    """Raise UserError for a file that a command would write over its input, or into other data.

    `inputs` are files, and folders in which no file may be written. A prepared data set is one, and
    so are the folders and pictures that a run keeps.
    """
    real = Path(os.path.realpath(out))
    name = f"--out {out}"
    for path in (Path(os.path.realpath(source)) for source in inputs):
        if path == real or _same_file(path, real):
            raise UserError(f"{name} is an input, and would be overwritten: name another file")
        if path in real.parents:
            raise UserError(f"{name} lies in {path}, among the input: name a file elsewhere")
    if prepared := enclosing_set(out):
        raise UserError(
            f"{name} lies in {prepared}, which is a prepared data set: name a file elsewhere"
        )
    for folder in real.parents:
        kept = real.relative_to(folder).parts[0]
        if kept in (*FOLDERS, *PICTURES) and os.path.isfile(folder / "config.json"):
            raise UserError(
                f"{name} would be among what the run {folder} keeps: name a file elsewhere"
            )


def _same_file(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them does not exist
        return False


def refuse_links(folder: Path) -> None:
    """Raise UserError, with its name, for what would lead a run's writing out of its folder.

    The folder itself, and those above it, may be links: `runs` on another disk.
    """
    for name in (*FOLDERS, *FLOW_FOLDERS, *APPENDED):
        path = folder / name
        try:
            info = os.lstat(path)
        except OSError:  # there is none; or it lies in one that was refused
            continue
        problem = ""
        if stat.S_ISLNK(info.st_mode):
            problem = "is a link"
        elif name not in APPENDED and not stat.S_ISDIR(info.st_mode):
            problem = "is no folder"
        elif name in APPENDED and not stat.S_ISREG(info.st_mode):
            problem = "is not a regular file"
        elif name in APPENDED and info.st_nlink > 1:
            problem = "has another name elsewhere (a hard link)"
        if problem:
            raise UserError(
                f"{folder} is not used: {name} in it {problem}, and what is written there would "
                "lie elsewhere. If the run is yours, copy it (`cp -rL`) and use the copy"
            )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder, and keep every other process from training in it.

    The kernel releases the lock when the process ends, however it ends: none is ever stale. Raises
    UserError if another process holds it, or the folder leads elsewhere, StorageError if the disk
    takes nothing.
    """
    with storage_errors(folder):
        make_folder(folder)
    with _lock(
        folder,
        LOCK,
        busy="is already being trained by {}: wait for it, or name another --out",
        mend="name an --out on another disk",
    ):
        yield


@contextmanager
def evaluating(folder: Path) -> Iterator[None]:
    """Keep every other process from evaluating the run; it may be trained meanwhile.

    Raises as `locked` does.
    """
    with _lock(
        folder,
        EVALUATION_LOCK,
        busy="is already being evaluated by {}: wait for it",
        mend="evaluate a copy of the run on another disk",
    ):
        yield


@contextmanager
def _lock(folder: Path, name: str, *, busy: str, mend: str) -> Iterator[None]:
    with storage_errors(folder):
        refuse_links(folder)
        file = open_to_append(folder / name)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).decode(errors="replace").strip()
            raise UserError(f"{folder} {busy.format(owner)}") from None
        except OSError as error:
            raise UserError(
                f"{folder}: files cannot be locked there ({error.strerror}), and without it two "
                f"processes could write over each other: {mend}"
            ) from None
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        with storage_errors(folder / name):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
        yield


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError in what must be written before a run can begin into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from None


def refuse_running(folder: Path) -> None:
    """Raise UserError if another process trains in `folder`."""
    if is_locked(folder):
        with locked(folder):
            pass


def is_locked(folder: Path) -> bool:
    """Tell whether a process trains in `folder`."""
    try:
        with open_regular(folder / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it is not ours to read
        return False
    return False
