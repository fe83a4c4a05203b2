"""A learned prior by flow matching: a network that moves normal noise to the latents of faces.

Lipman et al. (2023), with straight paths: z_t = (1 - t) z_0 + t z_1 between noise z_0 ~ N(0, I) and
a standardized latent z_1; the network learns the velocity z_1 - z_0. A face is drawn by following
the velocity from t = 0 to 1. The latents of a face are one vector `[d]` here, whatever their shape;
`batch_stats` are the mean and the standard deviation `[d]` that standardize them.

An attribute of a face, such as the color of the hair, is a number from 1 on, and 0 if unknown. In
training attributes are hidden at random, so that one network draws faces with any number of them
given (Ho and Salimans, 2022).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from vaejax.losses import Context, Metrics
from vaejax.models.layers import Dense

FREQUENCIES, HIGHEST = 32, 1000.0  # of the sines and cosines of t
MIN_STD = 1e-6
HIDDEN = 0.2  # share of the faces of an update that hide all their attributes anyway
EXACT_UP_TO = 128  # dimensions of which the divergence is exact; else Hutchinson's estimate
PROBES = 16  # of that estimate
MAX_COUNT = 2**16  # of a description's numbers: more is a damaged one


class Codes(NamedTuple):
    """What a flow learns from: posterior means of faces, and their attributes."""

    z: Any  # [n d]
    labels: Any  # [n a], from 1 on; 0 if unknown. a is 0 where there are none


class FlowMLP(nn.Module):
    """The velocity of every dimension, by a residual network over the latents as one vector."""

    latents: int
    width: int = 512
    depth: int = 4
    labels: tuple[int, ...] = ()  # number of values of each attribute

    @nn.compact
    def __call__(
        self, z: Float[Array, "b d"], t: Float[Array, " b"], labels: Int[Array, "b a"]
    ) -> Float[Array, "b d"]:
        """Return the velocity at z and t, given the attributes that are known."""
        h = Dense(self.width, name="z")(z) + Dense(self.width, name="t")(_waves(t))
        for i, values in enumerate(self.labels):
            embed = nn.Embed(values + 1, self.width, name=f"label_{i}")
            h = h + jnp.where(labels[:, i, None] > 0, embed(labels[:, i]), 0)
        for i in range(self.depth):
            inner = nn.silu(Dense(self.width, name=f"in_{i}")(nn.LayerNorm(name=f"norm_{i}")(h)))
            h = h + Dense(self.width, name=f"out_{i}")(inner)
        return Dense(self.latents, name="velocity")(nn.LayerNorm(name="norm")(h))


def _waves(t: Float[Array, " b"]) -> Float[Array, "b w"]:
    """Return sines and cosines of t, of frequencies from 1 to 1,000."""
    angles = t[:, None] * jnp.geomspace(1.0, HIGHEST, FREQUENCIES, dtype=t.dtype)[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


# JSON ---------------------------------------------------------------------------------------------


def to_json(flow: FlowMLP) -> dict[str, Any]:
    """Describe a flow by JSON values, from which `from_json` builds it again."""
    labels = list(flow.labels)
    return {"kind": "FlowMLP", "width": flow.width, "depth": flow.depth, "labels": labels}


def from_json(description: Mapping[str, Any], *, latents: int) -> FlowMLP:
    """Build the flow of a description. Raises ValueError for what describes none."""
    labels: Any = description.get("labels")
    counts: list[Any] = [description.get("width"), description.get("depth")]
    valid = isinstance(labels, list) and description.get("kind") == "FlowMLP"
    if not valid or not all(type(n) is int and 0 < n <= MAX_COUNT for n in [*counts, *labels]):
        raise ValueError(f"it describes {str(dict(description))[:80]}")
    width, depth = counts
    return FlowMLP(latents, width, depth, tuple(labels))


# Training -----------------------------------------------------------------------------------------


def init(flow: Any, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
    """Return initial `params`, and `batch_stats` that standardize nothing yet."""
    d, a = flow.latents, len(flow.labels)
    shapes = jnp.zeros((1, d)), jnp.zeros(1), jnp.zeros((1, a), jnp.int32)
    params = flow.init(key, *shapes)["params"]
    return params, {"mean": jnp.zeros(d), "std": jnp.ones(d)}


def standardization(z: Float[np.ndarray, "n d"]) -> dict[str, Float[np.ndarray, " d"]]:
    """Return the `batch_stats` that bring latents to mean 0 and standard deviation 1."""
    std = z.std(axis=0, dtype=np.float64)
    return {
        "mean": z.mean(axis=0, dtype=np.float64).astype(np.float32),
        "std": np.maximum(std, MIN_STD).astype(np.float32),
    }


def flow_matching(
    flow: Any, params: PyTree, z: Float[Array, "b d"], labels: Int[Array, "b a"], keys: Any
) -> Float[Array, " b"]:
    """Compute the mean squared error of the velocity, for each standardized z at a random time.

    Lipman et al. (2023), equation 23 with sigma_min = 0; one key a face draws its noise and time.
    """

    def draw(key: Key[Array, ""]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, z.shape[1:], z.dtype)
        return noise, jax.random.uniform(time_key, (), z.dtype)

    noise, t = jax.vmap(draw)(keys)
    between = (1 - t[:, None]) * noise + t[:, None] * z
    velocity = flow.apply({"params": params}, between, t, labels)
    return jnp.mean((velocity - (z - noise)) ** 2, axis=1)


def _hidden(key: Key[Array, ""], *, attributes: int) -> Bool[Array, " a"]:
    """Draw which attributes of a face are hidden: all of some faces, any number of the others."""
    all_key, share_key, key = jax.random.split(key, 3)
    share = jax.random.uniform(share_key)  # so that one attribute alone is as likely as all but one
    some = jax.random.bernoulli(key, share, (attributes,))
    return some | jax.random.bernoulli(all_key, HIDDEN)


def batch_loss(
    indices: Int[Array, " b"], context: Context, *, loss: partial
) -> tuple[Float[Array, ""], tuple[Metrics, PyTree]]:
    """Apply `flow_matching` to the faces with these indices among `context.frozen`, the `Codes`."""
    stats, codes = context.batch_stats, context.frozen
    z = (codes.z[indices] - stats["mean"][None]) / stats["std"][None]
    labels, keys = codes.labels[indices], context.keys
    if context.train and codes.labels.shape[1]:
        hide_keys, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        hidden = jax.vmap(partial(_hidden, attributes=labels.shape[1]))(hide_keys)
        labels = jnp.where(hidden, 0, labels)
    scalar = jnp.mean(loss(context.model, context.params, z, labels, keys))
    return scalar, ({"loss": jax.lax.stop_gradient(scalar)}, stats)


# Sampling and density -----------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("flow", "steps"))
def sample(
    params: PyTree,
    stats: PyTree,
    noise: Float[Array, "b d"],
    labels: Int[Array, "b a"],
    *,
    flow: Any,
    steps: int,
) -> Float[Array, "b d"]:
    """Follow the velocity from noise to latents in so many steps of Heun's method."""

    def velocity(z: Float[Array, "b d"], t: Float[Array, ""]) -> Float[Array, "b d"]:
        return flow.apply({"params": params}, z, jnp.full(len(z), t), labels)

    z = _heun(velocity, noise, times=jnp.linspace(0.0, 1.0, steps + 1, dtype=noise.dtype))
    return z * stats["std"][None] + stats["mean"][None]


