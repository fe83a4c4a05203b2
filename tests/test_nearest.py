"""The nearest training images are found, and faces that are too near are counted against chance."""

import numpy as np
import pytest

from vaejax import nearest
from vaejax.nearest import memorized_share, nearest_by_pixels


@pytest.fixture(scope="module")
def training(draw):
    return draw(50, 16)


def by_pixels(images: np.ndarray, training: np.ndarray, *, batch: int) -> nearest.Nearest:
    parts = (training[i : i + batch] for i in range(0, len(training), batch))
    return nearest_by_pixels(images, parts, lambda indices: training[indices])


@pytest.mark.parametrize("batch", [7, 50])
def test_nearest_by_pixels_is_that_of_all_pairs(training, draw, batch, monkeypatch):
    monkeypatch.setattr(nearest, "PIXEL_VALUES", 3 * training[0].size)  # 3 images at a time
    images = draw(10, 16, seed=1)
    indices, distances = by_pixels(images, training, batch=batch)
    differences = images[:, None].astype(float) - training[None]
    exact = np.sqrt(np.mean((differences / 255) ** 2, axis=(2, 3, 4)))
    np.testing.assert_array_equal(indices, exact.argmin(axis=1))
    np.testing.assert_allclose(distances, exact.min(axis=1), rtol=1e-5)


def test_planted_copies_are_found(training, draw):
    held_out = by_pixels(draw(200, 16, seed=2), training, batch=20).distances
    samples = draw(100, 16, seed=3)
    planted = {5: 17, 40: 3, 77: 49}
    for sample, original in planted.items():
        samples[sample] = training[original]
    samples[77, 0, 0, 0] ^= 1  # one level in one value
    indices, distances = by_pixels(samples, training, batch=20)
    assert {i: indices[i] for i in planted} == planted
    assert distances[5] == 0
    np.testing.assert_allclose(distances[77], 1 / 255 / np.sqrt(16 * 16 * 3), rtol=1e-5)
    # the nearest hundredth of 200 held-out faces, by Weibull's definition: between second and third
    second, third = np.sort(held_out)[1:3]
    near = np.flatnonzero(distances < second + 0.01 * (third - second))
    assert set(planted) <= set(near)
    assert memorized_share(distances, held_out).value == len(near) / 100


def test_the_share_and_its_error_are_those_of_the_formula():
    held_out = np.arange(1.0, 100)  # 99: one less than needed
    with pytest.raises(ValueError, match="99 held-out"):
        memorized_share(np.zeros(3), held_out)
    # of 199 faces at 1, 2, ... the threshold is 2: (199 + 1) / 100
    share = memorized_share(np.array([0.5, 1.9, 2.0, 3.0]), np.arange(1.0, 200))
    assert share.value == 0.5
    np.testing.assert_allclose(share.error, np.sqrt(0.5 * 0.5 / 4 + 0.01 * 0.99 / 201))


@pytest.mark.parametrize("held_out", [100, 150, 1000])
def test_by_chance_a_hundredth_is_near_however_few_are_held_out(held_out: int):
    random = np.random.default_rng(0)
    results = [
        memorized_share(random.uniform(size=1000), random.uniform(size=held_out))
        for _ in range(2000)
    ]
    shares = np.array([share.value for share in results])
    assert abs(shares.mean() - 0.01) < 4 * shares.std() / np.sqrt(2000)
    errors = np.sqrt(np.mean([share.error**2 for share in results]))
    np.testing.assert_allclose(errors, shares.std(), rtol=0.1)
