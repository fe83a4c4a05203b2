"""Flax Linen and optax, written as their own examples are."""

from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from benchmarks.contenders import B1, KL_WEIGHT, LEARNING_RATE, Contender, Task


class Block(nn.Module):
    """A layer, its activation, and the report's norm, whose batch_stats stay as initialized."""

    layer: nn.Module
    activation: object
    norm: nn.BatchNorm | None = None

    def __call__(self, x):
        x = self.activation(self.layer(x))
        return x if self.norm is None else self.norm(x)


class Encoder(nn.Module):
    """The encoder of the report's VAE: x to the mean and log-variance of z."""

    task: Task

    @nn.compact
    def __call__(self, x):
        mixed = {"dtype": jnp.dtype(self.task.precision), "parent": None}  # Block adopts it
        norm = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3, **mixed)
        for name, features, stride in self.task.encoder:
            layer = nn.Conv(features, (5, 5), (stride, stride), **mixed)
            x = Block(layer, partial(nn.leaky_relu, negative_slope=0.02), norm(), name=name)(x)
        x = x.reshape(len(x), -1)
        x = Block(nn.Dense(1024, **mixed), nn.selu, norm(), name="dense")(x)
        mean = Block(nn.Dense(512, **mixed), lambda x: x, name="mean")(x)
        log_variance = Block(nn.Dense(512, **mixed), lambda x: x, name="log_variance")(x)
        return mean.astype(jnp.float32), log_variance.astype(jnp.float32)


class Decoder(nn.Module):
    """The decoder of the report's VAE."""

    task: Task

    @nn.compact
    def __call__(self, z):
        mixed = {"dtype": jnp.dtype(self.task.precision), "parent": None}  # Block adopts it
        norm = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3, **mixed)
        transposed = partial(nn.ConvTranspose, transpose_kernel=True, **mixed)
        side, channels = self.task.decoder_input
        x = Block(nn.Dense(1024, **mixed), nn.selu, norm(), name="dense")(z)
        x = Block(nn.Dense(side**2 * channels, **mixed), nn.selu, name="reshape")(x)
        x = x.reshape(-1, side, side, channels)
        for name, features, stride, normed in self.task.decoder:
            layer = transposed(features, (5, 5), (stride, stride))
            activation = partial(nn.leaky_relu, negative_slope=0.02)
            x = Block(layer, activation, norm() if normed else None, name=name)(x)
        stride = self.task.last_stride
        layer = transposed(3, (5, 5), (stride, stride))
        x = Block(layer, nn.sigmoid, norm(), name="output")(x)
        return x.astype(jnp.float32)


def initial_batch_stats(model: nn.Module, x: jax.Array) -> dict:
    """Return a moving mean of 0 and a moving variance of 1 for every batch norm of a model."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["batch_stats"]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, float(path[-1].key == "var")), shapes
    )


def contender(task: Task) -> Contender:
    """Return the update of a training loop as in Flax' examples."""
    arrays, images, noise = task.load()
    encoder, decoder = Encoder(task), Decoder(task)
    params = unflatten_dict({path: jnp.asarray(a) for path, a in arrays.items()}, sep="/")
    batch_stats = {
        "encoder": initial_batch_stats(encoder, jnp.zeros(images.shape)),
        "decoder": initial_batch_stats(decoder, jnp.zeros(noise.shape[1:])),
    }
    adam = optax.adam(LEARNING_RATE, b1=B1)
    state = (params, adam.init(params))

    def loss(params, images, noise):
        x = images.astype(jnp.float32) / 255
        variables = {
            branch: {"params": params[branch], "batch_stats": batch_stats[branch]}
            for branch in params
        }
        mean, log_variance = encoder.apply(variables["encoder"], x)
        output = decoder.apply(variables["decoder"], mean + jnp.exp(log_variance / 2) * noise)
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - log_variance - 1)
        return jnp.mean((x - output) ** 2) + KL_WEIGHT * jnp.mean(kl)

    def update(state, images, noise):
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params, images, noise)
        changes, moments = adam.update(gradients, moments, params)
        return (optax.apply_updates(params, changes), moments), value

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, key):
        return update(state, images, jax.random.normal(key, noise.shape[1:]))

    step_with_noise = jax.jit(update, donate_argnums=0)
    done = 0

    def losses() -> list[float]:
        nonlocal state
        values = []
        for update_noise in noise:
            state, value = step_with_noise(state, images, update_noise)
            values.append(float(value))
        step_with_noise.clear_cache()
        return values

    def updates(count: int) -> None:
        nonlocal state, done
        for _ in range(count):
            state, _ = step(state, images, jax.random.fold_in(jax.random.key(1), done))
            done += 1
        jax.block_until_ready(state)

    version = f"flax {flax.__version__}, jax {jax.__version__}"
    return Contender(version, losses, updates, partial(matrix_products, task), device_memory)


def matrix_products(task: Task, count: int) -> None:
    """Multiply matrices of 4096 by 4096, in the task's precision."""
    a = (jax.random.normal(jax.random.key(0), (4096, 4096)) / 64).astype(task.precision)
    product, x = jax.jit(jnp.matmul), a
    for _ in range(count):
        x = product(a, x)
    x.block_until_ready()


def device_memory() -> int | None:
    """Return the largest memory in use on the device, bytes; None on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
