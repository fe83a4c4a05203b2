"""One update and one look, as pure functions over arrays."""

import jax
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
    key = jax.random.fold_in(key, state.step)
    gradient = jax.grad(loss, has_aux=True)
    gradients, (figures, statistics) = gradient(
        state.params, state.statistics, images, key, train=True
    )
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    figures = {**figures, "gradient_norm": optax.tree.norm(gradients)}
    return TrainState(state.step + 1, params, statistics, opt_state), figures


def eval_step(
    state: TrainState, images: UInt8[Array, "b h w c"], key: Key[Array, ""], *, loss: Loss
) -> Figures:
    """The figures of images that are not learned from; the norms use their moving statistics."""
    _, (figures, _) = loss(state.params, state.statistics, images, key, train=False)
    return figures
