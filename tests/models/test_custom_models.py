"""Models that are defined elsewhere: their JSON, their latents, and losses of several networks."""

import json
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaejax.distributions import Normal
from vaejax.errors import UserError
from vaejax.losses import mse_kl
from vaejax.models import autoencoder, summary
from vaejax.models.autoencoder import Autoencoder, from_json, to_json
from vaejax.models.denoising import Denoising
from vaejax.models.layers import Convolution, Dense
from vaejax.models.vae import VAE
from vaejax.priors import StandardNormal
from vaejax.training.step import Trainer, batch_gradient, image_keys, init, train_step

# most of the time would be LLVM's, whose work is not tested here
HASTY = {"xla_backend_optimization_level": 0}
KEY = jax.random.key(1)


def flat(x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1)


class Spatial(Autoencoder):
    """A latent `[b h/2 w/2 2]`."""

    title: ClassVar[str] = "spatial autoencoder"

    def setup(self) -> None:
        self.encoder = Convolution(4, stride=2, kernel_size=3)
        self.decoder = Convolution(4 * self.channels, kernel_size=3)

    def encode(self, x, *, train, axis=None):
        mean, log_variance = jnp.split(self.encoder(x), 2, axis=-1)
        return Normal(mean, log_variance - 1)

    def decode(self, z, *, train, axis=None):
        b, h, w, _ = z.shape
        x = self.decoder(z).reshape(b, h, w, 2, 2, self.channels)
        return nn.sigmoid(x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, self.channels))


class TwoLatents(Autoencoder):
    """A dictionary of a spatial latent and a vector."""

    def setup(self) -> None:
        self.encoder = Convolution(4, stride=2, kernel_size=3)
        self.top = Dense(6)
        self.decoder = Dense(self.size**2 * self.channels)

    def encode(self, x, *, train, axis=None):
        hidden = self.encoder(x)
        bottom = Normal(*jnp.split(hidden, 2, axis=-1))
        return {"top": Normal(*jnp.split(self.top(flat(hidden)), 2, axis=-1)), "bottom": bottom}

    def decode(self, z, *, train, axis=None):
        both = jnp.concatenate([flat(z["bottom"]), z["top"]], axis=1)
        return nn.sigmoid(self.decoder(both)).reshape(-1, self.size, self.size, self.channels)


class WithCritic(Autoencoder):
    """A model with a network that only its loss calls."""

    def setup(self) -> None:
        self.encoder = Dense(6)
        self.decoder = Dense(self.size**2 * self.channels)
        self.critic = Dense(1)

    def encode(self, x, *, train, axis=None):
        if self.is_initializing():
            self.score(x)
        return Normal(*jnp.split(self.encoder(flat(x)), 2, axis=-1))

    def decode(self, z, *, train, axis=None):
        return nn.sigmoid(self.decoder(z)).reshape(-1, self.size, self.size, self.channels)

    def score(self, x):
        return self.critic(flat(x))[:, 0]


# JSON ---------------------------------------------------------------------------------------------


class Narrow(VAE):
    """A subclass of a model, with fields of every kind."""

    depth: int = 2
    strides: tuple[int, ...] = (1, 2)
    window: tuple[int, float] | None = None
    blocks: tuple[tuple[int, str], ...] = ()
    rate: float = 0.5
    skip: bool = False


@pytest.mark.parametrize(
    "model",
    [
        VAE(),
        VAE(log_variance_bound=6.0, norm="batch", compute="bfloat16"),
        Denoising(noise=0.0),
        Narrow(),
        Narrow(depth=0, strides=(), window=(3, 0.0), rate=0.0, skip=True),
        Narrow(strides=(0, 3, 1), blocks=((1, "a"), (0, "b")), size=32, latent_dim=1),
        Spatial(size=8),
    ],
    ids=str,
)
def test_a_model_survives_json(model: Autoencoder):
    description = json.loads(json.dumps(to_json(model), allow_nan=False))
    assert description == to_json(model)  # tuples are lists already, as in a file
    again = from_json(description)
    assert type(again) is type(model)
    assert again == model
    assert hash(again) == hash(model)
    assert to_json(again) == to_json(model)


