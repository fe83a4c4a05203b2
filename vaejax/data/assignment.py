"""Which split each image has in a run: what the run has learned from stays in training.

A prepared set lies in a cache, under a name that follows from its source, and runs share it. Its
splits follow from the images that it has now. A run, though, has to know every image that it has
ever learned from. So it has a file of its own:

    splits.npz   16 bytes for each file, each image's pixels and each person, by their split; and
                 the split of every image of the set that the run reads

While a run's images do not change, it reads the prepared set. When it goes on with changed ones,
and their splits are not those of the set, then it reads a copy of the set, with splits of its own.
The copy lies in the cache too, and is made again from the set and `splits.npz`.
"""

import hashlib
import io
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from vaejax.cache import cache_folder
from vaejax.data import records
from vaejax.data.batches import Images
from vaejax.data.duplicates import hash_pixels
from vaejax.data.splits import (
    INTERVALS,
    LEFT_OUT,
    MIXED,
    Facts,
    go_by_persons,
    image_ids,
    keep_splits,
    person_id,
)
from vaejax.errors import UserError
from vaejax.files import atomic, atomic_folder, printable, write_json

FILE = "splits.npz"  # in a run's folder

_SPLITS = (*INTERVALS, LEFT_OUT)
_GROUPS = (*INTERVALS, MIXED)  # of the ids in the file
_ID_BYTES = 16
_BATCH = 256  # images that are read at a time


class Assignment(NamedTuple):
    """The splits of all images that a run has had."""

    known: dict[bytes, str]  # by the ids of files, pixels and persons
    source: str  # digest of the identity of the prepared set that it had last
    splits: list[str]  # of that set's images, in the order of their hashes and paths
    is_own: bool  # whether they are not those of the set


def identity(report: dict[str, Any]) -> dict[str, Any]:
    """Return what identifies the images of a prepared set, by its report: which, and their splits.

    A copy with a run's own splits has the identity of the set that it was made from. A set that was
    prepared before there was an "assignment" does not have one.
    """
    if "original" in report:
        return report["original"]
    names = ("fingerprint", "persons", "splits", "assignment")
    return {name: report[name] for name in names if name in report}


