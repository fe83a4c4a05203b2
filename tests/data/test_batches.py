"""The order of the images depends on the seed and the position, and on nothing else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vaejax.data import records
from vaejax.data.batches import (
    DatasetDiff,
    Images,
    batch_indices,
    dataset_diff,
    steps_per_epoch,
    stream,
    stream_indices,
)
from vaejax.data.prepare import builder, prepare
from vaejax.errors import UserError


@pytest.fixture(scope="module")
def prepared(faces: Path) -> Path:
    return prepare(faces, size=16, say=lambda _: None)


@pytest.fixture(scope="module")
def images(prepared: Path) -> Images:
    return Images(prepared, "train")


def take(images: Images, n: int, **settings: int) -> list[np.ndarray]:
    batches = stream(images, **{"batch_size": 8, "seed": 0} | settings)
    return [next(batches) for _ in range(n)]


def keys(batches: list[np.ndarray]) -> list[bytes]:
    return [image.tobytes() for batch in batches for image in batch]


def test_the_same_seed_gives_the_same_order_and_another_seed_another(images):
    assert keys(take(images, 9)) == keys(take(images, 9))
    assert keys(take(images, 9)) != keys(take(images, 9, seed=1))


def test_an_epoch_has_no_image_twice_and_every_epoch_its_own_order(images):
    steps = steps_per_epoch(len(images), 8)
    order = keys(take(images, 2 * steps))
    first, second = order[: steps * 8], order[steps * 8 :]
    assert len(set(first)) == len(set(second)) == steps * 8
    assert first != second
    assert set(order) <= {image.tobytes() for image in images.read(np.arange(len(images)))}


@pytest.mark.parametrize("shards", [2, 4])
def test_the_shards_of_a_batch_are_the_batch_of_one_process(images, shards: int):
    batches = take(images, 9)
    parts = [take(images, 9, shard=i, shards=shards) for i in range(shards)]
    for batch, *rows in zip(batches, *parts, strict=True):
        assert np.array_equal(batch, np.concatenate(rows))


@pytest.mark.parametrize("handed_out", [0, 3, 6, 11])
def test_a_restored_position_goes_on_with_the_next_batch(images, handed_out: int):
    batches = stream(images, batch_size=8, seed=0)
    for _ in range(handed_out):
        next(batches)
    position = batches.get_state()
    other = stream(images, batch_size=8, seed=0)
    other.set_state(position)
    assert keys([next(batches) for _ in range(5)]) == keys([next(other) for _ in range(5)])


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_images_are_those_that_tfds_reads(prepared: Path, split: str):
    expected = [record["image"] for record in builder(prepared).as_data_source(split)]
    images = Images(prepared, split)
    assert images.shape == expected[0].shape
    assert np.array_equal(images.read(np.arange(len(images))), expected)


def test_a_batch_larger_than_the_data_is_an_error_that_names_the_largest(images):
    with pytest.raises(UserError, match=f"--batch-size 1000 .* at most {len(images)}"):
        stream(images, batch_size=1000, seed=0)


@pytest.mark.parametrize("number", [0, 5, 40])
def test_the_indices_of_a_batch_are_those_of_the_stream(images, number: int):
    indices = batch_indices(images, number, batch_size=8, seed=3)
    assert np.array_equal(images.read(np.array(indices)), take(images, number + 1, seed=3)[-1])
    unread = stream_indices(len(images), batch_size=8, seed=3)
    assert [next(unread).tolist() for _ in range(number + 1)][-1] == indices


def test_metadata_are_those_that_tfds_reads(prepared: Path, images: Images):
    for index, record in enumerate(builder(prepared).as_data_source("train")):
        names = ("person", "path", "sha256")
        assert images.metadata(index) == {name: record[name].decode() for name in names}


WITHOUT_JAX = """
import sys
sys.modules["jax"] = None
from pathlib import Path
from vaejax.data.batches import Images, stream
print(next(stream(Images(Path(sys.argv[1]), "train"), batch_size=8, seed=0)).tobytes().hex())
"""


def test_a_stream_needs_no_jax(prepared: Path, images: Images):
    command = [sys.executable, "-c", WITHOUT_JAX, str(prepared)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert bytes.fromhex(output) == take(images, 1)[0].tobytes()


# Two data sets


def test_a_dataset_diff_counts_images_by_path(faces: Path, tmp_path: Path):
    source = Path(shutil.copytree(faces, tmp_path / "source"))
    before = prepare(source, size=16, say=lambda _: None)
    for name in ("000.png", "001.png"):
        (source / name).unlink()
    shutil.copy(source / "003.png", source / "new.png")
    for name in ("004.png", "005.png", "006.png"):
        shutil.copy(source / "003.png", source / name)
    after = prepare(source, size=16, say=lambda _: None)
    assert dataset_diff(before, after) == DatasetDiff(added=1, removed=2, changed=3)
    assert dataset_diff(after, before) == DatasetDiff(added=2, removed=1, changed=3)
    assert dataset_diff(before, before) == DatasetDiff(0, 0, 0)
    assert str(dataset_diff(before, after)) == "1 added, 2 removed, 3 changed"


def test_sets_of_another_size_or_crop_have_no_diff(prepared: Path, faces: Path, tmp_path: Path):
    assert dataset_diff(prepared, prepare(faces, size=8, say=lambda _: None)) is None
    cropped = Path(shutil.copytree(prepared, tmp_path / "cropped"))
    report = {**records.read_dataset_report(prepared), "crop": {"margin": 0.3}}
    (cropped / records.REPORT).write_text(json.dumps(records.seal(report, cropped)))
    assert dataset_diff(prepared, cropped) is None


def test_a_diff_from_a_set_that_is_gone_or_of_another_version_is_unknown(
    prepared: Path, tmp_path: Path
):
    unknown = DatasetDiff(0, 0, 0, known=False)
    assert dataset_diff(tmp_path / "gone", prepared) == unknown
    old = Path(shutil.copytree(prepared, tmp_path / "old"))
    report = (old / records.REPORT).read_text().replace(records.FORMAT, "vaejax prepared set 2")
    (old / "report.json").write_text(report)
    (old / records.REPORT).unlink()
    assert dataset_diff(old, prepared) == unknown
    assert (
        str(unknown)
        == "how is unknown, because the set prepared before is gone or of another version"
    )
