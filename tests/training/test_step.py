"""One update: what it changes, what its noise depends on, and what it leaves alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaejax.distributions import Normal
from vaejax.losses import Context, batch_loss, mse_kl
from vaejax.models.autoencoder import Autoencoder
from vaejax.models.layers import Dense
from vaejax.models.vae import VAE
from vaejax.training.optimizer import adam, schedule, skip_nonfinite
from vaejax.training.step import (
    Gradient,
    Trainer,
    TrainState,
    batch_gradient,
    eval_step,
    image_keys,
    init,
    micro_step,
    random_flips,
    train_step,
    update,
)

MODEL = VAE(size=16, latent_dim=4, width=2, norm="batch")
LOSS = partial(mse_kl, kl_weight=1e-4)
TRAINER = Trainer(MODEL, LOSS, optax.adam(3e-3))
KEY = jax.random.key(1)


class DenseVAE(Autoencoder):
    """The least model with a posterior, which compiles in no time."""

    def setup(self) -> None:
        self.encoder = Dense(6)
        self.decoder = Dense(self.size**2 * 3)

    def encode(self, x, *, train, axis=None):
        return Normal(*jnp.split(self.encoder(x.reshape(len(x), -1)), 2, axis=1))

    def decode(self, z, *, train, axis=None):
        return jax.nn.sigmoid(self.decoder(z)).reshape(-1, self.size, self.size, 3)


DENSE = Trainer(DenseVAE(size=16), LOSS, optax.adam(3e-3))

# most of the time would be LLVM's, whose work is not tested here
HASTY = {"xla_backend_optimization_level": 0}
step = jax.jit(partial(train_step, trainer=TRAINER), compiler_options=HASTY)
evaluate = jax.jit(partial(eval_step, trainer=TRAINER), compiler_options=HASTY)
gradient = jax.jit(batch_gradient, static_argnames="trainer", compiler_options=HASTY)


@pytest.fixture(scope="module")
def images(draw) -> jax.Array:
    return jnp.asarray(draw(16, 16))


@pytest.fixture(scope="module")
def state() -> TrainState:
    return jax.jit(partial(init, trainer=TRAINER))(jax.random.key(0))


@pytest.fixture(scope="module")
def keys() -> jax.Array:
    """The keys of the first update's images."""
    return image_keys(jax.random.fold_in(KEY, 0), jnp.arange(16))


@pytest.fixture(scope="module")
def dense() -> TrainState:
    return jax.jit(partial(init, trainer=DENSE))(jax.random.key(0))


def equal(a, b) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(bool(jnp.all(x == y)) for x, y in leaves)


def test_a_hundred_updates_on_one_batch_lower_its_loss(state, images):
    first = None
    for _ in range(100):
        state, metrics = step(state, None, images, KEY)
        first = first or metrics
    assert int(state.step) == 100
    assert metrics["loss"] < first["loss"] / 5


def test_an_update_is_a_function_of_its_arguments(state, images):
    assert equal(step(state, None, images, KEY), step(state, None, images, KEY))


def test_the_noise_of_an_update_comes_from_its_number_and_the_key(state, images):
    _, first = step(state, None, images, KEY)
    _, later = step(state._replace(step=state.step + 1), None, images, KEY)
    _, other = step(state, None, images, jax.random.key(2))
    assert first["kl"] == later["kl"] == other["kl"]  # which no noise enters
    assert len({float(metrics["mse"]) for metrics in (first, later, other)}) == 3


def test_the_metrics_are_of_the_state_before_the_update(dense, images, keys):
    _, metrics = jax.jit(partial(train_step, trainer=DENSE))(dense, None, images, KEY)
    context = Context(DENSE.model, dense.params, dense.batch_stats, keys)
    loss, _ = jax.jit(lambda: batch_loss(images, context, loss=LOSS))()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def test_batch_stats_move_by_a_hundredth_of_those_of_the_batch(state, images):
    after, _ = step(state, None, images, KEY)
    moved = after.batch_stats["encoder"]["conv_1"]["norm"]["var"]
    assert not equal(state.batch_stats, after.batch_stats)
    assert jnp.all(moved >= 0.99)  # 0.99 of the old variance, 1, and 0.01 of the new
    assert jnp.all(moved < 1)


def test_an_evaluation_uses_the_moving_statistics_and_not_the_batch(state, images, keys):
    metrics = evaluate(state.params, state.batch_stats, None, images, keys)
    moved = jax.tree.map(lambda a: a + 1, state.batch_stats)
    assert metrics["mse"] != evaluate(state.params, moved, None, images, keys)["mse"]
    alone = evaluate(state.params, state.batch_stats, None, images[:1], keys[:1])
    repeated = jnp.repeat(images[:1], 16, axis=0)
    together = evaluate(state.params, state.batch_stats, None, repeated, keys)
    np.testing.assert_allclose(alone["kl"], together["kl"], rtol=1e-5)


