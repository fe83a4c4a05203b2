"""Optimizers that skip non-finite updates, and learning rate schedules.

The step passes every optimizer the extra argument `norm`: the Euclidean norm of all gradients, NaN
where the update must not be applied. `skip_nonfinite` makes any optax chain honour it; `adam`
honours it by itself, so that old and new moments are never both in memory. Without the argument
both compute the norm of the gradients that they are given.
"""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from vaejax import kernels

LARGE = 2**16  # numbers of a leaf from which on our own kernel pays


class SkipsNonfinite(optax.GradientTransformationExtraArgs):
    """An optimizer that makes no step and keeps its state where `norm` is not finite."""


def skip_nonfinite(inner: optax.GradientTransformation) -> SkipsNonfinite:
    """Wrap an optimizer so that a non-finite `norm` gives zero updates and the old state.

    A wrapper around the chain, since an element of it cannot protect the ones behind it. Unlike
    `optax.apply_if_finite` it keeps no counters and takes the decision of the step, which has seen
    the loss as well. Old and new states of `inner` are in memory together.
    """
    if isinstance(inner, SkipsNonfinite):
        return inner
    extended = optax.with_extra_args_support(inner)

    def update(gradients: Any, state: Any, params: Any = None, *, norm: Any = None, **extra: Any):
        norm = global_norm(gradients) if norm is None else norm
        finite = jnp.isfinite(norm)
        updates, new_state = extended.update(gradients, state, params, norm=norm, **extra)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        return updates, jax.tree.map(partial(jnp.where, finite), new_state, state)

    return SkipsNonfinite(extended.init, cast(Any, update))


def adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float | None = None,
) -> SkipsNonfinite:
    """Adam (Kingma and Ba, 2015), as `optax.adam`: the same state, the same steps up to rounding.

    With `clip_norm` gradients whose norm is larger are scaled down to it first, as
    `optax.clip_by_global_norm` does. Where our own kernels are available, large leaves are updated
    in one pass and in place.
    """
    plain = optax.scale_by_adam(b1, b2, eps)

    def update_moments(gradients: Any, state: Any, params: Any = None, *, norm: Any, **_: Any):
        finite = jnp.isfinite(norm)
        if clip_norm is not None:
            scale = jnp.minimum(1.0, clip_norm / jnp.where(norm > 0, norm, 1.0))
            gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
        leaves, tree = jax.tree.flatten(gradients)
        large = [_is_large(leaf) for leaf in leaves]
        count = optax.safe_increment(state.count)
        corrections = jnp.stack([1 - b1**count, 1 - b2**count]).astype(jnp.float32)
        means, squares = (tree.flatten_up_to(moments) for moments in (state.mu, state.nu))
        small = [
            [x for x, own in zip(xs, large, strict=True) if not own]
            for xs in (leaves, means, squares)
        ]
        in_place = partial(kernels.adam, corrections=corrections, norm=norm, b1=b1, b2=b2, eps=eps)
        after: Any = plain.update(small[0], optax.ScaleByAdamState(state.count, *small[1:]))
        others = (
            (jnp.where(finite, step, 0), jnp.where(finite, m, before), jnp.where(finite, v, last))
            for step, m, before, v, last in zip(
                after[0], after[1].mu, small[1], after[1].nu, small[2], strict=True
            )
        )
        updated = [
            in_place(g, m, v) if own else next(others)
            for g, m, v, own in zip(leaves, means, squares, large, strict=True)
        ]
        steps, means, squares = (tree.unflatten(xs) for xs in zip(*updated, strict=True))
        count = jnp.where(finite, count, state.count)
        return steps, optax.ScaleByAdamState(count, means, squares)

    moments = optax.GradientTransformationExtraArgs(plain.init, cast(Any, update_moments))
    # a schedule counts its updates: one that is skipped must not move it on
    chain = optax.chain(moments, skip_nonfinite(optax.scale_by_learning_rate(learning_rate)))

    def update(gradients: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any):
        norm = jnp.asarray(global_norm(gradients) if norm is None else norm, jnp.float32)
        return chain.update(gradients, state, params, norm=norm)

    return SkipsNonfinite(chain.init, cast(Any, update))


def schedule(peak: float, *, warmup_steps: int, decay_steps: int | None) -> optax.ScalarOrSchedule:
    """Return the learning rate over the updates.

    It rises linearly from 0 over `warmup_steps`, then stays, or falls to 0 along a half cosine that
    ends at update `decay_steps` of the run (Loshchilov and Hutter, 2017, equation 5).
    """
    if not warmup_steps and decay_steps is None:
        return peak
    after: optax.Schedule = optax.constant_schedule(peak)
    if decay_steps is not None:
        after = optax.cosine_decay_schedule(peak, max(1, decay_steps - warmup_steps))
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """Return the Euclidean norm of all leaves as one vector."""
    squares = (
        kernels.squared_norm(leaf) if _is_large(leaf) else jnp.sum(leaf**2)
        for leaf in jax.tree.leaves(tree)
    )
    return jnp.sqrt(sum(squares, start=jnp.zeros(())))


def _is_large(leaf: Array) -> bool:
    return leaf.size >= LARGE and kernels.supports(leaf.dtype)
