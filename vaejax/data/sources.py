"""The files of a folder or a zip, in an order that no file system changes. Nothing is extracted.

Listing looks at names and sizes only; the bytes of a file are read when asked for, and no reading
waits for ever, leaves the source, or takes more than `MOST_BYTES`.
"""

import contextlib
import errno
import os
import re
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from vaejax.data.decode import Refused
from vaejax.errors import UserError

MOST_BYTES = 256 << 20

# Not images, and nobody means them as images: they are counted, and not complained about.
_JUNK = {"thumbs.db", "desktop.ini", "__macosx", "readme", "license", "licence"}
_COMPANIONS = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".xml", ".yaml", ".yml"}

_BOMB_RATIO, _BOMB_BYTES = 200, 16 << 20
_TOO_LARGE = "too large: more than 256 MB"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that may be an image, or the reason why its listing alone refuses it."""

    path: str  # relative to the source, printable
    name: str | int  # where to read it: a path that the system takes, or a place in the zip
    size: int = 0  # bytes
    stamp: int = 0  # changes with the content: time of change in ns, or the zip's checksum
    refused: str | None = None


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
    with _opened_zip(source) as archive:
        entries, ignored = _members(archive)
        yield Listing(sorted(entries, key=lambda e: e.path), ignored, _zip_reader(archive))


@contextlib.contextmanager
def reader(source: Path) -> Iterator[Callable[[Entry], bytes]]:
    """`read` of a listing that was made elsewhere: on a machine that sees the same source."""
    _check_exists(source)
    if source.is_dir():
        yield _read_file
        return
    with _opened_zip(source) as archive:
        yield _zip_reader(archive)


def printable(path: str | os.PathLike[str]) -> str:
    """A path with what is not UTF-8, and what would move a terminal's cursor, spelled out."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def _check_exists(source: Path) -> None:
    if not os.path.exists(source):  # Path.exists() raises where a name is too long
        raise UserError(f"{printable(source)} does not exist.")


def _is_ignored(path: str) -> bool:
    """Whether a part of the path is hidden or junk, or the file goes with images as text does."""
    parts = path.lower().split("/")
    if any(part in _JUNK or (part[:1] == "." and part not in (".", "..")) for part in parts):
        return True
    return PurePosixPath(parts[-1]).suffix in _COMPANIONS


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
        if _is_ignored(item.name):
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
            self.refuse(path, _TOO_LARGE)
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
        raise Refused(_TOO_LARGE)
    return data


# A zip


def _opened_zip(source: Path) -> zipfile.ZipFile:
    neither = UserError(
        f"{printable(source)} is neither a folder of images nor a readable zip of them."
    )
    if not source.is_file():  # to open a pipe would be to wait
        raise neither
    try:
        return zipfile.ZipFile(source)
    except OSError as error:
        raise UserError(f"cannot read {printable(source)}: {error.strerror}.") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError):
        raise neither from None


def _members(archive: zipfile.ZipFile) -> tuple[list[Entry], int]:
    entries, ignored = [], 0
    for place, info in enumerate(archive.infolist()):
        name = info.filename.replace("\\", "/")  # as some programs of Windows write them
        if name.endswith("/"):
            continue
        if _is_ignored(name):
            ignored += 1
            continue
        file = Entry(printable(name), place, info.file_size, info.CRC)
        entries.append(replace(file, refused=_member_refused(name, info)))
    return entries, ignored


def _member_refused(name: str, info: zipfile.ZipInfo) -> str | None:
    """Why a member is not read. Its names cannot lead anywhere, since nothing is extracted: one
    that tries tells of an archive made to harm."""
    if name.startswith("/") or name[1:2] == ":" or ".." in name.split("/"):
        return "its name leads out of the zip"
    if info.flag_bits & 1:
        return "encrypted"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "symlink in a zip"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "unusual compression"
    if info.file_size > MOST_BYTES:
        return _TOO_LARGE
    if info.file_size > max(_BOMB_BYTES, _BOMB_RATIO * info.compress_size):
        return "zip bomb"
    return None


def _zip_reader(archive: zipfile.ZipFile) -> Callable[[Entry], bytes]:
    members, lock = archive.infolist(), threading.Lock()

    def read(entry: Entry) -> bytes:
        """At most the size that was declared: zipfile stops there."""
        try:
            with lock:  # zipfile locks its file, but not the count of its readers
                member = archive.open(members[int(entry.name)])
            try:
                return member.read()
            finally:
                with lock:
                    member.close()
        except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
            raise Refused("damaged in the zip") from None

    return read
