"""Devices and processes: what there is, and what lies where.

There is one axis, "data": a batch is split over it, the state lies whole on every device. A step is
written for one device. Under `jit` XLA splits it and puts in the sums over devices by itself; under
`pmap` each device runs it on its own images, and the step sums what it must. Both hold the state in
the same way, so that they share checkpoints and pictures.
"""

import ctypes
import functools
import json
import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree, UInt8

from vaejax import cache
from vaejax.errors import UserError

AXIS = "data"
# For glibc's malloc. XLA on a CPU asks anew for the memory of every step: returned to the system in
# between, it would cost hundreds of thousands of page faults, up to a third of the time. And a
# run has a hundred threads: in a heap for each, checkpoints would leave some 50 KiB an epoch.
ONE_HEAP = {
    -8: 1,  # M_ARENA_MAX: one for all threads
    -4: 0,  # M_MMAP_MAX: large pieces in it as well
    -1: -1,  # M_TRIM_THRESHOLD: its end stays
}
T = TypeVar("T")


def configure(*, keep: bool = True) -> None:
    """To be called before the first computation: same bits every time, compiled once.

    On a GPU some of XLA's fast reductions add in the order in which threads arrive: they are
    forbidden. With `keep`, what was compiled stays in the user's cache folder, so that a run that
    goes on starts at once.
    """
    with suppress(AttributeError, OSError, TypeError):  # a C library without it
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ONE_HEAP.items():
            mallopt(parameter, value)
    # or else several steps that wait for each other would each have their memory
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    deterministic = "--xla_gpu_deterministic_ops=true"
    if deterministic not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {deterministic}".strip()
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if keep and chosen is None:
        jax.config.update(
            "jax_compilation_cache_dir", str(cache.folder() / "xla" / cache.processor())
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def release() -> None:
    """Give back to the system what nothing uses: what compiling or a checkpoint has left."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


# Processes ----------------------------------------------------------------------------------------


def join(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Become one of several processes, as the arguments say, or whoever started them.

    To be called before the first computation. UserError for arguments that cannot be, or if the
    others are not there within five minutes.
    """
    given = (coordinator, processes, process_id)
    if given == (None, None, None) and not _launched():
        return
    if given != (None, None, None) and None in given:
        raise UserError("--coordinator HOST:PORT, --processes N and --process-id I go together")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator {coordinator}: must be HOST:PORT, as in node01:1234")
    if processes is not None and process_id is not None and not 0 <= process_id < processes:
        raise UserError(f"--process-id {process_id}: must be from 0 to {processes - 1}")
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes did not find each other: {reason}. --coordinator, --processes and "
            "--process-id tell them"
        ) from None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which JAX has taken for itself
    # Connections are made at the first collective, by all at once, within seconds: not when the
    # first process has prepared the images for an hour.
    any_process(False)
    devices = choose()
    ones = put(
        devices, np.ones((len(devices.mesh.local_devices), 1, 1, 1), np.uint8), devices.count
    )
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=whole(devices))(ones))


def _launched() -> bool:
    """Whether a launcher that JAX knows has started several processes of which this is one."""
    several = (os.environ.get(n, "1") for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return (
        any(number.isdigit() and int(number) > 1 for number in several)
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()
        or "JAX_COORDINATOR_ADDRESS" in os.environ
    )


def alone() -> bool:
    """Whether this is the only process."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def agreed(find: Callable[[], T]) -> T:
    """What the first process finds, as JSON can tell it, in all of them; its failure is theirs."""
    if alone():
        return find()
    failure, told = None, b""
    if is_first():
        try:
            told = json.dumps({"found": find()}).encode()
        except BaseException as error:
            failure = error
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(told))))
    if failure is not None:
        raise failure
    if not length:
        raise UserError("the first process has stopped: its own message says why")
    padded = np.zeros(length, np.uint8)
    if is_first():
        padded[:] = np.frombuffer(told, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())["found"]


def any_process(*values: bool) -> list[bool]:
    """Whether each is so in any of the processes; all of them have to ask at the same time."""
    if alone():
        return list(values)
    return np.any(multihost_utils.process_allgather(np.asarray(values)), axis=0).tolist()


# Devices ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Devices:
    mesh: jax.sharding.Mesh
    how: Literal["jit", "pmap"]

    @property
    def count(self) -> int:
        return self.mesh.size

    def __str__(self) -> str:
        """ "2 × cpu", "8 × NVIDIA H200 by pmap in 2 processes"."""
        text = f"{self.count} × {self.mesh.devices[0].device_kind}"
        if self.count > 1:
            text += f" by {self.how}"
        several = jax.process_count()
        return text + (f" in {several} processes" if several > 1 else "")


def choose(count: int | None = None, how: Literal["jit", "pmap"] = "jit") -> Devices:
    """The first `count` devices, or all that there are; UserError for more than that."""
    there = jax.devices()
    if count is not None and not 1 <= count <= len(there):
        raise UserError(
            f"--devices {count}: there are {len(there)} here ({there[0].device_kind}), "
            f"take 1 to {len(there)}"
        )
    if count is not None and count < len(there) and jax.process_count() > 1:
        raise UserError(
            f"--devices {count}: {jax.process_count()} processes use all {len(there)} of theirs; "
            "start fewer processes, or leave out --devices"
        )
    if how == "pmap" and jax.process_count() > 1:
        raise UserError(
            "--parallel pmap goes with one process: jax.pmap wants the state of several in another "
            "layout. Leave it out, the result is the same"
        )
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((count or len(there),), (AXIS,), auto, devices=there[:count])
    return Devices(mesh, how)


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


@functools.cache
def compiled() -> list[str]:
    """A list that grows by one with every program that this process compiles from now on, or takes
    from the cache."""
    names: list[str] = []

    def count(event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about.get("fun_name", "?")))

    jax.monitoring.register_event_duration_secs_listener(count)
    return names


def memory_in_use() -> int | None:
    """Bytes on this process' first device; None where a device does not say, as a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use")


def memory_limit() -> int | None:
    """Bytes that a device has for us; None as above."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def whole(devices: Devices) -> jax.NamedSharding:
    """All of an array on every device."""
    return jax.NamedSharding(devices.mesh, jax.P())


def here(tree: PyTree) -> PyTree:
    """The arrays as they lie on this process' first device, without a copy."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def rows(devices: Devices, images: int) -> slice:
    """Which images of a batch this process has to read: its share, or all if they do not divide."""
    if images % devices.count:
        return slice(0, images)
    shard, shards = jax.process_index(), jax.process_count()
    return slice(shard * images // shards, (shard + 1) * images // shards)


def put(devices: Devices, images: UInt8[np.ndarray, "b h w c"], batch: int) -> Array:
    """This process' rows of a batch, on its devices, as part of the whole batch."""
    spec = jax.P() if batch % devices.count else jax.P(AXIS)
    sharding = jax.NamedSharding(devices.mesh, spec)
    return jax.make_array_from_process_local_data(sharding, images, (batch, *images.shape[1:]))


def placed(devices: Devices, images: UInt8[np.ndarray, "b h w c"] | Array) -> Any:
    """This process' images of a batch that divides, as the programs want them."""
    if isinstance(images, jax.Array):
        return jax.device_put(images, jax.NamedSharding(devices.mesh, jax.P(AXIS)))
    if devices.how == "pmap":
        return images.reshape(devices.count, -1, *images.shape[1:])
    return put(devices, images, len(images) * jax.process_count())
