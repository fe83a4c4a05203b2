"""Densities integrate to one, and divergences agree with their definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vaejax.distributions import LEVELS, DiscretizedNormal, Normal, kl_normal

# axes of a latent: a vector as most models have it, a spatial one, a single number
SHAPES = [(5,), (2, 3, 4), ()]


def normal(*z: int, b: int = 3, seed: int = 0) -> Normal:
    mean_key, variance_key = jax.random.split(jax.random.key(seed))
    shape = (b, *z)
    return Normal(jax.random.normal(mean_key, shape), jax.random.normal(variance_key, shape))


def standard_normal(*shape: int) -> Normal:
    return Normal(jnp.zeros(shape), jnp.zeros(shape))


def test_kl_is_zero_only_at_the_prior():
    zeros = jnp.zeros((2, 4))
    assert jnp.all(Normal(zeros, zeros).kl() == 0)
    assert jnp.all(Normal(zeros + 0.1, zeros).kl() > 0)
    assert jnp.all(Normal(zeros, zeros + 0.1).kl() > 0)
    assert jnp.all(Normal(zeros, zeros - 0.1).kl() > 0)


def test_kl_normal_is_zero_only_for_equal_distributions():
    q = normal(4)
    assert jnp.all(kl_normal(q, q) == 0)
    for p in (q._replace(mean=q.mean + 0.1), q._replace(log_variance=q.log_variance + 0.1)):
        assert jnp.all(kl_normal(q, p) > 0)
        assert jnp.all(kl_normal(p, q) > 0)


@pytest.mark.parametrize("z", SHAPES, ids=str)
def test_the_rate_is_the_mean_log_ratio_under_samples_of_the_posterior(z: tuple[int, ...]):
    q, prior = normal(*z), standard_normal(3, *z)
    samples = jax.vmap(q.sample)(jax.random.split(jax.random.key(1), 100_000))
    ratio = jax.vmap(lambda z: q.log_prob(z) - prior.log_prob(z))(samples)
    assert q.kl().shape == (3, *z)
    np.testing.assert_allclose(q.rate(), jnp.mean(ratio, axis=0), rtol=0.015)


def test_kl_normal_is_the_mean_log_ratio_under_samples_of_the_first():
    q, p = normal(seed=1, b=6), normal(seed=2, b=6)  # one value each: no sum hides an error
    samples = jax.vmap(q.sample)(jax.random.split(jax.random.key(1), 200_000))
    ratio = jax.vmap(lambda z: q.log_prob(z) - p.log_prob(z))(samples)
    error = jnp.std(ratio, axis=0) / math.sqrt(len(ratio))
    assert jnp.all(jnp.abs(kl_normal(q, p) - jnp.mean(ratio, axis=0)) < 4 * error)


@pytest.mark.parametrize("z", SHAPES, ids=str)
def test_kl_normal_from_the_prior_is_kl(z: tuple[int, ...]):
    q = normal(*z)
    np.testing.assert_allclose(kl_normal(q, standard_normal(3, *z)), q.kl(), rtol=1e-6)


def test_kl_keeps_its_digits_near_the_prior():
    log_variance = 1e-4  # (e^v - 1 - v) / 2 = v^2 / 4 + v^3 / 12 + ...; v^2 / 4 is 2.5e-9
    q = Normal(jnp.zeros((1, 1)), jnp.full((1, 1), log_variance))
    for kl in (q.kl(), kl_normal(q, standard_normal(1, 1))):
        np.testing.assert_allclose(kl, log_variance**2 / 4, rtol=0.05)


@pytest.mark.parametrize("z", SHAPES, ids=str)
def test_log_prob_of_a_normal_is_its_formula(z: tuple[int, ...]):
    q, values = normal(*z), jnp.ones((3, *z))
    mean, variance = np.asarray(q.mean, np.float64), np.exp(np.asarray(q.log_variance, np.float64))
    density = np.exp(-((1 - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    expected = np.log(density).reshape(3, -1).sum(1)
    np.testing.assert_allclose(q.log_prob(values), expected, rtol=1e-5)


def test_samples_have_the_mean_and_the_variance_of_the_distribution():
    q = normal(5)
    z = jax.vmap(q.sample)(jax.random.split(jax.random.key(2), 200_000))
    np.testing.assert_allclose(jnp.mean(z, axis=0), q.mean, atol=0.02)
    np.testing.assert_allclose(jnp.var(z, axis=0), jnp.exp(q.log_variance), rtol=0.03)


def test_a_key_determines_the_sample():
    q, key, other = normal(5), jax.random.key(3), jax.random.key(4)
    assert jnp.all(q.sample(key) == q.sample(key))
    assert jnp.all(q.sample(key) != q.sample(other))


@pytest.mark.parametrize("mean", [-0.3, 0.0, 0.002, 0.5, 1.0, 1.4])
@pytest.mark.parametrize("sigma", [1e-3, 0.02, 0.1, 1.0])
def test_the_masses_of_the_256_levels_sum_to_one(mean: float, sigma: float):
    levels = jnp.arange(LEVELS, dtype=jnp.uint8).reshape(LEVELS, 1, 1, 1)
    likelihood = DiscretizedNormal(jnp.full(levels.shape, mean), jnp.log(sigma**2))
    log_masses = likelihood.log_prob(levels)
    np.testing.assert_allclose(jnp.sum(jnp.exp(log_masses)), 1, rtol=2e-4)


def test_a_level_has_the_mass_of_its_interval():
    mean, sigma, half = 0.47, 0.03, 0.5 / 255

    def cdf(value: float) -> float:
        return 0.5 * (1 + math.erf((value - mean) / (sigma * math.sqrt(2))))

    for level in (100, 119, 120, 121, 140):
        likelihood = DiscretizedNormal(jnp.full((1, 1, 1, 1), mean), jnp.log(sigma**2))
        log_mass = likelihood.log_prob(jnp.full((1, 1, 1, 1), level, jnp.uint8))
        expected = math.log(cdf(level / 255 + half) - cdf(level / 255 - half))
        np.testing.assert_allclose(log_mass, [expected], rtol=1e-4)


def test_log_prob_of_an_image_is_the_sum_over_its_values():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5)), jnp.uint8)
    likelihood = DiscretizedNormal(jnp.full(images.shape, 0.4), jnp.log(0.3**2))
    values = DiscretizedNormal(likelihood.mean.reshape(-1), likelihood.log_variance)
    expected = values.log_prob(images.reshape(-1)).reshape(2, -1).sum(axis=1)
    np.testing.assert_allclose(likelihood.log_prob(images), expected, rtol=1e-5)


def test_log_mass_and_its_gradient_stay_finite_far_in_the_tails():
    images = jnp.asarray([0, 128, 255], jnp.uint8).reshape(3, 1, 1, 1)

    def total(mean):
        return jnp.sum(DiscretizedNormal(mean, jnp.log(1e-4)).log_prob(images))

    for mean in (-1.0, 0.0, 0.5, 1.0, 2.0):
        value, gradient = jax.value_and_grad(total)(jnp.full((3, 1, 1, 1), mean))
        assert jnp.isfinite(value)
        assert jnp.all(jnp.isfinite(gradient))


def test_gradients_of_sample_kl_and_density_are_right():
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        mean, log_variance = random.normal(size=(2, 3, 4))
        prior = Normal(*jnp.asarray(random.normal(size=(2, 3, 4))))
        key = jax.random.key(0)

        def sampled(mean, log_variance):
            return jnp.sum(jnp.sin(Normal(mean, log_variance).sample(key)))

        def divergence(mean, log_variance):
            return jnp.sum(Normal(mean, log_variance).kl() ** 2)

        def between(mean, log_variance):
            q = Normal(mean, log_variance)
            return jnp.sum(kl_normal(q, prior) ** 2 + kl_normal(prior, q) ** 2)

        def density(mean, log_variance):
            return jnp.sum(Normal(mean, log_variance).log_prob(jnp.ones((3, 4))))

        for function in (sampled, divergence, between, density):
            check_grads(function, (mean, log_variance), 1, rtol=1e-6, atol=1e-6, eps=1e-5)


def test_gradients_of_the_discretized_likelihood_are_right():
    with jax.enable_x64(True):
        images = jnp.asarray([[0, 3, 128], [200, 254, 255]], jnp.uint8).reshape(2, 1, 1, 3)
        mean = jnp.asarray([[0.01, 0.02, 0.4], [0.9, 0.93, 0.98]]).reshape(2, 1, 1, 3)

        def log_prob(mean, log_variance):
            return jnp.sum(DiscretizedNormal(mean, log_variance).log_prob(images))

        log_variance = jnp.asarray(-4.0)
        check_grads(log_prob, (mean, log_variance), 1, rtol=1e-6, atol=1e-6, eps=1e-5)
