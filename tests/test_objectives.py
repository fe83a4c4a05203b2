"""The loss is the report's, the figures beside it keep their identities, its gradient is right."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vaejax.models import autoencoder, vae
from vaejax.objectives import report, to_float, to_uint8

MODEL = vae.VAE(size=16, latent_dim=4, width=1)


encode = jax.jit(partial(autoencoder.encode, MODEL))
decode = jax.jit(partial(autoencoder.decode, MODEL))
evaluate = jax.jit(partial(report, model=MODEL, train=False), static_argnames="kl_weight")


@pytest.fixture(scope="module")
def images(draw) -> jax.Array:
    return jnp.asarray(draw(4, 16))


def weights(model: vae.VAE = MODEL):
    params, statistics = jax.jit(autoencoder.init, static_argnums=0)(model, jax.random.key(0))
    # biases away from zero: a gradient must not be right by an accident of the initialisation
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    move = lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), leaf.shape)  # noqa: E731
    return jax.tree.map(move, params), statistics


def test_every_level_survives_the_way_to_float_and_back():
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    assert jnp.all(to_uint8(to_float(levels)) == levels)


def test_loss_is_mse_and_weighted_kl_by_their_definitions(images):
    params, statistics = weights()
    keys = jax.random.split(jax.random.key(2), 4)
    loss, (figures, _) = evaluate(params, statistics, images, keys, kl_weight=0.01)
    x = np.asarray(images, np.float64) / 255
    posterior, _ = encode(params, statistics, jnp.asarray(x, jnp.float32))
    mean, log_variance = (np.asarray(a, np.float64) for a in posterior)
    noise = np.stack([np.asarray(jax.random.normal(key, (4,))) for key in keys])
    z = mean + np.exp(log_variance / 2) * noise
    output, _ = decode(params, statistics, jnp.asarray(z, jnp.float32))
    mse = np.mean((x - np.asarray(output)) ** 2)
    kl = -0.5 * np.mean(1 + log_variance - mean**2 - np.exp(log_variance))
    np.testing.assert_allclose(figures["mse"], mse, rtol=1e-5)
    np.testing.assert_allclose(figures["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(loss, mse + 0.01 * kl, rtol=1e-5)


def test_figures_in_nats_keep_their_identities(images):
    params, statistics = weights()
    keys = jax.random.split(jax.random.key(2), 4)
    _, (f, _) = evaluate(params, statistics, images, keys, kl_weight=0.02)
    values = 16 * 16 * 3
    np.testing.assert_allclose(f["rate"], 4 * f["kl"], rtol=1e-5)
    np.testing.assert_allclose(f["elbo"], -(f["distortion"] + f["rate"]), rtol=1e-6)
    np.testing.assert_allclose(f["bits_per_dim"], -f["elbo"] / values / np.log(2), rtol=1e-5)
    # the report's loss, in nats of a likelihood whose variance is the mse, is a beta-VAE's
    scale = values / (2 * f["mse"])
    in_nats = scale * f["mse"] + f["effective_beta"] * f["rate"]
    np.testing.assert_allclose(scale * f["loss"], in_nats, rtol=1e-5)


def test_an_image_does_not_learn_from_the_others_under_the_frozen_norm(images):
    params, statistics = weights()

    def distance(x):
        posterior, _ = autoencoder.encode(MODEL, params, statistics, x, train=True)
        output, _ = autoencoder.decode(MODEL, params, statistics, posterior.mean, train=True)
        return jnp.sum((x - output)[0] ** 2)

    gradient = jax.jit(jax.grad(distance))(to_float(images))
    assert jnp.any(gradient[0] != 0)
    assert jnp.all(gradient[1:] == 0)


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        vae.VAE(size=16, latent_dim=4, width=1, norm="batch"),
        vae.VAE(
            size=16, latent_dim=4, width=1, norm="batch", output_norm=False, log_variance_bound=3.0
        ),
    ],
    ids=["report", "batch norm", "bounded"],
)
def test_gradient_of_the_whole_loss_is_right(model: vae.VAE):
    # noise: in flat pictures a whole region would cross a kink of the activation at once
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    with jax.enable_x64(True):
        params, statistics = jax.tree.map(lambda a: a.astype(jnp.float64), weights(model))
        loss = partial(report, model=model, kl_weight=0.01, train=True)

        keys = jax.random.split(jax.random.key(0), 4)

        def value(params):
            return loss(params, statistics, jnp.asarray(images), keys)[0]

        check_grads(jax.jit(value), (params,), 1, modes=["rev"], rtol=1e-6, atol=1e-6, eps=1e-6)
