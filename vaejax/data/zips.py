"""A zip is read in place: nothing is extracted, and what its makers say of it is not believed."""

import contextlib
import io
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from vaejax.data.decode import Refused
from vaejax.data.entries import MOST_BYTES, TOO_LARGE, Entry, is_ignored, printable
from vaejax.errors import UserError

# How many times smaller than its content a bomb is, and from which size on: a member, or all of
# them, which may lie over one another in the file and each look harmless.
_BOMB_RATIO, _BOMB_BYTES, _BOMB_BYTES_IN_ALL = 200, 16 << 20, 4 << 30
# Of a zip's directory, which zipfile reads at once and makes ten times as much of in memory: a
# million members are some 60 to 100 MB of it.
_MOST_DIRECTORY = 128 << 20
_SAYS_UTF_8 = 1 << 11  # among a member's flags


@contextlib.contextmanager
def opened(source: Path) -> Iterator[zipfile.ZipFile]:
    """A zip, as far as it is one and of bearable size."""
    neither = UserError(
        f"{printable(source)} is neither a folder of images nor a readable zip of them."
    )
    if not source.is_file():  # to open a pipe would be to wait
        raise neither
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(_Limited(io.FileIO(source)))
            archive = stack.enter_context(zipfile.ZipFile(file))
            file.most = MOST_BYTES + 1  # from here on members are read
        except OSError as error:
            raise UserError(f"cannot read {printable(source)}: {error.strerror}.") from None
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError):
            raise neither from None
        yield archive


class _Limited(io.BufferedReader):
    """A zip of which nothing larger is read at once, whatever it says of itself."""

    most = _MOST_DIRECTORY

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.most:
            raise UserError(
                f"{printable(str(self.name))} has too many members for a zip: its directory alone "
                f"takes {size >> 20:,} MB. Unpack it, and name the folder."
            )
        return super().read(size)


def members(archive: zipfile.ZipFile, source: Path) -> tuple[list[Entry], int]:
    """What may be images, and how many are ignored."""
    entries, ignored = [], 0
    for place, info in enumerate(archive.infolist()):
        name = _name(info).replace("\\", "/")  # as some programs of Windows write them
        if name.endswith("/"):
            continue
        if is_ignored(name):
            ignored += 1
            continue
        why = _refused(name, info)
        entries.append(Entry(printable(name), place, info.file_size, info.CRC, why))
    unpacked = sum(entry.size for entry in entries if entry.refused is None)
    if unpacked > max(_BOMB_BYTES_IN_ALL, _BOMB_RATIO * source.stat().st_size):
        raise UserError(
            f"{printable(source)} is a zip bomb: it would unpack to {unpacked >> 30:,} GB."
        )
    return entries, ignored


def _name(info: zipfile.ZipInfo) -> str:
    """A member's name. Where a zip does not say in which alphabet, zipfile takes MS-DOS's; but what
    is UTF-8 was meant as that: so a Mac packs."""
    if info.flag_bits & _SAYS_UTF_8:
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def _refused(name: str, info: zipfile.ZipInfo) -> str | None:
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
        return TOO_LARGE
    if info.file_size > max(_BOMB_BYTES, _BOMB_RATIO * info.compress_size):
        return "zip bomb"
    return None


def reader(archive: zipfile.ZipFile) -> Callable[[Entry], bytes]:
    """`read` of a member, from any thread."""
    infos, lock = archive.infolist(), threading.Lock()

    def read(entry: Entry) -> bytes:
        """At most the size that was declared. To ask for all would unpack two gigabytes of a member
        that lies, before zipfile cuts off what is too much."""
        try:
            with lock:  # zipfile locks its file, but not the count of its readers
                member = archive.open(infos[int(entry.name)])
            try:
                return member.read(entry.size + 1)  # beyond its end, where it is checked
            finally:
                with lock:
                    member.close()
        except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
            raise Refused("damaged in the zip") from None

    return read
