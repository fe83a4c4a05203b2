"""Prepare a folder or a zip of images as a data set: decoded, checked, resized and split, once.

The splits follow from the hashes of all files, and the records are written in the order of the
hashes: as good as shuffled, and the same whatever the number of threads, or the names and the
location of the files.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vaejax import pictures
from vaejax.cache import cache_folder
from vaejax.data import faces, records
from vaejax.data.assignment import hash_assignment
from vaejax.data.duplicates import MAX_DISTANCE, near_duplicates
from vaejax.data.faces import Crop, Detector
from vaejax.data.gather import Gathered, Threads, Workers
from vaejax.data.records import builder
from vaejax.data.sources import Entry, Listing, open_source
from vaejax.data.splits import (
    INTERVALS,
    Facts,
    assign_splits,
    doubtful_persons,
    person_depth,
    person_names,
)
from vaejax.errors import UserError
from vaejax.files import atomic_folder, printable, write_json

__all__ = ["builder", "find_prepared", "prepare"]

MAX_REFUSED = 0.05  # of the files; more than that is a mistake, not an accident
MIN_IMAGES = 3  # different ones: one for training, two held out
LISTED_PAIRS = 1000  # of near-duplicates, in the report
RULES = "splits 2"  # raise the number when the same files are split or joined in another way


@dataclass(frozen=True)
class _Job:
    files: Listing
    key: str  # identifies the listing, the size and the crop
    size: int
    folder: Path
    workers: Workers
    detector: Detector | None
    debug_sheet: Path | None
    person_depth: int | None
    say: Callable[[str], None]


def prepare(
    source: Path,
    *,
    size: int,
    out: Path | None = None,
    crop: Crop | None = None,
    debug_sheet: Path | None = None,
    allow_refused: bool = False,
    person_depth: int | None = None,
    workers: Workers | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Prepare a folder or a zip of images at `size` x `size` pixels, unless this was done before.

    Args:
        out: the folder of the prepared set. Without it the set lies in the user's cache, under a
            name that follows from the source's path and listing: the same call finds it again, and
            a changed source makes another one. A source that is a prepared set is returned as it
            is.
        crop: crop every picture to its largest face.
        debug_sheet: a PNG that shows where faces were detected. It is written even if so many
            pictures have no face that this is an error. The prepared set has a copy.
        allow_refused: accept that more than 5 % of the files cannot be used.
        person_depth: which folder of a file's path names the person, from 1 for the outermost; 0
            for none. Without it, the first one that not all images share.
        workers: who does the work; None for one thread per core. Workers of Apache Beam must see
            `source`, `out` and the crop's cascade under these paths; the set is the same.
        say: is called with each line of progress.

    Returns the folder of the prepared set. Raises UserError, and keeps nothing, if the source
    cannot be used, or `out` holds anything else.
    """
    source = Path(source)
    detector = None if crop is None else Detector(crop)
    if debug_sheet is not None and detector is None:
        raise UserError("--debug-sheet shows which faces were found: add --crop-faces.")
    if records.is_prepared(source):
        folder = _check_prepared_source(
            source, size=size, out=out, detector=detector, person_depth=person_depth
        )
        _check_sheet(debug_sheet, outside=[folder])
        faces.copy_sheet(folder, debug_sheet)
        return folder
    if not 8 <= size <= 2048:
        raise UserError(f"--size {size}: images can be prepared at 8 to 2048 pixels a side.")
    if person_depth is not None and person_depth < 0:
        raise UserError(f"--person-depth {person_depth}: at least 0")
    with open_source(source) as files:
        key = _listing_key(files.entries, size, detector, person_depth)
        folder = Path(out).resolve() if out else cache_folder() / _cache_name(source, size, key)
        _check_sheet(debug_sheet, outside=[source, folder])
        workers = Threads() if workers is None else workers
        job = _Job(files, key, size, folder, workers, detector, debug_sheet, person_depth, say)
        try:
            if _holds(folder, key, files.entries):
                faces.copy_sheet(folder, debug_sheet)
                say(f"Using the prepared set {printable(folder)}.")
                return folder
            _check_location(folder, source)
            with atomic_folder(folder) as partial:
                _check_free_space(partial, job)
                report = _fill(partial, job, allow_refused=allow_refused)
        except FileExistsError:  # another process prepared the same meanwhile
            if not _holds(folder, key, files.entries):
                raise
            return folder
        except BrokenPipeError:  # nobody reads what `say` prints
            raise
        except OSError as error:
            message = f"cannot write {printable(folder)}: {error.strerror}; nothing was kept."
            raise UserError(message) from None
    say(f"{_summary(report)} They are in {printable(folder)}.")
    return folder


