"""Files and folders that appear complete or not at all, also after a kill or a power cut."""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vaejax.errors import UserError

PARTIAL = ".partial-"  # prefix of an unfinished file or folder
_PARTIAL_FOLDER = ".vaejax-partial-"


def printable(path: str | os.PathLike[str]) -> str:
    """Return a path as text, with bytes that are not UTF-8 and control characters escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def cache_folder() -> Path:
    """Return the folder of compiled programs, kernels and prepared images; it is safe to delete."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "vaejax"
    try:
        return Path.home() / ".cache" / "vaejax"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"vaejax-{os.getuid()}"


# Files --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{path.name}")  # the suffix tells libraries the format
    try:
        yield partial
        fsync(partial)
        os.replace(partial, path)
        fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int = 1) -> None:
    """Write a JSON file atomically. Raises ValueError for NaN and infinity, which JSON has not."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_text(path, f"{text}\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises FileNotFoundError if there is none, and ValueError, with the reason, if it cannot be
    read: it is no regular file, has no permission, is no UTF-8 or no JSON, or is nested too deep.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would block
        raise ValueError("it is not a regular file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


def fsync(path: Path | str) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Folders ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to fill, and rename it to `folder` when the block succeeds.

    It lies beside `folder`, so that the renaming is one step of the file system. Its process holds
    a lock on it, which the kernel releases when the process dies: a later call deletes unlocked
    leftovers.

    Raises FileExistsError if another process has made `folder` meanwhile, UserError if it cannot
    be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _delete_abandoned(folder.parent)
        partial, lock = _new_locked(folder.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {printable(error.filename or folder)}: {error.strerror}."
        ) from None
    try:
        yield partial
        _fsync_tree(partial)
        _rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _new_locked(parent: Path) -> tuple[Path, int]:
    while True:
        partial = parent / f"{_PARTIAL_FOLDER}{secrets.token_hex(4)}"
        partial.mkdir()
        lock = _lock(partial)
        if lock is not None:
            return partial, lock
        # another process deleted it before it was locked: take another name


def _lock(folder: Path) -> int | None:
    """Lock a folder and return the descriptor; None if it is locked already, or gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _delete_abandoned(parent: Path) -> None:
    for name in os.listdir(parent):
        if name.startswith(_PARTIAL_FOLDER):
            with contextlib.suppress(OSError):  # another user's, perhaps
                if (lock := _lock(parent / name)) is not None:
                    shutil.rmtree(parent / name, ignore_errors=True)
                    os.close(lock)


def _fsync_tree(folder: Path) -> None:
    """Flush everything before the rename: a power cut must not leave a name without its content."""
    for where, _, names in os.walk(folder):
        for path in [where, *(os.path.join(where, name) for name in names)]:
            fsync(path)


def _rename(partial: Path, folder: Path) -> None:
    """Rename onto nothing or an empty folder; a folder that holds a file stays as it is."""
    try:
        os.rename(partial, folder)
    except OSError as error:
        if os.path.isdir(folder) and os.listdir(folder):
            raise FileExistsError(printable(folder)) from None
        raise UserError(f"cannot write {printable(folder)}: {error.strerror}.") from None
