"""A prepared data set on disk: a TFDS data set of ArrayRecords, a report, a contact sheet.

    dataset_report.json  what was accepted, refused and duplicated; the last file to be written
    contact_sheet.png    64 of the images
    faces_sheet.png      where faces were detected, if the images were cropped to them
    records/             read by `tfds.builder_from_directory`: no TensorFlow, nothing to decode
    index/               of each split, where the pixels of its images lie in those files: `pixels`

TFDS's features serialize the records and its `write_metadata` describes them. Its own
`GeneratorBasedBuilder` holds a split of up to 1 GB in memory and fails beyond that if TensorFlow is
not installed. On Apache Beam a TFDS builder writes the records: `beam.py`.
"""

import errno
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
from jaxtyping import UInt8

from vaejax.data import pixels
from vaejax.errors import UserError
from vaejax.files import printable, read_json

if TYPE_CHECKING:
    import tensorflow_datasets as tfds  # its import takes half a second, which few commands need
    from array_record.python.array_record_module import ArrayRecordReader

REPORT = "dataset_report.json"
FORMAT = "vaejax prepared set 4"  # raise the number when older sets can no longer be read

_REPORTS = (REPORT, "report.json")  # the latter up to format 2
_ANY_FORMAT = re.compile(r"vaejax prepared set \d+")
_REQUIRED = {
    "source": str,
    "size": int,
    "accepted": int,
    "fingerprint": str,
    "listing": str,
    "files": dict,
    "metadata": dict,
}


class Metadata(TypedDict):
    """What is known of an image besides its pixels."""

    person: str  # "" if unknown
    path: str  # in the source
    sha256: str  # of the file, in hex


class Record(Metadata):
    """One example."""

    image: UInt8[np.ndarray, "size size 3"]


# Reading ------------------------------------------------------------------------------------------


def builder(prepared: Path) -> Any:  # a tfds.core.DatasetBuilder, whose annotations are wrong
    """Return TFDS's reader of a prepared set, as in `builder(folder).as_data_source("train")`.

    Raises UserError if it is no prepared set, or a damaged one.
    """
    size = check(prepared)["size"]
    import tensorflow_datasets as tfds
    from google.protobuf import json_format

    folder = Path(prepared) / "records"
    try:
        # compared first, because TFDS imports whatever class the file names
        if read_json(folder / "features.json") != json.loads(
            json_format.MessageToJson(features(size).to_proto())
        ):
            raise ValueError("other features")
        return tfds.builder_from_directory(os.fspath(folder))
    except Exception:  # whatever its parsers of JSON raise for damage
        raise damaged(prepared, "its metadata cannot be read") from None


def is_prepared(folder: Path) -> bool:
    """Return whether a folder is a prepared set, be it damaged or of another version."""
    return format_of(folder) is not None


def format_of(folder: Path) -> str | None:
    """Return the format of a prepared set, or None if the folder is no prepared set."""
    for name in _REPORTS:
        if (report := _read_report(Path(folder) / name)) is not None:
            return report["format"]
    return None


def read_dataset_report(prepared: Path) -> dict[str, Any]:
    """Read the report of a prepared set.

    Raises UserError if the folder is no prepared set, was written by another version of vaejax, or
    if its report is damaged.
    """
    written_as = format_of(prepared)
    if written_as is None:
        raise UserError(
            f"{printable(prepared)} is not a prepared data set: no {REPORT} of vaejax in it. "
            "`vaejax prepare` makes one of a folder or a zip of images."
        )
    if written_as != FORMAT:
        raise UserError(
            f"the prepared data set {printable(prepared)} was written by another version of vaejax "
            f'(as "{written_as}", and this one reads "{FORMAT}"). It is left as it is: prepare the '
            "original images again, in another folder."
        )
    report = _read_report(Path(prepared) / REPORT)
    if report is None or not _is_sealed(report):
        raise damaged(prepared, f"{REPORT} is not as it was written")
    for name, kind in _REQUIRED.items():
        if not isinstance(report.get(name), kind):
            raise damaged(prepared, f'{REPORT} has no "{name}"')
    return report


def check(prepared: Path) -> dict[str, Any]:
    """Read the report of a prepared set, and compare the files with it.

    Raises UserError if a file is missing or has another length, or if metadata have changed.
    Records and pixels have checksums of their own, which are compared when they are read.
    """
    report = read_dataset_report(prepared)
    for name, size in report["files"].items():
        path = os.path.join(prepared, name)
        actual = os.path.getsize(path) if os.path.isfile(path) else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes, not {size}"
            raise damaged(prepared, f"{printable(name)} {state}")
    for name, digest in report["metadata"].items():
        if _sha256(Path(prepared) / name) != digest:
            raise damaged(prepared, f"{printable(name)} is not as it was written")
    return report


class RecordFile(NamedTuple):
    """A file of records of a split, and their number."""

    path: Path
    count: int


def record_files(prepared: Path, split: str) -> list[RecordFile]:
    """Return the files of a split in their order, as TFDS would, without TFDS.

    Raises UserError if it is no prepared set, or a damaged one.
    """
    check(prepared)
    folder = Path(prepared) / "records"
    try:
        splits = read_json(folder / "dataset_info.json")["splits"]
        (lengths,) = (each["shardLengths"] for each in splits if each["name"] == split)
        counts = [int(length) for length in lengths]
        if min(counts) < 0:
            raise ValueError("a negative number of records")
    except (OSError, ValueError, KeyError, TypeError):
        raise damaged(prepared, "its metadata cannot be used") from None
    of = f"of-{len(counts):05}"
    return [
        RecordFile(folder / f"faces-{split}.array_record-{number:05}-{of}", count)
        for number, count in enumerate(counts)
    ]