@partial(jax.jit, static_argnames=("flow", "steps"))
def to_noise(
    params: PyTree,
    stats: PyTree,
    z: Float[Array, "b d"],
    labels: Int[Array, "b a"],
    *,
    flow: Any,
    steps: int,
) -> Float[Array, "b d"]:
    """Follow the velocity back from latents to the noise that `sample` makes them of."""

    def velocity(z: Float[Array, "b d"], t: Float[Array, ""]) -> Float[Array, "b d"]:
        return flow.apply({"params": params}, z, jnp.full(len(z), t), labels)

    start = (z - stats["mean"][None]) / stats["std"][None]
    return _heun(velocity, start, times=jnp.linspace(1.0, 0.0, steps + 1, dtype=z.dtype))


def _heun(velocity: Any, state: PyTree, *, times: Float[Array, " n"]) -> PyTree:
    """Integrate a velocity over these times by Heun's method, of second order."""

    def step(state: PyTree, interval: Float[Array, "2"]) -> tuple[PyTree, None]:
        t, after = interval
        first = velocity(state, t)
        guess = jax.tree.map(lambda x, v: x + (after - t) * v, state, first)
        second = velocity(guess, after)
        moved = jax.tree.map(lambda x, v, w: x + (after - t) / 2 * (v + w), state, first, second)
        return moved, None

    return jax.lax.scan(step, state, jnp.stack([times[:-1], times[1:]], axis=1))[0]


@partial(jax.jit, static_argnames=("flow", "steps"))
def log_prob(
    params: PyTree,
    stats: PyTree,
    z: Float[Array, "b d"],
    labels: Int[Array, "b a"],
    *,
    flow: Any,
    steps: int,
) -> Float[Array, " b"]:
    """Return log p(z), nats: the density of the noise that leads to z, less the growth of volume.

    Chen et al. (2018), equation 8, from t = 1 back to 0 in so many steps of Heun's method. Up to
    128 dimensions the divergence of the velocity is exact; beyond, it is Hutchinson's estimate by
    16 probes of ±1, the same at all times (Grathwohl et al., 2019, equation 8).
    """
    d = z.shape[1]
    if d <= EXACT_UP_TO:
        probes = jnp.eye(d, dtype=z.dtype)
    else:
        probes = jax.random.rademacher(jax.random.key(0), (PROBES, d), z.dtype)

    def velocity(state: Any, t: Float[Array, ""]) -> Any:
        def at(z: Float[Array, "b d"]) -> Float[Array, "b d"]:
            return flow.apply({"params": params}, z, jnp.full(len(z), t), labels)

        def along(probe: Float[Array, " d"]) -> Float[Array, " b"]:
            moved = jax.jvp(at, (state[0],), (jnp.broadcast_to(probe, state[0].shape),))[1]
            return moved @ probe

        divergence = jnp.sum(jax.lax.map(along, probes, batch_size=PROBES), axis=0)
        return at(state[0]), divergence * (1.0 if d <= EXACT_UP_TO else 1 / PROBES)

    start = (z - stats["mean"][None]) / stats["std"][None], jnp.zeros(len(z), z.dtype)
    times = jnp.linspace(1.0, 0.0, steps + 1, dtype=z.dtype)
    noise, growth = _heun(velocity, start, times=times)  # growth: minus the integral of divergence
    normal = -0.5 * jnp.sum(noise**2 + jnp.log(2 * jnp.pi), axis=1)
    return normal + growth - jnp.sum(jnp.log(stats["std"]))
