"""The loss is the report's, the figures beside it keep their identities, its gradient is right."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaejax.models import autoencoder, vae
from vaejax.models.autoencoder import Autoencoder
from vaejax.models.convolutional import Convolutional
from vaejax.models.denoising import Denoising
from vaejax.models.feed_forward import FeedForward
from vaejax.objectives import calibrated, reconstruction, report, to_float, to_uint8

MODEL = vae.VAE(size=16, latent_dim=4, width=1)
# LLVM's own work would be most of the time, and is not what is tested
HASTY = {"xla_backend_optimization_level": 0}

encode = jax.jit(partial(autoencoder.encode, MODEL))
decode = jax.jit(partial(autoencoder.decode, MODEL))
evaluate = jax.jit(partial(report, model=MODEL, train=False), static_argnames="kl_weight")


@pytest.fixture(scope="module")
def images(draw) -> jax.Array:
    return jnp.asarray(draw(4, 16))


def weights(model: Autoencoder = MODEL):
    begin = jax.jit(partial(autoencoder.init, model), compiler_options=HASTY)
    params, statistics = begin(jax.random.key(0))
    # biases away from zero: a gradient must not be right by an accident of the initialisation
    random = np.random.default_rng(1)
    move = lambda a: jnp.asarray(a + 0.05 * random.normal(size=a.shape), a.dtype)  # noqa: E731
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


def test_the_calibrated_loss_is_the_elbo_of_the_best_variance(images):
    """Up to log(2 pi e) / 2, of a density with that variance; so its beta is 1."""
    params, statistics = weights()
    keys = jax.random.split(jax.random.key(2), 4)
    loss, (f, _) = jax.jit(partial(calibrated, model=MODEL, train=False))(
        params, statistics, images, keys
    )
    values, mse = 16 * 16 * 3, float(f["mse"])

    def density(variance: float) -> float:
        return 0.5 * (np.log(2 * np.pi * variance) + mse / variance)

    constant = 0.5 * (np.log(2 * np.pi) + 1)
    np.testing.assert_allclose(loss + constant, density(mse) + f["rate"] / values, rtol=1e-5)
    assert density(mse) < min(density(0.9 * mse), density(1.1 * mse))
    np.testing.assert_allclose(f["effective_beta"], 1, rtol=1e-5)


def test_the_calibrated_loss_of_halves_has_the_gradient_of_the_whole(images):
    params, statistics = weights()
    keys = jax.random.split(jax.random.key(2), 4)

    def gradient(images, keys, *, axis):
        def value(params):
            loss = partial(calibrated, model=MODEL, train=True, axis=axis)
            return loss(params, statistics, images, keys)[0]

        return jax.value_and_grad(value)(params)

    loss, whole = jax.jit(partial(gradient, axis=None))(images, keys)
    halves = (images.reshape(2, 2, *images.shape[1:]), keys.reshape(2, 2))
    losses, each = jax.jit(jax.vmap(partial(gradient, axis="devices"), axis_name="devices"))(
        *halves
    )
    np.testing.assert_allclose(jnp.mean(losses), loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(
            jnp.mean(a, axis=0), b, atol=1e-5 * float(jnp.abs(b).max() + 1e-3)
        )


def test_an_image_does_not_learn_from_the_others_under_the_frozen_norm(images):
    params, statistics = weights()

    def distance(x):
        posterior, _ = autoencoder.encode(MODEL, params, statistics, x, train=True)
        output, _ = autoencoder.decode(MODEL, params, statistics, posterior.mean, train=True)
        return jnp.sum((x - output)[0] ** 2)

    gradient = jax.jit(jax.grad(distance))(to_float(images))
    assert jnp.any(gradient[0] != 0)
    assert jnp.all(gradient[1:] == 0)


@pytest.fixture(scope="module")
def reconstructed(images):
    """What a denoising model is shown, what it makes of it, and its figures: noise of 0.5."""
    model = Denoising(size=16, width=2, noise=0.5)
    params, statistics = weights(model)
    keys = jax.random.split(jax.random.key(2), 4)
    shown = model.corrupt(to_float(images), keys)
    code, _ = jax.jit(partial(autoencoder.encode, model))(params, statistics, shown)
    output, _ = jax.jit(partial(autoencoder.decode, model))(params, statistics, code)
    loss = partial(reconstruction, model=model, error="bce", train=False)
    value, (figures, _) = jax.jit(loss)(params, statistics, images, keys)
    return *(np.asarray(a, np.float64) for a in (shown, output)), value, figures


def test_what_is_made_of_noisy_images_is_compared_with_the_clean_ones(images, reconstructed):
    shown, output, _, figures = reconstructed
    x = np.asarray(images, np.float64) / 255
    np.testing.assert_allclose(figures["mse"], np.mean((x - output) ** 2), rtol=1e-5)
    assert figures["mse"] < 0.9 * np.mean((shown - output) ** 2)


def test_bce_is_the_cross_entropy_of_every_value(images, reconstructed):
    _, output, loss, figures = reconstructed
    x = np.asarray(images, np.float64) / 255
    bce = np.mean(-x * np.log(output) - (1 - x) * np.log(1 - output))
    np.testing.assert_allclose(figures["bce"], bce, rtol=1e-5)
    assert loss == figures["bce"] == figures["loss"]


def test_bce_of_a_saturated_output_is_finite_and_large():
    model = FeedForward(size=8, latent_dim=2)
    params, statistics = weights(model)
    params["decoder"]["output"]["layer"]["bias"] += 1e3  # white, whatever the image
    black = jnp.zeros((2, 8, 8, 3), jnp.uint8)
    loss = partial(reconstruction, model=model, error="bce", train=True)
    keys = jax.random.split(jax.random.key(0), 2)
    value, gradients = jax.jit(jax.value_and_grad(lambda p: loss(p, statistics, black, keys)[0]))(
        params
    )
    np.testing.assert_allclose(value, -np.log(1e-7), rtol=0.02)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


VARIATIONAL = partial(report, kl_weight=0.01)
MSE, BCE = (partial(reconstruction, error=error) for error in ("mse", "bce"))


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (MODEL, VARIATIONAL),
        (vae.VAE(size=16, latent_dim=4, width=1, norm="batch"), VARIATIONAL),
        (
            vae.VAE(
                size=16,
                latent_dim=4,
                width=1,
                norm="batch",
                output_norm=False,
                log_variance_bound=3.0,
            ),
            VARIATIONAL,
        ),
        (MODEL, partial(calibrated)),
        (FeedForward(size=8, latent_dim=4), MSE),
        (Convolutional(size=16, width=2), MSE),
        (Convolutional(size=16, width=2), BCE),
        (Denoising(size=8, width=2), BCE),
        (Denoising(size=8, width=2, norm="frozen"), MSE),
    ],
    ids=["report", "batch norm", "bounded", "calibrated"]
    + ["feed-forward", "convolutional", "convolutional bce", "denoising", "denoising mse, frozen"],
)
def test_gradient_of_the_whole_loss_is_right(model: Autoencoder, loss: partial):
    # noise: in flat pictures a whole region would cross a kink of the activation at once
    shape = (4, model.size, model.size, model.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    random = np.random.default_rng(2)
    double = partial(np.asarray, dtype=np.float64)
    with jax.enable_x64(True):
        params, statistics = jax.tree.map(double, weights(model))
        direction = jax.tree.map(lambda a: random.normal(size=a.shape), params)
        keys = jax.random.split(jax.random.key(0), 4)

        def value(way):
            moved = jax.tree.map(lambda a, along: a + way * along, params, direction)
            return loss(moved, statistics, jnp.asarray(images), keys, model=model, train=True)[0]

        both = jax.jit(jax.value_and_grad(value), compiler_options=HASTY)
        (before, _), (_, slope), (after, _) = both(-1e-6), both(0.0), both(1e-6)
        assert abs(slope) > 1e-5
        np.testing.assert_allclose(slope, (after - before) / 2e-6, rtol=1e-6)
