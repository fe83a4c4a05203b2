"""What a folder holds, by SHA-256: written into it last, and compared before anything is read.

Orbax restores a checkpoint in which a bit has flipped without a word.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vaejax.data.sources import printable
from vaejax.files import flush, whole

NAME = "manifest.json"


class Damaged(Exception):
    """What is wrong with a folder, as half a sentence."""


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Put all that lies in the folder onto the disk, and then the facts and every file's sum."""
    files = {name: _look(folder / name) for name in _names(folder)}
    for where, _, names in os.walk(folder):
        for path in (*(os.path.join(where, name) for name in names), where):
            flush(path)
    content = {**facts, "files": files}
    with whole(folder / NAME) as partial:
        text = json.dumps({"sha256": _sum(content), **content}, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")


def check(folder: Path) -> dict[str, Any]:
    """The facts. Raises Damaged, with the file's name, where anything is not as it was written."""
    facts = read(folder)
    there = _names(folder)
    for name, known in facts["files"].items():
        if name not in there:
            raise Damaged(f"{name} is missing")
        found = _look(folder / name)
        if found["bytes"] != known["bytes"]:
            raise Damaged(f"{name} has {found['bytes']:,} bytes, not {known['bytes']:,}")
        if found["sha256"] != known["sha256"]:
            raise Damaged(f"{name} has changed since it was written (its SHA-256 differs)")
    if stray := sorted(there - facts["files"].keys()):
        raise Damaged(f"{printable(stray[0])} does not belong there")
    return facts


def read(folder: Path) -> dict[str, Any]:
    """The facts, without a look at the files. Raises Damaged."""
    try:
        facts = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except (OSError, ValueError, RecursionError):
        raise Damaged(f"{NAME} cannot be read") from None
    if not isinstance(facts, dict) or facts.pop("sha256", None) != _sum(facts):
        raise Damaged(f"{NAME} has changed since it was written")
    files = facts.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(known, dict)
        and isinstance(known.get("bytes"), int)
        and isinstance(known.get("sha256"), str)
        for known in files.values()
    ):
        raise Damaged(f"{NAME} does not say which files there are")
    return facts


def _sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _names(folder: Path) -> set[str]:
    """Of all files but the manifest; a link or a pipe is none of ours, but it is there."""
    found = {
        os.path.relpath(os.path.join(where, name), folder)
        for where, folders, names in os.walk(folder)
        for name in (*names, *(n for n in folders if os.path.islink(os.path.join(where, n))))
    }
    return found - {NAME}


def _look(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.is_symlink():
        raise Damaged(f"{path.name} is no file")
    try:
        with path.open("rb") as file:
            total = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": total}
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from None
