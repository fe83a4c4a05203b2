"""Pixels that are read past the format of the records are those that were written, or an error."""

import os
from pathlib import Path

import numpy as np
import pytest

from vaejax.data import pixels, records
from vaejax.data.batches import Images, stream
from vaejax.errors import UserError
from vaejax.files import write_json

# 147 pixels fit between two headers, and 148 do not; of 8 some hundreds do, of 300 a fourth
SIZES = [8, 64, 147, 148, 300]


def random_images(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (count, size, size, 3), np.uint8)


def write_set(folder: Path, parts: list[np.ndarray]) -> Path:
    """Write a prepared set whose training images lie in several files."""
    size = parts[0].shape[1]
    serialize = records.features(size).serialize_example
    data = folder / "records"
    data.mkdir(parents=True)
    for number, images in enumerate(parts):
        path = data / f"faces-train.array_record-{number:05}-of-{len(parts):05}"
        texts = {"person": "", "path": "x" * number, "sha256": ""}
        records.write_records(path, (serialize({"image": i, **texts}) for i in images), size=size)
    split = records.finish_split(data, split="train", lengths=[len(part) for part in parts])
    records.write_metadata(data, size=size, splits=[split])
    report = {"format": records.FORMAT, "source": "", "size": size, "accepted": len(parts[0])}
    report = records.seal({**report, "fingerprint": "", "listing": ""}, folder)
    write_json(folder / records.REPORT, report)
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_images_are_read_as_they_were_written_wherever_a_block_ends(tmp_path: Path, size: int):
    written = random_images(600 if size < 64 else 40 if size < 300 else 7, size)
    images = Images(write_set(tmp_path, [written]), "train")
    order = np.random.default_rng(0).permutation(len(written))
    assert np.array_equal(images.read(order), written[order])


@pytest.mark.parametrize("value", [0, 255])
def test_images_of_one_colour_are_found(tmp_path: Path, value: int):
    written = np.full((30, 64, 64, 3), value, np.uint8)
    written[10:20, :, :, 0] = 7
    images = Images(write_set(tmp_path, [written]), "train")
    assert np.array_equal(images.read(np.arange(30)), written)


def test_a_batch_comes_from_several_files(tmp_path: Path):
    written = random_images(50, 16)
    images = Images(write_set(tmp_path, np.split(written, [20, 21, 45])), "train")
    assert len(images) == 50
    order = np.random.default_rng(0).permutation(50)
    assert np.array_equal(images.read(order), written[order])
    assert [len(images.metadata(i)["path"]) for i in (0, 19, 20, 21, 49)] == [0, 0, 1, 2, 3]
    assert next(stream(images, batch_size=50, seed=0)).sum() == written.sum()


def change_index(folder: Path, change) -> Images:
    path = folder / "index" / "train"
    entries = np.fromfile(path, pixels.ENTRY)
    change(entries)
    entries.tofile(path)
    return Images(folder, "train")


@pytest.mark.parametrize("start", [0, 1, -1, -(2**63), 2**63 - 1, 2**40, "end", "later"], ids=str)
def test_an_entry_that_leads_elsewhere_is_an_error(tmp_path: Path, start):
    folder = write_set(tmp_path, [random_images(20, 64)])
    length = next((folder / "records").glob("*.array_record*")).stat().st_size

    def change(entries: np.ndarray) -> None:
        places = {"end": length - 1, "later": entries["start"][3] + 1}
        entries["start"][3] = places.get(start, start)

    images = change_index(folder, change)
    with pytest.raises(UserError, match=r"00000-of-00001 cannot be read: .* Delete that folder"):
        images.read(np.array([2, 3]))
    images.read(np.array([2, 4]))


def test_the_entry_of_one_image_does_not_count_for_another(tmp_path: Path):
    folder = write_set(tmp_path, [random_images(20, 16)])

    def change(entries: np.ndarray) -> None:
        entries[3] = entries[5]

    with pytest.raises(UserError, match="image 3 is not as it was written"):
        change_index(folder, change).read(np.arange(20))


@pytest.mark.parametrize("name", ["index/train", "records/faces-train.array_record-00000-of-00001"])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path, name: str):
    images = Images(write_set(tmp_path, [random_images(20, 64)]), "train")
    images.read(np.arange(20))
    os.truncate(tmp_path / name, 0)
    with pytest.raises(UserError, match=r"is damaged: .* it was cut"):
        images.read(np.arange(20))


@pytest.mark.parametrize("entries", [0, 19, 21])
def test_an_index_of_other_images_is_an_error(tmp_path: Path, entries: int):
    folder = write_set(tmp_path, [random_images(20, 16)])
    np.zeros(entries, pixels.ENTRY).tofile(folder / "index" / "train")
    report = records._read_report(folder / records.REPORT)
    (folder / records.REPORT).unlink()
    write_json(folder / records.REPORT, records.seal(report, folder))
    with pytest.raises(UserError, match=r"is damaged: index/train (is of|cannot be read)"):
        Images(folder, "train")


def test_records_in_which_the_pixels_do_not_lie_as_they_are_have_no_index(tmp_path: Path):
    from array_record.python.array_record_module import ArrayRecordWriter

    serialize = records.features(16).serialize_example
    stripes = np.resize(np.arange(256, dtype=np.uint8), (16, 16, 3))
    image = {"image": stripes, "person": "", "path": "", "sha256": ""}
    writer = ArrayRecordWriter(str(tmp_path / "packed"), "group_size:1,zstd")
    writer.write(serialize(image))
    writer.close()
    with pytest.raises(ValueError, match="do not lie in the file as they are"):
        pixels.locate(tmp_path / "packed", 16)
