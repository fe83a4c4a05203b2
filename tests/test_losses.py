"""Losses by their definitions, their gradients, and the metrics of the ELBO beside them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaejax.losses import (
    Context,
    batch_loss,
    effective_beta,
    is_batch_coupled,
    mse_kl,
    reconstruction,
    settings,
    sigma_vae,
    sigma_vae_sharp,
    to_float,
    to_uint8,
)
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.models.convolutional import Convolutional
from vaejax.models.denoising import Denoising
from vaejax.models.feed_forward import FeedForward
from vaejax.models.vae import VAE

MODEL = VAE(size=16, latent_dim=4, width=1)
# most of the time would be LLVM's, whose work is not tested here
HASTY = {"xla_backend_optimization_level": 0}


def run(model: Autoencoder, loss: partial, *, train: bool = False):
    """Compile (params, batch_stats, images, keys, variance) -> (loss, metrics)."""

    def evaluate(params, batch_stats, images, keys, variance=None):
        context = Context(model, params, batch_stats, keys, train=train, variance=variance)
        value, (metrics, _) = batch_loss(images, context, loss=loss)
        return value, metrics

    return jax.jit(evaluate, compiler_options=HASTY)


@pytest.fixture(scope="module")
def images(draw) -> jax.Array:
    return jnp.asarray(draw(4, 16))


@pytest.fixture(scope="module")
def keys() -> jax.Array:
    return jax.random.split(jax.random.key(2), 4)


def weights(model: Autoencoder = MODEL):
    """With biases away from zero: a gradient must not be right by an accident of the start."""
    start = jax.jit(partial(autoencoder.init, model), compiler_options=HASTY)
    params, batch_stats = start(jax.random.key(0))
    random = np.random.default_rng(1)
    move = lambda a: jnp.asarray(a + 0.05 * random.normal(size=a.shape), a.dtype)  # noqa: E731
    return jax.tree.map(move, params), batch_stats


def test_every_level_survives_the_conversion_to_float_and_back():
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    assert jnp.all(to_uint8(to_float(levels)) == levels)


def test_values_outside_the_range_are_clipped():
    x = jnp.asarray([-3.0, -0.001, 0.5, 1.001, 7.0]).reshape(1, 5, 1, 1)
    assert to_uint8(x).ravel().tolist() == [0, 0, 128, 255, 255]


# The report's loss --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(images, keys):
    """The loss and the metrics of the report's loss with a weight of 0.02."""
    return run(MODEL, partial(mse_kl, kl_weight=0.02))(*weights(), images, keys)


