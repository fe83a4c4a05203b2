"""The user's cache folder: compiled programs, kernels, prepared images. It is safe to delete.

Code is loaded from it, and what is found there is taken for our own work. So it is used only where
it, and all that it holds, belongs to the user and nobody else can write to it.
"""

import functools
import os
import pwd
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vaejax.errors import UserError
from vaejax.files import printable

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
VARIABLE = "XDG_CACHE_HOME"  # of the environment: where the cache folder lies


def cache_folder(*, make: bool = True) -> Path:
    """Return the cache folder, which is ours alone; another one, with a warning, where it is not.

    A folder of ours to which others have rights is closed to them. What is not ours, or cannot be
    closed, is left as it is: a folder beside those of other users is in its place, `vaejax-UID-`
    and a random end, which the next process finds again.

    Without `make`, where there is none it stays so. Raises UserError if there is no place for it.
    """
    wanted = _wanted()
    return _checked(wanted) if make or os.path.lexists(wanted) else wanted


def _wanted() -> Path:
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen) / "vaejax"
    try:
        return Path.home() / ".cache" / "vaejax"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"vaejax-{os.geteuid()}"


@functools.cache  # one look, and one warning, a process
def _checked(wanted: Path) -> Path:
    problem = _problem(wanted)
    if not problem:
        return wanted
    try:
        private = _private_folder()
    except OSError as error:
        raise UserError(
            f"the cache folder {wanted} cannot be used: {problem}; nor another one: "
            f"{error.strerror}. Name a folder of yours in {VARIABLE}"
        ) from None
    text = (
        f"warning: the cache folder {wanted} is not used: {problem}. {private} is in its place; a "
        f"folder of yours in {VARIABLE} would be better"
    )
    print(printable(text), file=sys.stderr)
    return private


def _private_folder() -> Path:
    """Return a folder beside those of other users that is ours alone."""
    root, prefix = tempfile.gettempdir(), f"vaejax-{os.geteuid()}-"
    for name in sorted(os.listdir(root)):
        if name.startswith(prefix) and not _problem(Path(root, name)):
            return Path(root, name)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=root))


# Whose it is --------------------------------------------------------------------------------------


def _problem(folder: Path) -> str:
    """Make the folder, or close it to others; say why it is not ours alone, "" if it is."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=stat.S_IRWXU)
        for info in (os.lstat(folder), os.stat(folder)):  # a link of ours may lead to another disk
            if info.st_uid != os.geteuid():
                return f"it belongs to {_user(info.st_uid)}"
        if not stat.S_ISDIR(info.st_mode):
            return "it is no folder"
        for parent in folder.resolve().parents:
            mode = parent.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                return f"everybody may write to {parent}, and put another folder in its place"
        if stat.S_IMODE(info.st_mode) & ~stat.S_IRWXU:
            _close(folder, info.st_mode)
        if os.stat(folder).st_mode & OTHERS_WRITE:
            return "others may write to it, and it cannot be closed to them"
        if strange := next(_strange(folder), None):
            return f"{strange[0]} in it belongs to {_user(strange[1])}"
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return ""


def _close(folder: Path, mode: int) -> None:
    """Take all rights from others; where they could write, delete what they could have changed."""
    with suppress(OSError):  # a file system without rights
        os.chmod(folder, stat.S_IRWXU)
    if not mode & OTHERS_WRITE:
        return
    deleted = 0
    for where, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = os.path.join(where, name)
            info = os.lstat(path)
            if info.st_mode & OTHERS_WRITE and not stat.S_ISLNK(info.st_mode):
                deleted += 1
                if name in folders:
                    shutil.rmtree(path)
                    folders.remove(name)
                else:
                    os.unlink(path)
    text = f"others could write to the cache folder {folder}: it is closed to them now"
    made = f", and {deleted:,} of its files and folders were deleted" if deleted else ""
    print(printable(f"warning: {text}{made}"), file=sys.stderr)


def _strange(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield what in a folder belongs to others, and to whom. Links of ours are not followed."""
    for where, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            with suppress(FileNotFoundError):  # another process of ours cleans up
                owner = os.lstat(os.path.join(where, name)).st_uid
                if owner != os.geteuid():
                    yield name, owner


def _user(number: int) -> str:
    try:
        return f"the user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"the user {number}"
