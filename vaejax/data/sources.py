"""The files of a folder or of a zip, and the drawn faces that ship with vaejax.

A source is listed by names and sizes, in an order that does not depend on the file system. Contents
are read on request, from any thread. Nothing is extracted, and no read blocks forever, leaves the
source, or takes more than `MAX_BYTES`.
"""

import contextlib
import csv
import errno
import io
import os
import posixpath
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vaejax.data.decode import Refused
from vaejax.errors import UserError
from vaejax.files import open_regular, printable, read_bytes

MAX_BYTES = 256 << 20  # of one image file
_TOO_LARGE = "too large: more than 256 MB"

# Not images, and nobody takes them for images: they are counted, but not reported as refused.
_JUNK = {"thumbs.db", "desktop.ini", "__macosx", "readme", "license", "licence"}
_COMPANIONS = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".xml", ".yaml", ".yml"}

# A zip bomb is so many times smaller than its content, from this size on: a single member, or all
# members together, which may overlap in the file and each look harmless.
_BOMB_RATIO, _BOMB_BYTES, _BOMB_TOTAL_BYTES = 200, 16 << 20, 4 << 30
# zipfile reads a zip's directory at once and needs ten times its size in memory: a million members
# take some 60 to 100 MB of directory.
_MAX_DIRECTORY_BYTES = 128 << 20
_UTF_8_FLAG = 1 << 11  # of a member's flag bits

_PACKAGE = Path(__file__).parent


def drawn_faces() -> Path:
    """Return the zip of 3,200 drawn faces, 64 x 64 RGB; `drawn_faces.md` names their artist."""
    return _PACKAGE / "drawn_faces.zip"


def drawn_labels() -> Path:
    """Return the CSV that says what each drawn face shows."""
    return _PACKAGE / "drawn_faces.csv"


def drawn_attributes() -> dict[str, dict[str, str]]:
    """Return what each drawn face shows, by file name: {"00000.webp": {"hair": "bun", ...}}."""
    with drawn_labels().open(newline="", encoding="utf-8") as table:
        return {row.pop("file"): row for row in csv.DictReader(table)}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that may be an image, or that is refused before it is opened."""

    path: str  # relative to the source, printable
    location: str | int  # the path to open, or the index of the member in the zip
    size: int = 0  # bytes
    stamp: int = 0  # changes with the content: modification time in ns, or the zip's checksum
    refused: str | None = None  # the reason


@dataclass(frozen=True)
class Listing:
    """The files of a source. `read(entry)` returns a file's bytes, or raises Refused."""

    source: Path
    entries: list[Entry]  # sorted by path
    ignored: int  # files that nobody takes for images, and second names of a file
    read: Callable[[Entry], bytes]  # from any thread


@contextlib.contextmanager
def open_source(source: Path) -> Iterator[Listing]:
    """List the files of a folder or a zip; they can be read within the block.

    Raises UserError if the source does not exist, or is neither a folder nor a readable zip.
    """
    _check_exists(source)
    if source.is_dir():
        entries, ignored = _list_folder(source)
        yield Listing(source, sorted(entries, key=lambda e: e.path), ignored, _read_file)
        return
    with _open_zip(source) as archive:
        entries, ignored = _list_members(archive, source)
        yield Listing(source, sorted(entries, key=lambda e: e.path), ignored, _zip_reader(archive))


@contextlib.contextmanager
def open_reader(source: Path) -> Iterator[Callable[[Entry], bytes]]:
    """Yield a listing's `read` for a source that was listed on another machine.

    Raises UserError as `open_source` does.
    """
    _check_exists(source)
    if source.is_dir():
        yield _read_file
        return
    with _open_zip(source) as archive:
        yield _zip_reader(archive)


def _check_exists(source: Path) -> None:
    if not os.path.exists(source):  # Path.exists() raises where a name is too long
        raise UserError(f"{printable(source)} does not exist.")


def _is_ignored(path: str) -> bool:
    """Return whether a path is hidden, junk, or text of the kind that accompanies images."""
    parts = path.lower().split("/")
    if any(part in _JUNK or (part[:1] == "." and part not in (".", "..")) for part in parts):
        return True
    return posixpath.splitext(parts[-1])[1] in _COMPANIONS


# A folder -----------------------------------------------------------------------------------------


def _list_folder(root: Path) -> tuple[list[Entry], int]:
    """List every file once, under its real name if it has one: links are followed last."""
    walk = _FolderWalk(os.path.realpath(root))
    walk.visit("")
    while walk.links:
        walk.follow(walk.links.pop())
    return walk.entries, walk.ignored


