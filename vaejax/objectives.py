"""What is learned from: the report's losses, with the field's figures beside them.

A loss is `(params, statistics, images, keys, *, model, train, axis) -> (scalar, (figures,
statistics))`: images are uint8 `[b h w c]`, each with a key of its own, which draws its z or its
noise; batch norm's moving statistics travel as auxiliary output. Under `jax.pmap` the images are
those of one device, and `axis` is the name under which the devices' batch norms are one.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, UInt8

from vaejax.distributions import LEVELS, DiscretizedNormal, Normal
from vaejax.models.autoencoder import Autoencoder, decode, encode

Figures = dict[str, Float[Array, ""]]
Loss = Callable[..., tuple[Float[Array, ""], tuple[Figures, PyTree]]]


def to_float(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """x in [0, 1], the only scale that the models know; in JAX's default precision."""
    return images.astype(float) / (LEVELS - 1)


def to_uint8(x: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """The nearest levels; what lies outside [0, 1] is clipped."""
    return jnp.round(jnp.clip(x, 0, 1) * (LEVELS - 1)).astype(jnp.uint8)


def report(
    params: PyTree,
    statistics: PyTree,
    images: UInt8[Array, "b h w c"],
    keys: Key[Array, " b"],
    *,
    model: Autoencoder,
    kl_weight: float,
    train: bool,
    axis: str | None = None,
) -> tuple[Float[Array, ""], tuple[Figures, PyTree]]:
    """mse + kl_weight * kl, both means over everything: the report's loss (its weight is 0.01)."""
    x = to_float(images)
    posterior, statistics = encode(model, params, statistics, x, train=train, axis=axis)
    z = jax.vmap(Normal.sample)(posterior, keys)
    output, statistics = decode(model, params, statistics, z, train=train, axis=axis)

    mse = jnp.mean((x - output) ** 2)
    kl = jnp.mean(posterior.kl())  # per latent dimension, unlike the rate
    loss = mse + kl_weight * kl
    figures = {"loss": loss, "mse": mse, "kl": kl}
    figures |= in_nats(posterior, output, images, mse=mse, kl_weight=kl_weight, axis=axis)
    return loss, (figures, statistics)


def calibrated(
    params: PyTree,
    statistics: PyTree,
    images: UInt8[Array, "b h w c"],
    keys: Key[Array, " b"],
    *,
    model: Autoencoder,
    train: bool,
    axis: str | None = None,
) -> tuple[Float[Array, ""], tuple[Figures, PyTree]]:
    """log(mse) / 2 + rate / values: the negative ELBO, nats per value and up to a constant, of the
    normal likelihood whose one variance is the best that there is for these images, their mse
    (Rybkin et al., 2021, sigma-VAE, section 3). It has no weight to choose.

    In nats per value it is of order one at any size of image, as the other losses are; Adam takes
    the same steps at any scale. The images whose mse it is are those that are computed together:
    all devices', but one micro-batch's.
    """
    x = to_float(images)
    posterior, statistics = encode(model, params, statistics, x, train=train, axis=axis)
    z = jax.vmap(Normal.sample)(posterior, keys)
    output, statistics = decode(model, params, statistics, z, train=train, axis=axis)

    mse, kl = jnp.mean((x - output) ** 2), jnp.mean(posterior.kl())
    values, latents = output[0].size, posterior.mean.shape[-1]
    whole = jnp.maximum(over_devices(mse, axis), 1e-12)
    # the gradient of log(mse) / 2, where the mse is a mean over devices that each differentiates
    slope = (mse - jax.lax.stop_gradient(mse)) / (2 * whole)
    loss = jnp.log(whole) / 2 + slope + kl * latents / values
    figures = {"loss": loss, "mse": mse, "kl": kl}
    # in the report's form, the weight of the kl at this mse
    weight = 2 * whole * latents / values
    figures |= in_nats(posterior, output, images, mse=mse, kl_weight=weight, axis=axis)
    return loss, (figures, statistics)


def reconstruction(
    params: PyTree,
    statistics: PyTree,
    images: UInt8[Array, "b h w c"],
    keys: Key[Array, " b"],
    *,
    model: Autoencoder,
    error: Literal["mse", "bce"],
    train: bool,
    axis: str | None = None,
) -> tuple[Float[Array, ""], tuple[Figures, PyTree]]:
    """A deterministic autoencoder's error, a mean over everything: of what it makes of the images,
    or of what they are corrupted to, against the images themselves.

    "bce" is the cross-entropy of each value in [0, 1] with a sigmoid's output, nats. An image that
    is reproduced exactly does not have 0 but the entropy of its own values.
    """
    x = to_float(images)
    shown = model.corrupt(x, keys)
    code, statistics = encode(model, params, statistics, shown, train=train, axis=axis)
    output, statistics = decode(model, params, statistics, code, train=train, axis=axis)

    mse = jnp.mean((x - output) ** 2)
    figures = {"mse": mse}
    if error == "bce":
        inside = jnp.clip(output, 1e-7, 1 - 1e-7)  # a sigmoid that is saturated in float32
        figures["bce"] = -jnp.mean(x * jnp.log(inside) + (1 - x) * jnp.log1p(-inside))
    loss = figures[error]
    nats = distortion(output, images, over_devices(mse, axis))
    figures = {"loss": loss, **figures, "distortion": jax.lax.stop_gradient(nats)}
    return loss, (figures, statistics)


def over_devices(value: Float[Array, ""], axis: str | None) -> Float[Array, ""]:
    """The mean over the devices of the axis, of a figure through which no gradient goes."""
    value = jax.lax.stop_gradient(value)
    return value if axis is None else jax.lax.pmean(value, axis)


def distortion(
    output: Float[Array, "b h w c"], images: UInt8[Array, "b h w c"], mse: Float[Array, ""]
) -> Float[Array, ""]:
    """-log p(x|z) over the 256 levels, nats per image, for a model that was trained on means.

    The variance is the mse of these very images, the best that one variance for all of them can be
    (Rybkin et al., 2021, sigma-VAE, equation 4): a code of that length would have to send the
    variance as well, once for the batch.
    """
    variance = jnp.maximum(mse, 1e-12)  # a perfect copy has no finite density
    return -jnp.mean(DiscretizedNormal(output, jnp.log(variance)).log_prob(images))


def in_nats(
    posterior: Normal,
    output: Float[Array, "b h w c"],
    images: UInt8[Array, "b h w c"],
    *,
    mse: Float[Array, ""],
    kl_weight: float | Float[Array, ""],
    axis: str | None = None,
) -> Figures:
    """The ELBO's terms, nats per image, for a run that was trained on means.

    With the distortion's likelihood, mse + kl_weight * kl is a beta-VAE's loss with
    `effective_beta` (Higgins et al., 2017): n / 2 mse of the one is one nat of the other.
    """
    values, latents = output[0].size, posterior.mean.shape[-1]
    mse = over_devices(mse, axis)
    nats = distortion(output, images, mse)
    rate = jnp.mean(jnp.sum(posterior.kl(), axis=-1))
    figures = {
        "distortion": nats,
        "rate": rate,
        "elbo": -(nats + rate),
        "bits_per_dim": (nats + rate) / (values * jnp.log(2.0)),
        "effective_beta": kl_weight * values / (2 * jnp.maximum(mse, 1e-12) * latents),
    }
    return jax.tree.map(jax.lax.stop_gradient, figures)