def test_fields_that_a_description_leaves_out_have_their_defaults():
    assert from_json({"kind": "Narrow", "depth": 0}) == Narrow(depth=0)


def test_json_names_the_models_own_fields_alone():
    assert to_json(Spatial()) == {
        "kind": "Spatial", "size": 64, "channels": 3, "compute": "float32"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "Unheard"}, "there is no model 'Unheard': no imported class is called so"),
        ({"kind": None}, "there is no model 'None'"),
        ({"kind": ["VAE"]}, "there is no model"),
        ({"colour": 3}, "has no 'colour'"),
        ({"parent": None}, "has no 'parent'"),
        ({"name": "x"}, "has no 'name'"),
        ({"depth": "2"}, "has no depth of '2'"),
        ({"depth": 2.5}, "has no depth"),
        ({"depth": True}, "has no depth"),
        ({"depth": None}, "has no depth"),
        ({"depth": 2**20}, "has no depth"),
        ({"rate": float("nan")}, "has no rate"),
        ({"rate": float("inf")}, "has no rate"),
        ({"rate": False}, "has no rate"),
        ({"skip": 1}, "has no skip"),
        ({"strides": 3}, "has no strides"),
        ({"strides": [1, "2"]}, "has no strides"),
        ({"window": [3]}, "has no window"),
        ({"window": [3, 1.0, 2]}, "has no window"),
        ({"blocks": [[1, 2]]}, "has no blocks"),
        ({"blocks": [{"a": 1}]}, "has no blocks"),
        ({"norm": "frozen"}, "has no norm of 'frozen'"),
        ({"norm": ["batch"]}, "has no norm"),
        ({"compute": "float16"}, "has no compute"),
        ({"size": 17}, "multiple of 16"),
        ({"latent_dim": 0}, "has no latent_dim of 0: at least 1"),
    ],
    ids=str,
)
def test_a_description_of_no_model_is_refused(changes: dict, words: str):
    with pytest.raises(UserError, match=words):
        from_json({**to_json(Narrow()), **changes})


def test_two_classes_of_one_name_are_refused():
    def define() -> type[Autoencoder]:
        class Twice(Autoencoder):
            pass

        return Twice

    first = define()
    assert from_json({"kind": "Twice"}) == first()
    second = define()
    with pytest.raises(UserError, match="several imported classes are called so"):
        from_json(to_json(second()))


# Latents of other shapes --------------------------------------------------------------------------


MODELS = [Spatial(size=8), TwoLatents(size=8)]
NAMES = ["spatial", "two latents"]


@pytest.fixture(scope="module")
def images(draw) -> jax.Array:
    return jnp.asarray(draw(4, 8))


@pytest.fixture(scope="module")
def keys() -> jax.Array:
    return image_keys(KEY, jnp.arange(4))


def start(model: Autoencoder):
    return jax.jit(partial(autoencoder.init, model), compiler_options=HASTY)(jax.random.key(0))


def test_the_latents_of_a_model_are_known_without_computing():
    spatial, two = MODELS
    assert autoencoder.latent_spec(spatial).shape == (4, 4, 2)
    shapes = jax.tree.map(lambda leaf: leaf.shape, autoencoder.latent_spec(two))
    assert shapes == {"top": (3,), "bottom": (4, 4, 2)}
    assert autoencoder.is_variational(spatial)
    assert autoencoder.is_variational(two)


class HalfVariational(TwoLatents):
    """One of two latents has no posterior."""

    def encode(self, x, *, train, axis=None):
        posterior = super().encode(x, train=train, axis=axis)
        return {**posterior, "bottom": posterior["bottom"].mean}


def test_a_model_is_variational_if_all_its_latents_are():
    assert not autoencoder.is_variational(HalfVariational(size=8))
    assert autoencoder.latent_spec(HalfVariational(size=8))["bottom"].shape == (4, 4, 2)


