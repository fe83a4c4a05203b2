"""Bounds against evidence that is known, a variance against another search for it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PyTree

from vaejax.distributions import DiscretizedNormal, Normal
from vaejax.evaluation import likelihood
from vaejax.models import autoencoder
from vaejax.models.feed_forward import FeedForward
from vaejax.models.vae import VAE
from vaejax.objectives import report

MODEL = VAE(size=16, latent_dim=4, width=1, norm="batch")


class Linear:
    """p(z) = N(0, I), p(x|z) = N(W z + b, s^2 I): the evidence is N(b, W W' + s^2 I), and the
    posterior N(V W' (x - b) / s^2, V), V = (I + W' W / s^2)^-1."""

    def __init__(self, *, values: int, latents: int, deviation: float):
        random = np.random.default_rng(0)
        self.w, self.b = random.normal(size=(values, latents)), random.normal(size=values)
        self.s = deviation
        self.x = self.w @ random.normal(size=latents) + self.b + deviation * random.normal()
        self.variance = np.linalg.inv(np.eye(latents) + self.w.T @ self.w / deviation**2)
        self.mean = self.variance @ self.w.T @ (self.x - self.b) / deviation**2

    def evidence(self) -> float:
        covariance = self.w @ self.w.T + self.s**2 * np.eye(len(self.b))
        away = self.x - self.b
        squares = away @ np.linalg.solve(covariance, away)
        _, logdet = np.linalg.slogdet(2 * np.pi * covariance)
        return float(-0.5 * (squares + logdet))

    def log_likelihood(self, z: jax.Array) -> jax.Array:
        means = z @ self.w.T + self.b[None]
        deviations = jnp.full_like(means, 2 * np.log(self.s))
        return Normal(means, deviations).log_prob(jnp.broadcast_to(self.x, means.shape))

    def bound(self, posterior: Normal, samples: int, draws: int) -> likelihood.Bound:
        """Of the same x, as often as there are draws."""
        weigh = partial(likelihood.log_weights, posterior, self.log_likelihood, samples=samples)
        return likelihood.nothing_yet(draws).add(
            jax.jit(jax.vmap(weigh))(jax.random.split(jax.random.key(1), draws))
        )


def test_a_bound_with_the_exact_posterior_is_the_evidence():
    linear = Linear(values=3, latents=1, deviation=0.5)
    posterior = Normal(jnp.asarray(linear.mean), jnp.log(jnp.diag(jnp.asarray(linear.variance))))
    bound = linear.bound(posterior, samples=1, draws=20)
    np.testing.assert_allclose(bound.value, linear.evidence(), rtol=1e-4)


def test_a_bound_comes_nearer_to_the_evidence_from_below():
    linear = Linear(values=5, latents=2, deviation=0.7)
    evidence = linear.evidence()
    wide = Normal(jnp.asarray(linear.mean + 0.3), jnp.full(2, -0.5))
    bounds = [linear.bound(wide, samples, 400).value for samples in (1, 5, 50, 1000)]
    means = [float(bound.mean()) for bound in bounds]
    errors = [float(bound.std() / 20) for bound in bounds]
    assert means[0] < means[1] < means[2] < means[3]
    assert all(mean < evidence + 3 * error for mean, error in zip(means, errors, strict=True))
    assert means[0] < evidence - 0.2
    assert abs(means[3] - evidence) < 0.02


def test_a_bound_does_not_depend_on_how_its_samples_are_told():
    weights = jax.random.normal(jax.random.key(0), (3, 12)) * 30
    whole = likelihood.nothing_yet(3).add(weights)
    parts = likelihood.nothing_yet(3)
    for first in range(0, 12, 4):
        parts = parts.add(weights[:, first : first + 4])
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-5)
    np.testing.assert_allclose(parts.elbo, np.mean(weights, axis=1), rtol=1e-5)
    exact = np.log(np.mean(np.exp(np.asarray(weights, np.float64)), axis=1))
    np.testing.assert_allclose(whole.value, exact, rtol=1e-5)


@pytest.fixture(scope="module")
def trained() -> tuple[PyTree, PyTree]:
    return jax.jit(partial(autoencoder.init, MODEL))(jax.random.key(0))


def test_weights_of_images_are_the_elbo_of_the_same_distributions(
    trained: tuple[PyTree, PyTree], draw
):
    images, keys = jnp.asarray(draw(2, 16)), jax.random.split(jax.random.key(3), 2)
    log_variance = jnp.float32(-4.0)
    weights = likelihood.image_weights(
        trained[0], trained[1], images, keys, log_variance, model=MODEL, samples=4000
    )
    assert weights.shape == (2, 4000)
    posterior, _ = autoencoder.encode(MODEL, trained[0], trained[1], images / 255.0)
    z = jax.vmap(lambda key: jax.random.normal(key, (2, 4)))(jax.random.split(keys[0], 500))
    z = posterior.mean[None] + jnp.exp(posterior.log_variance / 2)[None] * z
    distortion = jnp.mean(
        jnp.stack(
            [
                -DiscretizedNormal(
                    autoencoder.decode(MODEL, trained[0], trained[1], some)[0], log_variance
                ).log_prob(images)
                for some in z[:50]
            ]
        ),
        axis=0,
    )
    elbo = -(distortion + posterior.kl().sum(axis=-1))
    np.testing.assert_allclose(jnp.mean(weights, axis=1), elbo, rtol=5e-3)


def test_what_is_seen_is_what_the_loss_sees(trained: tuple[PyTree, PyTree], draw):
    images, keys = jnp.asarray(draw(6, 16)), jax.random.split(jax.random.key(5), 6)
    seen = likelihood.see(trained[0], trained[1], images, keys, model=MODEL)
    inner = jax.vmap(lambda key: jax.random.split(key)[1])(keys)
    loss = jax.jit(partial(report, model=MODEL, kl_weight=0.01, train=False))
    _, (figures, _) = loss(*trained, images, inner)
    np.testing.assert_allclose(jnp.mean(seen.mse), figures["mse"], rtol=1e-5)
    assert seen.posterior is not None
    np.testing.assert_allclose(jnp.mean(seen.posterior.kl()), figures["kl"], rtol=1e-5)
    variance = jnp.log(jnp.mean(seen.mse))[None]
    nats = likelihood.distortions(seen.output, images, variance)
    np.testing.assert_allclose(jnp.mean(nats), figures["distortion"], rtol=1e-5)


def test_a_code_without_a_posterior_is_seen_too(draw):
    model = FeedForward(size=16)
    params, statistics = jax.jit(partial(autoencoder.init, model))(jax.random.key(0))
    keys = jax.random.split(jax.random.key(0), 3)
    seen = likelihood.see(params, statistics, jnp.asarray(draw(3, 16)), keys, model=model)
    assert seen.posterior is None
    assert seen.z is None
    again = np.asarray(seen.output * 255).round().clip(0, 255)
    np.testing.assert_array_equal(seen.reconstructions, again.astype(np.uint8))


@pytest.mark.parametrize("start", [-1.0, -6.0, -12.0])
@pytest.mark.parametrize("blur", [0.001, 0.1])
def test_the_calibrated_variance_has_the_smallest_distortion(draw, start: float, blur: float):
    images = jnp.asarray(draw(4, 16))
    output = images / 255.0 + blur * jax.random.normal(jax.random.key(0), images.shape)

    def total(log_variances: np.ndarray) -> np.ndarray:
        nats = likelihood.distortions(output, images, jnp.asarray(log_variances, jnp.float32))
        return np.asarray(nats, np.float64).sum(axis=1)

    found = likelihood.calibrate(total, start=start)
    near = found + np.linspace(-3, 3, 61)
    values = total(near)
    assert abs(near[np.argmin(values)] - found) < 0.06
    assert total(np.array([found]))[0] <= values.min() + 0.01