def find_prepared(
    source: Path, *, size: int, crop: Crop | None = None, person_depth: int | None = None
) -> tuple[Path | None, int]:
    """Find what `prepare` would start from, and write nothing.

    Returns the prepared set and its number of images, if the source is one or the cache holds one;
    else None and the number of files in the source.
    """
    source = Path(source)
    detector = None if crop is None else Detector(crop)
    if records.is_prepared(source):
        folder = _check_prepared_source(
            source, size=size, out=None, detector=detector, person_depth=person_depth
        )
        return folder, records.check(folder)["accepted"]
    with open_source(source) as files:
        key = _listing_key(files.entries, size, detector, person_depth)
        folder = cache_folder(make=False) / _cache_name(source, size, key)
        return (folder if _holds(folder, key, files.entries) else None), len(files.entries)


# Where a prepared set lies ------------------------------------------------------------------------


def _check_prepared_source(
    source: Path,
    *,
    size: int,
    out: Path | None,
    detector: Detector | None,
    person_depth: int | None,
) -> Path:
    """Return a source that is a prepared set. Raises UserError if it is not the requested one."""
    report = records.check(source)
    prepared_size = report["size"]
    if prepared_size != size:
        raise UserError(
            f"{printable(source)} is prepared at {prepared_size}x{prepared_size}, not "
            f"{size}x{size}. Use --size {prepared_size}, or prepare the original images again."
        )
    if detector is not None:
        detector.check_same_crop(source, report.get("crop"))
    if person_depth is not None and person_depth != report.get("person_depth"):
        raise UserError(
            f"{printable(source)} is prepared already, with --person-depth "
            f"{report.get('person_depth', 'unknown')}: leave out --person-depth, or prepare the "
            "original images again."
        )
    if out is not None and Path(out).resolve() != source.resolve():
        raise UserError(f"{printable(source)} is prepared already: leave out --out.")
    return source


def _listing_key(
    entries: Iterable[Entry], size: int, detector: Detector | None, person_depth: int | None
) -> str:
    """Hash everything that a prepared set depends on, but for the contents of the files."""
    key = hashlib.sha256(f"{records.FORMAT}, {RULES}, {size} pixels\n".encode())
    if person_depth is not None:
        key.update(f"persons at {person_depth}\n".encode())
    if detector is not None:
        key.update(json.dumps(detector.identity).encode())
    for entry in entries:
        key.update(json.dumps([entry.path, entry.size, entry.stamp]).encode())
    return key.hexdigest()


def _cache_name(source: Path, size: int, key: str) -> str:
    """Return where a prepared set lies in the cache folder."""
    path = source.resolve()
    name = re.sub(r"[^\w.-]+", "_", printable(path.stem if path.is_file() else path.name))[:60]
    digest = hashlib.sha256(os.fsencode(path) + key.encode()).hexdigest()
    return f"prepared/{name or 'images'}-{size}-{digest[:8]}"


def _holds(folder: Path, key: str, entries: Sequence[Entry]) -> bool:
    """Return whether the folder holds the prepared set with this key, of the files of a listing.

    Raises UserError if it holds anything else, or another version of vaejax has written it.
    """
    if records.is_prepared(folder):
        report = records.check(folder)
        if report["listing"] == key and _is_of(report, entries):
            return True
        raise UserError(
            f"{printable(folder)} holds another prepared set: {report['source']} at "
            f"{report['size']}x{report['size']}, or as that was before it changed, or not "
            "cropped in this way. Choose another --out, or delete that folder."
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{printable(folder)} is a file. Choose another --out.")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{printable(folder)} is neither empty nor a prepared set. Choose another --out."
        )
    return False


def _is_of(report: Mapping[str, Any], entries: Sequence[Entry]) -> bool:
    """Tell whether a report accounts for every file of a listing."""
    refused = report.get("refused")
    if not isinstance(refused, list) or report["accepted"] + len(refused) != len(entries):
        return False
    names = {str(refusal.get("path")) for refusal in refused if isinstance(refusal, dict)}
    return names <= {entry.path for entry in entries}


def _check_location(folder: Path, source: Path) -> None:
    if folder.is_relative_to(source.resolve()):
        raise UserError(f"{printable(folder)} lies among the images. Choose another --out.")
    if other := records.enclosing_set(folder.parent):
        raise UserError(
            f"{printable(folder)} lies in {printable(other)}, which is a prepared data set. Choose "
            "another --out."
        )
    if folder.is_mount():  # nothing can be renamed to it
        raise UserError(f"{printable(folder)} is a mount point. Choose a folder inside it.")


