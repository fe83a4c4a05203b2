"""The variational autoencoder is the report's, layer by layer."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaejax.errors import UserError
from vaejax.models import autoencoder, summary
from vaejax.models.vae import VAE

SMALL = VAE(size=16, latent_dim=4, width=1)

init = jax.jit(autoencoder.init, static_argnums=0)
encode = jax.jit(autoencoder.encode, static_argnums=0)
decode = jax.jit(autoencoder.decode, static_argnums=0)

# REPORT: layer, output of one image, parameters (+ those of its norm)
ENCODER_64 = """
Conv 32, stride 1 + BN | 64 64 32 | 2432 128
Conv 64, stride 2 + BN | 32 32 64 | 51264 256
Conv 128, stride 2 + BN | 16 16 128 | 204928 512
Conv 256, stride 2 + BN | 8 8 256 | 819456 1024
Conv 512, stride 2 + BN | 4 4 512 | 3277312 2048
Dense 1024 + BN | 1024 | 8389632 4096
Dense 512 | 512 | 524800
Dense 512 | 512 | 524800
"""
DECODER_64 = """
Dense 1024 + BN | 1024 | 525312 4096
Dense 8192 | 8192 | 8396800
ConvT 256, stride 2 + BN | 8 8 256 | 3277056 1024
ConvT 128, stride 2 + BN | 16 16 128 | 819328 512
ConvT 64, stride 2 + BN | 32 32 64 | 204864 256
ConvT 32, stride 2 + BN | 64 64 32 | 51232 128
ConvT 3, stride 1 + BN | 64 64 3 | 2403 12
"""
DECODER_256 = """
Dense 1024 + BN | 1024 | 525312 4096
Dense 8192 | 8192 | 8396800
ConvT 256, stride 2 + BN | 16 16 256 | 819456 1024
ConvT 128, stride 2 + BN | 32 32 128 | 819328 512
ConvT 64, stride 2 | 64 64 64 | 204864
ConvT 3, stride 4 + BN | 256 256 3 | 4803 12
"""


def rows(model: VAE, branch: str) -> list[summary.Row]:
    return [row for row in summary.rows(model) if row.branch == branch]


def as_text(rows: list[summary.Row]) -> str:
    lines = [
        f"{r.layer} | {' '.join(map(str, r.output))} | {' '.join(map(str, r.parameters))}"
        for r in rows
    ]
    return "\n" + "\n".join(lines) + "\n"


def total(rows: list[summary.Row]) -> int:
    return sum(sum(row.parameters) for row in rows)


def test_every_layer_at_64_pixels_is_the_reports():
    model = VAE(size=64)
    assert as_text(rows(model, "encoder")) == ENCODER_64
    assert as_text(rows(model, "decoder")) == DECODER_64
    assert total(rows(model, "encoder")) == 13_802_688
    assert total(rows(model, "decoder")) == 13_283_023


def test_every_layer_at_256_pixels_is_the_reports():
    model = VAE(size=256)
    assert as_text(rows(model, "decoder")) == DECODER_256
    assert total(rows(model, "encoder")) == 139_631_808
    assert total(rows(model, "decoder")) == 10_776_207


@pytest.mark.parametrize(
    ("size", "parameters", "moving"), [(64, 27_085_711, 7_046), (256, 150_408_015, 6_854)]
)
def test_arrays_of_the_model_count_as_the_report_counts(size: int, parameters: int, moving: int):
    model = VAE(size=size)
    shapes = jax.eval_shape(partial(autoencoder.init, model), jax.random.key(0))
    assert summary.count(shapes) == parameters
    assert summary.count(shapes[1]) == moving


def test_the_printed_table_has_the_totals():
    text = summary.table(VAE())
    for number in ("13,802,688", "13,283,023", "27,085,711", "27,078,665", "7,046"):
        assert number in text


@pytest.mark.parametrize(
    ("size", "nearest"), [(15, "16"), (1, "16"), (100, "96 or 112"), (264, "256 or 288"), (0, "16")]
)
def test_a_size_that_the_layers_do_not_admit_is_refused_with_the_nearest(size: int, nearest: str):
    with pytest.raises(UserError, match=rf"{size} pixels.* {nearest}$"):
        VAE(size=size)


@pytest.mark.parametrize("size", [16, 48, 96, 256, 288])
def test_an_admitted_size_comes_back_as_it_went_in(size: int):
    model = VAE(size=size, latent_dim=4, width=1)
    assert rows(model, "decoder")[-1].output == (size, size, 3)


def weights(model: VAE):
    """Away from their initial values, so that no bias and no moving mean can be forgotten."""
    random = np.random.default_rng(0)
    params, batch_stats = init(model, jax.random.key(0))
    params = jax.tree.map(lambda a: a + random.normal(0, 0.1, a.shape).astype("f"), params)
    batch_stats = jax.tree.map(lambda a: a + random.uniform(0, 1, a.shape).astype("f"), batch_stats)
    return params, batch_stats


class PlainEncoder(nn.Module):
    """The report's encoder in Flax's own layers."""

    @nn.compact
    def __call__(self, x):
        for i, (features, stride) in enumerate([(1, 1), (2, 2), (4, 2), (8, 2), (16, 2)], 1):
            x = nn.Conv(features, (5, 5), stride, name=f"conv_{i}.layer")(x)
            x = jnp.where(x > 0, x, 0.02 * x)
            x = nn.BatchNorm(True, epsilon=1e-3, name=f"conv_{i}.norm")(x)
        x = nn.selu(nn.Dense(32, name="dense.layer")(x.reshape(len(x), -1)))
        x = nn.BatchNorm(True, epsilon=1e-3, name="dense.norm")(x)
        return nn.Dense(4, name="mean.layer")(x), nn.Dense(4, name="log_variance.layer")(x)


class PlainDecoder(nn.Module):
    """The report's decoder in Flax's own layers."""

    @nn.compact
    def __call__(self, z):
        x = nn.selu(nn.Dense(32, name="dense.layer")(z))
        x = nn.BatchNorm(True, epsilon=1e-3, name="dense.norm")(x)
        x = nn.selu(nn.Dense(16, name="reshape.layer")(x)).reshape(-1, 1, 1, 16)
        names = ["conv_1", "conv_2", "conv_3", "conv_4", "output"]
        for name, features in zip(names, (8, 4, 2, 1, 3), strict=True):
            stride = 1 if name == "output" else 2
            x = nn.ConvTranspose(
                features, (5, 5), (stride, stride), transpose_kernel=True, name=f"{name}.layer"
            )(x)
            x = nn.sigmoid(x) if name == "output" else jnp.where(x > 0, x, 0.02 * x)
            x = nn.BatchNorm(True, epsilon=1e-3, name=f"{name}.norm")(x)
        return x


def flat(tree: dict) -> dict:
    return {
        f"{block}.{part}": leaf for block, parts in tree.items() for part, leaf in parts.items()
    }


def test_encoder_and_decoder_agree_with_the_same_layers_in_plain_flax():
    params, batch_stats = weights(SMALL)
    x = jax.random.uniform(jax.random.key(1), (3, 16, 16, 3))
    z = jax.random.normal(jax.random.key(2), (3, 4))
    variables = {
        branch: {"params": flat(params[branch]), "batch_stats": flat(batch_stats[branch])}
        for branch in ("encoder", "decoder")
    }
    mean, log_variance = jax.jit(PlainEncoder().apply)(variables["encoder"], x)
    output = jax.jit(PlainDecoder().apply)(variables["decoder"], z)
    posterior = encode(SMALL, params, batch_stats, x)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(posterior.mean, mean)
    close(posterior.log_variance, log_variance)
    close(decode(SMALL, params, batch_stats, z), output)


def run_encoder(norm: str, *, train: bool):
    """The posterior, and of each array of `batch_stats` whether it stayed as it was."""
    model = VAE(size=16, latent_dim=4, width=1, norm=norm)
    params, batch_stats = init(model, jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (8, 16, 16, 3))
    apply = jax.jit(partial(autoencoder.apply, model, method="encode", train=train))
    posterior, after = apply(params, batch_stats, x)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), batch_stats, after)
    return posterior, same


def test_the_affine_norm_never_moves_its_batch_stats():
    trained, same = run_encoder("affine", train=True)
    evaluated, _ = run_encoder("affine", train=False)
    assert len(jax.tree.leaves(same)) == 2 * (6 + 6)  # mean and variance of every norm
    assert all(jax.tree.leaves(same))
    assert jnp.all(trained.mean == evaluated.mean)


def test_batch_norm_moves_the_encoders_batch_stats_in_training_alone():
    trained, same = run_encoder("batch", train=True)
    evaluated, same_in_evaluation = run_encoder("batch", train=False)
    assert not any(jax.tree.leaves(same["encoder"]))
    assert all(jax.tree.leaves(same["decoder"]))
    assert all(jax.tree.leaves(same_in_evaluation))
    assert jnp.any(jnp.abs(trained.mean - evaluated.mean) > 1e-3)


def test_a_bounded_log_variance_stays_below_its_bound():
    model = VAE(size=16, latent_dim=4, width=1, log_variance_bound=2.0)
    params, batch_stats = init(model, jax.random.key(0))
    params["encoder"]["log_variance"]["layer"]["bias"] += 1e6
    posterior = encode(model, params, batch_stats, jnp.ones((2, 16, 16, 3)))
    assert jnp.all(posterior.log_variance <= 2)
    assert jnp.all(posterior.log_variance > 1.9)


def test_an_untrained_posterior_is_nearly_the_prior():
    params, batch_stats = init(SMALL, jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (8, 16, 16, 3))
    posterior = encode(SMALL, params, batch_stats, x)
    assert 0 < jnp.mean(posterior.kl()) < 0.2
