"""Bounds against a known evidence, a variance against a closed form, and z with known metrics."""

import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PyTree

from vaejax.distributions import DiscretizedNormal, Normal
from vaejax.evaluation import likelihood
from vaejax.evaluation.likelihood import ImportanceBound, active_units, prior_mmd, split_rate
from vaejax.losses import Context, batch_loss, mse_kl
from vaejax.models import autoencoder
from vaejax.models.feed_forward import FeedForward
from vaejax.models.vae import VAE

MODEL = VAE(size=16, latent_dim=4, width=1, norm="batch")
N, D = 700, 5  # more z than a block


@pytest.fixture(scope="module")
def trained() -> tuple[PyTree, PyTree]:
    return jax.jit(partial(autoencoder.init, MODEL))(jax.random.key(0))


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


# A batch ------------------------------------------------------------------------------------------


def test_a_batch_is_evaluated_as_the_loss_evaluates_it(trained: tuple[PyTree, PyTree], draw):
    images, keys = jnp.asarray(draw(6, 16)), jax.random.split(jax.random.key(5), 6)
    result = likelihood.evaluate_batch(*trained, images, keys, model=MODEL)
    context = Context(MODEL, *trained, keys, train=False)
    _, (metrics, _) = batch_loss(images, context, loss=partial(mse_kl, kl_weight=0.01))
    np.testing.assert_allclose(jnp.mean(result.mse), metrics["mse"], rtol=1e-5)
    assert result.latents is not None
    np.testing.assert_allclose(jnp.mean(result.latents.kl), metrics["kl"], rtol=1e-5)
    variance = jnp.log(jnp.mean(result.mse))[None]
    nats = likelihood.distortions(result.output, images, variance)
    np.testing.assert_allclose(jnp.mean(nats), metrics["distortion"], rtol=1e-5)


def test_latents_are_the_posterior_and_a_z_of_its_density(trained: tuple[PyTree, PyTree], draw):
    images, keys = jnp.asarray(draw(3, 16)), jax.random.split(jax.random.key(5), 3)
    mean, log_variance, z, kl = likelihood.evaluate_batch(
        *trained, images, keys, model=MODEL
    ).latents
    posterior = autoencoder.encode(MODEL, *trained, images / 255.0)
    np.testing.assert_allclose(mean, posterior.mean, atol=1e-5)
    np.testing.assert_allclose(log_variance, posterior.log_variance, atol=1e-5)
    np.testing.assert_allclose(kl, posterior.kl(), atol=1e-5)
    sample_keys = jax.vmap(lambda key: jax.random.split(key)[1])(keys)
    np.testing.assert_allclose(z, autoencoder.sample(posterior, sample_keys), atol=1e-5)


def test_a_model_without_a_posterior_has_no_latents(draw):
    model = FeedForward(size=16)
    params, batch_stats = jax.jit(partial(autoencoder.init, model))(jax.random.key(0))
    images, keys = jnp.asarray(draw(3, 16)), jax.random.split(jax.random.key(0), 3)
    result = likelihood.evaluate_batch(params, batch_stats, images, keys, model=model)
    assert result.latents is None
    levels = np.asarray(result.output * 255).round().clip(0, 255)
    np.testing.assert_array_equal(result.reconstructions, levels.astype(np.uint8))


# The likelihood's variance ------------------------------------------------------------------------


def test_the_fitted_sigma_is_that_of_a_closed_form():
    """An output of 254 levels for values of 254 and, a quarter of them, 255.

    With u = 1 / (2 σ), σ in levels, 254 has the mass 2 Φ(u) - 1, and 255 the upper tail, 1 - Φ(u).
    Setting the derivative of 3/4 log(2 Φ - 1) + 1/4 log(1 - Φ) by Φ to zero gives Φ(u) = 7/8.
    """
    images = np.full((2, 4, 4, 1), 254, np.uint8)
    images[:, 0] = 255
    output = jnp.full(images.shape, 254 / 255)

    def total_distortions(log_variances: np.ndarray) -> np.ndarray:
        grid = jnp.asarray(log_variances, jnp.float32)
        nats = likelihood.distortions(output, jnp.asarray(images), grid)
        return np.asarray(nats, np.float64).sum(axis=1)

    log_variance = likelihood.minimize_distortion(total_distortions, start=-3.0)
    exact = 0.5 / statistics.NormalDist().inv_cdf(7 / 8)  # 0.43465 levels
    np.testing.assert_allclose(255 * np.exp(log_variance / 2), exact, rtol=0.001)
    nats = 32 * -(0.75 * np.log(3 / 4) + 0.25 * np.log(1 / 8))
    np.testing.assert_allclose(total_distortions(np.array([log_variance])), nats, rtol=1e-4)


