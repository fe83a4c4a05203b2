"""Codes whose figures are known beforehand."""

import numpy as np
import pytest

from vaejax.evaluation.latents import active_units, prior_mmd, split_rate

N, D = 700, 5  # more than a block


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_planted_dead_units_are_not_counted(random):
    means = random.normal(size=(N, D))
    means[:, 1] = 3.0  # the same for every image
    means[:, 3] *= 0.01
    assert active_units(means) == 3


def test_codes_that_ignore_their_image_have_no_rate(random):
    z = random.normal(size=(N, D))
    rate = split_rate(np.zeros((N, D)), np.zeros((N, D)), z)
    assert abs(rate.index_code) < 1e-9
    assert abs(rate.marginal_kl) < 1e-9


def test_codes_that_stand_apart_tell_their_image(random):
    means = 100 * random.normal(size=(N, D))
    logs = np.full((N, D), -3.0)
    z = means + np.exp(logs / 2) * random.normal(size=(N, D))
    rate = split_rate(means, logs, z)
    np.testing.assert_allclose(rate.index_code, np.log(N), rtol=1e-6)
    # and the rest of the rate is the hole: both together are the rate at these z
    posterior = -0.5 * ((z - means) ** 2 / np.exp(logs) + logs).sum(axis=1)
    np.testing.assert_allclose(sum(rate), np.mean(posterior + 0.5 * (z**2).sum(axis=1)), rtol=1e-9)


def test_a_rate_is_split_as_it_is_one_by_one(random):
    means, logs = random.normal(size=(40, 3)), random.normal(size=(40, 3))
    z = means + np.exp(logs / 2) * random.normal(size=(40, 3))
    densities = np.array(
        [
            [
                np.prod(np.exp(-((a - m) ** 2) / (2 * np.exp(v))) / np.sqrt(2 * np.pi * np.exp(v)))
                for m, v in zip(means, logs, strict=True)
            ]
            for a in z
        ]
    )
    prior = np.prod(np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi), axis=1)
    rate = split_rate(means, logs, z)
    mixed = densities.mean(axis=1)
    np.testing.assert_allclose(rate.index_code, np.mean(np.log(np.diag(densities) / mixed)))
    np.testing.assert_allclose(rate.marginal_kl, np.mean(np.log(mixed / prior)))


def test_what_comes_from_the_prior_is_not_far_from_it(random):
    found = [prior_mmd(random.normal(size=(N, D))) for _ in range(20)]
    spread = np.std(found)
    assert abs(np.mean(found)) < 3 * spread / np.sqrt(20)
    assert spread < 1e-3


def test_a_discrepancy_is_that_of_two_samples(random):
    """The definition, with draws in the place of both expectations."""
    z = 0.5 + 0.7 * random.normal(size=(N, D))
    prior = random.normal(size=(4000, D))

    def kernel(a, b):
        squares = ((a[:, None] - b[None]) ** 2).sum(axis=2)
        return np.exp(-squares / (2 * D))

    own = (kernel(z, z).sum() - N) / (N * (N - 1))
    other = (kernel(prior, prior).sum() - 4000) / (4000 * 3999)
    drawn = own + other - 2 * kernel(z, prior).mean()
    exact = prior_mmd(z)
    assert exact > 0.05
    np.testing.assert_allclose(exact, drawn, rtol=0.05)


def test_one_code_has_no_discrepancy():
    with pytest.raises(ValueError, match="one point"):
        prior_mmd(np.zeros((1, 3)))
