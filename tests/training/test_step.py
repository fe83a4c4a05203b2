"""An update learns, depends on its arguments alone, and knows its own noise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaejax.models import vae
from vaejax.objectives import report
from vaejax.training.adam import adam
from vaejax.training.state import TrainState, init
from vaejax.training.step import eval_step, gradient, image_keys, train_step

MODEL = vae.VAE(size=16, latent_dim=4, width=2, norm="batch")
OPTIMIZER = optax.adam(3e-3)
LOSS = partial(report, model=MODEL, kl_weight=1e-4)
KEY = jax.random.key(1)

step = jax.jit(partial(train_step, loss=LOSS, optimizer=OPTIMIZER))
look = jax.jit(partial(eval_step, loss=LOSS))


@pytest.fixture(scope="module")
def images(draw) -> np.ndarray:
    return draw(16, 16)


@pytest.fixture(scope="module")
def state() -> TrainState:
    return jax.jit(partial(init, model=MODEL, optimizer=OPTIMIZER))(jax.random.key(0))


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a, b)))


def test_a_hundred_updates_on_one_batch_learn_it(state, images):
    first = None
    for _ in range(100):
        state, figures = step(state, images, KEY)
        first = first or figures
    assert int(state.step) == 100
    assert figures["loss"] < first["loss"] / 5


def test_an_update_is_a_function_of_its_arguments(state, images):
    assert equal(step(state, images, KEY), step(state, images, KEY))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_no_number_is_not_applied(bad: str, state, images):
    def breaks(params, statistics, images, keys, *, at, **settings):
        """As it was in updates 0 and 3, and broken in between."""
        scale, (figures, statistics) = LOSS(params, statistics, images, keys, **settings)
        number = jnp.where(at % 3 == 0, 1.0, jnp.nan)
        if bad == "loss":  # alone: what does not depend on the parameters has no gradient
            return scale, ({**figures, "loss": figures["loss"] * number}, statistics)
        return scale * number, (figures, statistics)

    optimizer = adam(1e-3, b1=0.5)
    begin = state._replace(opt_state=optimizer.init(state.params))

    @jax.jit
    def update(state):
        loss = partial(breaks, at=state.step)
        return train_step(state, jnp.asarray(images), KEY, loss=loss, optimizer=optimizer)

    first, figures = update(begin)
    assert figures["skipped"] == 0
    assert not equal(first.params, begin.params)
    second, figures = update(first)
    assert figures["skipped"] == second.skipped == 1
    third, figures = update(second)
    assert figures["skipped"] == third.skipped == 2
    assert int(third.step) == 3
    assert equal(third._replace(step=first.step, skipped=first.skipped), first)
    fourth, figures = update(third)
    assert figures["skipped"] == fourth.skipped == 0
    assert not equal(fourth.params, third.params)


def test_the_noise_of_an_update_comes_from_its_number_and_the_key(state, images):
    _, here = step(state, images, KEY)
    _, later = step(state._replace(step=state.step + 1), images, KEY)
    _, other = step(state, images, jax.random.key(2))
    assert here["kl"] == later["kl"] == other["kl"]  # which no noise enters
    assert len({float(f["mse"]) for f in (here, later, other)}) == 3


def test_the_figures_are_of_the_state_before_the_update(state, images):
    keys = image_keys(jax.random.fold_in(KEY, state.step), jnp.arange(16))
    _, figures = step(state, images, KEY)
    loss, _ = jax.jit(partial(LOSS, train=True))(state.params, state.statistics, images, keys)
    np.testing.assert_allclose(figures["loss"], loss, rtol=1e-5)


def test_the_statistics_move_by_a_hundredth_of_the_batch(state, images):
    after, _ = step(state, images, KEY)
    moved = after.statistics["encoder"]["conv_1"]["norm"]["var"]
    assert not equal(state.statistics, after.statistics)
    assert jnp.all(moved >= 0.99)  # 0.99 of the old variance, 1, and 0.01 of the new
    assert jnp.all(moved < 1)


def test_a_look_goes_by_the_moving_statistics_and_not_by_the_batch(state, images):
    here = look(state, images, KEY)
    moved = state._replace(statistics=jax.tree.map(lambda a: a + 1, state.statistics))
    assert here["mse"] != look(moved, images, KEY)["mse"]
    alone = look(state, images[:1], KEY)
    together = look(state, np.repeat(images[:1], 16, axis=0), KEY)
    np.testing.assert_allclose(alone["kl"], together["kl"], rtol=1e-5)


def test_bfloat16_points_the_same_way_and_all_that_is_kept_stays_float32(state, images):
    half = partial(LOSS, model=vae.VAE(**{**vars(MODEL), "compute": "bfloat16"}))
    found = {
        name: jax.jit(partial(gradient, loss=loss))(
            state.params, state.statistics, state.step, images, KEY
        )
        for name, loss in (("float32", LOSS), ("bfloat16", half))
    }
    for leaf in jax.tree.leaves(found["bfloat16"]):
        assert leaf.dtype == jnp.float32
    a, b = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found[name].gradients)])
        for name in ("float32", "bfloat16")
    )
    assert (a != b).any()  # it was used
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    assert cosine > 0.97
    assert found["bfloat16"].figures["mse"] == pytest.approx(
        float(found["float32"].figures["mse"]), rel=0.02
    )
