"""The order of the images depends on the seed and the position, and on nothing else."""

from pathlib import Path

import numpy as np
import pytest

from vaejax.data.batches import Images, steps_per_epoch, stream
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


def test_a_pass_shows_no_image_twice_and_every_pass_has_its_own_order(images):
    steps = steps_per_epoch(len(images), 8)
    order = keys(take(images, 2 * steps))
    first, second = order[: steps * 8], order[steps * 8 :]
    assert len(set(first)) == len(set(second)) == steps * 8
    assert first != second
    assert set(order) <= {image.tobytes() for image in images.read(np.arange(len(images)))}


@pytest.mark.parametrize("shards", [2, 4])
def test_the_shards_of_a_batch_are_the_batch_of_one_process(images, shards: int):
    whole = take(images, 9)
    parts = [take(images, 9, shard=i, shards=shards) for i in range(shards)]
    for batch, *rows in zip(whole, *parts, strict=True):
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


def test_a_batch_larger_than_the_data_is_refused_with_what_would_do(images):
    with pytest.raises(UserError, match=f"--batch-size 1000 .* at most {len(images)}"):
        stream(images, batch_size=1000, seed=0)
