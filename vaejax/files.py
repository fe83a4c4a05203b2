"""Files and folders that appear complete or not at all, and files that somebody else may have made.

What is written appears under its name when it is complete and on the disk, also after a kill or a
power cut. What is read may be anything that a stranger has put there: `open_regular` never waits
for a pipe, opens no device and bounds what is read; `inside` lets no name lead out of a folder.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

from vaejax.errors import UserError

PARTIAL = ".partial-"  # prefix of an unfinished file or folder; a random number and the name follow
MAX_JSON_BYTES = 16 << 20
_PARTIAL_FOLDER = ".vaejax-partial-"
_RANDOM = "[0-9a-f]{8}"
_SAFE = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# control characters, line separators, marks that reverse the order of what is shown, and surrogates
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str | os.PathLike[str]) -> str:
    """Return a path or a text from a file as one line that does nothing to a terminal.

    Control characters, marks of the writing direction and bytes that are not UTF-8 are escaped.
    """

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        if 0xDC80 <= code <= 0xDCFF:  # how Python spells a byte that is not UTF-8
            code -= 0xDC00
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _UNPRINTABLE.sub(escape, os.fspath(text))


# Reading ------------------------------------------------------------------------------------------


def open_regular(
    path: str | os.PathLike[str], *, max_bytes: int | None = None, links: bool = False
) -> BufferedReader:
    """Open a file for reading that may be anything: a pipe is not waited for, a device not opened.

    With `links`, `path` may be a symbolic link: what a person names may, a run's own files may not.

    Raises OSError, with the reason in `strerror`, for anything but a regular file, and for one of
    more than `max_bytes`.
    """

    def opener(name: str, flags: int) -> int:
        return _open_checked(name, flags, links=links)

    file = open(path, "rb", opener=opener)  # noqa: SIM115  the caller's
    if max_bytes is not None and os.fstat(file.fileno()).st_size > max_bytes:
        file.close()
        raise _too_large(path, max_bytes)
    return file


def read_bytes(path: str | os.PathLike[str], *, max_bytes: int, links: bool = False) -> bytes:
    """Read all of a file. Raises OSError as `open_regular` does."""
    with open_regular(path, max_bytes=max_bytes, links=links) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:  # it has grown, or the system does not know how large it is
        raise _too_large(path, max_bytes)
    return data


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file.

    Raises FileNotFoundError if there is none, and ValueError, with the reason, if it cannot be
    read: it is no regular file, is too large, has no permission, is no UTF-8 or no JSON, or is
    nested too deep.
    """
    try:
        return json.loads(read_bytes(path, max_bytes=max_bytes).decode())
    except FileNotFoundError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except MemoryError:
        raise ValueError("it does not fit into memory") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


def inside(folder: Path, name: Any) -> Path:
    """Return the path of a file below a folder that another file names; it need not exist.

    Raises ValueError unless the name is relative, has no `..`, and passes through no symbolic link
    below the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name or os.path.isabs(name):
        raise ValueError(f"{printable(str(name))[:200]!r} is no name below a folder")
    root = os.path.realpath(folder)
    path = os.path.join(root, name)
    if os.path.normpath(path) != path or not path.startswith(os.path.join(root, "")):
        raise ValueError(f"{printable(name)[:200]} leads out of its folder")
    if os.path.realpath(path) != path:
        raise ValueError(f"{printable(name)[:200]} is a link, or lies behind one")
    return Path(folder, name)


def _open_checked(path: str, flags: int, *, links: bool) -> int:
    """Open a regular file, and nothing else, without waiting."""
    with contextlib.suppress(FileNotFoundError):  # which may be created
        # asked first, because a device may do something when it is opened
        _require_regular(os.stat(path, follow_symlinks=links), path)
    descriptor = os.open(path, flags | _SAFE | (0 if links else os.O_NOFOLLOW), 0o666)
    try:
        _require_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(info: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(info.st_mode):
        kind = "a link" if stat.S_ISLNK(info.st_mode) else "not a regular file"
        raise OSError(errno.EINVAL, f"it is {kind}", path)


def _too_large(path: str | os.PathLike[str], max_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", os.fspath(path))


# Writing ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` when the block succeeds.

    The temporary file is new and has a random name, so that nobody can have put a link in its
    place. This process holds a lock on it, which the kernel releases when the process dies: a later
    call for the same path deletes unlocked leftovers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(path)
    partial, descriptor = _new_file(path)
    try:
        yield partial
        fsync(partial)
        os.replace(partial, path)
        fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
        os.close(descriptor)


def partial_name(name: str) -> str:
    """Return a random name for what will be renamed to `name`, which no one can know before."""
    return f"{PARTIAL}{secrets.token_hex(4)}-{name}"


def is_partial(name: str, of: str) -> bool:
    """Tell whether `partial_name` may have returned a name, for a name that matches `of`.

    `of` is a regular expression.
    """
    return re.fullmatch(f"{re.escape(PARTIAL)}{_RANDOM}-{of}", name) is not None


def _new_file(path: Path) -> tuple[Path, int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        partial = path.with_name(partial_name(path.name))  # the suffix tells libraries the format
        descriptor = os.open(partial, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process deletes it, as a leftover
            os.close(descriptor)
            continue
        except OSError:  # a file system without locks, where no leftover is deleted either
            return partial, descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.lstat(partial)):
                return partial, descriptor
        os.close(descriptor)


def _delete_leftovers(path: Path) -> None:
    with contextlib.suppress(OSError):  # of a folder that cannot be listed
        for name in os.listdir(path.parent):
            if is_partial(name, re.escape(path.name)):
                leftover = path.with_name(name)
                with contextlib.suppress(OSError):  # another user's, perhaps
                    if (lock := _lock(leftover, stat.S_ISREG)) is not None:
                        leftover.unlink()
                        os.close(lock)


def open_to_append(path: Path) -> FileIO:
    """Open a file for reading and appending, unbuffered; create it where there is none.

    Raises OSError unless it is a regular file with one name: a link of a stranger would let us
    write into another file of ours.
    """

    def opener(name: str, flags: int) -> int:
        descriptor = _open_checked(name, flags, links=False)
        if os.fstat(descriptor).st_nlink > 1:
            os.close(descriptor)
            raise OSError(errno.EMLINK, "it has another name elsewhere (a hard link)", name)
        return descriptor

    return open(path, "a+b", buffering=0, opener=opener)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int = 1) -> None:
    """Write a JSON file atomically. Raises ValueError for NaN and infinity, which JSON has not."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_text(path, f"{text}\n")


def fsync(path: Path | str) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | _SAFE)
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
        lock = _lock(partial, stat.S_ISDIR)
        if lock is not None:
            return partial, lock
        # another process deleted it before it was locked: take another name


def _lock(path: Path, kind: Callable[[int], bool]) -> int | None:
    """Lock a file or folder and return the descriptor; None if it is locked already, or gone.

    None too if it is of another kind, as `stat.S_ISDIR` or `stat.S_ISREG` tells.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | _SAFE)
    except FileNotFoundError:
        return None
    info = os.fstat(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if kind(info.st_mode) and os.path.samestat(info, os.lstat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # a file system without locks
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _delete_abandoned(parent: Path) -> None:
    for name in os.listdir(parent):
        if re.fullmatch(f"{re.escape(_PARTIAL_FOLDER)}{_RANDOM}", name):
            with contextlib.suppress(OSError):  # another user's, perhaps
                if (lock := _lock(parent / name, stat.S_ISDIR)) is not None:
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
