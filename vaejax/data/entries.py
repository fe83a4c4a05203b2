"""What a listing knows of a file before it is opened."""

import os
import posixpath
import re
from dataclasses import dataclass

MOST_BYTES = 256 << 20
TOO_LARGE = "too large: more than 256 MB"

# Not images, and nobody means them as images: they are counted, and not complained about.
_JUNK = {"thumbs.db", "desktop.ini", "__macosx", "readme", "license", "licence"}
_COMPANIONS = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".xml", ".yaml", ".yml"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that may be an image, or the reason why its listing alone refuses it."""

    path: str  # relative to the source, printable
    name: str | int  # where to read it: a path that the system takes, or a place in the zip
    size: int = 0  # bytes
    stamp: int = 0  # changes with the content: time of change in ns, or the zip's checksum
    refused: str | None = None


def printable(path: str | os.PathLike[str]) -> str:
    """A path with what is not UTF-8, and what would move a terminal's cursor, spelled out."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def is_ignored(path: str) -> bool:
    """Whether a part of the path is hidden or junk, or the file goes with images as text does."""
    parts = path.lower().split("/")
    if any(part in _JUNK or (part[:1] == "." and part not in (".", "..")) for part in parts):
        return True
    return posixpath.splitext(parts[-1])[1] in _COMPANIONS
