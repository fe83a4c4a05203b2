"""Will a step fit, and does a run leave enough to save itself?"""

import sys
import time

from vaejax import log, memory
from vaejax.errors import MemoryLowError, UserError, VaejaxError
from vaejax.log import size
from vaejax.training import parallel
from vaejax.training.config import Recipe

# What stays free besides a copy of the state: one part in so many, and so many bytes at least.
SHARE, LEAST = 32, 128 << 20
SECONDS = 0.2  # between two looks: one takes as long as a small update on a fast device


class Guard:
    """Knows when there is so little memory left that a run has to save itself now; `most` are the
    bytes of RAM that a person wants it to hold, if there is such a limit."""

    def __init__(self, state: int, *, most: int | None):
        self._looked = -float("inf")
        self._needed = state + max(memory.limit() // SHARE, LEAST)
        self._most = most

    def full(self) -> str:
        """What is full, in words; empty while all is well, or was a moment ago."""
        if time.monotonic() - self._looked < SECONDS:
            return ""
        self._looked = time.monotonic()
        if self._most is not None and (held := log.memory()) > self._most:
            return f"the run holds {size(held)} of RAM, more than --max-ram {self._most / 2**30:g}"
        if (left := memory.room()) < self._needed:
            return f"only {size(left)} of {size(memory.limit())} of memory are left"
        return ""

    def stopped(self, why: str, *, recipe: Recipe) -> MemoryLowError:
        """After the run was saved."""
        images = recipe.micro_batch or recipe.batch_size
        return MemoryLowError(
            f"{why}. The run was saved; the same command goes on when there is more"
            + (f", and --micro-batch {images // 2} needs less" if images % 2 == 0 else "")
        )


def refuse_too_much(needed: int, state: int, recipe: Recipe, devices: parallel.Devices) -> str:
    """Say what a step will take, in a line, with what there is; both are bytes on a device.

    UserError, with the batch that would fit, for one that needs more than there can ever be; a
    warning where it is not free at the moment.
    """
    there, free, count = memory.limit(), memory.room(), 1
    if parallel.on_cpu():  # whose devices share the machine's
        count = len(devices.mesh.local_devices)
    else:
        there = free = parallel.memory_limit() or needed
    images = recipe.micro_batch or recipe.batch_size
    text = f"a step of {images} images needs {size(needed * count)}"
    where = "memory" if parallel.on_cpu() else "each device's memory"
    hint = _hint(needed, state, there // count, recipe, devices)
    if parallel.any_process(needed * count > there)[0]:
        raise UserError(f"{text} of {where}: there are {size(there)}. {hint}")
    if needed * count > free:
        print(f"warning: {text} of {where}: {size(free)} are free. {hint}", file=sys.stderr)
    held = f"; this process holds {size(log.memory())} already, {size(memory.room())} are free"
    return f"memory: {text} of {where}, of {size(there)}{held}"


def out_of_memory(
    error: Exception, needed: int, state: int, recipe: Recipe, devices: parallel.Devices
) -> VaejaxError | None:
    """The error for people, if one of JAX's tells of memory that was not to be had."""
    words = str(error)
    if not any(text in words for text in ("RESOURCE_EXHAUSTED", "Out of memory", "bad_alloc")):
        return None
    images = recipe.micro_batch or recipe.batch_size
    hint = _hint(needed, state, needed * 3 // 4, recipe, devices)
    return VaejaxError(
        f"out of memory in a step of {images} images, which needs about {size(needed)}. {hint}. "
        "Its checkpoints are as they were: with it, the same command goes on from the last"
    )


def _hint(needed: int, state: int, there: int, recipe: Recipe, devices: parallel.Devices) -> str:
    """Which micro-batch would fit into `there` bytes, if what a step of so many needs grows with
    its images, but for the state and the gradients."""
    images, count = recipe.micro_batch or recipe.batch_size, devices.count
    fixed = min(state * 4 // 3, needed)  # parameters, two moments, and a gradient
    each = max((needed - fixed) / images, 1)
    can = [n for n in range(count, images, count) if recipe.batch_size % n == 0]
    fitting = [n for n in can if fixed + n * each <= there]
    if fitting:
        about = size(round(fixed + fitting[-1] * each))
        return f"--micro-batch {fitting[-1]} would do with about {about}"
    if can:
        return f"Not even --micro-batch {can[0]} would do: take a smaller --size"
    return "Take a smaller --size"
