"""The steps as compiled programs: one for each shape, over all devices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from vaejax.models.convolution import compiler_options
from vaejax.objectives import Figures, Loss
from vaejax.training import parallel
from vaejax.training.state import TrainState
from vaejax.training.step import Gradient, add_gradient, eval_step, gradient, train_step, update


class TrainStep(NamedTuple):
    run: Callable[..., tuple[TrainState, Figures]]  # (state, this process' images, key)
    memory: int  # bytes that an update needs on a device: arguments, results and temporaries


def compile_init(begin: Callable[..., TrainState], *, devices: parallel.Devices) -> Callable:
    """key -> state. On a CPU LLVM does only half its work: all of it takes longer than the program,
    which runs once, and makes the same bits."""
    hasty = {"xla_backend_optimization_level": 1} if parallel.on_cpu() else {}
    return jax.jit(begin, out_shardings=parallel.whole(devices), compiler_options=hasty)


def compile_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: PyTree,
    images: jax.ShapeDtypeStruct,
    key: Any,
    *,
    devices: parallel.Devices,
    micro_batches: int = 1,
) -> TrainStep:
    """The whole step as one program, of which the state is donated; `images` is the shape of a
    whole batch, `state` may be shapes alone.

    With micro-batches it is two programs, one for each of them and one for the update: in the body
    of a loop XLA takes convolutions on a CPU for naive ones, and is ten times slower.
    """
    if micro_batches > 1:
        return _compile_in_parts(
            loss, optimizer, state, images, key, devices=devices, parts=micro_batches
        )
    step = partial(train_step, loss=loss, optimizer=optimizer)
    program = _compile(step, state, images, key, images=1, donate=0, devices=devices)
    parallel.release()

    def run(state, images, key):
        return program(state, parallel.placed(devices, images), key)

    return TrainStep(run, _memory(program))


def _compile_in_parts(
    loss, optimizer, state, images, key, *, devices: parallel.Devices, parts: int
):
    batch, *rest = images.shape
    some = jax.ShapeDtypeStruct((batch // parts, *rest), images.dtype)
    found = jax.eval_shape(
        partial(gradient, loss=loss), state.params, state.statistics, state.step, some, key
    )
    everywhere = parallel.whole(devices)

    def zeros(statistics: PyTree) -> Gradient:
        """No gradient yet; the statistics are a copy, to be changed."""
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), found)
        return nothing._replace(statistics=statistics)

    begin = jax.jit(zeros, out_shardings=everywhere)
    one = partial(add_gradient, loss=loss, parts=parts)
    arguments = (found, state.params, state.step, some, key, np.int32(0))
    add = _compile(one, *arguments, images=3, donate=0, devices=devices)
    apply = jax.jit(
        partial(update, optimizer=optimizer), out_shardings=everywhere, donate_argnums=0
    )
    apply = apply.lower(state, found).compile()
    parallel.release()

    def run(state, images, key):
        total = begin(state.statistics)
        for part in range(parts):
            mine = parallel.placed(devices, images[part::parts])  # of each device the same number
            total = add(total, state.params, state.step, mine, key, np.int32(part))
        return apply(state, total)

    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state))
    return TrainStep(run, max(_memory(add) + kept, _memory(apply)))


def _compile(
    step: Callable, *arguments: Any, images: int, donate: int, devices: parallel.Devices
) -> Any:
    """`step` as one program; of its arguments, that with the number `images` is split over the
    devices, the others are whole on each, as is all that it returns."""
    split = arguments[images]
    if devices.how == "pmap":
        shape = (devices.count, split.shape[0] // devices.count, *split.shape[1:])
        split = jax.ShapeDtypeStruct(shape, split.dtype)
        jitted = jax.pmap(
            partial(step, axis=parallel.AXIS),
            parallel.AXIS,
            in_axes=tuple(0 if i == images else None for i in range(len(arguments))),
            out_axes=None,  # pyright: ignore[reportArgumentType]  one copy, and no leading axis
            donate_argnums=donate,
            devices=list(devices.mesh.devices),
        )
    else:
        over = jax.NamedSharding(devices.mesh, jax.P(parallel.AXIS))
        everywhere = parallel.whole(devices)
        jitted = jax.jit(
            step,
            in_shardings=tuple(over if i == images else everywhere for i in range(len(arguments))),
            out_shardings=everywhere,
            donate_argnums=donate,
        )
    shapes = (*arguments[:images], split, *arguments[images + 1 :])
    return jitted.lower(*shapes).compile({**compiler_options()})


def _memory(program: Any) -> int:
    sizes = program.memory_analysis()
    if sizes is None:
        return 0
    needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    return needed + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


def compile_eval_step(loss: Loss, *, devices: parallel.Devices) -> Callable[..., Figures]:
    """(state, this process' rows of a batch, key, place of its first image, its size) -> figures;
    one program for each size. A batch that does not divide is computed whole by every device."""
    step = jax.jit(
        partial(eval_step, loss=loss),
        out_shardings=parallel.whole(devices),
        compiler_options=compiler_options(),
    )

    def run(state, images, key, first: int, *, batch: int):
        return step(state, parallel.put(devices, images, batch), key, np.int32(first))

    return run


def state_bytes(state: TrainState) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
