"""A prepared data set on disk: a TFDS data set of ArrayRecords, a report, a contact sheet.

    dataset_report.json  what was accepted, refused and duplicated; the last file to be written
    contact_sheet.png    64 of the images
    faces_sheet.png      where faces were detected, if the images were cropped to them
    records/             read by `tfds.builder_from_directory`: no TensorFlow, nothing to decode
    pixels/              the same pixels once more, as vaejax reads them: `pixels.py`

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
from vaejax.files import inside, printable, read_bytes, read_json

if TYPE_CHECKING:
    import tensorflow_datasets as tfds  # its import takes half a second, which few commands need
    from array_record.python.array_record_module import ArrayRecordReader

REPORT = "dataset_report.json"
FORMAT = "vaejax prepared set 4"  # raise the number when older sets can no longer be read

# of a report, which lists every refused file; and of a file of metadata
_MAX_REPORT_BYTES, _MAX_METADATA_BYTES = 128 << 20, 16 << 20
_METADATA = ("records/dataset_info.json", "records/features.json")  # that TFDS reads
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
    report = check(prepared)
    size = report["size"]
    import tensorflow_datasets as tfds
    from google.protobuf import json_format

    folder = Path(prepared) / "records"
    try:
        # compared first, because TFDS imports whatever class the file names
        if read_json(folder / "features.json") != json.loads(
            json_format.MessageToJson(features(size).to_proto())
        ):
            raise ValueError("other features")
        found = tfds.builder_from_directory(os.fspath(folder))
        names = {
            f"records/{os.path.relpath(f, folder)}"
            for s in found.info.splits.values()
            for f in s.filepaths
        }
    except Exception:  # whatever its parsers of JSON raise for damage
        raise damaged(prepared, "its metadata cannot be read") from None
    if other := sorted(names - report["files"].keys()):  # those were checked
        raise damaged(prepared, f"its metadata name {printable(other[0])}")
    return found


def is_prepared(folder: Path) -> bool:
    """Return whether a folder is a prepared set, be it damaged or of another version."""
    return format_of(folder) is not None


def enclosing_set(path: Path) -> Path | None:
    """Return the prepared set that a path lies in, or is; None if there is none."""
    real = Path(os.path.realpath(path))
    return next((folder for folder in (real, *real.parents) if is_prepared(folder)), None)


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

    Raises UserError if a file is missing or has another length, if metadata have changed, or if a
    name leads out of the folder. Records and pixels have checksums of their own, which are compared
    when they are read.
    """
    report = read_dataset_report(prepared)
    try:
        paths = {name: inside(prepared, name) for name in [*report["files"], *report["metadata"]]}
    except ValueError as error:
        raise damaged(prepared, f"{REPORT} names a file, and {error}") from None
    for name, size in report["files"].items():
        actual = os.path.getsize(paths[name]) if os.path.isfile(paths[name]) else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes, not {size}"
            raise damaged(prepared, f"{printable(name)} {state}")
    for name in {*_METADATA, *report["metadata"]}:
        digest = report["metadata"].get(name)
        if digest is None or _sha256(paths[name]) != digest:
            raise damaged(prepared, f"{printable(name)} is not as it was written")
    return report


class Part(NamedTuple):
    """A part of a split: a file of records, and one of the same images' pixels."""

    records: Path
    pixels: Path
    images: int


def parts_of(prepared: Path, split: str) -> list[Part]:
    """Return the parts of a split in their order, as TFDS would, without TFDS.

    Raises UserError if it is no prepared set, or a damaged one.
    """
    report = check(prepared)
    try:
        splits = read_json(Path(prepared) / "records" / "dataset_info.json")["splits"]
        (lengths,) = (each["shardLengths"] for each in splits if each["name"] == split)
        parts = []
        for number, length in enumerate(lengths):
            name, images = f"{number:05}-of-{len(lengths):05}", int(length)
            names = (f"records/faces-{split}.array_record-{name}", f"pixels/{split}-{name}")
            if names[0] not in report["files"] or images < 1:
                raise ValueError(f"no images in {names[0]}")
            if report["files"][names[1]] != pixels.file_bytes(images, report["size"]):
                raise ValueError(f"{names[1]} is of other images")
            parts.append(Part(Path(prepared) / names[0], Path(prepared) / names[1], images))
    except (OSError, ValueError, KeyError, TypeError):
        raise damaged(prepared, "its metadata cannot be used") from None
    return parts


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


def write_split(folder: Path, *, split: str, examples: Iterable[Record]) -> "tfds.core.SplitInfo":
    """Write one split, record by record; memory does not grow with their number."""
    path = _template(folder).replace(split=split).sharded_filepath(shard_index=0, num_shards=1)
    records = ((serialize(example), example["image"].data) for example in examples)
    count = write_records(path, records)
    return finish_split(folder, split=split, lengths=[count])


def write_records(
    path: str | os.PathLike[str], records: Iterable[tuple[bytes, bytes | memoryview]]
) -> int:
    """Write a file of serialized records, and beside it the pixels of their images, `path`.pixels.

    Returns their number. Raises OSError.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a group, so that reading one does not unpack its neighbours; uncompressed, because
    # zstd saves a tenth of the pixels' size and a third of the reading speed.
    # The path as bytes, because it takes no text that is not UTF-8.
    writer = ArrayRecordWriter(os.fsencode(path), "group_size:1,uncompressed")
    count = 0
    try:
        with pixels.PixelWriter(f"{os.fspath(path)}.pixels") as pixel_writer:
            for record, image in records:
                writer.write(record)
                pixel_writer.append(image)
                count += 1
        writer.close()
    except RuntimeError as error:  # which it raises for a full disk
        raise OSError(errno.EIO, str(error)) from None
    return count


def serialize(record: Record) -> bytes:
    """Serialize a record as `features(size).serialize_example` does, in a quarter of the time.

    The fields are sorted, so that the bytes are the same in every process.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
    values = example.features.feature
    values["image"].bytes_list.value.append(record["image"].tobytes())
    for name in Metadata.__annotations__:
        values[name].bytes_list.value.append(record[name].encode())
    return example.SerializeToString(deterministic=True)


def image_of(record: bytes) -> bytes:
    """Return the pixels of the image in a serialized record."""
    from tensorflow_datasets.proto import tf_example_pb2

    parse = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]
    return parse(record).features.feature["image"].bytes_list.value[0]


def finish_split(folder: Path, *, split: str, lengths: list[int]) -> "tfds.core.SplitInfo":
    """Move the pixels of a split, written in one file for each number of records, to their place.

    Returns TFDS's description of the split.
    """
    import tensorflow_datasets as tfds

    template = _template(folder)
    paths = template.replace(split=split).sharded_filepaths(num_shards=len(lengths))
    pixels_folder = folder.with_name("pixels")
    pixels_folder.mkdir(exist_ok=True)
    for path in paths:
        name = os.path.basename(path).removeprefix("faces-").replace(".array_record", "")
        os.rename(f"{os.fspath(path)}.pixels", pixels_folder / name)
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
        report = read_json(path, max_bytes=_MAX_REPORT_BYTES)
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
    """Hash a file of metadata; None if it cannot be read."""
    try:
        return hashlib.sha256(read_bytes(path, max_bytes=_MAX_METADATA_BYTES)).hexdigest()
    except OSError:
        return None
