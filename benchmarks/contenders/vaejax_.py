"""vaejax: the compiled update that `experiments/anime.py` and `experiments/students.py` run."""

from functools import cache, partial

import flax
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import B1, KL_WEIGHT, LATENT_DIM, LEARNING_RATE, Contender, Task
from benchmarks.contenders.flax_ import device_memory, matrix_products
from vaejax.distributions import Normal
from vaejax.losses import mse_kl
from vaejax.models.autoencoder import sample
from vaejax.models.vae import VAE
from vaejax.training import devices as dev
from vaejax.training.compiled import TrainStep, compile_train_step
from vaejax.training.optimizer import adam
from vaejax.training.step import Trainer, image_indices, image_keys, init


def make_trainer(task: Task) -> Trainer:
    """Return what the report's recipe does in an update."""
    model = VAE(size=task.size, compute=task.precision)
    return Trainer(model, partial(mse_kl, kl_weight=KL_WEIGHT), adam(LEARNING_RATE, b1=B1))


def run_key() -> jax.Array:
    """Return the key of the run, from which the noise of every update follows."""
    return jax.random.key(1)


def update_noise(step: int, *, batch: int) -> jax.Array:
    """Return the noise `[b d]` that the model adds in an update, as `Autoencoder.__call__` does.

    It splits the key of each image into one for the corruption of x and one for z; the latter is
    split again, once for each array of z.
    """
    keys = image_keys(jax.random.fold_in(run_key(), step), image_indices(batch))
    _, sample_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    zeros = jnp.zeros((batch, LATENT_DIM))
    return sample(Normal(zeros, zeros), sample_keys)  # of N(0, I): the noise itself


def write_arrays(task: Task) -> None:
    """Write the weights, images and noise that all contenders start from."""
    params = init(jax.random.key(0), trainer=make_trainer(task)).params
    leaves = jax.tree_util.tree_leaves_with_path(params)
    weights = {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
    noise = [update_noise(step, batch=task.batch) for step in range(2)]
    shape = (task.batch, task.size, task.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.savez(task.arrays, images=images, noise=np.stack(noise), **weights)


def contender(task: Task) -> Contender:
    """Return the update of vaejax's training loop, on one device."""
    dev.configure(keep=False)
    _, images, _ = task.load()
    devices, key = dev.choose(1), run_key()
    trainer = make_trainer(task)
    state = init(jax.random.key(0), trainer=trainer)  # the weights of `write_arrays`

    @cache
    def compiled() -> TrainStep:  # at the first update, when the others compile as well
        shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
        return compile_train_step(trainer, state, None, shape, key, devices=devices)

    def losses() -> list[float]:
        nonlocal state
        values = []
        for _ in range(2):
            state, metrics = compiled().run(state, images, key)
            values.append(float(metrics["loss"]))
        return values

    def updates(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _ = compiled().run(state, images, key)
        jax.block_until_ready(state)

    version = f"jax {jax.__version__}, flax {flax.__version__}"
    return Contender(version, losses, updates, partial(matrix_products, task), device_memory)