def test_bfloat16_has_nearly_the_same_gradient_and_keeps_everything_in_float32(draw):
    model = VAE(size=16, latent_dim=4, width=1, norm="batch")
    exact, rounded = (
        Trainer(model.clone(compute=kind), LOSS, optax.sgd(0.1)) for kind in ("float32", "bfloat16")
    )
    state = jax.jit(partial(init, trainer=exact))(jax.random.key(0))
    batch = jnp.asarray(draw(16, 16)), image_keys(KEY, jnp.arange(16))
    exact, rounded = (gradient(state, None, *batch, trainer=t) for t in (exact, rounded))
    for leaf in jax.tree.leaves(rounded):
        assert leaf.dtype == jnp.float32
    a, b = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(which.gradients)])
        for which in (exact, rounded)
    )
    assert (a != b).any()  # bfloat16 was used
    assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.97
    assert rounded.metrics["mse"] == pytest.approx(float(exact.metrics["mse"]), rel=0.02)


# Updates that are not applied ---------------------------------------------------------------------


def tree(seed: int) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(random.normal(size=(3, 4)), jnp.float32),
        "bias": jnp.asarray(random.normal(size=3), jnp.float32),
    }


def adamw() -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1),
        optax.scale(-1e-2),
    )


WARM_UP = schedule(1e-2, warmup_steps=2, decay_steps=10)
OPTIMIZERS = {
    "optax.adam": optax.adam(1e-2),
    "adamw": adamw(),
    "optax.adam, cosine": optax.adam(optax.cosine_decay_schedule(1e-2, 10)),
    "adam": adam(1e-2),
    "adam, cosine": adam(schedule(1e-2, warmup_steps=0, decay_steps=10)),
    "adam, warm-up and clipping": adam(WARM_UP, clip_norm=0.5),
    "adam in a chain": optax.chain(adam(1e-2), optax.add_decayed_weights(-1e-3)),
    "partition": optax.partition(
        {"a": adam(WARM_UP), "b": optax.sgd(0.1, momentum=0.9)}, {"kernel": "a", "bias": "b"}
    ),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(1e-2)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=WARM_UP),
}


def state_of(trainer: Trainer, params) -> TrainState:
    """A state of these parameters as `init` would make it."""
    ema = None if trainer.ema_decay is None else jax.tree.map(jnp.copy, params)
    zero = jnp.zeros((), jnp.int32)
    opt_state = skip_nonfinite(trainer.optimizer).init(params)
    return TrainState(zero, zero, params, {"mean": jnp.zeros(3)}, opt_state, ema)


def batch(gradients, loss: float = 1.0) -> Gradient:
    batch_stats = {"mean": jnp.full(3, optax.tree.norm(gradients))}
    return Gradient(gradients, batch_stats, {"loss": jnp.float32(loss)})


BROKEN = {
    "a gradient of NaN": batch({**tree(2), "bias": jnp.asarray([0.0, jnp.nan, 1.0])}),
    "an infinite gradient": batch({**tree(2), "bias": jnp.asarray([0.0, -jnp.inf, 1.0])}),
    "a gradient whose norm overflows": batch({**tree(2), "bias": jnp.full(3, 1e30)}),
    "a loss of NaN": batch(tree(2), loss=np.nan),
    "an infinite loss": batch(tree(2), loss=np.inf),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_non_finite_update_changes_step_and_skipped_alone(optimizer):
    trainer = Trainer(MODEL, LOSS, optimizer, ema_decay=0.9)
    apply = jax.jit(partial(update, trainer=trainer))
    before, _ = apply(state_of(trainer, tree(0)), batch(tree(1)))
    before, metrics = apply(before, batch(tree(3)))
    assert metrics["skipped"] == 0
    for broken in BROKEN.values():
        after, metrics = apply(before, broken)
        assert (int(after.step), int(after.skipped)) == (3, 1)
        assert metrics["skipped"] == 1
        assert equal(after._replace(step=before.step, skipped=before.skipped), before)
    again, metrics = apply(after, BROKEN["a loss of NaN"])
    assert (int(again.step), int(again.skipped), int(metrics["skipped"])) == (4, 2, 2)
    applied, metrics = apply(again, batch(tree(4)))
    assert (int(applied.step), int(applied.skipped), int(metrics["skipped"])) == (5, 0, 0)
    for part in ("params", "batch_stats", "opt_state", "ema"):
        assert not equal(getattr(applied, part), getattr(before, part)), part
    # an update that follows skipped ones is the one that would have come instead of them
    expected, _ = apply(before, batch(tree(4)))
    for part in ("params", "opt_state", "batch_stats"):  # the average's decay counts them, too
        assert equal(getattr(applied, part), getattr(expected, part)), part


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_the_loss_breaks_is_not_applied(broken: str, dense, images):
    """The same through the entire step: at updates 1 and 2 of 0 to 3."""

    def breaks(x, out, context, *, at):
        scalar, terms = LOSS(x, out, context)
        factor = jnp.where(at % 3 == 0, 1.0, jnp.nan)
        if broken == "gradient":
            return scalar * factor, terms
        # the loss alone: what does not depend on the parameters has no gradient
        return scalar + jax.lax.stop_gradient(scalar * factor - scalar), terms

    optimizer = adam(schedule(1e-3, warmup_steps=2, decay_steps=None), b1=0.5, clip_norm=1.0)
    trainer = DENSE._replace(optimizer=optimizer, ema_decay=0.5)
    start = dense._replace(opt_state=optimizer.init(dense.params), ema=dense.params)

    @jax.jit
    def run(state):
        here = trainer._replace(loss=partial(breaks, at=state.step))
        return train_step(state, None, images, KEY, trainer=here)

    first, metrics = run(start)
    assert metrics["skipped"] == 0
    second, metrics = run(first)
    assert metrics["skipped"] == second.skipped == 1
    assert np.isfinite(metrics["gradient_norm"]) == (broken == "loss")
    third, metrics = run(second)
    assert metrics["skipped"] == third.skipped == 2
    assert int(third.step) == 3
    assert equal(third._replace(step=first.step, skipped=first.skipped), first)
    fourth, metrics = run(third)
    assert metrics["skipped"] == fourth.skipped == 0
    assert not equal(fourth.params, third.params)


# The moving average of the weights ----------------------------------------------------------------


def test_the_moving_average_follows_the_new_parameters():
    trainer = Trainer(MODEL, LOSS, optax.sgd(0.5), ema_decay=0.25)
    state, params = state_of(trainer, tree(0)), tree(0)
    average = {name: np.asarray(a, np.float64) for name, a in params.items()}
    for number, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 0.25]):  # (1 + n) / (10 + n), at most
        gradients = tree(number + 1)
        state, _ = update(state, batch(gradients), trainer=trainer)
        for name in params:
            params[name] = params[name] - 0.5 * gradients[name]
            average[name] = decay * average[name] + (1 - decay) * np.asarray(params[name])
            np.testing.assert_allclose(state.params[name], params[name], rtol=1e-5)
            np.testing.assert_allclose(state.ema[name], average[name], rtol=1e-5, atol=1e-7)
    assert state.best_params is state.ema