def test_mse_kl_is_mse_and_weighted_kl_by_their_definitions(images, keys, report):
    params, batch_stats = weights()
    loss, metrics = report
    x = np.asarray(images, np.float64) / 255
    posterior = jax.jit(partial(autoencoder.encode, MODEL))(
        params, batch_stats, jnp.asarray(x, jnp.float32)
    )
    mean, log_variance = (np.asarray(a, np.float64) for a in posterior)
    forward = jax.jit(partial(autoencoder.forward, MODEL, train=False))
    out = forward(params, batch_stats, to_float(images), keys)
    mse = np.mean((x - np.asarray(out.output)) ** 2)
    kl = -0.5 * np.mean(1 + log_variance - mean**2 - np.exp(log_variance))
    np.testing.assert_allclose(metrics["mse"], mse, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(loss, mse + 0.02 * kl, rtol=1e-5)


def test_the_output_is_decoded_from_a_sample_of_the_posterior(images):
    params, batch_stats = weights()
    keys = jax.random.split(jax.random.key(0), 4000).reshape(1000, 4)
    x = to_float(images)
    posterior = jax.jit(partial(autoencoder.encode, MODEL))(params, batch_stats, x)
    z = np.asarray(jax.vmap(partial(autoencoder.sample, posterior))(keys))
    deviation = np.exp(np.asarray(posterior.log_variance) / 2)
    np.testing.assert_allclose(z.mean(0), posterior.mean, atol=0.2)
    np.testing.assert_allclose(z.std(0), deviation, rtol=0.1)
    noise = (z - np.asarray(posterior.mean)) / deviation
    assert np.abs(np.corrcoef(noise.reshape(1000, -1).T) - np.eye(16)).max() < 0.15
    out = jax.jit(partial(autoencoder.forward, MODEL, train=False))(params, batch_stats, x, keys[0])
    decoded = jax.jit(partial(autoencoder.decode, MODEL))(params, batch_stats, out.z)
    np.testing.assert_allclose(out.output, decoded, rtol=1e-5, atol=1e-6)
    assert jnp.all(jnp.abs(out.z - posterior.mean) < 6 * deviation)
    assert jnp.any(out.z != posterior.mean)


def test_metrics_in_nats_keep_their_identities(report):
    loss, f = report
    values = 16 * 16 * 3
    np.testing.assert_allclose(f["rate"], 4 * f["kl"], rtol=1e-5)
    np.testing.assert_allclose(f["elbo"], -(f["distortion"] + f["rate"]), rtol=1e-6)
    np.testing.assert_allclose(f["bits_per_dim"], -f["elbo"] / values / np.log(2), rtol=1e-5)
    # the report's loss, in nats of a likelihood whose variance is the mse, is a beta-VAE's
    scale = values / (2 * f["mse"])
    in_nats = scale * f["mse"] + f["effective_beta"] * f["rate"]
    np.testing.assert_allclose(scale * loss, in_nats, rtol=1e-5)


def test_effective_beta_by_hand():
    # mse counts 768 / (2 * 0.01) = 38,400 nats; kl_weight * rate / 4 is 38,400 * 0.02 / 4 = 192
    beta = effective_beta({"kl_weight": 0.02}, 0.01, values=768, latents=4)
    assert beta == pytest.approx(192, rel=1e-12)
    # the report's at 64 pixels: 0.01 * 12,288 / (2 * 0.01 * 512) = 12
    assert effective_beta({"kl_weight": 0.01}, 0.01, values=12_288, latents=512) == 12
    assert effective_beta({"kl_weight": 0.0}, 0.01, values=768, latents=4) == 0
    assert effective_beta({"beta": 3.0}, 0.01, values=768, latents=4) == 3
    assert effective_beta({"error": "mse"}, 0.01, values=768, latents=4) is None
    assert effective_beta({}, 0.01, values=768, latents=4) is None


def test_the_settings_of_a_loss_are_what_is_bound_and_the_defaults():
    assert settings(partial(mse_kl, kl_weight=0.0)) == {"kl_weight": 0.0}
    assert settings(partial(sigma_vae)) == {"beta": 1.0}
    assert settings(partial(sigma_vae, beta=0.5)) == {"beta": 0.5}
    assert settings(mse_kl) == {}


# sigma-VAE ----------------------------------------------------------------------------------------


def test_sigma_vae_is_the_negative_elbo_of_the_best_variance(images, keys):
    """Up to log(2 pi) / 2; so its beta is 1."""
    loss, f = run(MODEL, partial(sigma_vae))(*weights(), images, keys)
    values, mse = 16 * 16 * 3, float(f["mse"])

    def nats(variance: float) -> float:
        return 0.5 * (np.log(2 * np.pi * variance) + mse / variance)

    constant = 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(loss + constant, nats(mse) + f["rate"] / values, rtol=1e-5)
    assert nats(mse) < min(nats(0.9 * mse), nats(1.1 * mse))
    np.testing.assert_allclose(f["effective_beta"], 1, rtol=1e-5)
    doubled, f2 = run(MODEL, partial(sigma_vae, beta=2.0))(*weights(), images, keys)
    np.testing.assert_allclose(doubled - loss, f["rate"] / values, rtol=1e-2)
    np.testing.assert_allclose(f2["effective_beta"], 2, rtol=1e-5)


def test_the_gradient_of_sigma_vae_is_that_of_the_log_of_the_mse(images, keys):
    """The variance is its own optimum: with it, log(mse) / 2 + 1 / 2 is left of the distortion."""
    params, batch_stats = weights()

    def gradient(scalar):
        def value(params):
            context = Context(MODEL, params, batch_stats, keys)
            return scalar(*batch_loss(images, context, loss=partial(sigma_vae)))

        return jax.jit(jax.grad(value), compiler_options=HASTY)(params)

    def from_metrics(params):
        forward = partial(autoencoder.forward, MODEL, train=True)
        out = forward(params, batch_stats, to_float(images), keys)
        mse = jnp.mean((to_float(images) - out.output) ** 2)
        return 0.5 * jnp.log(mse) + jnp.mean(out.rate) / (16 * 16 * 3)

    expected = jax.jit(jax.grad(from_metrics), compiler_options=HASTY)(params)
    actual = gradient(lambda loss, _: loss)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max() + 1e-3))


