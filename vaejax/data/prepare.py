"""Folder or zip of images -> a prepared set: decoded, checked, resized and split, once and for all.

When all hashes are known the splits are, and the records are written in the order of the hashes:
as good as shuffled, and the same whatever the number of threads, the names of the files or their
place.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vaejax import cache, pictures
from vaejax.data import records, sheet
from vaejax.data.faces import Crop, Finder
from vaejax.data.gather import Gathered
from vaejax.data.records import builder
from vaejax.data.report import of_images, summary
from vaejax.data.sources import Entry, Listing, listing, printable
from vaejax.data.splits import INTERVALS, persons, splits
from vaejax.data.whole import appearing
from vaejax.data.workers import Threads, workers
from vaejax.errors import UserError
from vaejax.files import whole

if TYPE_CHECKING:
    from vaejax.data.beam import Beam

__all__ = ["builder", "look", "prepare"]

MOST_REFUSED = 0.05  # of the files; more than that is a mistake, not an accident
FEWEST = 3  # different images: one to learn from, two to hold out


@dataclass(frozen=True)
class _Job:
    source: Path
    files: Listing
    key: str  # says which listing at which size, cropped how
    size: int
    folder: Path
    by: "Threads | Beam"
    finder: Finder | None
    debug_sheet: Path | None


def prepare(
    source: Path,
    *,
    size: int,
    out: Path | None = None,
    allow_refused: bool = False,
    threads: int | None = None,
    beam: str | None = None,
    beam_options: str = "",
    say: Callable[[str], None] = print,
    crop: Crop | None = None,
    debug_sheet: Path | None = None,
) -> Path:
    """The prepared set of a folder or a zip, at `size` x `size` pixels; made if it is not there.

    Without `out` it lies in the user's cache, under a name that follows from the source's path and
    listing: the same call finds it again, and a changed source makes another. A source that is a
    prepared set already is handed back.

    With `crop` a picture is its largest face; a sheet shows which were found where. It lies in the
    prepared set, and at `debug_sheet` too, even when so many have none that this is an error.

    With `beam` a runner of Apache Beam does the work (DirectRunner, FlinkRunner, DataflowRunner or
    another), and the set is the same. Its workers must see `source`, `out` and the crop's cascade
    under these paths; `beam_options` are what one would write on Beam's command line.
    """
    source = Path(source)
    finder = None if crop is None else Finder(crop)
    if debug_sheet is not None and finder is None:
        raise UserError("--debug-sheet shows which faces were found: add --crop-faces.")
    if records.is_prepared(source):
        folder = _prepared_already(source, size=size, out=out, finder=finder)
        sheet.refuse_no_place(debug_sheet, outside=[folder])
        sheet.copy(folder, debug_sheet)
        return folder
    if not 8 <= size <= 2048:
        raise UserError(f"--size {size}: images can be prepared at 8 to 2048 pixels a side.")
    by = workers(beam, beam_options, threads=threads, say=say)
    with listing(source) as files:
        key = _listing_key(files.entries, size, finder)
        folder = _cache_folder(source, size, key) if out is None else Path(out).resolve()
        sheet.refuse_no_place(debug_sheet, outside=[source, folder])
        try:
            if _is_there(folder, key):
                sheet.copy(folder, debug_sheet)
                say(f"Using the prepared set {printable(folder)}.")
                return folder
            _check_place(folder, source)
            with appearing(folder) as partial:
                job = _Job(source, files, key, size, folder, by, finder, debug_sheet)
                _check_room(partial, job)
                report = _fill(partial, job, allow_refused=allow_refused)
        except FileExistsError:  # another process prepared the same meanwhile
            _is_there(folder, key)
            return folder
        except BrokenPipeError:  # nobody listens to `say`
            raise
        except OSError as error:
            message = f"cannot write {printable(folder)}: {error.strerror}; nothing was kept."
            raise UserError(message) from None
    say(f"{summary(report)} They are in {printable(folder)}.")
    return folder


def look(source: Path, *, size: int, crop: Crop | None = None) -> tuple[Path | None, int]:
    """What `prepare` would start from, without preparing it: the prepared set, if it is there in
    the cache or the source is one, and how many images or files there are."""
    source = Path(source)
    finder = None if crop is None else Finder(crop)
    if records.is_prepared(source):
        folder = _prepared_already(source, size=size, out=None, finder=finder)
        return folder, records.check(folder)["accepted"]
    with listing(source) as files:
        folder = _cache_folder(source, size, _listing_key(files.entries, size, finder))
        return (folder if records.is_prepared(folder) else None), len(files.entries)


# Where it lies


def _prepared_already(source: Path, *, size: int, out: Path | None, finder: Finder | None) -> Path:
    report = records.check(source)
    found = report["size"]
    if found != size:
        raise UserError(
            f"{printable(source)} is prepared at {found}x{found}, not {size}x{size}. "
            f"Use --size {found}, or prepare the original images again."
        )
    if finder is not None:
        finder.refuse_other(source, report.get("crop"))
    if out is not None and Path(out).resolve() != source.resolve():
        raise UserError(f"{printable(source)} is prepared already: leave out --out.")
    return source


def _listing_key(entries: Iterable[Entry], size: int, finder: Finder | None) -> str:
    key = hashlib.sha256(f"{records.FORMAT}, {size} pixels\n".encode())
    if finder is not None:
        key.update(json.dumps(finder.identity).encode())
    for entry in entries:
        key.update(json.dumps([entry.path, entry.size, entry.stamp]).encode())
    return key.hexdigest()


def _cache_folder(source: Path, size: int, key: str) -> Path:
    full = source.resolve()
    name = re.sub(r"[^\w.-]+", "_", printable(full.stem if full.is_file() else full.name))[:60]
    digest = hashlib.sha256(os.fsencode(full) + key.encode()).hexdigest()
    return cache.folder() / "prepared" / f"{name or 'images'}-{size}-{digest[:8]}"


def _is_there(folder: Path, key: str) -> bool:
    """Whether the folder is what was asked for; UserError if it is anything else that is full."""
    if records.is_prepared(folder):
        report = records.check(folder)
        if report["listing"] == key:
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


def _check_place(folder: Path, source: Path) -> None:
    if folder.is_relative_to(source.resolve()):
        raise UserError(f"{printable(folder)} lies among the images. Choose another --out.")
    if folder.is_mount():  # nothing can be renamed to it
        raise UserError(f"{printable(folder)} is a mount point. Choose a folder inside it.")


def _check_room(partial: Path, job: _Job) -> None:
    files, size = len(job.files.entries), job.size
    needed, free = 2 * files * size * size * 3, shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(
            f"not enough room in {printable(partial.parent)}: to prepare {files:,} images at "
            f"{size}x{size} takes {needed >> 20:,} MB, and {free >> 20:,} MB are free."
        )


# What goes into it


def _fill(partial: Path, job: _Job, *, allow_refused: bool) -> dict[str, Any]:
    start = time.monotonic()
    raw = partial / "pixels"
    with job.by.gathered(job.files, raw, job.source, size=job.size, finder=job.finder) as found:
        if job.finder is not None and job.files.entries:
            found.sheet.save(partial / sheet.NAME)
            sheet.copy(partial, job.debug_sheet)
        _judge(found, job, allow_refused=allow_refused)
        written = _write_images(partial, found, job)
    report = {
        "format": records.FORMAT,
        "source": printable(job.source.resolve()),
        "size": job.size,
        "seconds": round(time.monotonic() - start, 3),
        "ignored": job.files.ignored,
        "listing": job.key,
        **of_images(found, job.size, job.finder),
        **written,
    }
    report = records.complete(report, partial)
    _write_json(partial / "report.json", report)
    _refusals_file(job).unlink(missing_ok=True)
    return report


def _write_images(partial: Path, found: Gathered, job: _Job) -> dict[str, Any]:
    """The records and the contact sheet; what is known of them by then, for the report."""
    people = persons(found.paths)
    split_of = splits(found.hashes, people)
    order = sorted(range(len(found.paths)), key=lambda i: (found.hashes[i], found.paths[i]))

    def of(split: str) -> Iterator[tuple[int, records.Texts]]:
        for i in order:
            if split_of[i] == split:
                yield i, {"person": people[i], "path": found.paths[i], "sha256": found.hashes[i]}

    folder, size = partial / "records", job.size
    folder.mkdir()
    written = [job.by.write(folder, found, of(name), size=size, split=name) for name in INTERVALS]
    records.describe(folder, size=size, splits=written)
    sheet = np.stack([found.pixels[i] for i in order[:64]])
    pictures.save(partial / "contact_sheet.png", pictures.grid(sheet, columns=8))
    return {
        "splits": {name: split_of.count(name) for name in INTERVALS},
        "persons": len(set(people) - {""}),
    }


# What cannot be prepared


def _judge(found: Gathered, job: _Job, *, allow_refused: bool) -> None:
    """UserError if there is too little to learn from, or too much that is refused."""
    source, files = printable(job.source), len(job.files.entries)
    kinds = "vaejax reads jpg png webp bmp gif tiff ppm"
    if not files:
        raise UserError(f"no images in {source}: no file there could be one ({kinds}).")
    counts = Counter(refusal["reason"] for refusal in found.refused).most_common()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts)
    hint = sheet.hint(job.debug_sheet) if job.finder else ""
    if not found.paths:
        raise UserError(
            f"no usable images in {source} (0 of {files:,} files): {reasons}. {kinds}.{hint}"
        )
    if len(found.refused) > MOST_REFUSED * files and not allow_refused:
        _write_json(_refusals_file(job), found.refused)
        examples = ", ".join(refusal["path"] for refusal in found.refused[:3])
        raise UserError(
            f"{len(found.refused):,} of {files:,} files of {source} cannot be used: {reasons}; for "
            f"example {examples}. All are listed in {printable(_refusals_file(job))}. Mend or "
            f"remove them, or leave them out by --allow-refused.{hint}"
        )
    different = len(set(found.hashes))
    if different < FEWEST:
        raise UserError(
            f"only {different} different images in {source} ({len(found.refused)} of {files} files "
            f"refused{': ' + reasons if reasons else ''}): at least {FEWEST} are needed."
        )


def _refusals_file(job: _Job) -> Path:
    return job.folder.with_name(f"{job.folder.name}.refused.json")


def _write_json(path: Path, value: Any) -> None:
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
