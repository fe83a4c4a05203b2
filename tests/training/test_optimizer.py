"""Our Adam takes optax's steps, with and without the C++ kernels; skipping; learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaejax import kernels
from vaejax.training.optimizer import (
    LARGE,
    SkipsNonfinite,
    adam,
    global_norm,
    schedule,
    skip_nonfinite,
)


@pytest.fixture(params=["kernels", "plain"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernels are used, as with one device, or not, as with several."""
    ours = request.param == "kernels"
    if ours and kernels.unavailable_reason():
        pytest.skip(kernels.unavailable_reason())
    monkeypatch.setattr(jax, "device_count", lambda: 1 if ours else 4)
    return ours


def tree(seed: int, scale: float = 1.0) -> dict[str, jax.Array]:
    """Leaves for the kernels and, below `LARGE`, for XLA."""
    random = np.random.default_rng(seed)
    shapes = {"kernel": (5, LARGE // 10, 3), "bias": (7,), "dense": (LARGE, 1), "scale": (3,)}
    return {
        name: jnp.asarray(scale * random.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }


def assert_same_steps(ours, theirs, gradients: list, *, native: bool) -> None:
    params = expected = tree(0)
    state, other = ours.init(params), theirs.init(params)
    step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
    text = str(jax.make_jaxpr(ours.update)(gradients[0], state, params))
    assert ("vaejax_adam" in text) == native
    for gradient in gradients:
        updates, state = step(gradient, state, params, norm=global_norm(gradient))
        params = optax.apply_updates(params, updates)
        updates, other = their_step(gradient, other, expected)
        expected = optax.apply_updates(expected, updates)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            # 1 - 0.999^t keeps four digits in float32: of a step of 1e-3
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=3e-8)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype
            assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


def test_adam_is_optax_adam_step_by_step(native: bool):
    rate = optax.cosine_decay_schedule(1e-3, 5)
    ours, theirs = adam(rate, b1=0.5), optax.adam(rate, b1=0.5)
    assert jax.tree.structure(ours.init(tree(0))) == jax.tree.structure(theirs.init(tree(0)))
    gradients = [tree(number, scale=10.0 ** (5 - 2 * number)) for number in range(1, 6)]
    assert_same_steps(ours, theirs, gradients, native=native)


def test_adam_with_clip_norm_is_optax_with_clipping_by_the_global_norm(native: bool):
    bound = 0.5 * float(global_norm(tree(2)))
    theirs = optax.chain(optax.clip_by_global_norm(bound), optax.adam(1e-3, b1=0.5))
    # clipped, just not clipped, zero, clipped by far
    gradients = [tree(1), tree(2, scale=0.49), tree(3, scale=0.0), tree(4, scale=100.0)]
    assert_same_steps(adam(1e-3, b1=0.5, clip_norm=bound), theirs, gradients, native=native)


def test_clipping_changes_the_steps():
    params, first, second = tree(0), tree(1, scale=100.0), tree(2)
    ends = []
    for clip_norm in (None, 1.0):
        optimizer = adam(1e-3, clip_norm=clip_norm)
        _, state = optimizer.update(first, optimizer.init(params), params)
        updates, _ = optimizer.update(second, state, params)
        ends.append(updates["bias"])
    assert not np.allclose(*ends, rtol=0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_or_norm_changes_nothing(native: bool, bad: float):
    for optimizer in (adam(1e-3, b1=0.5), adam(1e-3, b1=0.5, clip_norm=1.0)):
        params = tree(0)
        _, state = optimizer.update(tree(1), optimizer.init(params), params)
        dense = tree(2)["dense"].at[3].set(bad)
        broken = {**tree(2), "bias": jnp.full(7, bad), "dense": dense}
        step = jax.jit(optimizer.update)
        for gradients in (broken, tree(2)):  # the second is finite, and so is not its norm
            updates, after = step(gradients, state, params, norm=jnp.float32(bad))
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
            for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
                np.testing.assert_array_equal(a, b)
        updates, _ = step(tree(2), state, params, norm=global_norm(tree(2)))
        assert all(np.all(leaf) for leaf in jax.tree.leaves(updates))


def test_the_norm_is_that_of_all_leaves_as_one_vector(native: bool):
    gradients = tree(1)
    vector = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)]).astype(float)
    norm = jax.jit(global_norm)(gradients)
    assert float(norm) == pytest.approx(np.linalg.norm(vector), rel=1e-6)
    for bad in (jnp.nan, jnp.inf):
        broken = {**gradients, "dense": gradients["dense"].at[-1].set(bad)}
        assert not np.isfinite(global_norm(broken))


