"""Adam in one pass is optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaejax import native
from vaejax.training.adam import LARGE, adam, norm


@pytest.fixture(params=["kernels", "plain"])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    kernels = request.param == "kernels"
    if kernels and native.missing():
        pytest.skip(native.missing())
    monkeypatch.setattr(jax, "device_count", lambda: 1 if kernels else 4)
    return kernels


def tree(seed: int, scale: float = 1.0) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    shapes = {"kernel": (5, LARGE // 10, 3), "bias": (7,), "dense": (LARGE, 1), "scale": (3,)}
    return {
        name: jnp.asarray(scale * random.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }


def test_it_is_optax_adam_step_by_step(served: bool):
    rate = optax.cosine_decay_schedule(1e-3, 5)
    ours, theirs = adam(rate, b1=0.5), optax.adam(rate, b1=0.5)
    params = expected = tree(0)
    state, other = ours.init(params), theirs.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(other)
    step = jax.jit(optax.with_extra_args_support(ours).update)
    for number in range(5):
        gradients = tree(number + 1, scale=10.0 ** (3 - 2 * number))
        text = str(jax.make_jaxpr(ours.update)(gradients, state, params))
        assert ("vaejax_adam" in text) == served
        updates, state = step(gradients, state, params, length=norm(gradients))
        params = optax.apply_updates(params, updates)
        updates, other = theirs.update(gradients, other, expected)
        expected = optax.apply_updates(expected, updates)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            # 1 - 0.999^t keeps four digits in float32: of a step of 1e-3
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=3e-8)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype
            assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("length", [np.nan, np.inf])
def test_a_gradient_that_is_no_number_changes_nothing(served: bool, length: float):
    optimizer = adam(1e-3, b1=0.5)
    params = tree(0)
    _, state = optimizer.update(tree(1), optimizer.init(params), params)
    broken = {**tree(2), "bias": jnp.full(7, length), "dense": tree(2)["dense"].at[3].set(length)}
    step = jax.jit(optax.with_extra_args_support(optimizer).update)
    for gradients in (broken, tree(2)):  # of which the second is told to be as bad
        updates, after = step(gradients, state, params, length=jnp.float32(length))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b)
    updates, _ = step(tree(2), state, params, length=norm(tree(2)))
    assert all(np.all(leaf) for leaf in jax.tree.leaves(updates))


def test_the_norm_is_the_length_of_all_leaves(served: bool):
    found = tree(1)
    vector = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)]).astype(float)
    assert float(jax.jit(norm)(found)) == pytest.approx(np.linalg.norm(vector), rel=1e-6)
    for bad in (jnp.nan, jnp.inf):
        broken = {**found, "dense": found["dense"].at[-1].set(bad)}
        assert not np.isfinite(norm(broken))


def test_it_takes_float32_where_the_default_is_double(served: bool):
    gradients = tree(1)
    optimizer = adam(1e-3, b1=0.5)
    with jax.enable_x64(True):
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(gradients))
    # the first step is the rate, whatever the gradient's length
    np.testing.assert_allclose(np.abs(updates["bias"]), 1e-3, rtol=1e-3)
    assert float(jnp.median(jnp.abs(updates["dense"]))) == pytest.approx(1e-3, rel=1e-3)
