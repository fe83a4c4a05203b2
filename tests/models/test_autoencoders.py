"""The deterministic autoencoders are the notebook's, layer by layer, and can be trained."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaejax.errors import UserError
from vaejax.losses import reconstruction
from vaejax.models import autoencoder, layers, summary
from vaejax.models.autoencoder import Autoencoder
from vaejax.models.convolutional import Convolutional
from vaejax.models.denoising import Denoising
from vaejax.models.feed_forward import FeedForward
from vaejax.training.step import Trainer, eval_step, image_keys, init, train_step

SMALL = [
    FeedForward(size=8, latent_dim=16),
    Convolutional(size=16, width=8),
    Denoising(size=8, width=4),
]
KINDS = [type(model).__name__ for model in SMALL]

# layer | output of one image | parameters (and those of its norm), 28 × 28 × 1
FEED_FORWARD = """
Dense 32 | 32 | 25120
Dense 784 | 784 | 25872
"""
DENOISING = """
Conv 32, stride 1 + BN | 28 28 32 | 320 128
Max-pool 2 | 14 14 32 |
Conv 32, stride 1 + BN | 14 14 32 | 9248 128
Max-pool 2 | 7 7 32 |
Conv 32, stride 1 + BN | 7 7 32 | 9248 128
Upsample 2 | 14 14 32 |
Conv 32, stride 1 + BN | 14 14 32 | 9248 128
Upsample 2 | 28 28 32 |
Conv 1, stride 1 | 28 28 1 | 289
"""
# 64 × 64 × 3: a layer has 9 · inputs · outputs weights, and a bias for each output
CONVOLUTIONAL = """
Conv 16, stride 1 | 64 64 16 | 448
Max-pool 2 | 32 32 16 |
Conv 8, stride 1 | 32 32 8 | 1160
Max-pool 2 | 16 16 8 |
Conv 8, stride 1 | 16 16 8 | 584
Max-pool 2 | 8 8 8 |
Conv 8, stride 1 | 8 8 8 | 584
Upsample 2 | 16 16 8 |
Conv 8, stride 1 | 16 16 8 | 584
Upsample 2 | 32 32 8 |
Conv 16, stride 1 | 32 32 16 | 1168
Upsample 2 | 64 64 16 |
Conv 3, stride 1 | 64 64 3 | 435
"""


def rows(model: Autoencoder, branch: str) -> list[summary.Row]:
    return [row for row in summary.rows(model) if row.branch == branch]


@pytest.mark.parametrize(
    ("model", "table", "total"),
    [
        (FeedForward(size=28, channels=1), FEED_FORWARD, 50_992),
        (Convolutional(), CONVOLUTIONAL, 4_963),
        (Denoising(size=28, channels=1), DENOISING, 28_865),
    ],
    ids=KINDS,
)
def test_every_layer_is_the_notebooks(model: Autoencoder, table: str, total: int):
    words = [
        (r.layer, " ".join(map(str, r.output)), " ".join(map(str, r.parameters)))
        for r in summary.rows(model)
    ]
    assert [" | ".join(line).strip() for line in words] == table.strip().splitlines()
    shapes = jax.eval_shape(partial(autoencoder.init, model), jax.random.key(0))
    assert summary.count(shapes) == total
    assert f"{total:,} parameters" in summary.table(model)


def test_a_width_multiplies_the_channels_of_every_layer_but_the_last():
    model = Convolutional(width=24)
    channels = [row.output[-1] for row in rows(model, "decoder") if row.layer.startswith("Conv")]
    assert channels == [24, 24, 48, 3]
    assert autoencoder.latent_spec(model).shape == (8, 8, 24)


@pytest.mark.parametrize(
    ("kind", "size", "nearest"),
    [(FeedForward, 0, 1), (Convolutional, 28, "24 or 32"), (Convolutional, 4, 8)]
    + [(Denoising, 30, "28 or 32"), (Denoising, 0, 4)],
)
def test_a_size_that_the_layers_do_not_admit_is_refused_with_the_nearest(kind, size, nearest):
    with pytest.raises(UserError, match=f"{size} pixels.* {nearest}$"):
        kind(size=size)


@pytest.mark.parametrize(
    ("kind", "size"), [(FeedForward, 9), (Convolutional, 24), (Denoising, 28)], ids=KINDS
)
def test_an_admitted_size_comes_back_as_it_went_in(kind: type[Autoencoder], size: int):
    model = kind(size=size)
    assert rows(model, "encoder")[-1].output == autoencoder.latent_spec(model).shape
    assert np.prod(rows(model, "decoder")[-1].output) == size * size * 3


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 6, 8, 3)).astype(np.float32)


def test_a_pool_takes_the_largest_of_each_square(noise: np.ndarray):
    pooled = jax.jit(layers.MaxPool().apply)({}, jnp.asarray(noise))
    for y, x in np.ndindex(3, 4):
        square = noise[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert np.array_equal(pooled[:, y, x], square.max(axis=(1, 2)))


def test_upsampling_repeats_every_pixel(noise: np.ndarray):
    upsampled = layers.Upsample().apply({}, jnp.asarray(noise))
    assert np.array_equal(upsampled, noise.repeat(2, axis=1).repeat(2, axis=2))


# The same three in Flax's own layers ----------------------------------------------------------


class Plain(nn.Module):
    """A branch as a list of steps: the name of a layer, "pool" or "up"."""

    features: dict[str, int]  # of each layer
    steps: str
    normed: bool = False

    @nn.compact
    def __call__(self, x):
        for step in self.steps.split():
            if step == "pool":
                x = nn.max_pool(x, (2, 2), (2, 2))
            elif step == "up":
                x = jax.image.resize(
                    x, (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]), "nearest"
                )
            else:
                flat = x.ndim == 2
                name, features = f"{step}.layer", self.features[step]
                layer = (
                    nn.Dense(features, name=name) if flat else nn.Conv(features, (3, 3), name=name)
                )
                x = nn.sigmoid(layer(x)) if step == "output" else nn.relu(layer(x))
                if self.normed and step != "output":
                    x = nn.BatchNorm(True, epsilon=1e-3, name=f"{step}.norm")(x)
        return x


PLAIN = [
    (Plain({"dense": 16}, "dense"), Plain({"output": 192}, "output")),
    (
        Plain({"conv_1": 16, "conv_2": 8, "conv_3": 8}, "conv_1 pool conv_2 pool conv_3 pool"),
        Plain(
            {"conv_1": 8, "conv_2": 8, "conv_3": 16, "output": 3},
            "conv_1 up conv_2 up conv_3 up output",
        ),
    ),
    (
        Plain({"conv_1": 4, "conv_2": 4}, "conv_1 pool conv_2 pool", normed=True),
        Plain({"conv_1": 4, "conv_2": 4, "output": 3}, "conv_1 up conv_2 up output", normed=True),
    ),
]


def weights(model: Autoencoder):
    """Away from their initial values, so that no bias and no moving mean can be forgotten. Every
    second scale of a norm is negative, so that it does not commute with a pool."""
    random = np.random.default_rng(0)

    def move(path, leaf):
        moved = leaf + random.normal(0, 0.1, leaf.shape).astype("f")
        return moved * (-1.0) ** np.arange(leaf.size) if path[-1].key == "scale" else moved

    params, batch_stats = jax.jit(autoencoder.init, static_argnums=0)(model, jax.random.key(0))
    batch_stats = jax.tree.map(lambda a: a + random.uniform(0, 1, a.shape).astype("f"), batch_stats)
    return jax.tree_util.tree_map_with_path(move, params), batch_stats


def flat(tree: dict) -> dict:
    return {
        f"{block}.{part}": leaf for block, parts in tree.items() for part, leaf in parts.items()
    }


@pytest.mark.parametrize(("model", "plain"), [*zip(SMALL, PLAIN, strict=True)], ids=KINDS)
def test_encoder_and_decoder_agree_with_the_same_layers_in_plain_flax(model: Autoencoder, plain):
    params, batch_stats = weights(model)
    variables = {
        branch: {"params": flat(params[branch]), "batch_stats": flat(batch_stats.get(branch, {}))}
        for branch in ("encoder", "decoder")
    }
    x = jax.random.uniform(jax.random.key(1), (3, model.size, model.size, 3))
    inputs = x.reshape(3, -1) if isinstance(model, FeedForward) else x
    z = jax.jit(plain[0].apply)(variables["encoder"], inputs)
    ours = jax.jit(partial(autoencoder.encode, model))(params, batch_stats, x)
    np.testing.assert_allclose(ours, z, rtol=1e-4, atol=1e-5)
    assert 0.1 < np.mean(np.asarray(z) > 0) < 0.99  # some units are dead, and some are not

    output = jax.jit(plain[1].apply)(variables["decoder"], z)
    ours = jax.jit(partial(autoencoder.decode, model))(params, batch_stats, z)
    np.testing.assert_allclose(ours, output.reshape(x.shape), rtol=1e-4, atol=1e-5)


# Training ---------------------------------------------------------------------------------------


@cache  # compiled once for all tests
def training(model: Autoencoder):
    """An untrained state, the update and the evaluation."""
    error = "bce" if isinstance(model, Denoising) else "mse"
    trainer = Trainer(model, partial(reconstruction, error=error), optax.adam(1e-2))
    state = jax.jit(partial(init, trainer=trainer))(jax.random.key(0))
    step = jax.jit(partial(train_step, trainer=trainer))
    return state, step, jax.jit(partial(eval_step, trainer=trainer))


@pytest.mark.parametrize("model", SMALL, ids=KINDS)
def test_a_hundred_updates_on_one_batch_lower_its_error(model: Autoencoder, draw):
    state, step, _ = training(model)
    images, key = jnp.asarray(draw(8, model.size)), jax.random.key(1)
    state, first = step(state, None, images, key)
    for _ in range(99):
        state, metrics = step(state, None, images, key)
    assert metrics["loss"] < first["loss"]
    assert metrics["mse"] < first["mse"] / 4


# Noise ------------------------------------------------------------------------------------------


def corrupted(x: jax.Array, keys: jax.Array, noise: float = 0.1) -> jax.Array:
    return Denoising(size=32, noise=noise).corrupt(x, keys)


def test_noise_has_its_standard_deviation_and_stays_within_the_range_of_a_picture():
    grey = jnp.full((4, 32, 32, 3), 0.5)
    keys = jax.random.split(jax.random.key(0), 4)
    added = corrupted(grey, keys) - grey  # five standard deviations from either end
    assert abs(jnp.mean(added)) < 0.003
    np.testing.assert_allclose(jnp.std(added, axis=(1, 2, 3)), 0.1, rtol=0.05)
    black = corrupted(0 * grey, keys)
    assert jnp.min(black) == 0
    np.testing.assert_allclose(jnp.mean(black == 0), 0.5, atol=0.03)  # half would be below
    assert jnp.max(corrupted(0 * grey + 1, keys)) == 1
    assert jnp.all(corrupted(grey, keys, noise=0.0) == grey)


def test_the_noise_of_an_image_depends_on_its_own_key_alone():
    grey = jnp.full((3, 32, 32, 3), 0.5)
    keys = jax.random.split(jax.random.key(0), 3)
    three = corrupted(grey, keys)
    assert jnp.all(corrupted(grey[2:], keys[2:])[0] == three[2])
    assert jnp.mean(three[0] == three[1]) < 0.01
    assert jnp.mean(three[..., 0] == three[..., 1]) < 0.01  # nor is it the same for every channel


def test_every_update_has_its_own_noise_and_every_evaluation_has_the_same(draw):
    state, step, evaluate = training(SMALL[2])
    images, key = jnp.asarray(draw(8, 8)), jax.random.key(1)
    later = state._replace(step=state.step + 1)

    def trained_mse(state):
        return step(state, None, images, key)[1]["mse"]

    assert trained_mse(state) == trained_mse(state)
    assert trained_mse(state) != trained_mse(later)

    def evaluated_mse(keys):
        return evaluate(state.params, state.batch_stats, None, images, keys)["mse"]

    keys = image_keys(key, jnp.arange(8))
    assert evaluated_mse(keys) == evaluated_mse(keys)
    assert evaluated_mse(keys) != evaluated_mse(image_keys(key, jnp.arange(8, 16)))


def test_they_have_no_posterior():
    for model in SMALL:
        assert not autoencoder.is_variational(model)
        params, batch_stats = jax.eval_shape(partial(autoencoder.init, model), jax.random.key(0))
        x = jax.ShapeDtypeStruct((2, model.size, model.size, 3), jnp.float32)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
        forward = partial(autoencoder.forward, model, train=False)
        out = jax.eval_shape(forward, params, batch_stats, x, keys)
        assert out.rate is None
        assert out.z.shape == (2, *autoencoder.latent_spec(model).shape)
