"""Devices: what they are, what they hold, and the steps compiled for them."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import PyTree

from vaejax.models.convolution import compiler_options
from vaejax.objectives import Loss
from vaejax.training.state import TrainState
from vaejax.training.step import eval_step, train_step


def configure(*, cache: bool = True) -> None:
    """To be called before the first computation: same bits every time, compiled once.

    On a GPU some of XLA's fast reductions add in the order in which threads arrive: they are
    forbidden. With `cache`, what was compiled stays in the user's cache folder, so that a run that
    goes on starts at once.
    """
    deterministic = "--xla_gpu_deterministic_ops=true"
    if deterministic not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {deterministic}".strip()
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if cache and chosen is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "vaejax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def describe() -> str:
    """ "2 × cpu", "1 × NVIDIA H200"."""
    return f"{jax.device_count()} × {jax.devices()[0].device_kind}"


def memory_in_use() -> int | None:
    """Bytes on the first device; None where a device does not say, as a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")


class TrainStep(NamedTuple):
    run: Callable[..., Any]  # (state, images, key) -> (state, figures); the state is donated
    memory: int  # bytes that one call needs: its arguments, results and temporaries


def compile_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, state: PyTree, images: Any, key: Any
) -> TrainStep:
    """The whole step as one program; `state`, `images` and `key` may be shapes alone."""
    step = partial(train_step, loss=loss, optimizer=optimizer)
    jitted = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
    run = jitted.lower(state, images, key).compile()
    sizes = run.memory_analysis()
    memory = 0
    if sizes is not None:
        memory = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        memory += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return TrainStep(run, memory)


def compile_eval_step(loss: Loss) -> Callable[..., Any]:
    """(state, images, key) -> figures; one program for each size of a batch."""
    return jax.jit(partial(eval_step, loss=loss), compiler_options=compiler_options())


def state_bytes(state: TrainState) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