class _FolderWalk:
    """A traversal of one folder. Files and folders are known by device and inode: loops end."""

    def __init__(self, root: str):
        self.root = root
        self.entries: list[Entry] = []
        self.ignored = 0
        self.links: list[str] = []
        self.visited: set[tuple[int, int]] = set()

    def visit(self, folder: str) -> None:
        """List a folder and everything below it; links are noted and not followed."""
        folders = [folder]
        while folders:
            folder = folders.pop()
            try:
                info = os.stat(self.absolute(folder))
                items = sorted(os.scandir(self.absolute(folder)), key=lambda item: item.name)
            except OSError as error:
                self.refuse(folder, _reason(error))
                continue
            if self.is_new(info):
                folders += [path for item in items if (path := self.visit_item(folder, item))]

    def visit_item(self, folder: str, item: os.DirEntry[str]) -> str | None:
        """Add a file; return the path of a folder, which is to be visited."""
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

    def follow(self, link: str) -> None:
        try:
            is_folder = stat.S_ISDIR(os.stat(self.absolute(link)).st_mode)
        except OSError as error:
            self.refuse(link, _reason(error))
            return
        if not is_folder:
            self.add(link)
        elif Path(self.root).is_relative_to(os.path.realpath(self.absolute(link))):
            self.refuse(link, "symlink loop")  # it would lead through everything around the source
        else:
            self.visit(link)

    def add(self, path: str) -> None:
        try:
            info = os.stat(self.absolute(path))
        except OSError as error:
            self.refuse(path, _reason(error))
            return
        if not stat.S_ISREG(info.st_mode):
            self.refuse(path, "not a regular file")
        elif info.st_size > MAX_BYTES:
            self.refuse(path, _TOO_LARGE)
        elif self.is_new(info):
            absolute = self.absolute(path)
            self.entries.append(Entry(printable(path), absolute, info.st_size, info.st_mtime_ns))
        else:
            self.ignored += 1

    def is_new(self, info: os.stat_result) -> bool:
        inode = (info.st_dev, info.st_ino)
        is_new = inode not in self.visited
        self.visited.add(inode)
        return is_new

    def refuse(self, path: str, reason: str) -> None:
        self.entries.append(Entry(printable(path) or ".", self.absolute(path), refused=reason))

    def absolute(self, path: str) -> str:
        return os.path.join(self.root, path) if path else self.root


def _reason(error: OSError) -> str:
    reasons = {errno.ENOENT: "broken symlink", errno.ELOOP: "symlink loop"}
    return reasons.get(error.errno or 0, "unreadable")


def _read_file(entry: Entry) -> bytes:
    """Read a file, which may have become anything since it was listed."""
    try:
        return read_bytes(str(entry.location), max_bytes=MAX_BYTES, links=True)
    except OSError as error:
        reasons = {errno.EINVAL: "not a regular file", errno.EFBIG: _TOO_LARGE}
        raise Refused(reasons.get(error.errno or 0, "unreadable")) from None


# A zip --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_zip(source: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip. Raises UserError if it is none, or its directory is too large."""
    not_a_source = UserError(
        f"{printable(source)} is neither a folder of images nor a readable zip of them."
    )
    with contextlib.ExitStack() as stack:
        try:
            raw = open_regular(source, links=True).detach()
            file = stack.enter_context(_BoundedReader(raw))
            archive = stack.enter_context(zipfile.ZipFile(file))
            file.max_bytes = MAX_BYTES + 1  # from here on members are read
        except OSError as error:
            if error.errno == errno.EINVAL:  # no regular file
                raise not_a_source from None
            raise UserError(f"cannot read {printable(source)}: {error.strerror}.") from None
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError):
            raise not_a_source from None
        yield archive


class _BoundedReader(io.BufferedReader):
    """A file of which no more than `max_bytes` are read at once, whatever its headers claim."""

    max_bytes = _MAX_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.max_bytes:
            raise UserError(
                f"{printable(str(self.name))} has too many members for a zip: its directory alone "
                f"takes {size >> 20:,} MB. Unpack it, and name the folder."
            )
        return super().read(size)


def _list_members(archive: zipfile.ZipFile, source: Path) -> tuple[list[Entry], int]:
    """List the members that may be images, and count those that are ignored."""
    entries, ignored = [], 0
    for index, info in enumerate(archive.infolist()):
        name = _member_name(info).replace("\\", "/")  # which some programs of Windows write
        if name.endswith("/"):
            continue
        if _is_ignored(name):
            ignored += 1
            continue
        refused = _member_refusal(name, info)
        entries.append(Entry(printable(name), index, info.file_size, info.CRC, refused))
    unpacked = sum(entry.size for entry in entries if entry.refused is None)
    if unpacked > max(_BOMB_TOTAL_BYTES, _BOMB_RATIO * source.stat().st_size):
        raise UserError(
            f"{printable(source)} is a zip bomb: it would unpack to {unpacked >> 30:,} GB."
        )
    return entries, ignored


def _member_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name.

    If the zip does not declare UTF-8, zipfile decodes names as MS-DOS's code page 437. A name whose
    bytes are valid UTF-8 was meant as that: macOS packs so.
    """
    if info.flag_bits & _UTF_8_FLAG:
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def _member_refusal(name: str, info: zipfile.ZipInfo) -> str | None:
    """Return why a member is not read, or None.

    Nothing is extracted, so that no name can lead anywhere; but a name that tries to belongs to an
    archive that was made to harm.
    """
    if name.startswith("/") or name[1:2] == ":" or ".." in name.split("/"):
        return "its name leads out of the zip"
    if info.flag_bits & 1:
        return "encrypted"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "symlink in a zip"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "unusual compression"
    if info.file_size > MAX_BYTES:
        return _TOO_LARGE
    if info.file_size > max(_BOMB_BYTES, _BOMB_RATIO * info.compress_size):
        return "zip bomb"
    return None


def _zip_reader(archive: zipfile.ZipFile) -> Callable[[Entry], bytes]:
    """Return a function that reads a member, from any thread."""
    infos, lock = archive.infolist(), threading.Lock()

    def read(entry: Entry) -> bytes:
        # At most one byte more than declared: reading to the end of a member that lies about its
        # size would unpack gigabytes before zipfile cuts off the excess. That byte lies beyond the
        # end, where zipfile compares the checksum.
        try:
            with lock:  # zipfile locks its file, but not the count of its readers
                member = archive.open(infos[int(entry.location)])
            try:
                return member.read(entry.size + 1)
            finally:
                with lock:
                    member.close()
        except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
            raise Refused("damaged in the zip") from None

    return read