@pytest.mark.parametrize("start", [-1.0, -6.0, -12.0])
@pytest.mark.parametrize("blur", [0.001, 0.1])
def test_the_fitted_variance_has_the_smallest_distortion(draw, start: float, blur: float):
    images = jnp.asarray(draw(4, 16))
    output = images / 255.0 + blur * jax.random.normal(jax.random.key(0), images.shape)

    def total(log_variances: np.ndarray) -> np.ndarray:
        nats = likelihood.distortions(output, images, jnp.asarray(log_variances, jnp.float32))
        return np.asarray(nats, np.float64).sum(axis=1)

    fitted = likelihood.minimize_distortion(total, start=start)
    near = fitted + np.linspace(-3, 3, 61)
    values = total(near)
    assert abs(near[np.argmin(values)] - fitted) < 0.06
    assert total(np.array([fitted]))[0] <= values.min() + 0.01


# The importance-weighted bound --------------------------------------------------------------------


class Linear:
    """p(z) = N(0, I), p(x|z) = N(W z + b, s² I): the evidence is N(b, W W' + s² I), and the
    posterior N(V W' (x - b) / s², V), V = (I + W' W / s²)^-1."""

    def __init__(self, *, values: int, latents: int, sigma: float):
        random = np.random.default_rng(0)
        self.w, self.b = random.normal(size=(values, latents)), random.normal(size=values)
        self.s = sigma
        self.x = self.w @ random.normal(size=latents) + self.b + sigma * random.normal()
        self.variance = np.linalg.inv(np.eye(latents) + self.w.T @ self.w / sigma**2)
        self.mean = self.variance @ self.w.T @ (self.x - self.b) / sigma**2

    def evidence(self) -> float:
        covariance = self.w @ self.w.T + self.s**2 * np.eye(len(self.b))
        difference = self.x - self.b
        squares = difference @ np.linalg.solve(covariance, difference)
        _, logdet = np.linalg.slogdet(2 * np.pi * covariance)
        return float(-0.5 * (squares + logdet))

    def kl_from_posterior(self, q: Normal) -> float:
        """KL(q ‖ p(z|x)) of two Gaussians, the second with a full covariance."""
        precision = np.linalg.inv(self.variance)
        variances, difference = np.exp(q.log_variance), np.asarray(q.mean) - self.mean
        traces = np.trace(precision * variances) + difference @ precision @ difference
        logdet = np.linalg.slogdet(self.variance)[1] - np.sum(q.log_variance)
        return float(0.5 * (traces - len(difference) + logdet))

    def log_likelihood(self, z: jax.Array) -> jax.Array:
        means = z @ self.w.T + self.b[None]
        log_variances = jnp.full_like(means, 2 * np.log(self.s))
        return Normal(means, log_variances).log_prob(jnp.broadcast_to(self.x, means.shape))

    def bound(self, posterior: Normal, samples: int, draws: int) -> ImportanceBound:
        """The bound of the same x, `draws` times."""
        weigh = partial(likelihood.log_weights, posterior, self.log_likelihood, samples=samples)
        keys = jax.random.split(jax.random.key(1), draws)
        return ImportanceBound.zero(draws).add(jax.jit(jax.vmap(weigh))(keys))


def test_the_bound_with_the_exact_posterior_is_the_evidence():
    linear = Linear(values=3, latents=1, sigma=0.5)
    posterior = Normal(jnp.asarray(linear.mean), jnp.log(jnp.diag(jnp.asarray(linear.variance))))
    bound = linear.bound(posterior, samples=1, draws=20)
    np.testing.assert_allclose(bound.iwae_bound, linear.evidence(), rtol=1e-4)


def test_the_bound_rises_from_the_elbo_to_the_evidence():
    linear = Linear(values=5, latents=2, sigma=0.7)
    evidence = linear.evidence()
    wide = Normal(jnp.asarray(linear.mean + 0.3), jnp.full(2, -0.5))
    bounds = [linear.bound(wide, samples, 400).iwae_bound for samples in (1, 5, 50, 1000)]
    means = [float(bound.mean()) for bound in bounds]
    errors = [float(bound.std() / 20) for bound in bounds]
    elbo = evidence - linear.kl_from_posterior(wide)
    assert abs(means[0] - elbo) < 3 * errors[0]
    assert means[0] < means[1] < means[2] < means[3]
    assert abs(means[3] - evidence) < 3 * errors[3]
    one_by_one = linear.bound(wide, 1000, 400).elbo  # of the same samples
    assert abs(float(one_by_one.mean()) - elbo) < 3 * float(one_by_one.std() / 20)


