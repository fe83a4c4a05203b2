"""vaejax: the very program that `experiments/anime.py` and `students.py` run."""

from functools import cache, partial

import flax
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import KL_WEIGHT, Contender, Task
from benchmarks.contenders.flax_ import device_memory, matrix_products
from vaejax import objectives
from vaejax.models.vae import VAE
from vaejax.training import parallel, programs
from vaejax.training.config import Recipe, build_adam
from vaejax.training.state import init
from vaejax.training.step import image_keys


def recipe(task: Task) -> Recipe:
    loss = partial(objectives.report, kl_weight=KL_WEIGHT)
    model = VAE(size=task.size, compute=task.precision)
    return Recipe("report", model, loss, epochs=1, batch_size=task.batch)


def start(task: Task):
    optimizer = build_adam(recipe(task), updates=1)
    return init(jax.random.key(0), model=recipe(task).model, optimizer=optimizer), optimizer


def write_arrays(task: Task) -> None:
    """The weights, images and noise that all contenders begin with."""
    state, _ = start(task)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    params = {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in leaves}
    key = jax.random.key(1)
    noise = [
        jax.vmap(lambda key: jax.random.normal(key, (512,)))(
            image_keys(jax.random.fold_in(key, step), jnp.arange(task.batch))
        )
        for step in range(2)
    ]
    shape = (task.batch, task.size, task.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.savez(task.arrays, images=images, noise=np.stack(noise), **params)


def contender(task: Task) -> Contender:
    parallel.configure(keep=False)
    _, images, _ = task.load()
    devices, key = parallel.choose(1), jax.random.key(1)
    state, optimizer = start(task)

    @cache
    def step() -> programs.TrainStep:  # compiled when it is first asked for, as the others'
        return programs.compile_train_step(
            partial(recipe(task).loss, model=recipe(task).model),
            optimizer,
            state,
            jax.ShapeDtypeStruct(images.shape, images.dtype),
            key,
            devices=devices,
        )

    def losses() -> list[float]:
        nonlocal state
        found = []
        for _ in range(2):
            state, figures = step().run(state, images, key)
            found.append(float(figures["loss"]))
        return found

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _ = step().run(state, images, key)
        jax.block_until_ready(state)

    version = f"jax {jax.__version__}, flax {flax.__version__}"
    return Contender(version, losses, steps, partial(matrix_products, task), device_memory)
