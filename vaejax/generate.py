"""Faces from a decoder, and faces that go through the model: uint8 in, uint8 out, compiled."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree, UInt8

from vaejax.data.batches import Images
from vaejax.losses import to_float, to_uint8
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.priors import flatten_latents, unraveler

BATCH = 100  # images at a time


@partial(jax.jit, static_argnames="model")
def decode(
    params: PyTree, batch_stats: PyTree, z: PyTree, *, model: Autoencoder
) -> UInt8[Array, "n h w c"]:
    """Decode latents to images: the mode of p(x|z)."""
    return to_uint8(autoencoder.decode(model, params, batch_stats, z))


def decode_vectors(
    params: PyTree,
    batch_stats: PyTree,
    vectors: Float[np.ndarray, "n d"],
    *,
    model: Autoencoder,
    batch_size: int = BATCH,
) -> UInt8[np.ndarray, "n h w c"]:
    """Decode latents that are laid out as vectors, so many at a time: one shape is compiled."""
    faces, unravel = [], jax.vmap(unraveler(model))
    for first in range(0, len(vectors), batch_size):
        part = vectors[first : first + batch_size]
        padded = np.pad(part, ((0, batch_size - len(part)), (0, 0)), mode="edge")
        decoded = decode(params, batch_stats, unravel(jnp.asarray(padded)), model=model)
        faces.append(np.asarray(decoded)[: len(part)])
    return np.concatenate(faces)


@partial(jax.jit, static_argnames="model")
def reconstruct(
    params: PyTree, batch_stats: PyTree, images: UInt8[Array, "n h w c"], *, model: Autoencoder
) -> UInt8[Array, "n h w c"]:
    """Decode the most probable z of each image."""
    posterior = autoencoder.encode(model, params, batch_stats, to_float(images))
    return to_uint8(autoencoder.decode(model, params, batch_stats, autoencoder.mode(posterior)))


@partial(jax.jit, static_argnames="model")
def corrupt(
    images: UInt8[Array, "n h w c"], key: Key[Array, ""], *, model: Autoencoder
) -> UInt8[Array, "n h w c"]:
    """Return the images as a denoising model is shown them; image i has its noise by key and i."""
    return to_uint8(model.corrupt(to_float(images), jax.random.split(key, len(images))))


def posterior_means(
    params: PyTree,
    batch_stats: PyTree,
    images: Images,
    *,
    model: Autoencoder,
    most: int,
    mirrored: bool = False,
) -> Float[np.ndarray, "n d"]:
    """Return the posterior means, or codes, of the first `most` images, as vectors.

    With `mirrored` they are those of the images mirrored left to right.

    Prepared sets are in the order of hashes, so that the first images are a random sample.
    """
    count = min(most, len(images))
    parts = []
    for first in range(0, count, BATCH):
        # the last batch is filled up with its last image, so that one shape is compiled
        indices = np.minimum(np.arange(first, first + BATCH), count - 1)
        faces = images.read(indices)[:, :, :: -1 if mirrored else 1]
        z = encode(params, batch_stats, faces, model=model)
        parts.append(np.asarray(z)[: count - first])
    return np.concatenate(parts)


@partial(jax.jit, static_argnames="model")
def encode(
    params: PyTree, batch_stats: PyTree, images: UInt8[Array, "n h w c"], *, model: Autoencoder
) -> Float[Array, "n d"]:
    """Return the most probable z of each image as a vector."""
    posterior = autoencoder.encode(model, params, batch_stats, to_float(images))
    return flatten_latents(autoencoder.mode(posterior))
