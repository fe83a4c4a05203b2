"""The order is grain's own, whatever the number of images, the seed and the epoch."""

import grain
import numpy as np
import pytest

from vaejax.data.order import Order, permute

# about the powers of two and four, between which the width of a block changes
COUNTS = [1, 60, 1023, 1024, 1025, 65_535, 65_536, 65_537, 65_538, 70_000, 2**18 + 1, 10**6]
COUNTS += [2**32, 2**33 + 5]


@pytest.mark.parametrize("count", COUNTS)
def test_a_permutation_is_that_of_grain(count: int):
    random = np.random.default_rng(count)
    for seed in [0, 2**32 - 1, *random.integers(0, 2**32, 3).tolist()]:
        positions = random.integers(0, count, 20)
        expected = [
            grain.experimental.index_shuffle(position, count - 1, seed, 4)
            for position in positions.tolist()
        ]
        assert permute(positions, count, seed=seed).tolist() == expected


@pytest.mark.parametrize(("images", "batch_size"), [(60, 8), (9, 9), (27_025, 128), (20_000, 9000)])
def test_the_batches_are_those_of_a_pipeline_of_grain(images: int, batch_size: int):
    steps = images // batch_size
    for seed in (0, 3):
        shuffled = grain.MapDataset.range(images).seed(seed).shuffle()[: steps * batch_size]
        expected = shuffled.repeat().batch(batch_size)
        order = Order(images, batch_size=batch_size, seed=seed)
        for number in {0, 1, steps - 1, steps, 5 * steps + steps // 2}:
            assert order[number].tolist() == np.asarray(expected[number]).tolist()


def test_every_image_of_an_epoch_comes_once():
    order = Order(1000, batch_size=10, seed=1)
    epoch = np.concatenate([order[number] for number in range(200, 300)])
    assert np.array_equal(np.sort(epoch), np.arange(1000))
