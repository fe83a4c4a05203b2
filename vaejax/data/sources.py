"""The files of a folder or a zip, in an order that no file system changes. Nothing is extracted.

Listing looks at names and sizes only; the bytes of a file are read when asked for, and no reading
waits for ever, leaves the source, or takes more than `MOST_BYTES`.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vaejax.data import zips
from vaejax.data.decode import Refused
from vaejax.data.entries import MOST_BYTES, TOO_LARGE, Entry, is_ignored, printable
from vaejax.errors import UserError


@dataclass(frozen=True)
class Listing:
    """`read(entry)` gives a file's bytes, from any thread, or raises Refused."""

    entries: list[Entry]
    ignored: int
    read: Callable[[Entry], bytes]


@contextlib.contextmanager
def listing(source: Path) -> Iterator[Listing]:
    """What a folder or a zip holds, sorted by path; readable within the block."""
    _check_exists(source)
    if source.is_dir():
        entries, ignored = _folder(source)
        yield Listing(sorted(entries, key=lambda e: e.path), ignored, _read_file)
        return
    with zips.opened(source) as archive:
        entries, ignored = zips.members(archive, source)
        yield Listing(sorted(entries, key=lambda e: e.path), ignored, zips.reader(archive))


@contextlib.contextmanager
def reader(source: Path) -> Iterator[Callable[[Entry], bytes]]:
    """`read` of a listing that was made elsewhere: on a machine that sees the same source."""
    _check_exists(source)
    if source.is_dir():
        yield _read_file
        return
    with zips.opened(source) as archive:
        yield zips.reader(archive)


def _check_exists(source: Path) -> None:
    if not os.path.exists(source):  # Path.exists() raises where a name is too long
        raise UserError(f"{printable(source)} does not exist.")


# A folder


def _folder(root: Path) -> tuple[list[Entry], int]:
    """Every file once, under its real name where it has one: links are followed last."""
    walk = _Walk(os.path.realpath(root))
    walk.through("")
    while walk.links:
        walk.follow(walk.links.pop())
    return walk.entries, walk.ignored


class _Walk:
    """A traversal of one folder. What was seen is known by device and inode, so loops end."""

    def __init__(self, root: str):
        self.root = root
        self.entries: list[Entry] = []
        self.ignored = 0
        self.links: list[str] = []
        self.seen: set[tuple[int, int]] = set()

    def through(self, folder: str) -> None:
        """List a folder and all below it; links are only noted."""
        folders = [folder]
        while folders:
            folder = folders.pop()
            try:
                info = os.stat(self.at(folder))
                items = sorted(os.scandir(self.at(folder)), key=lambda item: item.name)
            except OSError as error:
                self.refuse(folder, _reason(error))
                continue
            if self.is_new(info):
                folders += [path for item in items if (path := self.take(folder, item))]

    def take(self, folder: str, item: os.DirEntry[str]) -> str | None:
        """Note one item of a folder; a folder's path is handed back, to be walked through."""
        path = os.path.join(folder, item.name)
        if is_ignored(item.name):
            self.ignored += 1
        elif item.is_symlink():
            self.links.append(path)
        elif item.is_dir(follow_symlinks=False):
            return path
        else:
            self.add(path)
        return None

    def follow(self, path: str) -> None:
        try:
            is_folder = stat.S_ISDIR(os.stat(self.at(path)).st_mode)
        except OSError as error:
            self.refuse(path, _reason(error))
            return
        if not is_folder:
            self.add(path)
        elif Path(self.root).is_relative_to(os.path.realpath(self.at(path))):
            self.refuse(path, "symlink loop")  # it would lead through all around the source
        else:
            self.through(path)

    def add(self, path: str) -> None:
        try:
            info = os.stat(self.at(path))
        except OSError as error:
            self.refuse(path, _reason(error))
            return
        if not stat.S_ISREG(info.st_mode):
            self.refuse(path, "not a regular file")
        elif info.st_size > MOST_BYTES:
            self.refuse(path, TOO_LARGE)
        elif self.is_new(info):
            file = Entry(printable(path), self.at(path), info.st_size, info.st_mtime_ns)
            self.entries.append(file)
        else:
            self.ignored += 1

    def is_new(self, info: os.stat_result) -> bool:
        key = (info.st_dev, info.st_ino)
        new = key not in self.seen
        self.seen.add(key)
        return new

    def refuse(self, path: str, reason: str) -> None:
        self.entries.append(Entry(printable(path) or ".", self.at(path), refused=reason))

    def at(self, path: str) -> str:
        return os.path.join(self.root, path) if path else self.root


def _reason(error: OSError) -> str:
    reasons = {errno.ENOENT: "broken symlink", errno.ELOOP: "symlink loop"}
    return reasons.get(error.errno or 0, "unreadable")


def _read_file(entry: Entry) -> bytes:
    """Opened without waiting: what was a file when it was listed may be a pipe by now."""
    try:
        descriptor = os.open(str(entry.name), os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Refused("not a regular file")
            data = file.read(MOST_BYTES + 1)
    except OSError:
        raise Refused("unreadable") from None
    if len(data) > MOST_BYTES:
        raise Refused(TOO_LARGE)
    return data
