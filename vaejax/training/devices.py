"""Devices and processes: which there are, and how arrays are laid out on them.

There is one axis, "data": a batch is split over it, the state is replicated on every device. A step
is written for one device. Under `jit` XLA splits it and inserts the sums over devices; under `pmap`
each device runs it on its own images, and the step sums what it must. Both lay out the state in the
same way, so that they share checkpoints and pictures.
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
from jaxtyping import Array, Int, PyTree, Shaped

from vaejax.cache import cache_folder
from vaejax.data.batches import Images
from vaejax.errors import UserError
from vaejax.system import processor_id

AXIS = "data"
RESIDENT_SHARE = 8  # training images may fill 1/8 of a device's memory: the rest is the step's
RESIDENT_CHUNK = 1024  # images that are read at a time
# Options of glibc's malloc. XLA on a CPU allocates the memory of every step anew: returned to the
# system in between, it would cost hundreds of thousands of page faults, up to a third of the time.
# And a run has a hundred threads: with a heap for each, checkpoints would leave 50 KiB an epoch.
MALLOC_OPTIONS = {
    -8: 1,  # M_ARENA_MAX: one heap for all threads
    -4: 0,  # M_MMAP_MAX: large pieces in it as well
    -1: -1,  # M_TRIM_THRESHOLD: its end is not returned
}
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"  # in XLA_FLAGS
# Threads that a CPU of no more cores computes with. Sums over many numbers are divided by their
# number, which decides the rounding: with any number of cores up to this the bits are equal.
MIN_THREADS = 8
# What jaxlib takes the number of threads from when it computes first; the first one wins.
THREADS = ("PJRT_NPROC", "NPROC")
T = TypeVar("T")


def configure(*, keep: bool = True, threads: int | None = None) -> None:
    """Set JAX up for equal bits at every run; call it before the first computation.

    A CPU computes with so many threads, by default with 8, or as many as it has cores if those are
    more: the bits do not depend on the cores. Random numbers are those of threefry2x32, whatever
    the environment says, and numbers have 32 bits. On a GPU some of XLA's fast reductions add in
    the order in which threads arrive: they are switched off. With `keep`, compiled programs stay in
    the user's cache folder, so that a run that is resumed starts at once.
    """
    if threads is not None or not any(name in os.environ for name in THREADS):
        count = threads or max(MIN_THREADS, len(os.sched_getaffinity(0)))
        os.environ |= dict.fromkeys(THREADS, str(count))
    jax.config.update("jax_default_prng_impl", "threefry2x32")
    jax.config.update("jax_threefry_partitionable", True)
    jax.config.update("jax_random_seed_offset", 0)
    jax.config.update("jax_enable_x64", False)
    with suppress(AttributeError, OSError, TypeError):  # a C library without it
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in MALLOC_OPTIONS.items():
            mallopt(parameter, value)
    # otherwise several steps that wait for each other would each have their memory
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if keep and chosen is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla" / processor_id()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def threads() -> str:
    """Return the number of threads that a CPU computes with."""
    names = (os.environ[name] for name in THREADS if name in os.environ)
    return next(names, str(len(os.sched_getaffinity(0))))


def release_memory() -> None:
    """Return unused memory to the system: what compiling or a checkpoint has left."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


# Processes ----------------------------------------------------------------------------------------


def initialize_processes(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> None:
    """Become one of several processes, as the arguments say, or the launcher that started them.

    Call it before the first computation. Raises UserError for arguments that cannot be, or if the
    others are not there within five minutes.
    """
    arguments = (coordinator, processes, process_id)
    if arguments == (None, None, None) and not _launched():
        return
    if arguments != (None, None, None) and None in arguments:
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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX has installed a handler of its own
    # Connections are made at the first collective, by all at once, within seconds: not when the
    # first process has prepared the images for an hour.
    any_process(False)
    devices = choose()
    ones = put(
        devices, np.ones((len(devices.mesh.local_devices), 1, 1, 1), np.uint8), devices.count
    )
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=replicated(devices))(ones))


