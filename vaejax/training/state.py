"""What a step of learning changes, and nothing else: arrays only, so that it can be saved whole."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree

from vaejax.models import autoencoder


class TrainState(NamedTuple):
    step: Int[Array, ""]  # updates made so far
    skipped: Int[Array, ""]  # of the last ones, how many in a row were not applied
    params: PyTree
    statistics: PyTree  # batch norm's moving mean and variance
    opt_state: PyTree


def init(
    key: Key[Array, ""], *, model: autoencoder.Autoencoder, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first update."""
    params, statistics = autoencoder.init(model, key)
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, skipped, params, statistics, optimizer.init(params))
