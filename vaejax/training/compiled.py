"""The steps as compiled programs: one for each shape, over all devices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from vaejax.losses import Metrics
from vaejax.models.convolution import compiler_options
from vaejax.training.devices import (
    AXIS,
    Devices,
    on_cpu,
    put,
    put_batch,
    release_memory,
    replicated,
)
from vaejax.training.step import (
    Gradient,
    Trainer,
    TrainState,
    batch_gradient,
    eval_step,
    image_keys,
    init,
    micro_step,
    train_step,
    update,
)


class TrainStep(NamedTuple):
    """A compiled update."""

    run: Callable[..., tuple[TrainState, Metrics]]  # (state, this process' images, key)
    memory: int  # bytes that an update needs on a device: arguments, results and temporaries


def compile_init(trainer: Trainer, *, devices: Devices) -> Callable[..., TrainState]:
    """Compile key -> initial state, replicated.

    On a CPU LLVM does only half its work: all of it takes longer than the program, which runs once,
    and makes the same bits.
    """
    options = {"xla_backend_optimization_level": 1} if on_cpu() else {}
    start = partial(init, trainer=trainer)
    return jax.jit(start, out_shardings=replicated(devices), compiler_options=options)


def compile_train_step(
    trainer: Trainer,
    state: PyTree,
    frozen: PyTree,
    images: jax.ShapeDtypeStruct,
    key: Any,
    *,
    devices: Devices,
) -> TrainStep:
    """Compile the update, which donates its state, for the shape of a global batch.

    `state` may be shapes alone; `frozen` are arrays. With micro-batches there are two programs, one
    for each of them and one for the update: in the body of a loop XLA takes convolutions on a CPU
    for naive ones, and is ten times slower.
    """
    frozen = jax.device_put(frozen, replicated(devices))
    if trainer.micro_batches > 1:
        return _compile_micro_batches(trainer, state, frozen, images, key, devices=devices)
    step = partial(train_step, trainer=trainer)
    program = _compile(step, state, frozen, images, key, split=2, donate=0, devices=devices)
    release_memory()

    def run(state: TrainState, images: Any, key: Any) -> tuple[TrainState, Metrics]:
        return program(state, frozen, put_batch(devices, images), key)

    return TrainStep(run, _memory(program))


def _compile_micro_batches(
    trainer: Trainer,
    state: PyTree,
    frozen: PyTree,
    images: jax.ShapeDtypeStruct,
    key: Any,
    *,
    devices: Devices,
) -> TrainStep:
    parts = trainer.micro_batches
    batch, *image = images.shape
    micro = jax.ShapeDtypeStruct((batch // parts, *image), images.dtype)
    keys = jax.eval_shape(lambda key: jax.random.split(key, batch // parts), key)
    shapes = jax.eval_shape(partial(batch_gradient, trainer=trainer), state, frozen, micro, keys)
    everywhere = replicated(devices)

    def zeros(batch_stats: PyTree) -> Gradient:
        """Return an empty sum; its batch_stats are a copy, to be overwritten."""
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return empty._replace(batch_stats=batch_stats)

    start = jax.jit(zeros, out_shardings=everywhere)
    step = partial(micro_step, trainer=trainer)
    arguments = (shapes, state, frozen, micro, key, np.int32(0))
    add = _compile(step, *arguments, split=3, donate=0, devices=devices)
    apply = jax.jit(partial(update, trainer=trainer), out_shardings=everywhere, donate_argnums=0)
    apply = apply.lower(state, shapes).compile()
    release_memory()

    def run(state: TrainState, images: Any, key: Any) -> tuple[TrainState, Metrics]:
        total = start(state.batch_stats)
        for part in range(parts):
            mine = put_batch(devices, images[part::parts])  # of each device the same number
            total = add(total, state, frozen, mine, key, np.int32(part))
        return apply(state, total)

    # `add` does not take them, but they are in memory
    unused = jax.tree.leaves((state.opt_state, state.ema))
    waiting = sum(leaf.size * leaf.dtype.itemsize for leaf in unused)
    return TrainStep(run, max(_memory(add) + waiting, _memory(apply)))


def _compile(step: Callable, *arguments: Any, split: int, donate: int, devices: Devices) -> Any:
    """Compile `step` as one program.

    The argument with the number `split` is a batch, divided over the devices; the others and all
    results are replicated.
    """
    batch = arguments[split]
    if devices.how == "pmap":
        shape = (devices.count, batch.shape[0] // devices.count, *batch.shape[1:])
        batch = jax.ShapeDtypeStruct(shape, batch.dtype)
        jitted = jax.pmap(
            partial(step, axis=AXIS),
            AXIS,
            in_axes=tuple(0 if i == split else None for i in range(len(arguments))),
            out_axes=None,  # pyright: ignore[reportArgumentType]  one copy, and no leading axis
            donate_argnums=donate,
            devices=list(devices.mesh.devices),
        )
    else:
        divided = jax.NamedSharding(devices.mesh, jax.P(AXIS))
        everywhere = replicated(devices)
        jitted = jax.jit(
            step,
            in_shardings=tuple(
                divided if i == split else everywhere for i in range(len(arguments))
            ),
            out_shardings=everywhere,
            donate_argnums=donate,
        )
    shapes = (*arguments[:split], batch, *arguments[split + 1 :])
    return jitted.lower(*shapes).compile({**compiler_options()})


def _memory(program: Any) -> int:
    sizes = program.memory_analysis()
    if sizes is None:
        return 0
    needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    return needed + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


EvalStep = Callable[..., Metrics]


def compile_eval_step(trainer: Trainer, frozen: PyTree, *, devices: Devices) -> EvalStep:
    """Compile the evaluation of a batch; a program for each batch size.

    The result is called with (state, this process' rows of the batch, key, index of the batch's
    first image, the likelihood's variance, number of images). The noise of an image comes from its
    index among all of them. A batch that does not divide over the devices is computed by each.
    """

    def step(state, frozen, images, key, first, variance) -> Metrics:
        keys = image_keys(key, first + jnp.arange(len(images)))
        params, stats = state.best_params, state.batch_stats
        return eval_step(params, stats, frozen, images, keys, variance, trainer=trainer)

    everywhere = replicated(devices)
    jitted = jax.jit(step, out_shardings=everywhere, compiler_options=compiler_options())
    frozen = jax.device_put(frozen, everywhere)

    def run(state, images, key, first: int, variance: float, *, batch: int) -> Metrics:
        numbers = np.int32(first), np.float32(variance)
        return jitted(state, frozen, put(devices, images, batch), key, *numbers)

    return run


def state_bytes(state: TrainState) -> int:
    """Return the size of a state: what a checkpoint takes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
