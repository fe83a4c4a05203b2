"""One update and one evaluation, as pure functions over arrays.

Images of a batch are numbered from 0. The noise of an image comes from the run's key, the number of
the update and the image's index alone: wherever and in whatever part of the batch it is computed,
and whether or not the run was interrupted. Under `jax.pmap` the images are those of one device, and
`axis` is the name under which gradients, metrics and batch norms are averaged over all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from vaejax.losses import Context, Metrics, batch_loss
from vaejax.models import autoencoder
from vaejax.training.optimizer import global_norm, skip_nonfinite

Batch = UInt8[Array, "b h w c"] | Int[Array, " b"]  # images, or indices of what is learned


class Trainer(NamedTuple):
    """What an update does: everything about it that is not an array.

    The last two fields say what is trained: by default an autoencoder, on batches of images.
    """

    model: Any
    loss: Callable[..., Any]  # with its settings bound: `vaejax.losses.Loss`
    optimizer: optax.GradientTransformation
    ema_decay: float | None = None  # of the moving average of the weights; None: there is none
    flip: bool = False  # mirror every second image, at random
    micro_batches: int = 1  # parts that a batch is computed in, one after the other
    init: Callable[..., tuple[PyTree, PyTree]] = autoencoder.init  # (model, key) -> arrays
    batch_loss: Callable[..., Any] = batch_loss  # (batch, context, loss=...)


class TrainState(NamedTuple):
    """What an update changes: arrays only, so that all of it can be saved."""

    step: Int[Array, ""]  # updates made so far
    skipped: Int[Array, ""]  # how many of the last updates, in a row, were not applied
    params: PyTree
    batch_stats: PyTree  # moving mean and variance of batch norms
    opt_state: PyTree
    ema: PyTree  # moving average of the parameters; None where there is none

    @property
    def best_params(self) -> PyTree:
        """The parameters to evaluate and to sample with: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def init(key: Key[Array, ""], *, trainer: Trainer) -> TrainState:
    """Return the state before the first update."""
    params, batch_stats = trainer.init(trainer.model, key)
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    opt_state = skip_nonfinite(trainer.optimizer).init(params)
    # a copy: the state is donated, and one buffer cannot be donated twice
    ema = None if trainer.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(step, skipped, params, batch_stats, opt_state, ema)


class Gradient(NamedTuple):
    """The gradient of a loss at a batch, and what else the forward pass gave."""

    gradients: PyTree  # of the mean loss
    batch_stats: PyTree  # after these images
    metrics: Metrics  # of these images, before the update


def train_step(
    state: TrainState,
    frozen: PyTree,
    images: Batch,
    key: Key[Array, ""],
    *,
    trainer: Trainer,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """Make one update. The metrics are of these images *before* it.

    `frozen` are networks that the loss uses and nothing trains, None without any; `key` is the
    run's, the same for all updates.
    """
    keys = image_keys(jax.random.fold_in(key, state.step), image_indices(len(images), axis=axis))
    batch = batch_gradient(state, frozen, images, keys, trainer=trainer, axis=axis)
    return update(state, batch, trainer=trainer)


def batch_gradient(
    state: TrainState,
    frozen: PyTree,
    images: Batch,
    keys: Key[Array, " b"],
    *,
    trainer: Trainer,
    axis: str | None = None,
) -> Gradient:
    """Differentiate the loss of a batch by the parameters; `keys` are the images' own."""
    if trainer.flip:
        flip_keys, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        images = random_flips(images, flip_keys)
    params = state.params
    if axis is not None:
        # Where shard_map keeps track of what varies (jax.pmap does not, as of JAX 0.10), the
        # gradient would come summed over the devices: its mean would be that many times too large,
        # which Adam hides.
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axis, to="varying"), params)
    context = Context(
        trainer.model, params, state.batch_stats, keys, train=True, frozen=frozen, axis=axis
    )

    def loss(params: PyTree):
        context_ = context._replace(params=params)
        return trainer.batch_loss(images, context_, loss=trainer.loss)

    gradients, (metrics, batch_stats) = jax.grad(loss, has_aux=True)(params)
    if axis is not None:
        gradients, metrics = jax.lax.pmean((gradients, metrics), axis)
    return Gradient(gradients, batch_stats, metrics)


