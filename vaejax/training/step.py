"""One update and one look, as pure functions over arrays."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree, UInt8

from vaejax.objectives import Figures, Loss
from vaejax.training.state import TrainState


def train_step(
    state: TrainState,
    images: UInt8[Array, "b h w c"],
    key: Key[Array, ""],
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    axis: str | None = None,
) -> tuple[TrainState, Figures]:
    """One update; the figures are of these images *before* it.

    The key is the run's, the same at every step: the step's own noise comes from folding in the
    number of the step, so that step n draws the same whether or not the run was interrupted.

    Under `jax.pmap`, the images are one device's part of the batch, and `axis` the name of the axis
    over which gradients, figures and batch norms' statistics are averaged.
    """
    key, params, first = jax.random.fold_in(key, state.step), state.params, 0
    if axis is not None:
        first = jax.lax.axis_index(axis) * len(images)
        # Or else, where shard_map keeps track of what varies (jax.pmap does not, as of JAX 0.10),
        # the gradient comes summed over the devices, and its mean is that many times too large,
        # which Adam hides.
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axis, to="varying"), params)
    keys = image_keys(key, len(images), first=first)
    gradients, (figures, statistics) = gradient(
        partial(loss, train=True, axis=axis), params, state.statistics, images, keys, micro_batches
    )
    if axis is not None:
        gradients, figures = jax.lax.pmean((gradients, figures), axis)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    figures = {**figures, "gradient_norm": optax.tree.norm(gradients)}
    return TrainState(state.step + 1, params, statistics, opt_state), figures


def gradient(
    loss: Loss,
    params: PyTree,
    statistics: PyTree,
    images: UInt8[Array, "b h w c"],
    keys: Key[Array, " b"],
    micro_batches: int,
) -> tuple[PyTree, tuple[Figures, PyTree]]:
    """The gradient of the mean loss, in the memory of a micro-batch.

    It is that of the whole batch, as are the figures that are means over images, where an image
    does not meet the others: real batch norm sees each micro-batch as a batch of its own.
    """
    of_some = jax.grad(loss, has_aux=True)
    if micro_batches == 1:
        return of_some(params, statistics, images, keys)

    def add(carry: Any, some: Any) -> Any:
        total, statistics = carry
        gradients, (figures, statistics) = of_some(params, statistics, *some)
        return (jax.tree.map(jnp.add, total, gradients), statistics), figures

    # every micro_batches-th image: of the images on each device, the same number
    def deal(a: Array) -> Array:
        return a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1)

    zeros = jax.tree.map(jnp.zeros_like, params)
    (total, statistics), figures = jax.lax.scan(
        add, (zeros, statistics), (deal(images), deal(keys))
    )
    gradients = jax.tree.map(lambda g: g / micro_batches, total)
    return gradients, (jax.tree.map(partial(jnp.mean, axis=0), figures), statistics)


def eval_step(
    state: TrainState,
    images: UInt8[Array, "b h w c"],
    key: Key[Array, ""],
    first: int | Int[Array, ""] = 0,
    *,
    loss: Loss,
) -> Figures:
    """The figures of images that are not learned from; the norms use their moving statistics.

    The noise of each comes from its place among all of them, of which `first` is the first's.
    """
    keys = image_keys(key, len(images), first=first)
    _, (figures, _) = loss(state.params, state.statistics, images, keys, train=False)
    return figures


def image_keys(
    key: Key[Array, ""], images: int, *, first: int | Int[Array, ""] = 0
) -> Key[Array, " b"]:
    """A key for each image by its place in the batch, wherever the batch is computed."""
    return jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(images))