def hash_assignment(hashes: Sequence[str], splits: Sequence[str]) -> str:
    """Hash which image is in which split, but for their order."""
    lines = sorted(f"{digest} {split}" for digest, split in zip(hashes, splits, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# The images of a prepared set ---------------------------------------------------------------------


class _Row(NamedTuple):
    """An image of a prepared set."""

    facts: Facts
    path: str  # in the source
    split: str
    images: Images  # of that split
    place: int  # among them


def _read_rows(prepared: Path) -> list[_Row]:
    """Read all images of a prepared set, in the order of their hashes and paths."""
    rows = [
        _Row(facts, path, split, images, place)
        for split in records.read_dataset_report(prepared)["splits"]
        for images in [Images(prepared, split)]
        for place, (facts, path) in enumerate(_examine(images))
    ]
    return sorted(rows, key=lambda row: (row.facts.sha256, row.path))


def _examine(images: Images) -> Iterator[tuple[Facts, str]]:
    """Yield what decides on the split of every image, and its path."""
    for first in range(0, len(images), _BATCH):
        indices = np.arange(first, min(first + _BATCH, len(images)))
        for index, pixels in zip(indices.tolist(), images.read(indices), strict=True):
            image = images.metadata(index)
            folder = str(PurePosixPath(image["path"]).parent)
            facts = Facts(image["sha256"], hash_pixels(pixels), image["person"], folder)
            yield facts, image["path"]


# A run's file -------------------------------------------------------------------------------------


def read(folder: Path) -> Assignment | None:
    """Read the splits of a run's images; None if it has none yet. Raises UserError for damage."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            known = {
                row.tobytes(): group
                for group in _GROUPS
                for row in np.asarray(file[group], np.uint8).reshape(-1, _ID_BYTES)
            }
            splits = [_SPLITS[code] for code in file["splits"].tolist()]
            source, is_own = str(file["source"]), bool(file["is_own"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile):
        raise UserError(
            f"{printable(path)} is damaged, and it alone says which images this run has learned "
            "from. Put it back, or start anew with --fresh, which keeps the folder"
        ) from None
    return Assignment(known, source, splits, is_own)


def _write(folder: Path, assignment: Assignment) -> None:
    groups: dict[str, list[bytes]] = {group: [] for group in _GROUPS}
    for key, group in assignment.known.items():
        groups[group].append(key)
    arrays: dict[str, Any] = {
        group: np.frombuffer(b"".join(sorted(keys)), np.uint8).reshape(-1, _ID_BYTES)
        for group, keys in groups.items()
    }
    codes = np.asarray([_SPLITS.index(split) for split in assignment.splits], np.uint8)
    with atomic(folder / FILE) as partial, partial.open("wb") as file:
        source, is_own = np.asarray(assignment.source), np.asarray(assignment.is_own)
        np.savez(file, **arrays, splits=codes, source=source, is_own=is_own)


def remember(folder: Path, prepared: Path) -> None:
    """Add the images of the set that a run reads to those that it knows, before it learns of them.

    Raises OSError if the disk does not take them.
    """
    report = records.read_dataset_report(prepared)
    kept, source = read(folder), _digest(identity(report))
    if kept is None or kept.source != source:
        rows = _read_rows(prepared)
        known = _extended({} if kept is None else kept.known, rows)
        splits = [row.split for row in rows]
        _write(folder, Assignment(known, source, splits, "original" in report))


def _extended(known: dict[bytes, str], rows: Sequence[_Row]) -> dict[bytes, str]:
    """Return what is known with these images, too. What was learned from stays so."""
    extended = dict(known)
    by_person = go_by_persons([row.facts for row in rows], known)
    for image, split in ((row.facts, row.split) for row in rows):
        if split == LEFT_OUT:
            continue
        for key in image_ids(image):
            if extended.get(key) != "train":
                extended[key] = split
        if by_person and image.person:
            key = person_id(image.person)
            extended[key] = split if extended.get(key, split) == split else MIXED
    return extended


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# The set that a run reads -------------------------------------------------------------------------


def set_of_run(folder: Path, prepared: Path) -> Path:
    """Return the set that a run reads while its images are those of a prepared set.

    That is the prepared set itself, unless the run has split it in another way.
    """
    kept = read(folder)
    if kept is None or not kept.is_own or kept.source != _source(prepared):
        return prepared
    return _copy(prepared, kept.splits)


def split_for_run(folder: Path, prepared: Path, *, before: Path | None) -> Path:
    """Return the set that a run reads from now on: a prepared set, with the splits that the run's
    images have had; say how many new ones are left out because they would tie two splits.

    `before` is the set that the run read last; it is asked if the run has no `splits.npz`, as those
    of earlier versions of vaejax. Raises UserError if a split would be empty.
    """
    kept = read(folder)
    known = _known_before(folder, before) if kept is None else kept.known
    if not known or (kept is not None and kept.source == _source(prepared)):
        return set_of_run(folder, prepared)
    rows = _read_rows(prepared)
    natural = [row.split for row in rows]
    splits = keep_splits([row.facts for row in rows], natural, known)
    if empty := [name for name in INTERVALS if name not in splits]:
        raise UserError(
            f"of the images that {printable(folder)} goes on with, none is left for "
            f"{' and '.join(empty)}, because every image keeps the split that it has had: put the "
            "others back, or start anew with --fresh"
        )
    if left_out := splits.count(LEFT_OUT):
        print(
            f"{left_out:,} new images are left out of all splits: they are copies of images, or "
            "show persons, of different splits"
        )
    return prepared if splits == natural else _copy(prepared, splits)


def _known_before(folder: Path, before: Path | None) -> dict[bytes, str]:
    """Return the splits of the images that a run without a file of its own was trained on."""
    if before is None:
        return {}
    try:
        return _extended({}, _read_rows(before))
    except UserError:
        print(
            f"warning: which images {printable(folder)} has learned from is unknown, because it "
            f"has no {FILE}, and {printable(before)} cannot be read: they may be among the "
            "held-out ones",
            file=sys.stderr,
        )
        return {}


def _source(prepared: Path) -> str:
    return _digest(identity(records.read_dataset_report(prepared)))


def _copy(prepared: Path, splits: Sequence[str]) -> Path:
    """Copy a prepared set into the cache, with other splits, unless that was done before."""
    name = re.sub(r"[^\w.-]+", "_", printable(prepared.name))[:60]
    digest = _digest({"source": _source(prepared), "splits": list(splits)})
    folder = cache_folder() / f"prepared/{name}-split-{digest[:8]}"
    if records.is_prepared(folder):
        records.check(folder)
        return folder
    try:
        with atomic_folder(folder) as partial:
            _write_copy(partial, prepared, splits)
    except FileExistsError:  # another process has made the same meanwhile
        pass
    except OSError as error:
        message = f"cannot write {printable(folder)}: {error.strerror}; nothing was kept."
        raise UserError(message) from None
    return folder


def _write_copy(partial: Path, prepared: Path, splits: Sequence[str]) -> None:
    report, rows = records.read_dataset_report(prepared), _read_rows(prepared)

    def examples(split: str) -> Iterator[records.Record]:
        for own, row in zip(splits, rows, strict=True):
            if own == split:
                pixels = row.images.read(np.array([row.place], np.int64))[0]
                yield records.Record(image=pixels, **row.images.metadata(row.place))

    counts = {name: splits.count(name) for name in _SPLITS if name in (*INTERVALS, *splits)}
    folder, size = partial / "records", report["size"]
    folder.mkdir()
    infos = [records.write_split(folder, split=name, examples=examples(name)) for name in counts]
    records.write_metadata(folder, size=size, splits=infos)
    shutil.copyfile(prepared / "contact_sheet.png", partial / "contact_sheet.png")
    hashes = [row.facts.sha256 for row in rows]
    own = {"splits": counts, "assignment": hash_assignment(hashes, splits)}
    report = records.seal({**report, **own, "original": identity(report)}, partial)
    write_json(partial / records.REPORT, report)


# Evaluation ---------------------------------------------------------------------------------------


def learned_from(folder: Path, images: Images) -> Int[np.ndarray, " n"]:
    """Return the indices of the images that a run has ever had for training."""
    kept = read(folder)
    if kept is None:
        return np.zeros(0, np.int64)
    indices = [
        index
        for index, (facts, _) in enumerate(_examine(images))
        if any(kept.known.get(key) == "train" for key in image_ids(facts))
    ]
    return np.asarray(indices, np.int64)
