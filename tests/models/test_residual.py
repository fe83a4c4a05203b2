"""Residual VAEs: their shapes, what their layers are at first, and that z reaches every block."""

import json
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaejax.distributions import Normal
from vaejax.errors import UserError
from vaejax.models import autoencoder, residual, summary
from vaejax.models.autoencoder import Autoencoder
from vaejax.models.layers import GroupNormSilu
from vaejax.models.residual import ResidualBlock, ResidualVAE, SpatialVAE, depth_to_space
from vaejax.models.residual import space_to_depth as to_depth

SMALL = [
    ResidualVAE(size=32, width=8, latent_dim=3),
    SpatialVAE(size=32, width=8, latent_channels=2),
]
KINDS = [type(model).__name__ for model in SMALL]
each_model = pytest.mark.parametrize("model", SMALL, ids=KINDS)

# a block has two 3 × 3 convolutions with biases and two norms, of a scale and a shift a channel;
# in the vector's decoder each norm has 384 inputs more for both: 2 (384 + 1) (2 · 96) for 96
RESIDUAL = """
to_2x | Dense 48 | 16 16 48 | 2352
block_2x_1 | Residual block 48 | 16 16 48 | 41760
to_1x | Dense 96 | 8 8 96 | 18528
block_1x_1 | Residual block 96 | 8 8 96 | 166464
block_1x_2 | Residual block 96 | 8 8 96 | 166464
norm | Group norm 8, SiLU | 8 8 96 | 192
squeeze | Dense 24 | 8 8 24 | 2328
posterior | Dense 128 | 128 | 196736
style | Dense 384 | 384 | 24960
grid | Dense 6144 | 6144 | 2365440
block_1x_1 | Residual block 96 | 8 8 96 | 314304
block_1x_2 | Residual block 96 | 8 8 96 | 314304
to_2x | Dense 192 | 8 8 192 | 18624
block_2x_1 | Residual block 48 | 16 16 48 | 115680
to_4x | Dense 96 | 16 16 96 | 4704
block_4x_1 | Residual block 24 | 32 32 24 | 47472
norm | Group norm 8, SiLU | 32 32 24 | 48
output | Conv 12, stride 1 | 32 32 12 | 2604
"""


