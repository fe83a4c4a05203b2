"""The pixels that are read are those that were written, or there is an error."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from vaejax.data import records
from vaejax.data.batches import Images, in_order, stream
from vaejax.data.pixels import Buffers
from vaejax.errors import UserError
from vaejax.files import write_json


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
        records.write_records(path, ((serialize({"image": i, **texts}), i.data) for i in images))
    split = records.finish_split(data, split="train", lengths=[len(part) for part in parts])
    records.write_metadata(data, size=size, splits=[split])
    report = {"format": records.FORMAT, "source": "", "size": size, "accepted": len(parts[0])}
    report = records.seal({**report, "fingerprint": "", "listing": ""}, folder)
    write_json(folder / records.REPORT, report)
    return folder


@pytest.mark.parametrize("size", [8, 37])
def test_images_are_read_as_they_were_written(tmp_path: Path, size: int):
    written = random_images(30, size)
    images = Images(write_set(tmp_path, [written]), "train")
    order = np.random.default_rng(0).permutation(30)
    assert np.array_equal(images.read(order), written[order])
    batches = list(in_order(images, 7))
    assert np.array_equal(np.concatenate([batch for _, batch in batches]), written)
    assert [indices.tolist() for indices, _ in batches][-1] == [28, 29]
    assert [len(batch) for _, batch in in_order(images, 7, count=8)] == [7, 1]


def test_a_batch_comes_from_several_files(tmp_path: Path):
    written = random_images(50, 16)
    images = Images(write_set(tmp_path, np.split(written, [20, 21, 45])), "train")
    assert len(images) == 50
    order = np.random.default_rng(0).permutation(50)
    assert np.array_equal(images.read(order), written[order])
    assert [len(images.metadata(i)["path"]) for i in (0, 19, 20, 21, 49)] == [0, 0, 1, 2, 3]
    assert next(stream(images, batch_size=50, seed=0)).sum() == written.sum()


def test_the_checksum_of_one_image_does_not_count_for_another(tmp_path: Path):
    written = random_images(20, 16)
    write_set(tmp_path, [written])
    path = tmp_path / "pixels" / "train-00000-of-00001"
    pixels, checksums = np.split(np.fromfile(path, np.uint8), [written.size])
    pixels.reshape(written.shape)[3] = written[5]
    checksums.view("<u8")[3] = checksums.view("<u8")[5]
    np.concatenate([pixels, checksums]).tofile(path)
    with pytest.raises(UserError, match="image 3 is not as it was written"):
        Images(tmp_path, "train").read(np.arange(20))


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path):
    images = Images(write_set(tmp_path, [random_images(20, 64)]), "train")
    images.read(np.arange(20))
    os.truncate(tmp_path / "pixels" / "train-00000-of-00001", 5000)
    with pytest.raises(UserError, match=r"is damaged: .* it was cut"):
        images.read(np.arange(20))


def test_a_file_of_other_images_is_an_error(tmp_path: Path):
    folders = [write_set(tmp_path / str(n), [random_images(n, 16)]) for n in (20, 21)]
    shutil.copy(*(folder / "pixels" / "train-00000-of-00001" for folder in folders))
    report = records._read_report(folders[1] / records.REPORT)
    (folders[1] / records.REPORT).unlink()
    write_json(folders[1] / records.REPORT, records.seal(report, folders[1]))
    with pytest.raises(UserError, match="its metadata cannot be used"):
        Images(folders[1], "train")


def test_an_index_that_does_not_exist_is_no_image(tmp_path: Path):
    images = Images(write_set(tmp_path, [random_images(20, 16)]), "train")
    with pytest.raises(IndexError):
        images.read(np.array([20]))


# Buffers


def test_the_memory_of_an_array_is_used_again_when_its_last_view_is_gone():
    buffers = Buffers(kept=2)
    first = buffers.empty(4, 8)
    address, view = first.ctypes.data, first[1:, ::2]
    del first
    assert buffers.empty(4, 8).ctypes.data != address
    column = view[:, 1]
    del view
    assert buffers.empty(4, 8).ctypes.data != address
    kept = memoryview(column)
    del column
    assert buffers.empty(4, 8).ctypes.data != address
    del kept
    assert buffers.empty(4, 8).ctypes.data == address


def test_a_batch_that_is_kept_does_not_change_while_others_are_read(tmp_path: Path):
    images = Images(write_set(tmp_path, [random_images(60, 16)]), "train")
    batches = stream(images, batch_size=6, seed=0)
    kept = [next(batches)[:3] for _ in range(40)]
    copies = [part.copy() for part in kept]
    for _ in range(40):
        next(batches)
    assert np.array_equal(kept, copies)


# Records


def test_a_record_is_serialized_as_tfds_does():
    image = random_images(1, 16)[0]
    record = records.Record(image=image, person="Ä", path="a/ü.png", sha256="0" * 64)
    features = records.features(16)
    read = features.deserialize_example_np(records.serialize(record))
    expected = features.deserialize_example_np(features.serialize_example(dict(record)))
    assert np.array_equal(read.pop("image"), expected.pop("image"))
    assert (
        read
        == expected
        == {"person": "Ä".encode(), "path": "a/ü.png".encode(), "sha256": b"0" * 64}
    )
    assert records.image_of(features.serialize_example(dict(record))) == image.tobytes()
