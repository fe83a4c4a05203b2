"""New faces from a decoder, and what becomes of a face that goes through the model."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt8

from vaejax.models import vae
from vaejax.objectives import to_float, to_uint8


def latents(seeds: Iterable[int], *, latent_dim: int) -> Float[Array, "n d"]:
    """A standard-normal z for each seed: the same in every run, and whoever stands beside it."""
    root = jax.random.key(2**32 - 1)  # no run's --seed: its noise and these are independent
    keys = [jax.random.fold_in(root, seed) for seed in seeds]
    return jnp.stack([jax.random.normal(key, (latent_dim,)) for key in keys])


@partial(jax.jit, static_argnames="model")
def decode(
    params: PyTree, statistics: PyTree, z: Float[Array, "n d"], *, model: vae.VAE
) -> UInt8[Array, "n h w c"]:
    """The faces at z: the mode of p(x|z), as images."""
    mean, _ = vae.decode(model, params, statistics, z)
    return to_uint8(mean)


@partial(jax.jit, static_argnames="model")
def reconstruct(
    params: PyTree, statistics: PyTree, images: UInt8[Array, "n h w c"], *, model: vae.VAE
) -> UInt8[Array, "n h w c"]:
    """The mode of p(x|z) at the posterior's mean, as images."""
    posterior, _ = vae.encode(model, params, statistics, to_float(images))
    mean, _ = vae.decode(model, params, statistics, posterior.mode)
    return to_uint8(mean)