def normals(posterior) -> list[Normal]:
    return [posterior] if isinstance(posterior, Normal) else list(posterior.values())


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_the_rate_is_the_sum_of_all_divergences(model: Autoencoder, images, keys):
    params, batch_stats = start(model)
    x = images / 255
    forward = partial(autoencoder.forward, model, train=False)
    out = jax.jit(forward, compiler_options=HASTY)(params, batch_stats, x, keys)
    expected, latents = np.zeros(4), 0
    for normal in normals(autoencoder.encode(model, params, batch_stats, x)):
        mean, log_variance = (np.asarray(a, np.float64).reshape(4, -1) for a in normal)
        divergences = 0.5 * (mean**2 + np.exp(log_variance) - log_variance - 1)
        expected += divergences.sum(axis=1)
        latents += mean.shape[1]
    np.testing.assert_allclose(out.rate, expected, rtol=1e-4)
    assert out.latents == latents
    assert out.output.shape == x.shape


def test_each_latent_has_noise_of_its_own_by_the_images_key():
    zeros = jnp.zeros((4, 3))
    posterior = {"a": Normal(zeros, zeros), "b": Normal(zeros, zeros), "c": zeros}
    keys = jax.random.split(KEY, 4)
    z = autoencoder.sample(posterior, keys)
    assert len({float(value) for value in (*z["a"].ravel(), *z["b"].ravel())}) == 24
    assert jnp.all(z["c"] == 0)
    last = jax.tree.map(lambda a: a[3:], posterior)
    alone = autoencoder.sample(last, keys[3:])
    for name in ("a", "b"):
        np.testing.assert_array_equal(alone[name][0], z[name][3])
    assert jnp.all(autoencoder.mode(posterior)["a"] == 0)


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_the_standard_normal_prior_draws_what_the_decoder_takes(model: Autoencoder):
    prior = StandardNormal(model)
    z = prior.sample([5, 6])
    spec = autoencoder.latent_spec(model)
    assert jax.tree.structure(z) == jax.tree.structure(spec)
    for leaf, expected in zip(jax.tree.leaves(z), jax.tree.leaves(spec), strict=True):
        assert leaf.shape == (2, *expected.shape)
    assert autoencoder.decode(model, *start(model), z).shape == (2, 8, 8, 3)
    assert prior.log_prob(z).shape == (2,)


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_three_updates_lower_the_loss(model: Autoencoder, images):
    trainer = Trainer(model, partial(mse_kl, kl_weight=0.01), optax.adam(1e-2))
    state = jax.jit(partial(init, trainer=trainer), compiler_options=HASTY)(jax.random.key(0))
    step = jax.jit(partial(train_step, trainer=trainer), compiler_options=HASTY)
    losses = []
    for _ in range(4):
        state, metrics = step(state, None, images, KEY)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert int(state.skipped) == 0


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_no_image_depends_on_the_others(model: Autoencoder, images, keys):
    params, batch_stats = start(model)

    def terms(x):
        out = autoencoder.forward(model, params, batch_stats, x, keys, train=True)
        return jnp.sum((out.output - x)[1] ** 2) + out.rate[1]

    gradient = jax.jit(jax.grad(terms), compiler_options=HASTY)(images / 255)
    others = np.asarray(gradient)[[0, 2, 3]]
    assert np.all(others == 0)
    assert jnp.any(gradient[1] != 0)


def test_the_table_of_a_model_lists_its_own_layers():
    rows = summary.rows(TwoLatents(size=8))
    assert {row.name for row in rows} == {"encoder", "top", "decoder"}
    assert f"{sum(sum(row.parameters) for row in rows):,} parameters" in summary.table(MODELS[1])


# Several networks by one loss ---------------------------------------------------------------------


def adversarial(x, out, context, *, model_term: float = 1.0, critic_term: float = 1.0):
    """The model is to raise the critic's score of its output, and the critic to lower it."""
    frozen_critic = jax.lax.stop_gradient(context.params)
    fooled = jnp.mean(context.apply("score", out.output, params=frozen_critic))
    score = jnp.mean(context.apply("score", jax.lax.stop_gradient(out.output)))
    mse = jnp.mean((x - out.output) ** 2)
    return model_term * (mse - 0.1 * fooled) + critic_term * score, {"score": score}