def read_index(prepared: Path, split: str, images: int) -> pixels.Index:
    """Open the index of a split of so many images. Raises UserError if it is damaged."""
    name = f"index/{split}"
    try:
        index = pixels.Index(Path(prepared) / name)
    except (OSError, ValueError):
        raise damaged(prepared, f"{name} cannot be read") from None
    if len(index) != images:
        raise damaged(prepared, f"{name} is of {len(index):,} images, not of {images:,}")
    return index


def read_metadata(file: "ArrayRecordReader", position: int) -> Metadata:
    """Read what is known of an image from its record.

    Raises RuntimeError, IndexError or ValueError if the record is damaged.
    """
    # As a range of one: for a list of positions ArrayRecord (0.8) fills a table as long as the file
    example = _texts().deserialize_example_np(file.read(position, position + 1)[0])
    return Metadata(**{name: value.decode() for name, value in example.items()})


@functools.cache
def _texts() -> Any:  # a tfds.features.FeaturesDict, whose annotations are wrong
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {name: tfds.features.Text() for name in Metadata.__annotations__}
    )


def damaged(prepared: Path, what: str) -> UserError:
    """Return the error for a prepared set that is not as it was written."""
    return UserError(
        f"the prepared data set {printable(prepared)} is damaged: {what}. "
        "Delete that folder and prepare it again."
    )


# Writing ------------------------------------------------------------------------------------------


def seal(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Add to a report the sizes and hashes by which damage to its folder, or to it, is detected."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    metadata = sorted(folder.glob("records/*.json"))
    report = {
        **report,
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in files},
        "metadata": {str(path.relative_to(folder)): _sha256(path) for path in metadata},
    }
    return {**report, "sha256": _hash_report(report)}


def write_split(
    folder: Path, *, size: int, split: str, examples: Iterable[Record]
) -> "tfds.core.SplitInfo":
    """Write one split, record by record; memory does not grow with their number."""
    path = _template(folder).replace(split=split).sharded_filepath(shard_index=0, num_shards=1)
    serialize = features(size).serialize_example
    count = write_records(path, (serialize(dict(example)) for example in examples), size=size)
    return finish_split(folder, split=split, lengths=[count])


def write_records(path: str | os.PathLike[str], serialized: Iterable[bytes], *, size: int) -> int:
    """Write a file of serialized records, and the index of its pixels, `path`.index.

    Returns their number. Raises OSError.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a group, so that reading one does not unpack its neighbours; uncompressed, because
    # zstd saves a tenth of the pixels' size and a third of the reading speed.
    # The path as bytes, because it takes no text that is not UTF-8.
    writer = ArrayRecordWriter(os.fsencode(path), "group_size:1,uncompressed")
    count = 0
    try:
        for record in serialized:
            writer.write(record)
            count += 1
        writer.close()
    except RuntimeError as error:  # which it raises for a full disk
        raise OSError(errno.EIO, str(error)) from None
    pixels.locate(path, size).tofile(f"{os.fspath(path)}.index")
    return count


def finish_split(folder: Path, *, split: str, lengths: list[int]) -> "tfds.core.SplitInfo":
    """Join the indices of a split's files, one in `folder` for each number of records, into one.

    Returns TFDS's description of the split.
    """
    import tensorflow_datasets as tfds

    template = _template(folder)
    paths = template.replace(split=split).sharded_filepaths(num_shards=len(lengths))
    index = folder.with_name("index")
    index.mkdir(exist_ok=True)
    with (index / split).open("wb") as joined:
        for path in paths:
            part = Path(f"{os.fspath(path)}.index")
            joined.write(part.read_bytes())
            part.unlink()
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=lengths,
        num_bytes=sum(os.path.getsize(path) for path in paths),
        filename_template=template,
    )


def write_metadata(folder: Path, *, size: int, splits: Iterable["tfds.core.SplitInfo"]) -> None:
    """Write the metadata by which TFDS reads the records."""
    import tensorflow_datasets as tfds

    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(folder),
        features=features(size),
        split_infos=list(splits),
        filename_template=_template(folder),
        check_data=False,  # it would need TensorFlow
        description="Faces, prepared by vaejax.",
    )


def features(size: int) -> "tfds.features.FeaturesDict":
    """Return TFDS's description of a record of `size` x `size` pixels."""
    import tensorflow_datasets as tfds

    image = tfds.features.Tensor(shape=(size, size, 3), dtype=np.uint8, encoding="bytes")
    texts = {name: tfds.features.Text() for name in Metadata.__annotations__}
    return tfds.features.FeaturesDict({"image": image, **texts})


def _template(folder: Path) -> "tfds.core.ShardedFileTemplate":
    import tensorflow_datasets as tfds

    return tfds.core.ShardedFileTemplate(
        data_dir=tfds.core.Path(folder), dataset_name="faces", filetype_suffix="array_record"
    )


# The report ---------------------------------------------------------------------------------------


def _read_report(path: Path) -> dict[str, Any] | None:
    """Read the report of a prepared set of any version; None if there is none."""
    if not os.path.isfile(path):  # which, unlike Path.is_file(), takes any name
        return None
    try:
        report = read_json(path)
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict) or not isinstance(report.get("format"), str):
        return None
    return report if _ANY_FORMAT.fullmatch(report["format"]) else None


def _is_sealed(report: dict[str, Any]) -> bool:
    try:
        return report.get("sha256") == _hash_report(report)
    except RecursionError:  # nested so deep that it could just be read
        return False


def _hash_report(report: dict[str, Any]) -> str:
    """Hash all of a report but its hash, whatever the order of its keys."""
    rest = {name: value for name, value in report.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str | None:
    """Hash a file; None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