@pytest.mark.parametrize("kind", [sigma_vae, sigma_vae_sharp])
def test_sigma_vae_on_two_devices_has_the_gradient_of_the_batch(kind, images, keys):
    params, batch_stats = weights()

    def gradient(images, keys, *, axis):
        def value(params):
            context = Context(MODEL, params, batch_stats, keys, axis=axis)
            return batch_loss(images, context, loss=partial(kind))[0]

        return jax.value_and_grad(value)(params)

    loss, together = jax.jit(partial(gradient, axis=None))(images, keys)
    halves = (images.reshape(2, 2, *images.shape[1:]), keys.reshape(2, 2))
    devices = jax.vmap(partial(gradient, axis="devices"), axis_name="devices")
    losses, apart = jax.jit(devices)(*halves)
    np.testing.assert_allclose(jnp.mean(losses), loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(
            jnp.mean(a, axis=0), b, atol=1e-5 * float(jnp.abs(b).max() + 1e-3)
        )


def test_the_images_of_a_batch_meet_in_sigma_vae_alone():
    assert is_batch_coupled(partial(sigma_vae))
    assert is_batch_coupled(partial(sigma_vae_sharp, l1_weight=0.0))
    assert not is_batch_coupled(partial(mse_kl, kl_weight=0.1))
    assert not is_batch_coupled(partial(reconstruction, error="mse"))


# The sharper one ----------------------------------------------------------------------------------


def by_hand(x: np.ndarray, output: np.ndarray) -> tuple[float, float]:
    """The squared error of neighbours' differences, down and across; and the absolute error."""
    error = np.asarray(output, np.float64) - np.asarray(x, np.float64)
    down, across = error[:, 1:] - error[:, :-1], error[:, :, 1:] - error[:, :, :-1]
    return (down**2).mean() + (across**2).mean(), np.abs(error).mean()


def sharp(x: jax.Array, output: jax.Array, **weights: float):
    """The loss and its terms for an output as it is, with a rate of zero."""
    out = autoencoder.Pass(output, jnp.zeros(len(x)), jnp.zeros((len(x), 4)), {})
    context = Context(MODEL, {}, {}, jax.random.split(jax.random.key(0), len(x)))
    return sigma_vae_sharp(x, out, context, **weights)


def test_sigma_vae_sharp_has_the_value_of_sigma_vae_and_two_terms_more(images, keys):
    params, batch_stats = weights()
    plain, expected = run(MODEL, partial(sigma_vae, beta=0.3))(*weights(), images, keys)
    loss, metrics = run(MODEL, partial(sigma_vae_sharp, beta=0.3))(*weights(), images, keys)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    assert metrics.keys() == expected.keys() | {"gradient_mse", "l1"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    assert metrics["effective_beta"] == pytest.approx(0.3)
    forward = jax.jit(partial(autoencoder.forward, MODEL, train=False))
    out = forward(params, batch_stats, to_float(images), keys)
    gradient_mse, l1 = by_hand(to_float(images), out.output)
    np.testing.assert_allclose(metrics["gradient_mse"], gradient_mse, rtol=1e-5)
    np.testing.assert_allclose(metrics["l1"], l1, rtol=1e-5)


@pytest.mark.parametrize(("edges", "flat"), [(0.5, 0.5), (2.0, 0.0), (0.0, 1.5)])
def test_the_gradient_of_sigma_vae_sharp_is_that_of_three_logarithms(edges, flat, images, keys):
    """log(mse) / 2 + w log(gradient_mse) / 2 + v log(l1), with the rate, in float64."""
    with jax.enable_x64(True):
        params, batch_stats = jax.tree.map(partial(np.asarray, dtype=np.float64), weights())

        def actual(params):
            loss = partial(sigma_vae_sharp, beta=0.7, gradient_weight=edges, l1_weight=flat)
            return batch_loss(images, Context(MODEL, params, batch_stats, keys), loss=loss)[0]

        def expected(params):
            x = to_float(images)
            out = autoencoder.forward(MODEL, params, batch_stats, x, keys, train=True)
            error = x - out.output
            down, across = error[:, 1:] - error[:, :-1], error[:, :, 1:] - error[:, :, :-1]
            edge_error = jnp.mean(down**2) + jnp.mean(across**2)
            logs = 0.5 * jnp.log(jnp.mean(error**2)) + 0.5 * edges * jnp.log(edge_error)
            logs += flat * jnp.log(jnp.mean(jnp.sqrt(error**2)))
            return logs + 0.7 * jnp.mean(out.rate) / (16 * 16 * 3)

        ours, theirs = (
            jax.jit(jax.grad(f), compiler_options=HASTY)(params) for f in (actual, expected)
        )
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs)) > 0.1
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_edges_are_blind_to_an_offset_and_flat_areas_to_its_sign(images):
    x = to_float(images)
    output = jax.random.uniform(jax.random.key(0), x.shape)
    _, terms = sharp(x, output)
    _, moved = sharp(x, output + 0.25)
    np.testing.assert_allclose(moved["gradient_mse"], terms["gradient_mse"], rtol=1e-5)
    assert abs(moved["l1"] - terms["l1"]) > 1e-2
    # a mirrored error, a transposed picture: the same
    for other in (sharp(x, 2 * x - output), sharp(x.swapaxes(1, 2), output.swapaxes(1, 2))):
        for name in ("mse", "gradient_mse", "l1"):
            np.testing.assert_allclose(other[1][name], terms[name], rtol=1e-5, err_msg=name)