def top_level(params):
    return {name: "critic" if name == "critic" else "model" for name in params}


def trained(images, optimizers: dict | None = None, **terms: float):
    """The parameters before and after three updates."""
    optimizers = optimizers or {"model": optax.adam(1e-2), "critic": optax.sgd(0.1)}
    optimizer = optax.partition(optimizers, top_level)
    trainer = Trainer(WithCritic(size=8), partial(adversarial, **terms), optimizer)
    state = jax.jit(partial(init, trainer=trainer), compiler_options=HASTY)(jax.random.key(0))
    before = state.params
    step = jax.jit(partial(train_step, trainer=trainer), compiler_options=HASTY)
    for _ in range(3):
        state, _ = step(state, None, images, KEY)
    return before, state.params


def moved(before: dict, after: dict) -> set[str]:
    same = {
        name: jax.tree.map(lambda a, b: bool(jnp.all(a == b)), before[name], after[name])
        for name in before
    }
    return {name for name, tree in same.items() if not all(jax.tree.leaves(tree))}


def test_each_term_of_a_loss_trains_its_own_network(images):
    before, both = trained(images)
    assert moved(before, both) == {"encoder", "decoder", "critic"}
    assert moved(*trained(images, critic_term=0.0)) == {"encoder", "decoder"}
    assert moved(*trained(images, model_term=0.0)) == {"critic"}


def test_a_network_is_not_moved_by_the_other_ones_term(images):
    """With the other network held still, its own term alone gives the same parameters."""
    still = {"model": optax.adam(1e-2), "critic": optax.set_to_zero()}
    _, both = trained(images, optimizers=still)
    _, alone = trained(images, optimizers=still, critic_term=0.0)
    assert moved(both, alone) == set()
    still = {"model": optax.set_to_zero(), "critic": optax.sgd(0.1)}
    _, both = trained(images, optimizers=still)
    _, alone = trained(images, optimizers=still, model_term=0.0)
    assert moved(both, alone) == set()


def test_each_network_has_its_own_optimizer(images):
    before, after = trained(images, model_term=0.0)
    # plain SGD on the mean score: its gradient by the bias is 1, so three steps of 0.1
    step = after["critic"]["bias"] - before["critic"]["bias"]
    np.testing.assert_allclose(step, -0.3, rtol=1e-5)


# A network that is not trained --------------------------------------------------------------------


def perceptual(x, out, context):
    """A distance in the features of a frozen network."""
    features = [jnp.tanh(flat(image) @ context.frozen["kernel"]) for image in (x, out.output)]
    return jnp.mean((features[0] - features[1]) ** 2), {}


def test_a_frozen_network_is_an_argument_that_nothing_trains(images):
    trainer = Trainer(WithCritic(size=8), perceptual, optax.adam(1e-2))
    state = jax.jit(partial(init, trainer=trainer), compiler_options=HASTY)(jax.random.key(0))
    random = np.random.default_rng(0)
    first, second = (
        {"kernel": jnp.asarray(random.normal(size=(192, 5)), jnp.float32)} for _ in range(2)
    )
    compiled = []

    def counted(*arguments):
        compiled.append(1)
        return train_step(*arguments, trainer=trainer)

    step = jax.jit(counted, compiler_options=HASTY)
    after, metrics = step(state, first, images, KEY)
    _, others = step(state, second, images, KEY)
    assert metrics["loss"] != others["loss"]
    assert len(compiled) == 1
    assert moved(state.params, after.params) == {"encoder", "decoder"}
    batch = jax.eval_shape(
        partial(batch_gradient, trainer=trainer),
        state,
        first,
        images,
        image_keys(KEY, jnp.arange(4)),
    )
    assert jax.tree.structure(batch.gradients) == jax.tree.structure(state.params)