@cache
def weights(model: Autoencoder):
    """Away from their initial values, at which many are zero."""
    params, batch_stats = jax.jit(autoencoder.init, static_argnums=0)(model, jax.random.key(0))
    random = np.random.default_rng(1)

    def move(leaf):
        return jnp.asarray(leaf + 0.1 * random.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(move, params), batch_stats


@cache
def compiled(model: Autoencoder, method: str):
    return jax.jit(partial(getattr(autoencoder, method), model))


@pytest.fixture(scope="module")
def images(draw) -> jax.Array:
    return jnp.asarray(draw(3, 32), jnp.float32) / 255


# Sizes and parameters -----------------------------------------------------------------------------


def test_the_table_of_the_vector_model_is_what_its_docstring_describes():
    model = ResidualVAE()
    words = [
        (r.name, r.layer, " ".join(map(str, r.output)), " ".join(map(str, r.parameters)))
        for r in summary.rows(model)
    ]
    assert [" | ".join(line) for line in words] == RESIDUAL.strip().splitlines()
    assert "3,802,964 parameters: 3,802,964 trainable, 0 moving" in summary.table(model)
    # without its vector: the same blocks without a style, and two layers less
    assert "811,268 parameters: 811,268 trainable" in summary.table(SpatialVAE())


@pytest.mark.parametrize("size", [32, 36, 60, 64, 96, 104, 128, 240, 256])
def test_an_admitted_size_comes_back_as_it_went_in(size: int):
    model = ResidualVAE(size=size, width=8)
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    params, batch_stats = jax.eval_shape(partial(autoencoder.init, model), jax.random.key(0))
    posterior = jax.eval_shape(partial(autoencoder.encode, model), params, batch_stats, x)
    assert posterior.mean.shape == posterior.log_variance.shape == (2, 64)
    output = jax.eval_shape(partial(autoencoder.decode, model), params, batch_stats, posterior.mean)
    assert output == x
    grid = next(row.output for row in summary.rows(model) if row.name == "squeeze")
    assert 8 <= grid[0] == grid[1] < 16  # the smallest grid, whatever the size


@pytest.mark.parametrize("size", [32, 40, 104, 256])
def test_the_latents_of_the_spatial_model_are_a_grid_of_an_eighth(size: int):
    model = SpatialVAE(size=size, width=8, latent_channels=5)
    assert autoencoder.latent_spec(model).shape == (size // 8, size // 8, 5)
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    arrays = jax.eval_shape(partial(autoencoder.init, model), jax.random.key(0))
    z = jax.ShapeDtypeStruct((2, size // 8, size // 8, 5), jnp.float32)
    assert jax.eval_shape(partial(autoencoder.decode, model), *arrays, z) == x


@pytest.mark.parametrize(
    ("kind", "size", "nearest"),
    [(ResidualVAE, 100, "96 or 104"), (ResidualVAE, 63, "60 or 64"), (ResidualVAE, 250, "240 or")]
    + [(ResidualVAE, 28, "32"), (ResidualVAE, 0, "32"), (ResidualVAE, -8, "32")]
    + [(SpatialVAE, 100, "96 or 104"), (SpatialVAE, 36, "32 or 40"), (SpatialVAE, 24, "32")],
)
def test_a_size_that_the_layers_do_not_admit_is_refused_with_the_nearest(kind, size, nearest):
    with pytest.raises(UserError, match=f"images of {size} pixels: .* nearest is {nearest}"):
        kind(size=size)


@pytest.mark.parametrize("kind", [ResidualVAE, SpatialVAE])
@pytest.mark.parametrize(("width", "words"), [(12, "8 or 16"), (3, "such as 8$"), (0, "at least")])
def test_a_width_that_the_group_norms_do_not_divide_is_refused_at_once(kind, width, words):
    with pytest.raises(UserError, match=words):
        kind(width=width)


def test_every_width_is_of_whole_groups():
    for width in range(8, 200, 8):
        for halvings in (2, 3, 4, 5):
            widths = residual._widths(width, halvings)
            assert len(widths) == halvings
            assert all(w % residual.GROUPS == 0 and w >= 16 for w in widths)
            assert widths[0] == 2 * width
            assert list(widths) == sorted(widths, reverse=True)


@each_model
def test_a_model_survives_json(model: Autoencoder):
    text = json.dumps(autoencoder.to_json(model))
    assert autoencoder.from_json(json.loads(text)) == model
    assert json.loads(text)["width"] == 8


# Layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4])
def test_depth_to_space_is_the_inverse_of_space_to_depth(n: int):
    x = jnp.arange(2 * 8 * 12 * 3.0).reshape(2, 8, 12, 3)
    deep = to_depth(x, n)
    assert deep.shape == (2, 8 // n, 12 // n, 3 * n * n)
    assert jnp.all(depth_to_space(deep, n) == x)
    # every square is one pixel, in the order in which its pixels are read
    for i, j in np.ndindex(8 // n, 12 // n):
        square = x[:, n * i : n * i + n, n * j : n * j + n]
        assert jnp.all(deep[:, i, j] == square.reshape(2, -1))


@pytest.mark.parametrize("styled", [False, True])
def test_a_block_is_the_identity_at_first_and_learns_from_the_first_update_on(styled: bool):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 4, 4, 16)), jnp.float32)
    style = jnp.asarray(random.normal(size=(2, 5)), jnp.float32) if styled else None
    block = ResidualBlock(16)
    variables = block.init(jax.random.key(0), x, style)
    assert jnp.all(block.apply(variables, x, style) == x)
    gradients = jax.grad(lambda v: jnp.sum(block.apply(v, x, style) ** 2))(variables)["params"]
    assert jnp.all(gradients["conv_2"]["kernel"].any(axis=(0, 1, 2)))
    assert str(block) == "Residual block 16"


@each_model
def test_the_deviations_of_a_posterior_are_bounded(model: Autoencoder, images: jax.Array):
    params, batch_stats = weights(model)
    extreme = jax.tree.map(lambda a: a, params)
    kernel = extreme["encoder"]["posterior"]["kernel"]
    extreme["encoder"]["posterior"]["kernel"] = 1e4 * kernel
    posterior = compiled(model, "encode")(extreme, batch_stats, images)
    assert isinstance(posterior, Normal)
    assert 5.9 < jnp.max(jnp.abs(posterior.log_variance)) <= 6
    assert jnp.max(jnp.abs(posterior.mean)) > 100  # means are not
    near = residual._normal(jnp.asarray([[1.0, 0.01]]))
    np.testing.assert_allclose(near, [[[1.0]], [[0.01]]], rtol=1e-5)


def test_z_reaches_the_decoder_by_its_norms_too(images: jax.Array):
    model = SMALL[0]
    params, batch_stats = weights(model)
    decode = compiled(model, "decode")
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)

    def without(*names: str):
        def zeroed(path, leaf):
            words = {key.key for key in path}
            return 0 * leaf if "decoder" in words and words & set(names) else leaf

        return jax.tree_util.tree_map_with_path(zeroed, params)

    def difference(params) -> float:
        """Between two faces that are decoded together."""
        faces = decode(params, batch_stats, z)
        return float(jnp.max(jnp.abs(faces[0] - faces[1])))

    assert difference(without("grid")) > 1e-2  # by the norms alone
    assert difference(without("modulation")) > 1e-2  # by the grid alone
    assert difference(without("grid", "modulation")) == 0


@each_model
def test_an_image_does_not_depend_on_the_others_of_its_batch(model, images: jax.Array):
    params, batch_stats = weights(model)
    assert not model.batch_coupled

    def first(x):
        posterior = autoencoder.encode(model, params, batch_stats, x)
        return jnp.sum(autoencoder.decode(model, params, batch_stats, posterior.mean)[0])

    gradient = jax.jit(jax.grad(first))(images)
    assert jnp.any(gradient[0] != 0)
    assert jnp.all(gradient[1:] == 0)


@each_model
def test_its_gradient_agrees_with_finite_differences(model: Autoencoder):
    """Through encoder, sample and decoder, in float64."""
    random = np.random.default_rng(2)
    with jax.enable_x64(True):
        double = partial(np.asarray, dtype=np.float64)
        params, batch_stats = jax.tree.map(double, weights(model))
        x = jnp.asarray(random.uniform(size=(2, 32, 32, 3)))
        aim = jnp.asarray(random.normal(size=x.shape))
        direction = jax.tree.map(lambda a: random.normal(size=a.shape), params)
        keys = jax.random.split(jax.random.key(0), 2)

        def value(distance):
            moved = jax.tree.map(lambda a, along: a + distance * along, params, direction)
            out = autoencoder.forward(model, moved, batch_stats, x, keys, train=True)
            assert out.rate is not None
            return jnp.mean(out.rate) + jnp.sum(aim * out.output)

        both = jax.jit(jax.value_and_grad(value))
        (before, _), (_, slope), (after, _) = both(-1e-6), both(0.0), both(1e-6)
        assert slope.dtype == jnp.float64
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(slope, (after - before) / 2e-6, rtol=1e-5)


# Group norm ---------------------------------------------------------------------------------------


def random_like(tree, key: jax.Array):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    random = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, random)


def test_group_norm_is_that_of_flax():
    x = 3 * jax.random.normal(jax.random.key(0), (3, 7, 5, 48)) + 20
    ours, flax = GroupNormSilu(8), nn.GroupNorm(8)
    shapes = jax.eval_shape(flax.init, jax.random.key(1), x)
    assert jax.eval_shape(ours.init, jax.random.key(1), x) == shapes
    random = random_like(shapes, jax.random.key(2))
    expected = flax.apply(random, x)
    np.testing.assert_allclose(ours.apply(random, x), nn.silu(expected), atol=2e-4)
    modulation = jax.random.normal(jax.random.key(3), (3, 2, 48))
    a, b = modulation[:, None, None, 0], modulation[:, None, None, 1]
    expected = nn.silu(expected * (1 + a) + b)
    np.testing.assert_allclose(ours.apply(random, x, modulation), expected, atol=1e-3)


def test_a_constant_group_is_normed_to_its_bias():
    x = jnp.full((2, 4, 4, 16), 0.7)
    bias = jnp.arange(16.0)
    normed = GroupNormSilu(8).apply({"params": {"scale": jnp.ones(16), "bias": bias}}, x)
    np.testing.assert_allclose(normed, jnp.broadcast_to(nn.silu(bias), x.shape), atol=1e-2)
