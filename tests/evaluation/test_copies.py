"""Planted copies are found, and held against chance."""

import numpy as np
import pytest

from vaejax.evaluation import copies


@pytest.fixture(scope="module")
def training(draw):
    return draw(50, 16)


def nearest(images: np.ndarray, training: np.ndarray, *, at_a_time: int) -> copies.Nearest:
    parts = (training[i : i + at_a_time] for i in range(0, len(training), at_a_time))
    return copies.by_pixels(images, parts, lambda index: training[index])


@pytest.mark.parametrize("at_a_time", [7, 50])
def test_the_nearest_is_that_of_all_pairs(training, draw, at_a_time, monkeypatch):
    monkeypatch.setattr(copies, "AT_A_TIME", 3 * training[0].size)  # images in parts as well
    images = draw(10, 16, seed=1)
    found = nearest(images, training, at_a_time=at_a_time)
    differences = images[:, None].astype(float) - training[None]
    exact = np.sqrt(np.mean((differences / 255) ** 2, axis=(2, 3, 4)))
    np.testing.assert_array_equal(found.place, exact.argmin(axis=1))
    np.testing.assert_allclose(found.distance, exact.min(axis=1), rtol=1e-5)


def test_planted_copies_are_found(training, draw):
    held_out = nearest(draw(200, 16, seed=2), training, at_a_time=20).distance
    samples = draw(100, 16, seed=3)
    planted = {5: 17, 40: 3, 77: 49}
    for sample, original in planted.items():
        samples[sample] = training[original]
    samples[77, 0, 0, 0] ^= 1  # by a hair another one
    found = nearest(samples, training, at_a_time=20)
    assert {i: found.place[i] for i in planted} == planted
    assert found.distance[5] == 0
    assert 0 < found.distance[77] < 1e-3
    near = np.flatnonzero(found.distance < np.quantile(held_out, copies.RARE))
    assert set(planted) <= set(near)
    assert copies.share_near(found.distance, held_out).value == len(near) / 100


def test_those_that_are_like_the_held_out_ones_are_near_by_chance():
    random = np.random.default_rng(0)
    share = copies.share_near(random.exponential(size=20_000), random.exponential(size=20_000))
    assert abs(share.value - 0.01) < 4 * share.error
    assert 0.0009 < share.error < 0.0011  # both sets are as large
    everything = copies.share_near(np.zeros(20), random.exponential(size=200))
    assert everything.value == 1


def test_a_hundredth_needs_a_hundred():
    with pytest.raises(ValueError, match="99 held-out"):
        copies.share_near(np.zeros(3), np.ones(99))


def test_persons_are_counted_as_often_as_they_are_met():
    assert copies.persons_hit(["a"] * 7) == 1
    assert copies.persons_hit(["a", "b", "c", "d"] * 5) == pytest.approx(4)
    assert 1 < copies.persons_hit(["a"] * 9 + ["b"]) < 2
