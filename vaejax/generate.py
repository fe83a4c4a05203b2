"""New faces from a decoder, and what becomes of a face that goes through the model."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, UInt8

from vaejax.distributions import Normal
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.objectives import to_float, to_uint8


def latents(seeds: Iterable[int], *, latent_dim: int) -> Float[Array, "n d"]:
    """A standard-normal z for each seed: the same in every run, and whoever stands beside it."""
    root = jax.random.key(2**32 - 1)  # no run's --seed: its noise and these are independent
    keys = [jax.random.fold_in(root, seed) for seed in seeds]
    return jnp.stack([jax.random.normal(key, (latent_dim,)) for key in keys])


@partial(jax.jit, static_argnames="model")
def decode(
    params: PyTree, statistics: PyTree, code: Float[Array, "n ..."], *, model: Autoencoder
) -> UInt8[Array, "n h w c"]:
    """The faces of codes: the mode of p(x|z), as images."""
    mean, _ = autoencoder.decode(model, params, statistics, code)
    return to_uint8(mean)


@partial(jax.jit, static_argnames="model")
def reconstruct(
    params: PyTree, statistics: PyTree, images: UInt8[Array, "n h w c"], *, model: Autoencoder
) -> UInt8[Array, "n h w c"]:
    """What the decoder makes of the images' codes, or of the modes of their posteriors."""
    code, _ = autoencoder.encode(model, params, statistics, to_float(images))
    mean, _ = autoencoder.decode(
        model, params, statistics, code.mode if isinstance(code, Normal) else code
    )
    return to_uint8(mean)


@partial(jax.jit, static_argnames="model")
def corrupt(
    images: UInt8[Array, "n h w c"], key: Key[Array, ""], *, model: Autoencoder
) -> UInt8[Array, "n h w c"]:
    """The images as a denoising model is shown them; image i has its noise by key and i."""
    return to_uint8(model.corrupt(to_float(images), jax.random.split(key, len(images))))