def _check_sheet(path: Path | None, *, outside: Iterable[Path]) -> None:
    if path and (other := records.enclosing_set(path)):
        raise UserError(
            f"--debug-sheet {printable(path)} lies in {printable(other)}, which is a prepared "
            "data set: name a file elsewhere."
        )
    faces.check_sheet_path(path, outside=outside)


def _check_free_space(partial: Path, job: _Job) -> None:
    files, size = len(job.files.entries), job.size
    needed, free = 3 * files * size * size * 3, shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(
            f"not enough room in {printable(partial.parent)}: to prepare {files:,} images at "
            f"{size}x{size} takes {needed >> 20:,} MB, and {free >> 20:,} MB are free."
        )


# What a prepared set holds ------------------------------------------------------------------------


def _fill(partial: Path, job: _Job, *, allow_refused: bool) -> dict[str, Any]:
    """Write everything into an empty folder, and return the report."""
    start = time.monotonic()
    with job.workers.gather(
        job.files, partial / "scratch", size=job.size, detector=job.detector, say=job.say
    ) as gathered:
        if job.detector is not None and job.files.entries:
            gathered.sheet.save(partial / faces.SHEET_NAME)
            faces.copy_sheet(partial, job.debug_sheet)
        _check_enough(gathered, job, allow_refused=allow_refused)
        split_facts = _write_images(partial, gathered, job)
    report = {
        "format": records.FORMAT,
        "source": printable(job.files.source.resolve()),
        "size": job.size,
        "seconds": round(time.monotonic() - start, 3),
        "ignored": job.files.ignored,
        "listing": job.key,
        **_image_facts(gathered, job.size, job.detector),
        **split_facts,
    }
    report = records.seal(report, partial)
    write_json(partial / records.REPORT, report)
    _refusals_file(job).unlink(missing_ok=True)
    return report


def _write_images(partial: Path, gathered: Gathered, job: _Job) -> dict[str, Any]:
    """Write the records and the contact sheet; return the report's facts on splits and persons."""
    persons = person_names(gathered.paths, depth=job.person_depth)
    folders = (str(PurePosixPath(path).parent) for path in gathered.paths)
    facts = zip(gathered.hashes, gathered.pixel_hashes, persons, folders, strict=True)
    split_of = assign_splits([Facts(*fact) for fact in facts])
    order = sorted(
        range(len(gathered.paths)), key=lambda i: (gathered.hashes[i], gathered.paths[i])
    )

    def select(split: str) -> Iterator[tuple[int, records.Metadata]]:
        for i in order:
            if split_of[i] == split:
                path, digest = gathered.paths[i], gathered.hashes[i]
                yield i, {"person": persons[i], "path": path, "sha256": digest}

    folder, size = partial / "records", job.size
    folder.mkdir()
    infos = [
        job.workers.write_split(folder, gathered, select(split), size=size, split=split)
        for split in INTERVALS
    ]
    records.write_metadata(folder, size=size, splits=infos)
    images = np.stack([gathered.pixels[i] for i in order[:64]])
    pictures.save_png(partial / "contact_sheet.png", pictures.grid(images, columns=8))
    return {
        "splits": {split: split_of.count(split) for split in INTERVALS},
        "assignment": hash_assignment(gathered.hashes, split_of),
        **_person_facts(gathered.paths, persons, job),
    }


def _person_facts(paths: Sequence[str], persons: Sequence[str], job: _Job) -> dict[str, Any]:
    """Return the report's facts on persons; warn where folders may not name any."""
    found = person_depth(paths)
    depth = found if job.person_depth is None else job.person_depth
    if doubt := doubtful_persons(persons):
        job.say(
            f"warning: {doubt}. --person-depth N says which folder of a path names the person: 1 "
            f"the outermost, here it was {depth}; 0 says that none does."
        )
    return {"persons": len(set(persons) - {""}), "person_depth": depth, "doubt": doubt}


# The preparation report ---------------------------------------------------------------------------


def _image_facts(gathered: Gathered, size: int, detector: Detector | None) -> dict[str, Any]:
    """Return the report's facts on files and images; "crop" says how faces were detected."""
    facts = {
        "accepted": len(gathered.paths),
        "refused": gathered.refused,
        "duplicates": _duplicates(gathered),
        "near_duplicates": _near_duplicates(gathered),
        "sizes": _sizes(gathered.dimensions),
        "fingerprint": _fingerprint(gathered.hashes, size, detector),
    }
    if detector is not None:
        cascade = {"cascade": printable(detector.cascade.name)}
        facts["crop"] = {**cascade, **detector.identity, "several_faces": gathered.several_faces}
    return facts


