"""One update and one look, as pure functions over arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, UInt8

from vaejax.objectives import Figures, Loss
from vaejax.training.state import TrainState


def train_step(
    state: TrainState,
    images: UInt8[Array, "b h w c"],
    key: Key[Array, ""],
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Figures]:
    """One update; the figures are of these images *before* it.

    The key is the run's, the same at every step: the step's own noise comes from folding in the
    number of the step, so that step n draws the same whether or not the run was interrupted.
    """
    keys = image_keys(jax.random.fold_in(key, state.step), len(images))
    gradient = jax.grad(loss, has_aux=True)
    gradients, (figures, statistics) = gradient(
        state.params, state.statistics, images, keys, train=True
    )
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    figures = {**figures, "gradient_norm": optax.tree.norm(gradients)}
    return TrainState(state.step + 1, params, statistics, opt_state), figures


def eval_step(
    state: TrainState, images: UInt8[Array, "b h w c"], key: Key[Array, ""], *, loss: Loss
) -> Figures:
    """The figures of images that are not learned from; the norms use their moving statistics."""
    keys = image_keys(key, len(images))
    _, (figures, _) = loss(state.params, state.statistics, images, keys, train=False)
    return figures


def image_keys(key: Key[Array, ""], images: int, *, first: int = 0) -> Key[Array, " b"]:
    """A key for each image by its place in the batch, wherever the batch is computed."""
    return jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(images))