def test_without_a_decay_there_is_no_moving_average(state, images):
    assert state.ema is None
    after, _ = step(state, None, images, KEY)
    assert after.ema is None
    assert after.best_params is after.params


def test_the_moving_average_starts_at_the_initial_weights():
    start = jax.jit(partial(init, trainer=DENSE._replace(ema_decay=0.9)))(jax.random.key(0))
    assert equal(start.ema, start.params)


# Flips --------------------------------------------------------------------------------------------


def test_half_of_the_images_are_flipped_by_their_own_keys():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (400, 3, 4, 1), np.uint8))
    keys = image_keys(KEY, jnp.arange(400))
    flipped = np.asarray(random_flips(images, keys))
    mirrored = (flipped == np.asarray(images)[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (flipped == np.asarray(images)).all(axis=(1, 2, 3))
    assert np.all(mirrored ^ kept)
    assert 160 < mirrored.sum() < 240  # four standard deviations
    parts = [random_flips(images[i : i + 100], keys[i : i + 100]) for i in range(0, 400, 100)]
    assert np.array_equal(np.concatenate(parts), flipped)
    shuffled = np.random.default_rng(1).permutation(400)
    assert np.array_equal(random_flips(images[shuffled], keys[shuffled]), flipped[shuffled])


def pixels(x, out, context):
    """A loss that reports what it is given."""
    return jnp.mean(out.output), {"x": jnp.mean(x), "left": jnp.mean(x[:, :, :8])}


def test_flips_mirror_what_the_loss_is_given_and_nothing_else(dense, images, keys):
    plain, mirrored = (
        gradient(dense, None, images, keys, trainer=DENSE._replace(loss=pixels, flip=flip)).metrics
        for flip in (False, True)
    )
    np.testing.assert_allclose(plain["x"], mirrored["x"], rtol=1e-6)
    flip_keys = jnp.stack([jax.random.split(key)[0] for key in keys])
    expected = random_flips(images, flip_keys)[:, :, :8] / 255
    np.testing.assert_allclose(mirrored["left"], jnp.mean(expected), rtol=1e-5)
    assert plain["left"] != mirrored["left"]


@pytest.mark.parametrize("parts", [2, 8])
def test_a_batch_is_flipped_equally_in_whatever_micro_batches(parts: int, dense, images, keys):
    trainer = DENSE._replace(flip=True, micro_batches=parts)
    together = gradient(dense, None, images, keys, trainer=trainer)
    add = jax.jit(partial(micro_step, trainer=trainer))
    total = jax.tree.map(jnp.zeros_like, together)
    for part in range(parts):
        total = add(total, dense, None, images[part::parts], KEY, part)
    for name in ("loss", "mse", "kl", "rate"):
        np.testing.assert_allclose(total.metrics[name], together.metrics[name], rtol=1e-5)
    difference = jax.tree.map(jnp.subtract, total.gradients, together.gradients)
    assert optax.tree.norm(difference) < 1e-5 * optax.tree.norm(together.gradients)