def _launched() -> bool:
    """Tell whether a launcher that JAX knows has started this as one of several processes."""
    several = (os.environ.get(n, "1") for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return (
        any(number.isdigit() and int(number) > 1 for number in several)
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()
        or "JAX_COORDINATOR_ADDRESS" in os.environ
    )


def is_single_process() -> bool:
    """Tell whether this is the only process."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Tell whether this process is the one that writes."""
    return jax.process_index() == 0


def broadcast(compute: Callable[[], T]) -> T:
    """Compute a JSON value in the first process and return it in all; they share its failure.

    All processes have to call it, so it is a barrier too.
    """
    if is_single_process():
        return compute()
    failure, message = None, b""
    if is_first():
        try:
            message = json.dumps({"value": compute()}).encode()
        except BaseException as error:
            failure = error
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    if failure is not None:
        raise failure
    if not length:
        raise UserError("the first process has stopped: its own message says why")
    padded = np.zeros(length, np.uint8)
    if is_first():
        padded[:] = np.frombuffer(message, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())["value"]


def any_process(*values: bool) -> list[bool]:
    """Tell whether each is true in any process; all of them have to call it together."""
    if is_single_process():
        return list(values)
    return np.any(multihost_utils.process_allgather(np.asarray(values)), axis=0).tolist()


# Devices ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Devices:
    """The devices of a run, and how a batch is split over them."""

    mesh: jax.sharding.Mesh
    how: Literal["jit", "pmap"]

    @property
    def count(self) -> int:
        """The number of devices, of all processes."""
        return self.mesh.size

    def __str__(self) -> str:
        """ "2 × cpu", "8 × NVIDIA H200 by pmap in 2 processes"."""
        text = f"{self.count} × {self.mesh.devices[0].device_kind}"
        if self.count > 1:
            text += f" by {self.how}"
        several = jax.process_count()
        return text + (f" in {several} processes" if several > 1 else "")


def choose(count: int | None = None, how: Literal["jit", "pmap"] = "jit") -> Devices:
    """Take the first `count` devices, or all; UserError for more than there are."""
    present = jax.devices()
    if count is not None and not 1 <= count <= len(present):
        raise UserError(
            f"--devices {count}: there are {len(present)} here ({present[0].device_kind}), "
            f"take 1 to {len(present)}"
        )
    if count is not None and count < len(present) and jax.process_count() > 1:
        raise UserError(
            f"--devices {count}: {jax.process_count()} processes use all {len(present)} of theirs; "
            "start fewer processes, or leave out --devices"
        )
    if how == "pmap" and jax.process_count() > 1:
        raise UserError(
            "--parallel pmap goes with one process: jax.pmap wants the state of several in another "
            "layout. Leave it out, the result is the same"
        )
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((count or len(present),), (AXIS,), auto, devices=present[:count])
    return Devices(mesh, how)


def on_cpu() -> bool:
    """Tell whether JAX computes on a CPU."""
    return jax.default_backend() == "cpu"


@functools.cache
def compiled_programs() -> list[str]:
    """Return a list that grows by a name with every program that is compiled from now on.

    Programs that are taken from the cache count as well.
    """
    names: list[str] = []

    def count(event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about.get("fun_name", "?")))

    jax.monitoring.register_event_duration_secs_listener(count)
    return names


def device_memory_in_use() -> int | None:
    """Return the bytes in use on this process' first device; None on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use")


def device_memory_limit() -> int | None:
    """Return the bytes that a device has for this process; None on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def replicated(devices: Devices) -> jax.NamedSharding:
    """Return the sharding that keeps all of an array on every device."""
    return jax.NamedSharding(devices.mesh, jax.P())


def local(tree: PyTree) -> PyTree:
    """Return the arrays as they are on this process' first device, without a copy."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def rows(devices: Devices, images: int) -> slice:
    """Return which images of a batch this process reads: its share, or all if uneven."""
    if images % devices.count:
        return slice(0, images)
    shard, shards = jax.process_index(), jax.process_count()
    return slice(shard * images // shards, (shard + 1) * images // shards)


def put(devices: Devices, images: Shaped[np.ndarray, "b *image"], batch: int) -> Array:
    """Place this process' rows of a batch on its devices, as a part of the global batch."""
    spec = jax.P() if batch % devices.count else jax.P(AXIS)
    sharding = jax.NamedSharding(devices.mesh, spec)
    return jax.make_array_from_process_local_data(sharding, images, (batch, *images.shape[1:]))


def put_batch(devices: Devices, images: Shaped[np.ndarray, "b *image"] | Array) -> Any:
    """Place this process' images of a batch on its devices, as the programs take them."""
    if isinstance(images, jax.Array):
        return jax.device_put(images, jax.NamedSharding(devices.mesh, jax.P(AXIS)))
    if devices.how == "pmap":
        return images.reshape(devices.count, -1, *images.shape[1:])
    return put(devices, images, len(images) * jax.process_count())


# Images that stay on the devices ------------------------------------------------------------------


class ResidentImages:
    """All images of a split, uint8, replicated on every device; called with indices, a batch.

    An accelerator takes in a batch sooner than a host reads it. The indices are those of the
    stream, so that batches are the same bit for bit.
    """

    def __init__(self, images: Images, devices: Devices):
        pixels = np.empty((len(images), *images.shape), np.uint8)
        for first in range(0, len(images), RESIDENT_CHUNK):
            indices = np.arange(first, min(first + RESIDENT_CHUNK, len(images)))
            pixels[indices] = images.read(indices)
        self._pixels = jax.device_put(pixels, replicated(devices))
        split = jax.NamedSharding(devices.mesh, jax.P(AXIS))
        self._gather = jax.jit(lambda pixels, indices: pixels[indices], out_shardings=split)

    def __call__(self, indices: Int[np.ndarray, " b"]) -> Array:
        """Gather a batch `[b h w c]`."""
        return self._gather(self._pixels, indices)


def fit_on_device(images: Images, devices: Devices) -> bool:
    """Tell whether the images can stay on the devices; on a CPU they would be in memory twice."""
    if on_cpu() or devices.how == "pmap" or not is_single_process():
        return False
    needed = len(images) * int(np.prod(images.shape))
    return needed <= (device_memory_limit() or 0) // RESIDENT_SHARE
