"""One update and one look, as pure functions over arrays.

A batch has places, from 0: the noise of an image comes from the run's key, the number of the update
and the image's place, wherever and in whatever part of the batch it is computed, and whether or not
the run was interrupted. Under `jax.pmap` the images are those of one device, and `axis` is the name
under which gradients, figures and the batch norms' statistics are averaged over all of them.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree, UInt8

from vaejax.objectives import Figures, Loss
from vaejax.training.adam import norm
from vaejax.training.state import TrainState


class Gradient(NamedTuple):
    gradients: PyTree  # of the mean loss
    statistics: PyTree  # as they stand after these images
    figures: Figures  # of these images, before the update


def train_step(
    state: TrainState,
    images: UInt8[Array, "b h w c"],
    key: Key[Array, ""],
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    axis: str | None = None,
) -> tuple[TrainState, Figures]:
    """One update; the figures are of these images *before* it."""
    found = gradient(state.params, state.statistics, state.step, images, key, loss=loss, axis=axis)
    return update(state, found, optimizer=optimizer)


def gradient(
    params: PyTree,
    statistics: PyTree,
    step: Int[Array, ""],
    images: UInt8[Array, "b h w c"],
    key: Key[Array, ""],
    part: int | Int[Array, ""] = 0,
    *,
    loss: Loss,
    parts: int = 1,
    axis: str | None = None,
) -> Gradient:
    """Of a batch, or of a part of it: every `parts`-th image, from that in place `part` on."""
    first = 0
    if axis is not None:
        first = jax.lax.axis_index(axis) * len(images)
        # Or else, where shard_map keeps track of what varies (jax.pmap does not, as of JAX 0.10),
        # the gradient comes summed over the devices, and its mean is that many times too large,
        # which Adam hides.
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axis, to="varying"), params)
    places = part + parts * (first + jnp.arange(len(images)))
    keys = image_keys(jax.random.fold_in(key, step), places)
    learn = jax.grad(partial(loss, train=True, axis=axis), has_aux=True)
    gradients, (figures, statistics) = learn(params, statistics, images, keys)
    if axis is not None:
        gradients, figures = jax.lax.pmean((gradients, figures), axis)
    return Gradient(gradients, statistics, figures)


def add_gradient(
    total: Gradient,
    params: PyTree,
    step: Int[Array, ""],
    images: UInt8[Array, "b h w c"],
    key: Key[Array, ""],
    part: int | Int[Array, ""],
    *,
    loss: Loss,
    parts: int,
    axis: str | None = None,
) -> Gradient:
    """The total with one more of `parts` micro-batches in it, in the memory of one.

    All of them together have the gradient of the whole batch, and its figures as far as those are
    means over images, where an image does not meet the others: real batch norm sees a micro-batch
    as a batch of its own.
    """
    found = gradient(
        params, total.statistics, step, images, key, part, loss=loss, parts=parts, axis=axis
    )
    gradients, figures = jax.tree.map(
        lambda all_, some: all_ + some / parts,
        (total.gradients, total.figures),
        (found.gradients, found.figures),
    )
    return Gradient(gradients, found.statistics, figures)


def update(
    state: TrainState, found: Gradient, *, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Figures]:
    """The state after a step along the gradient.

    One that is no number, or that comes of a loss which is none, is not applied: only the number of
    the step goes on, and with it the batch and its noise. The figures count them, as "skipped". It
    is for the optimizer to make no step and to stay as it is where `length` is not finite: ours
    does it in place, a choice between old and new ones here would keep both in memory.
    """
    length = norm(found.gradients)
    finite = jnp.isfinite(length) & jnp.isfinite(found.figures["loss"])
    learn = optax.with_extra_args_support(optimizer)
    updates, opt_state = learn.update(
        found.gradients,
        state.opt_state,
        state.params,
        length=jnp.where(finite, length, jnp.nan),
    )
    params = optax.apply_updates(state.params, updates)
    statistics = jax.tree.map(partial(jnp.where, finite), found.statistics, state.statistics)
    skipped = jnp.where(finite, 0, state.skipped + 1)
    figures = {**found.figures, "gradient_norm": length, "skipped": 1.0 * skipped}
    return TrainState(state.step + 1, skipped, params, statistics, opt_state), figures


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
    keys = image_keys(key, first + jnp.arange(len(images)))
    _, (figures, _) = loss(state.params, state.statistics, images, keys, train=False)
    return figures


def image_keys(key: Key[Array, ""], places: Int[Array, " b"]) -> Key[Array, " b"]:
    """A key for each image, by its place alone."""
    return jax.vmap(partial(jax.random.fold_in, key))(places)
