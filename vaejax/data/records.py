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
import hashlib
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

FORMAT = "vaejax prepared set 2"  # another number when old sets can no longer be read
_NEEDED = {
    "source": str,
    "size": int,
    "accepted": int,
    "fingerprint": str,
    "listing": str,
    "files": dict,
    "metadata": dict,
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
    size = check(prepared)["size"]
    import tensorflow_datasets as tfds
    from google.protobuf import json_format

    folder = Path(prepared) / "records"
    try:
        # TFDS imports whatever class is named there
        found = json.loads((folder / "features.json").read_text(encoding="utf-8"))
        if found != json.loads(json_format.MessageToJson(features(size).to_proto())):
            raise ValueError("other features")
        return tfds.builder_from_directory(os.fspath(folder))
    except Exception:  # whatever its parsers of JSON make of damage
        raise damaged(prepared, "its metadata cannot be read") from None


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
    if not _is_sealed(report):
        raise damaged(prepared, "report.json is not as it was written")
    for name, kind in _NEEDED.items():
        if not isinstance(report.get(name), kind):
            raise damaged(prepared, f'report.json has no "{name}"')
    return report


def check(prepared: Path) -> dict[str, Any]:
    """The report of a prepared set whose files are all there and as long as they were, and whose
    metadata are as they were. Records have checksums of their own, which reading them checks."""
    report = read_report(prepared)
    for name, size in report["files"].items():
        path = os.path.join(prepared, name)
        found = os.path.getsize(path) if os.path.isfile(path) else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise damaged(prepared, f"{printable(name)} {state}")
    for name, digest in report["metadata"].items():
        if _sha256(Path(prepared) / name) != digest:
            raise damaged(prepared, f"{printable(name)} is not as it was written")
    return report


def complete(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The report of a folder, with what tells damage to its files, and to the report itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    metadata = sorted(folder.glob("records/*.json"))
    report = {
        **report,
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in files},
        "metadata": {str(path.relative_to(folder)): _sha256(path) for path in metadata},
    }
    return {**report, "sha256": _seal(report)}


def write(
    folder: Path, *, size: int, split: str, records: Iterable[Record]
) -> "tfds.core.SplitInfo":
    """Write one split, record by record; memory does not grow with their number."""
    path = _template(folder).replace(split=split).sharded_filepath(shard_index=0, num_shards=1)
    serialize = features(size).serialize_example
    count = save(path, (serialize(dict(record)) for record in records))
    return split_info(folder, split=split, lengths=[count])


def save(path: str | os.PathLike[str], serialized: Iterable[bytes]) -> int:
    """Write a file of records; how many they were."""
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a group, so that reading one does not unpack its neighbours; unpacked, since
    # pixels that zstd packs by a tenth are read at two thirds of the speed.
    # A path as bytes, since it takes no text that is not UTF-8.
    writer = ArrayRecordWriter(os.fsencode(path), "group_size:1,uncompressed")
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


def damaged(prepared: Path, what: str) -> UserError:
    """What to say of a prepared set that is not as it was written."""
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
    path = Path(folder) / "report.json"
    if not os.path.isfile(path):  # to open a pipe would be to wait
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(report, dict) and report.get("format") == FORMAT
    return report if is_ours else None


def _is_sealed(report: dict[str, Any]) -> bool:
    try:
        return report.get("sha256") == _seal(report)
    except RecursionError:  # lists in lists, so deep that they could just be read
        return False


def _seal(report: dict[str, Any]) -> str:
    """A hash over all of a report but this one, however it is laid out."""
    rest = {name: value for name, value in report.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str | None:
    """None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