def test_the_gradient_does_not_depend_on_the_contrast_of_the_error(images):
    """Every term is calibrated: an error twice as large has half the gradient."""
    x = to_float(images)
    error = jax.random.normal(jax.random.key(0), x.shape)
    slope = jax.jit(jax.grad(lambda error: sharp(x, x + error)[0]))
    np.testing.assert_allclose(2 * slope(2 * error), slope(error), rtol=1e-4, atol=1e-8)


def test_a_perfect_copy_has_a_finite_gradient(images):
    x = to_float(images)
    value, slope = jax.jit(jax.value_and_grad(lambda output: sharp(x, output)[0]))(x)
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(slope))


# Errors of reconstructions ------------------------------------------------------------------------


def test_an_image_has_no_gradient_from_the_others_under_the_affine_norm(images):
    params, batch_stats = weights()

    def distance(x):
        apply = partial(autoencoder.apply, MODEL, params, batch_stats, train=True)
        posterior, _ = apply(x, method="encode")
        output, _ = apply(posterior.mean, method="decode")
        return jnp.sum((x - output)[0] ** 2)

    gradient = jax.jit(jax.grad(distance))(to_float(images))
    assert jnp.any(gradient[0] != 0)
    assert jnp.all(gradient[1:] == 0)


@pytest.fixture(scope="module")
def denoised(images, keys):
    """A denoising model's inputs, its outputs, and its loss and metrics: noise of 0.5."""
    model = Denoising(size=16, width=2, noise=0.5)
    params, batch_stats = weights(model)
    noise_keys = jnp.stack([jax.random.split(key)[0] for key in keys])
    noisy = model.corrupt(to_float(images), noise_keys)
    z = jax.jit(partial(autoencoder.encode, model))(params, batch_stats, noisy)
    output = jax.jit(partial(autoencoder.decode, model))(params, batch_stats, z)
    loss, metrics = run(model, partial(reconstruction, error="bce"))(
        params, batch_stats, images, keys
    )
    return *(np.asarray(a, np.float64) for a in (noisy, output)), loss, metrics


def test_outputs_for_noisy_images_are_compared_with_the_clean_ones(images, denoised):
    noisy, output, _, metrics = denoised
    x = np.asarray(images, np.float64) / 255
    np.testing.assert_allclose(metrics["mse"], np.mean((x - output) ** 2), rtol=1e-5)
    assert metrics["mse"] < 0.9 * np.mean((noisy - output) ** 2)


def test_bce_is_the_cross_entropy_of_every_value(images, denoised):
    _, output, loss, metrics = denoised
    x = np.asarray(images, np.float64) / 255
    bce = np.mean(-x * np.log(output) - (1 - x) * np.log(1 - output))
    np.testing.assert_allclose(metrics["bce"], bce, rtol=1e-5)
    assert loss == metrics["bce"] == metrics["loss"]


def test_bce_of_a_saturated_output_is_finite_and_large():
    model = FeedForward(size=8, latent_dim=2)
    params, batch_stats = weights(model)
    params["decoder"]["output"]["layer"]["bias"] += 1e3  # white, whatever the image
    black = jnp.zeros((2, 8, 8, 3), jnp.uint8)
    keys = jax.random.split(jax.random.key(0), 2)

    def bce(params):
        context = Context(model, params, batch_stats, keys)
        return batch_loss(black, context, loss=partial(reconstruction, error="bce"))[0]

    value, gradients = jax.jit(jax.value_and_grad(bce))(params)
    np.testing.assert_allclose(value, -np.log(1e-7), rtol=0.02)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


