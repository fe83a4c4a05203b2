"""A folder that is there whole or not at all, whatever kills the process that fills it."""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from vaejax.data.sources import printable
from vaejax.errors import UserError
from vaejax.files import flush

_PREFIX = ".vaejax-partial-"


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder to fill: it takes the name `folder` at the end of the block, or vanishes.

    It stands beside `folder`, so that the renaming is one step of the file system, and is locked
    while its process lives: the kernel lets go of the lock when the process dies, however it
    dies, and whoever comes next clears away what is not locked. FileExistsError tells that
    somebody else has meanwhile made a folder of that name.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_away_the_dead(folder.parent)
        partial, lock = _new_locked(folder.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {printable(error.filename or folder)}: {error.strerror}."
        ) from None
    try:
        yield partial
        _flush(partial)
        _rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _new_locked(parent: Path) -> tuple[Path, int]:
    while True:
        partial = parent / f"{_PREFIX}{secrets.token_hex(4)}"
        partial.mkdir()
        lock = _lock(partial)
        if lock is not None:
            return partial, lock
        # Somebody who clears away was quicker than our lock. It is gone: another name.


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None if another has it, or it is gone."""
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


def _clear_away_the_dead(parent: Path) -> None:
    for name in os.listdir(parent):
        if name.startswith(_PREFIX):
            with contextlib.suppress(OSError):  # somebody else's, perhaps
                if (lock := _lock(parent / name)) is not None:
                    shutil.rmtree(parent / name, ignore_errors=True)
                    os.close(lock)


def _flush(folder: Path) -> None:
    """All on the disk before the name is: a power cut must not leave a whole name on half."""
    for where, _, names in os.walk(folder):
        for path in [where, *(os.path.join(where, name) for name in names)]:
            flush(path)


def _rename(partial: Path, folder: Path) -> None:
    """Onto nothing, or onto an empty folder; whatever holds a file stays."""
    try:
        os.rename(partial, folder)
    except OSError as error:
        if folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(printable(folder)) from None
        raise UserError(f"cannot write {printable(folder)}: {error.strerror}.") from None