def micro_step(
    total: Gradient,
    state: TrainState,
    frozen: PyTree,
    images: Batch,
    key: Key[Array, ""],
    part: int | Int[Array, ""],
    *,
    trainer: Trainer,
    axis: str | None = None,
) -> Gradient:
    """Add the gradient of one micro-batch to the total, in the memory of one.

    `images` are every `micro_batches`-th of the batch, from index `part` on. All parts together
    have the gradient of the batch, and its metrics as far as those are means over images, where an
    image does not meet the others: batch norm and a batch-coupled loss see a micro-batch as a batch
    of its own.
    """
    parts = trainer.micro_batches
    indices = part + parts * image_indices(len(images), axis=axis)
    keys = image_keys(jax.random.fold_in(key, state.step), indices)
    before = state._replace(batch_stats=total.batch_stats)
    batch = batch_gradient(before, frozen, images, keys, trainer=trainer, axis=axis)
    gradients, metrics = jax.tree.map(
        lambda sum_, term: sum_ + term / parts,
        (total.gradients, total.metrics),
        (batch.gradients, batch.metrics),
    )
    return Gradient(gradients, batch.batch_stats, metrics)


def update(state: TrainState, batch: Gradient, *, trainer: Trainer) -> tuple[TrainState, Metrics]:
    """Make a step along the gradient, and count it.

    A non-finite gradient, or that of a non-finite loss, is not applied, with any optimizer: only
    `step` goes on, and with it the batch and its noise, and `skipped` counts how many were not
    applied in a row.
    """
    norm = global_norm(batch.gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(batch.metrics["loss"])
    updates, opt_state = skip_nonfinite(trainer.optimizer).update(
        batch.gradients, state.opt_state, state.params, norm=jnp.where(finite, norm, jnp.nan)
    )
    params = optax.apply_updates(state.params, updates)
    batch_stats = jax.tree.map(partial(jnp.where, finite), batch.batch_stats, state.batch_stats)
    skipped = jnp.where(finite, 0, state.skipped + 1)
    ema = state.ema
    if trainer.ema_decay is not None:
        decay = jnp.where(finite, ema_decay(state.step, trainer.ema_decay), 1.0)
        ema = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, ema, params)
    metrics = {**batch.metrics, "gradient_norm": norm, "skipped": 1.0 * skipped}
    return TrainState(state.step + 1, skipped, params, batch_stats, opt_state, ema), metrics


def ema_decay(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """Return the decay of the moving average at an update: lower at first, when weights move fast.

    min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage.
    """
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def eval_step(
    params: PyTree,
    batch_stats: PyTree,
    frozen: PyTree,
    images: Batch,
    keys: Key[Array, " b"],
    variance: Float[Array, ""] | None = None,
    *,
    trainer: Trainer,
) -> Metrics:
    """Compute the metrics of images that are not trained on; norms use their moving statistics.

    With the `variance` of the likelihood given every metric is a mean over images, and so does not
    depend on how they are divided into batches; without it the variance is the mse of these images.
    """
    context = Context(
        trainer.model, params, batch_stats, keys, train=False, frozen=frozen, variance=variance
    )
    _, (metrics, _) = trainer.batch_loss(images, context, loss=trainer.loss)
    return metrics


def image_indices(images: int, *, axis: str | None = None) -> Int[Array, " b"]:
    """Return the indices of a batch's images; under pmap those of this device's share."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * images
    return first + jnp.arange(images)


def image_keys(key: Key[Array, ""], indices: Int[Array, " b"]) -> Key[Array, " b"]:
    """Return a key for each image, by its index alone."""
    return jax.vmap(partial(jax.random.fold_in, key))(indices)


def random_flips(
    images: UInt8[Array, "b h w c"], keys: Key[Array, " b"]
) -> UInt8[Array, "b h w c"]:
    """Mirror each image left to right with probability one half, by its own key."""
    flipped = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
