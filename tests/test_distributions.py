"""Densities that integrate to one, divergences that agree with their definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vaejax.distributions import LEVELS, DiscretizedNormal, Normal


def posterior(b: int = 3, d: int = 5) -> Normal:
    mean_key, variance_key = jax.random.split(jax.random.key(0))
    return Normal(jax.random.normal(mean_key, (b, d)), jax.random.normal(variance_key, (b, d)))


def test_kl_is_zero_only_at_the_prior():
    zeros = jnp.zeros((2, 4))
    assert jnp.all(Normal(zeros, zeros).kl() == 0)
    assert jnp.all(Normal(zeros + 0.1, zeros).kl() > 0)
    assert jnp.all(Normal(zeros, zeros + 0.1).kl() > 0)
    assert jnp.all(Normal(zeros, zeros - 0.1).kl() > 0)


def test_kl_is_the_mean_of_the_log_ratio_under_its_own_samples():
    q = posterior()
    keys = jax.random.split(jax.random.key(1), 100_000)
    z = jax.vmap(q.sample)(keys)
    prior = Normal(jnp.zeros_like(q.mean), jnp.zeros_like(q.mean))
    ratio = jax.vmap(lambda z: q.log_prob(z) - prior.log_prob(z))(z)
    np.testing.assert_allclose(jnp.sum(q.kl(), axis=-1), jnp.mean(ratio, axis=0), rtol=0.01)


def test_kl_keeps_its_digits_near_the_prior():
    log_variance = 1e-4  # (e^v - 1 - v) / 2 = v^2 / 4 + v^3 / 12 + ...; v^2 / 4 is 2.5e-9
    kl = Normal(jnp.zeros((1, 1)), jnp.full((1, 1), log_variance)).kl()
    np.testing.assert_allclose(kl, log_variance**2 / 4, rtol=0.05)


def test_log_prob_of_a_normal_is_its_formula():
    q, z = posterior(), jnp.ones((3, 5))
    mean, variance = np.asarray(q.mean, np.float64), np.exp(np.asarray(q.log_variance, np.float64))
    density = np.exp(-((1 - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    np.testing.assert_allclose(q.log_prob(z), np.log(density).sum(-1), rtol=1e-5)


def test_samples_have_the_mean_and_the_variance_they_should():
    q = posterior()
    z = jax.vmap(q.sample)(jax.random.split(jax.random.key(2), 200_000))
    np.testing.assert_allclose(jnp.mean(z, axis=0), q.mean, atol=0.02)
    np.testing.assert_allclose(jnp.var(z, axis=0), jnp.exp(q.log_variance), rtol=0.03)


def test_the_same_key_draws_the_same_and_another_key_another():
    q, key, other = posterior(), jax.random.key(3), jax.random.key(4)
    assert jnp.all(q.sample(key) == q.sample(key))
    assert jnp.all(q.sample(key) != q.sample(other))


@pytest.mark.parametrize("mean", [-0.3, 0.0, 0.002, 0.5, 1.0, 1.4])
@pytest.mark.parametrize("deviation", [1e-3, 0.02, 0.1, 1.0])
def test_the_masses_of_the_256_levels_sum_to_one(mean: float, deviation: float):
    levels = jnp.arange(LEVELS, dtype=jnp.uint8).reshape(LEVELS, 1, 1, 1)
    likelihood = DiscretizedNormal(jnp.full(levels.shape, mean), jnp.log(deviation**2))
    log_masses = likelihood.log_prob(levels)
    np.testing.assert_allclose(jnp.sum(jnp.exp(log_masses)), 1, rtol=2e-4)


def test_a_level_has_the_mass_of_its_interval():
    mean, deviation, half = 0.47, 0.03, 0.5 / 255

    def cdf(value: float) -> float:
        return 0.5 * (1 + math.erf((value - mean) / (deviation * math.sqrt(2))))

    for level in (100, 119, 120, 121, 140):
        image = jnp.full((1, 1, 1, 1), level, jnp.uint8)
        log_mass = DiscretizedNormal(jnp.full((1, 1, 1, 1), mean), jnp.log(deviation**2)).log_prob(
            image
        )
        expected = math.log(cdf(level / 255 + half) - cdf(level / 255 - half))
        np.testing.assert_allclose(log_mass, [expected], rtol=1e-4)


def test_log_mass_and_its_gradient_stay_finite_far_in_the_tails():
    images = jnp.asarray([0, 128, 255], jnp.uint8).reshape(3, 1, 1, 1)

    def total(mean):
        return jnp.sum(DiscretizedNormal(mean, jnp.log(1e-4)).log_prob(images))

    for mean in (-1.0, 0.0, 0.5, 1.0, 2.0):
        value, gradient = jax.value_and_grad(total)(jnp.full((3, 1, 1, 1), mean))
        assert jnp.isfinite(value)
        assert jnp.all(jnp.isfinite(gradient))


def test_gradients_of_sample_and_divergence_are_right():
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        mean, log_variance = random.normal(size=(2, 3, 4))
        key = jax.random.key(0)

        def sampled(mean, log_variance):
            return jnp.sum(jnp.sin(Normal(mean, log_variance).sample(key)))

        def divergence(mean, log_variance):
            return jnp.sum(Normal(mean, log_variance).kl() ** 2)

        def density(mean, log_variance):
            return jnp.sum(Normal(mean, log_variance).log_prob(jnp.ones((3, 4))))

        for function in (sampled, divergence, density):
            check_grads(function, (mean, log_variance), 1, rtol=1e-6, atol=1e-6, eps=1e-5)


def test_gradients_of_the_discretized_likelihood_are_right():
    with jax.enable_x64(True):
        images = jnp.asarray([[0, 3, 128], [200, 254, 255]], jnp.uint8).reshape(2, 1, 1, 3)
        mean = jnp.asarray([[0.01, 0.02, 0.4], [0.9, 0.93, 0.98]]).reshape(2, 1, 1, 3)

        def log_prob(mean, log_variance):
            return jnp.sum(DiscretizedNormal(mean, log_variance).log_prob(images))

        log_variance = jnp.asarray(-4.0)
        check_grads(log_prob, (mean, log_variance), 1, rtol=1e-6, atol=1e-6, eps=1e-5)
