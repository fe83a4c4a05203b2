"""A prepared set on disk: a TFDS data set of ArrayRecords, a report, a contact sheet.

    report.json          what was accepted, refused and doubled; the last file to be written
    contact_sheet.png    64 of the images
    faces_sheet.png      where faces were found, if the images were cropped to them
    records/             what `tfds.builder_from_directory` reads: no TensorFlow, nothing to decode

The records are written by TFDS's own features and described by its `write_metadata`, not by a
`GeneratorBasedBuilder`: that one holds a split in memory up to 1 GB, and beyond that, with no
TensorFlow installed, it dies. On Apache Beam a TFDS builder writes them: `beam.py`.
"""

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from jaxtyping import UInt8

from vaejax.data.sources import printable
from vaejax.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds  # half a second, which most commands need not spend

FORMAT = "vaejax prepared set 1"  # another number when old sets can no longer be read
_NEEDED = {
    "source": str,
    "size": int,
    "accepted": int,
    "fingerprint": str,
    "listing": str,
    "files": dict,
}


class Texts(TypedDict):
    """Whose face it is ("" if not known), where it came from, the hash of the file."""

    person: str
    path: str
    sha256: str


class Record(Texts):
    """One example."""

    image: UInt8[np.ndarray, "size size 3"]


def builder(prepared: Path) -> Any:  # a tfds.core.DatasetBuilder, whose annotations are wrong
    """TFDS's reader of a prepared set: `builder(folder).as_data_source("train")[0]["image"]`."""
    check(prepared)
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(os.fspath(Path(prepared) / "records"))
    except Exception:  # whatever its parsers of JSON make of damage
        raise _damaged(prepared, "its metadata cannot be read") from None


def is_prepared(folder: Path) -> bool:
    """Whether this is a prepared set, be it damaged."""
    return _report(folder) is not None


def read_report(prepared: Path) -> dict[str, Any]:
    report = _report(prepared)
    if report is None:
        raise UserError(
            f"{printable(prepared)} is not a prepared data set: no report.json of vaejax in it. "
            "`vaejax prepare` makes one of a folder or a zip of images."
        )
    for name, kind in _NEEDED.items():
        if not isinstance(report.get(name), kind):
            raise _damaged(prepared, f'report.json has no "{name}"')
    return report


def check(prepared: Path) -> dict[str, Any]:
    """The report of a prepared set whose files are all there, and as long as they were."""
    report = read_report(prepared)
    for name, size in report["files"].items():
        path = Path(prepared) / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise _damaged(prepared, f"{printable(name)} {state}")
    return report


def write(
    folder: Path, *, size: int, split: str, records: Iterable[Record]
) -> "tfds.core.SplitInfo":
    """Write one split, record by record; memory does not grow with their number."""
    path = _template(folder).replace(split=split).sharded_filepath(shard_index=0, num_shards=1)
    serialize = features(size).serialize_example
    count = save(os.fspath(path), (serialize(dict(record)) for record in records))
    return split_info(folder, split=split, lengths=[count])


def save(path: str, serialized: Iterable[bytes]) -> int:
    """Write a file of records; how many they were."""
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a group, so that reading one does not unpack its neighbours; unpacked, since
    # pixels that zstd packs by a tenth are read at two thirds of the speed.
    writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
    count = 0
    try:
        for record in serialized:
            writer.write(record)
            count += 1
        writer.close()
    except RuntimeError as error:  # which is what it makes of a full disk
        raise OSError(errno.EIO, str(error)) from None
    return count


def split_info(folder: Path, *, split: str, lengths: list[int]) -> "tfds.core.SplitInfo":
    """What TFDS wants to know of a split whose files lie in `folder`, each so many records long."""
    import tensorflow_datasets as tfds

    template = _template(folder)
    paths = template.replace(split=split).sharded_filepaths(num_shards=len(lengths))
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=lengths,
        num_bytes=sum(os.path.getsize(path) for path in paths),
        filename_template=template,
    )


def describe(folder: Path, *, size: int, splits: Iterable["tfds.core.SplitInfo"]) -> None:
    """Write the metadata that TFDS reads the records by."""
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
    """A record as TFDS knows it."""
    import tensorflow_datasets as tfds

    image = tfds.features.Tensor(shape=(size, size, 3), dtype=np.uint8, encoding="bytes")
    texts = {name: tfds.features.Text() for name in Texts.__annotations__}
    return tfds.features.FeaturesDict({"image": image, **texts})


def _damaged(prepared: Path, what: str) -> UserError:
    return UserError(
        f"the prepared data set {printable(prepared)} is damaged: {what}. "
        "Delete that folder and prepare it again."
    )


def _template(folder: Path) -> "tfds.core.ShardedFileTemplate":
    import tensorflow_datasets as tfds

    return tfds.core.ShardedFileTemplate(
        data_dir=tfds.core.Path(folder), dataset_name="faces", filetype_suffix="array_record"
    )


def _report(folder: Path) -> dict[str, Any] | None:
    try:
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(report, dict) and report.get("format") == FORMAT
    return report if is_ours else None