def test_adam_takes_float32_where_the_default_is_double(native: bool):
    gradients = tree(1)
    optimizer = adam(1e-3, b1=0.5)
    with jax.enable_x64(True):
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(gradients))
    # the first step is the rate, whatever the gradient's norm
    np.testing.assert_allclose(np.abs(updates["bias"]), 1e-3, rtol=1e-3)
    assert float(jnp.median(jnp.abs(updates["dense"]))) == pytest.approx(1e-3, rel=1e-3)


def test_what_skips_by_itself_is_not_wrapped_again():
    ours = adam(1e-3)
    assert isinstance(ours, SkipsNonfinite)
    assert skip_nonfinite(ours) is ours
    wrapped = skip_nonfinite(optax.sgd(0.1))
    assert isinstance(wrapped, SkipsNonfinite)
    assert skip_nonfinite(wrapped) is wrapped


def test_a_wrapped_optimizer_makes_its_own_steps_where_the_norm_is_finite():
    inner = optax.chain(optax.clip(0.1), optax.adam(1e-2), optax.add_decayed_weights(0.1))
    params = {"w": jnp.asarray([1.0, -2.0, 3.0])}
    gradients = {"w": jnp.asarray([0.3, 0.05, -4.0])}
    expected = inner.update(gradients, inner.init(params), params)
    wrapped = skip_nonfinite(inner)
    actual = wrapped.update(gradients, wrapped.init(params), params, norm=jnp.float32(4.0))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


# Learning rates -----------------------------------------------------------------------------------


def rates(**settings) -> list[float]:
    """The learning rate of the updates 0, 1, ... 12."""
    rate = schedule(0.1, **settings)
    return [float(rate(n)) if callable(rate) else rate for n in range(13)]


def test_without_warm_up_and_decay_the_rate_is_a_constant():
    assert schedule(0.1, warmup_steps=0, decay_steps=None) == 0.1


def test_the_warm_up_is_linear_from_zero_and_stays_at_the_peak():
    expected = [0.0, 0.025, 0.05, 0.075] + [0.1] * 9
    np.testing.assert_allclose(rates(warmup_steps=4, decay_steps=None), expected, rtol=1e-6)


def test_the_cosine_falls_from_the_peak_to_zero():
    cosine = rates(warmup_steps=0, decay_steps=10)
    expected = [0.05 * (1 + np.cos(np.pi * min(n, 10) / 10)) for n in range(13)]
    np.testing.assert_allclose(cosine, expected, rtol=1e-5, atol=1e-8)
    assert cosine[0] == pytest.approx(0.1)
    assert cosine[10] == cosine[12] == 0


def test_warm_up_and_cosine_are_optax_s_and_end_at_the_last_update():
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.1, 4, 10)
    ours = rates(warmup_steps=4, decay_steps=10)
    np.testing.assert_allclose(ours, [float(theirs(n)) for n in range(13)], rtol=1e-6)
    assert ours[4] == pytest.approx(0.1)
    assert ours[10] == 0


def test_a_warm_up_longer_than_the_run_reaches_no_peak():
    ours = rates(warmup_steps=20, decay_steps=10)
    np.testing.assert_allclose(ours[:11], np.arange(11) * 0.005, rtol=1e-6)