def _duplicates(gathered: Gathered) -> list[list[str]]:
    """List the files of each image that there is more than once, by its pixels."""
    paths_of: dict[str, list[str]] = {}
    for path, digest in zip(gathered.paths, gathered.pixel_hashes, strict=True):
        paths_of.setdefault(digest, []).append(path)
    return [paths for paths in paths_of.values() if len(paths) > 1]


def _near_duplicates(gathered: Gathered) -> dict[str, Any]:
    """Describe the pairs of images that look the same, and are not: one file of each image."""
    first = {digest: i for i, digest in reversed(list(enumerate(gathered.pixel_hashes)))}
    different = sorted(first.values())
    near = near_duplicates([gathered.looks[i] for i in different], examples=LISTED_PAIRS)
    paths = [gathered.paths[i] for i in different]
    return {
        "pairs": near.pairs,
        "complete": near.complete,
        "max_distance": MAX_DISTANCE,
        "listed": [[paths[one], paths[other]] for one, other in near.examples],
    }


def _sizes(dimensions: Counter[tuple[int, int]]) -> dict[str, Any]:
    """Describe the sizes of the files' images, in pixels."""
    sizes = np.repeat(np.array(list(dimensions)), list(dimensions.values()), axis=0)  # [n 2]
    sides = {
        side: {
            "min": int(values.min()),
            "median": float(np.median(values)),
            "max": int(values.max()),
        }
        for side, values in zip(("width", "height"), sizes.T, strict=True)
    }
    common = {f"{w}x{h}": count for (w, h), count in dimensions.most_common(5)}
    return {**sides, "most_common": common}


def _fingerprint(hashes: Iterable[str], size: int, detector: Detector | None) -> str:
    """Hash the images, their size and crop, but neither their names nor their location."""
    crop = [] if detector is None else [json.dumps(detector.identity)]
    return hashlib.sha256("\n".join([*sorted(hashes), str(size), *crop]).encode()).hexdigest()


def _summary(report: dict[str, Any]) -> str:
    """Summarize a report in one sentence."""
    parts = ", ".join(f"{count:,} {name}" for name, count in report["splits"].items())
    duplicates = sum(len(paths) - 1 for paths in report["duplicates"])
    persons = ""
    if report["persons"]:
        persons = f" of {report['persons']:,} persons (folder {report['person_depth']} of a path)"
    near = f", {report['near_duplicates']['pairs']:,} pairs look alike"
    crop = ""
    if "crop" in report:
        none = sum(refusal["reason"] == faces.NO_FACE for refusal in report["refused"])
        crop = f" {report['crop']['several_faces']:,} with several faces and {none:,} with none,"
    return (
        f"Prepared {report['accepted']:,} images{persons} from {report['source']} at "
        f"{report['size']}x{report['size']} ({parts}); {len(report['refused']):,} files "
        f"refused,{crop} {duplicates:,} duplicates kept{near}, {report['seconds']:.1f} s."
    )


# What cannot be prepared --------------------------------------------------------------------------


def _check_enough(gathered: Gathered, job: _Job, *, allow_refused: bool) -> None:
    """Raise UserError if there are too few images, or too many files are refused."""
    source, files = printable(job.files.source), len(job.files.entries)
    kinds = "vaejax reads jpg png webp bmp gif tiff ppm"
    if not files:
        raise UserError(f"no images in {source}: no file there could be one ({kinds}).")
    counts = Counter(refusal["reason"] for refusal in gathered.refused).most_common()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts)
    hint = faces.sheet_hint(job.debug_sheet) if job.detector else ""
    if not gathered.paths:
        raise UserError(
            f"no usable images in {source} (0 of {files:,} files): {reasons}. {kinds}.{hint}"
        )
    if len(gathered.refused) > MAX_REFUSED * files and not allow_refused:
        write_json(_refusals_file(job), gathered.refused)
        examples = ", ".join(refusal["path"] for refusal in gathered.refused[:3])
        raise UserError(
            f"{len(gathered.refused):,} of {files:,} files of {source} cannot be used: {reasons}; "
            f"for example {examples}. All are listed in {printable(_refusals_file(job))}. Mend or "
            f"remove them, or leave them out by --allow-refused.{hint}"
        )
    different = len(set(gathered.pixel_hashes))
    if different < MIN_IMAGES:
        raise UserError(
            f"only {different} different images in {source} ({len(gathered.refused)} of {files} "
            f"files refused{': ' + reasons if reasons else ''}): at least {MIN_IMAGES} are needed."
        )


def _refusals_file(job: _Job) -> Path:
    return job.folder.with_name(f"{job.folder.name}.refused.json")