def test_a_deterministic_model_has_a_distortion_and_no_rate(denoised):
    *_, metrics = denoised
    assert metrics.keys() == {"loss", "mse", "bce", "distortion"}


def test_a_loss_with_a_kl_refuses_a_model_without_a_posterior(images, keys):
    model = FeedForward(size=16, latent_dim=2)
    with pytest.raises(ValueError, match="needs a posterior"):
        run(model, partial(sigma_vae))(*weights(model), images, keys)


def mean_of_output(x, out, context):
    """A loss that reports nothing."""
    return jnp.mean(out.output), {}


def test_every_loss_has_the_mse_among_its_metrics(images, keys):
    params, batch_stats = weights()
    loss, metrics = run(MODEL, mean_of_output)(params, batch_stats, images, keys)
    assert metrics["mse"] > 0
    assert metrics["loss"] == loss
    assert "effective_beta" not in metrics


# The same images in other batches -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (MODEL, partial(mse_kl, kl_weight=0.02)),
        (MODEL, partial(sigma_vae)),
        (MODEL, partial(sigma_vae_sharp)),
        (Denoising(size=16, width=2), partial(reconstruction, error="bce")),
    ],
    ids=["mse_kl", "sigma_vae", "sigma_vae_sharp", "reconstruction"],
)
def test_with_a_fixed_variance_metrics_are_means_over_images(model, loss, draw):
    images, keys = draw(64, 16), jax.random.split(jax.random.key(3), 64)
    # an extreme order: dark images first, so that batches differ as much as they can
    images = jnp.asarray(images[np.argsort(images.mean(axis=(1, 2, 3)))])
    evaluate, arrays = run(model, loss), weights(model)
    means = {}
    for size in (4, 16, 64):
        parts = [
            evaluate(*arrays, images[i : i + size], keys[i : i + size], jnp.float32(0.03))[1]
            for i in range(0, 64, size)
        ]
        means[size] = {name: np.mean([part[name] for part in parts]) for name in parts[0]}
    for name, mean in means[64].items():
        for size in (4, 16):
            np.testing.assert_allclose(means[size][name], mean, rtol=1e-5, err_msg=name)


# Gradients ----------------------------------------------------------------------------------------


VARIATIONAL = partial(mse_kl, kl_weight=0.01)
MSE, BCE = (partial(reconstruction, error=error) for error in ("mse", "bce"))


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (MODEL, VARIATIONAL),
        (VAE(size=16, latent_dim=4, width=1, norm="batch"), VARIATIONAL),
        (
            VAE(
                size=16,
                latent_dim=4,
                width=1,
                norm="batch",
                output_norm=False,
                log_variance_bound=3.0,
            ),
            VARIATIONAL,
        ),
        (MODEL, partial(sigma_vae)),
        (FeedForward(size=8, latent_dim=4), MSE),
        (Convolutional(size=16, width=2), MSE),
        (Convolutional(size=16, width=2), BCE),
        (Denoising(size=8, width=2), BCE),
        (Denoising(size=8, width=2, norm="affine"), MSE),
    ],
    ids=["mse_kl", "batch norm", "bounded", "sigma_vae"]
    + ["feed-forward", "convolutional", "convolutional bce", "denoising", "denoising mse, affine"],
)
def test_the_gradient_agrees_with_finite_differences(model: Autoencoder, loss: partial):
    # noise: in flat pictures an entire region would cross a kink of the activation at once
    shape = (4, model.size, model.size, model.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    random = np.random.default_rng(2)
    double = partial(np.asarray, dtype=np.float64)
    with jax.enable_x64(True):
        params, batch_stats = jax.tree.map(double, weights(model))
        direction = jax.tree.map(lambda a: random.normal(size=a.shape), params)
        keys = jax.random.split(jax.random.key(0), 4)

        def value(distance):
            moved = jax.tree.map(lambda a, along: a + distance * along, params, direction)
            context = Context(model, moved, batch_stats, keys)
            return batch_loss(jnp.asarray(images), context, loss=loss)[0]

        both = jax.jit(jax.value_and_grad(value), compiler_options=HASTY)
        (before, _), (_, slope), (after, _) = both(-1e-6), both(0.0), both(1e-6)
        assert abs(slope) > 1e-5
        np.testing.assert_allclose(slope, (after - before) / 2e-6, rtol=1e-5)
