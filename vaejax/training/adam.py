"""Adam, as optax has it, without the steps that are no numbers.

Where our own kernels serve, its large leaves are gone over in one pass and in place.
"""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from vaejax import native

LARGE = 2**16  # numbers of a leaf from which on a kernel of its own pays


def adam(
    rate: optax.ScalarOrSchedule, *, b1: float, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """optax.adam: the same state, and the same steps up to rounding.

    A gradient whose `length` is not finite makes a step of zero and leaves the moments alone.
    `optax.apply_if_finite` does that too, but keeps a second copy of them for it.
    """
    plain = optax.scale_by_adam(b1, b2, eps)

    def update(gradients: Any, state: Any, params: Any = None, *, length: Any = None, **_: Any):
        leaves, tree = jax.tree.flatten(gradients)
        large = [_large(leaf) for leaf in leaves]
        length = jnp.asarray(norm(gradients) if length is None else length, jnp.float32)
        finite = jnp.isfinite(length)
        count = optax.safe_increment(state.count)
        corrections = jnp.stack([1 - b1**count, 1 - b2**count]).astype(jnp.float32)
        means, squares = (tree.flatten_up_to(moments) for moments in (state.mu, state.nu))
        small = [
            [x for x, own in zip(xs, large, strict=True) if not own]
            for xs in (leaves, means, squares)
        ]
        ours = partial(native.adam, corrections=corrections, length=length, b1=b1, b2=b2, eps=eps)
        after: Any = plain.update(small[0], optax.ScaleByAdamState(state.count, *small[1:]))
        others = (
            (jnp.where(finite, step, 0), jnp.where(finite, m, before), jnp.where(finite, v, last))
            for step, m, before, v, last in zip(
                after[0], after[1].mu, small[1], after[1].nu, small[2], strict=True
            )
        )
        found = [
            ours(g, m, v) if own else next(others)
            for g, m, v, own in zip(leaves, means, squares, large, strict=True)
        ]
        steps, means, squares = (tree.unflatten(xs) for xs in zip(*found, strict=True))
        made = jnp.where(finite, count, state.count)
        return steps, optax.ScaleByAdamState(made, means, squares)

    own = optax.GradientTransformationExtraArgs(plain.init, cast(Any, update))
    return optax.chain(own, optax.scale_by_learning_rate(rate))


def norm(tree: PyTree) -> Float[Array, ""]:
    """The length of all leaves as one vector."""
    squares = (
        native.squared_length(leaf) if _large(leaf) else jnp.sum(leaf**2)
        for leaf in jax.tree.leaves(tree)
    )
    return jnp.sqrt(sum(squares, start=jnp.zeros(())))


def _large(leaf: Array) -> bool:
    return leaf.size >= LARGE and native.serves(leaf.dtype)