def test_the_bound_does_not_depend_on_the_parts_in_which_samples_are_added():
    weights = jax.random.normal(jax.random.key(0), (3, 12)) * 30
    at_once = ImportanceBound.zero(3).add(weights)
    parts = ImportanceBound.zero(3)
    for first in range(0, 12, 4):
        parts = parts.add(weights[:, first : first + 4])
    np.testing.assert_allclose(parts.iwae_bound, at_once.iwae_bound, rtol=1e-5)
    np.testing.assert_allclose(parts.elbo, np.mean(weights, axis=1), rtol=1e-5)
    exact = np.log(np.mean(np.exp(np.asarray(weights, np.float64)), axis=1))
    np.testing.assert_allclose(at_once.iwae_bound, exact, rtol=1e-5)


def test_the_weights_of_an_image_average_to_its_elbo(trained: tuple[PyTree, PyTree], draw):
    images, keys = jnp.asarray(draw(2, 16)), jax.random.split(jax.random.key(3), 2)
    log_variance = jnp.float32(-4.0)
    weights = likelihood.image_log_weights(
        *trained, images, keys, log_variance, model=MODEL, samples=4000
    )
    assert weights.shape == (2, 4000)
    posterior = autoencoder.encode(MODEL, *trained, images / 255.0)
    noise = jax.vmap(lambda key: jax.random.normal(key, (2, 4)))(jax.random.split(keys[0], 50))
    z = posterior.mean[None] + jnp.exp(posterior.log_variance / 2)[None] * noise
    outputs = [autoencoder.decode(MODEL, *trained, some) for some in z]
    likelihoods = [DiscretizedNormal(out, log_variance).log_prob(images) for out in outputs]
    elbo = jnp.mean(jnp.stack(likelihoods), axis=0) - posterior.kl().sum(axis=-1)
    np.testing.assert_allclose(jnp.mean(weights, axis=1), elbo, rtol=5e-3)


# The aggregate posterior --------------------------------------------------------------------------


def test_planted_dead_units_are_not_counted(random):
    means = random.normal(size=(N, D))
    means[:, 1] = 3.0  # the same for every image
    means[:, 3] *= 0.01
    assert active_units(means) == 3


def test_z_that_do_not_depend_on_the_image_have_no_rate(random):
    z = random.normal(size=(N, D))
    rate = split_rate(np.zeros((N, D)), np.zeros((N, D)), z)
    np.testing.assert_allclose(rate, (0, 0), atol=1e-9)


def test_z_far_from_each_other_have_the_log_of_their_number(random):
    means = 100 * random.normal(size=(N, D))
    logs = np.full((N, D), -3.0)
    z = means + np.exp(logs / 2) * random.normal(size=(N, D))
    rate = split_rate(means, logs, z)
    np.testing.assert_allclose(rate.mutual_information, np.log(N), rtol=1e-6)
    # and both parts together are the rate at these z
    log_posterior = -0.5 * ((z - means) ** 2 / np.exp(logs) + logs).sum(axis=1)
    log_prior = -0.5 * (z**2).sum(axis=1)
    np.testing.assert_allclose(sum(rate), np.mean(log_posterior - log_prior), rtol=1e-9)


def test_the_parts_of_a_rate_are_those_of_their_definition(random):
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
    aggregate = densities.mean(axis=1)
    information = np.mean(np.log(np.diag(densities) / aggregate))
    np.testing.assert_allclose(rate.mutual_information, information)
    np.testing.assert_allclose(rate.aggregate_posterior_kl, np.mean(np.log(aggregate / prior)))


def test_z_from_the_prior_have_no_discrepancy_in_the_mean(random):
    values = [prior_mmd(random.normal(size=(N, D))) for _ in range(20)]
    spread = np.std(values)
    assert abs(np.mean(values)) < 3 * spread / np.sqrt(20)
    assert spread < 1e-3


def test_the_discrepancy_is_that_of_two_samples(random):
    """The definition, with samples in place of the expectations over the prior."""
    z = 0.5 + 0.7 * random.normal(size=(N, D))
    prior = random.normal(size=(4000, D))

    def kernel(a, b):
        squares = ((a[:, None] - b[None]) ** 2).sum(axis=2)
        return np.exp(-squares / (2 * D))

    within = (kernel(z, z).sum() - N) / (N * (N - 1))
    within_prior = (kernel(prior, prior).sum() - 4000) / (4000 * 3999)
    sampled = within + within_prior - 2 * kernel(z, prior).mean()
    np.testing.assert_allclose(prior_mmd(z), sampled, rtol=0.05)
    with pytest.raises(ValueError, match="one z"):
        prior_mmd(z[:1])
