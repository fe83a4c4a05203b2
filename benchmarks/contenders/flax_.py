"""Flax Linen and optax, as their own examples are written."""

from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.contenders import B1, KL_WEIGHT, RATE, Contender, Task


class Block(nn.Module):
    """A layer, its activation, and the report's norm, which never left its first statistics."""

    layer: nn.Module
    activation: object
    norm: nn.BatchNorm | None = None

    def __call__(self, x):
        x = self.activation(self.layer(x))
        return x if self.norm is None else self.norm(x)


class Encoder(nn.Module):
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
    task: Task

    @nn.compact
    def __call__(self, z):
        mixed = {"dtype": jnp.dtype(self.task.precision), "parent": None}  # Block adopts it
        norm = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3, **mixed)
        transposed = partial(nn.ConvTranspose, transpose_kernel=True, **mixed)
        side, channels = self.task.seed_image
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


def contender(task: Task) -> Contender:
    arrays, images, noise = task.load()
    encoder, decoder = Encoder(task), Decoder(task)
    params: dict = {}
    for path, array in arrays.items():
        *parents, leaf = path.split("/")
        branch = params
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = jnp.asarray(array)
    shapes = {
        "encoder": jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros(images.shape)),
        "decoder": jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros(noise.shape[1:])),
    }
    statistics = {
        branch: jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.full(leaf.shape, float(path[-1].key == "var")),
            variables["batch_stats"],
        )
        for branch, variables in shapes.items()
    }
    adam = optax.adam(RATE, b1=B1)
    state = (params, adam.init(params))

    def loss(params, images, noise):
        x = images.astype(jnp.float32) / 255
        variables = {
            branch: {"params": params[branch], "batch_stats": statistics[branch]}
            for branch in params
        }
        mean, log_variance = encoder.apply(variables["encoder"], x)
        output = decoder.apply(variables["decoder"], mean + jnp.exp(log_variance / 2) * noise)
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - log_variance - 1)
        return jnp.mean((x - output) ** 2) + KL_WEIGHT * jnp.mean(kl)

    def update(state, images, noise):
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params, images, noise)
        updates, moments = adam.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, key):
        return update(state, images, jax.random.normal(key, noise.shape[1:]))

    on_given_noise = jax.jit(update, donate_argnums=0)
    done = 0

    def losses() -> list[float]:
        nonlocal state
        found = []
        for given in noise:
            state, value = on_given_noise(state, images, given)
            found.append(float(value))
        on_given_noise.clear_cache()
        return found

    def steps(count: int) -> None:
        nonlocal state, done
        for _ in range(count):
            state, _ = step(state, images, jax.random.fold_in(jax.random.key(1), done))
            done += 1
        jax.block_until_ready(state)

    version = f"flax {flax.__version__}, jax {jax.__version__}"
    return Contender(version, losses, steps, partial(matrix_products, task), device_memory)


def matrix_products(task: Task, count: int) -> None:
    a = (jax.random.normal(jax.random.key(0), (4096, 4096)) / 64).astype(task.precision)
    product, x = jax.jit(jnp.matmul), a
    for _ in range(count):
        x = product(a, x)
    x.block_until_ready()


def device_memory() -> int | None:
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
