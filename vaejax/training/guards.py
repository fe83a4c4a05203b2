"""What can end a run early, and what must not: signals, non-finite updates, memory, the disk."""

import errno
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from vaejax.errors import (
    DivergedError,
    Interrupted,
    MemoryLowError,
    StorageError,
    UserError,
    VaejaxError,
)
from vaejax.files import write_json
from vaejax.system import format_bytes, memory_free, memory_limit, process_memory
from vaejax.training.config import Recipe
from vaejax.training.devices import Devices, any_process, device_memory_limit, on_cpu

MAX_SKIPPED = 3  # non-finite updates in a row that end a run
DELAY = 2  # updates after which metrics are read: an accelerator need not wait for that
DIVERGED = "diverged.json"
# What stays free besides a copy of the state: one part in so many, and so many bytes at least.
FREE_SHARE, MIN_FREE = 32, 128 << 20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHECK_SECONDS = 0.2  # between two checks: one takes as long as a small update on a fast device


# Signals ------------------------------------------------------------------------------------------


class SignalGuard:
    """Ctrl-C and SIGTERM request a stop between two updates; a second one stops at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator["SignalGuard"]:
        """Handle both signals within the block."""
        old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        # print() may be what was interrupted, and cannot be entered twice
        with suppress(OSError, ValueError):
            text = f"\n{self.received.name}: finishing the step and saving …\n"
            os.write(sys.stderr.fileno(), text.encode())

    def error(self) -> Interrupted:
        """Return the error that ends a run which was saved because of a signal."""
        number = self.received or signal.SIGTERM  # another process may have received it
        return Interrupted(f"stopped by {number.name}", exit_code=128 + number)


# Non-finite updates -------------------------------------------------------------------------------


class FiniteGuard:
    """Reads the metrics of each update, and ends a run that diverges.

    `image_paths` returns the paths of an update's images, where it takes some; `last_checkpoint`
    the newest one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        updates_per_epoch: int,
        advice: str,
        image_paths: Callable[[int], list[str]] | None,
        last_checkpoint: Callable[[], Path | None],
        writes: bool,
    ):
        self._folder, self._per_epoch, self._advice = folder, updates_per_epoch, advice
        self._image_paths, self._last_checkpoint = image_paths, last_checkpoint
        self._writes = writes
        self._unread: deque[tuple[int, Mapping[str, Any]]] = deque()
        self._finite: tuple[int, Mapping[str, Any]] | None = None
        self._skipped: list[tuple[int, dict[str, float]]] = []

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of update `step`, from 0, and read those of some updates before.

        Raises DivergedError when too many updates in a row were not applied.
        """
        self._unread.append((step, metrics))
        while len(self._unread) > DELAY:
            self._read(*self._unread.popleft())

    def catch_up(self) -> bool:
        """Read everything that is unread; return whether the last update was applied."""
        while self._unread:
            self._read(*self._unread.popleft())
        return not self._skipped

    def check_held_out(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Raise DivergedError where a metric of the held-out images is not finite."""
        for name, value in metrics.items():
            if not np.isfinite(value):
                raise self._error(f"the held-out images' {_words(name)} is {value}", step)

    def _read(self, step: int, metrics: Mapping[str, Any]) -> None:
        in_a_row = int(metrics["skipped"])
        if not in_a_row:
            self._finite = (step, metrics)
            self._skipped.clear()
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._skipped.append((step, values))
        name = next((n for n in ("loss", "gradient_norm") if not np.isfinite(values[n])), "loss")
        what = f"the {_words(name)} is {values[name]}"
        if in_a_row < MAX_SKIPPED:
            print(
                f"warning: update {step:,} was not applied: {what} ({in_a_row} in a row; after "
                f"{MAX_SKIPPED} the run stops)",
                file=sys.stderr,
            )
            return
        raise self._error(
            f"{what}, in {in_a_row} updates in a row, of which none was applied", step
        )

    def _error(self, what: str, step: int) -> DivergedError:
        checkpoint, finite = self._last_checkpoint(), self._last_finite()
        epoch = step // self._per_epoch + 1
        parts = [f"diverged in epoch {epoch:,} at step {step:,}: {what}"]
        if finite:
            words = ", ".join(f"{_words(n)} {finite[n]:.4g}" for n in ("loss", "gradient_norm"))
            parts.append(f"The last finite metrics, of step {finite['step']:,}: {words}")
        if self._skipped and self._image_paths:
            image_paths = self._image_paths
            updates = [
                {"step": n, "metrics": _json(values), "images": image_paths(n)}
                for n, values in self._skipped
            ]
            if self._writes:
                content = {
                    "epoch": epoch,
                    "step": step,
                    "last_finite": finite,
                    "last_good_checkpoint": str(checkpoint) if checkpoint else None,
                    "updates": updates,
                }
                with suppress(OSError):
                    write_json(self._folder / DIVERGED, content)
            some = ", ".join(updates[0]["images"][:3])
            parts.append(
                f"The images of these batches are in {self._folder / DIVERGED} ({some}, …)"
            )
        parts.append(
            f"The last good checkpoint is {checkpoint}"
            if checkpoint
            else "No checkpoint was due yet"
        )
        return DivergedError(". ".join([*parts, self._advice]))

    def _last_finite(self) -> dict[str, Any]:
        if self._finite is None:
            return {}
        step, metrics = self._finite
        return {"step": step, **{name: float(value) for name, value in metrics.items()}}


def _words(name: str) -> str:
    return name.replace("_", " ")


def _json(values: Mapping[str, float]) -> dict[str, float | str]:
    """Spell NaN and infinity, for which JSON has no number."""
    return {name: v if np.isfinite(v) else str(v) for name, v in values.items()}


# Memory -------------------------------------------------------------------------------------------


class MemoryGuard:
    """Knows when so little memory is left that a run has to save itself now.

    `state` are the bytes of its state, `images` those of a step, `max_ram` the GiB of RAM that a
    person allows it.
    """

    def __init__(self, state: int, *, images: int, max_ram: float | None):
        self._checked, self._images = -float("inf"), images
        self._reserve = state + max(memory_limit() // FREE_SHARE, MIN_FREE)
        self._max_ram = max_ram

    def problem(self) -> str:
        """Say what is full; "" while all is well, or was a moment ago."""
        if time.monotonic() - self._checked < CHECK_SECONDS:
            return ""
        self._checked = time.monotonic()
        if self._max_ram is not None and (held := process_memory()) > self._max_ram * 2**30:
            return (
                f"the run holds {format_bytes(held)} of RAM, more than --max-ram {self._max_ram:g}"
            )
        if (left := memory_free()) < self._reserve:
            return f"only {format_bytes(left)} of {format_bytes(memory_limit())} of memory are left"
        return ""

    def error(self, problem: str) -> MemoryLowError:
        """Return the error that ends a run which was saved because of this problem."""
        return MemoryLowError(
            f"{problem}. The run was saved; the same command resumes it when there is more"
            + (
                f", and --micro-batch {self._images // 2} needs less"
                if self._images % 2 == 0
                else ""
            )
        )


def refuse_too_much(needed: int, state: int, recipe: Recipe, devices: Devices) -> str:
    """Describe what a step will take, in a line, and what there is; both are bytes on a device.

    Raises UserError, with the batch that would fit, if it needs more than there can ever be; warns
    if it is not free at the moment.
    """
    total, free, count = memory_limit(), memory_free(), 1
    if on_cpu():  # whose devices share the machine's memory
        count = len(devices.mesh.local_devices)
    else:
        total = free = device_memory_limit() or needed
    images = recipe.micro_batch or recipe.batch_size
    text = f"a step of {images} images needs {format_bytes(needed * count)}"
    where = "memory" if on_cpu() else "each device's memory"
    hint = _hint(needed, state, total // count, recipe, devices)
    if any_process(needed * count > total)[0]:
        raise UserError(f"{text} of {where}: there are {format_bytes(total)}. {hint}")
    if needed * count > free:
        print(f"warning: {text} of {where}: {format_bytes(free)} free. {hint}", file=sys.stderr)
    return (
        f"memory: {text} of {where}, of {format_bytes(total)}; this process holds "
        f"{format_bytes(process_memory())} already, {format_bytes(memory_free())} are free"
    )


def out_of_memory(
    error: Exception, needed: int, state: int, recipe: Recipe, devices: Devices
) -> VaejaxError | None:
    """Return the error for people, if one of JAX's says that memory could not be had."""
    words = str(error)
    if not any(text in words for text in ("RESOURCE_EXHAUSTED", "Out of memory", "bad_alloc")):
        return None
    images = recipe.micro_batch or recipe.batch_size
    hint = _hint(needed, state, needed * 3 // 4, recipe, devices)
    return VaejaxError(
        f"out of memory in a step of {images} images, which needs about {format_bytes(needed)}. "
        f"{hint}. The checkpoints are as they were: with it, the same command resumes from the last"
    )


def _hint(needed: int, state: int, available: int, recipe: Recipe, devices: Devices) -> str:
    """Say which micro-batch would fit into `available` bytes.

    What a step of so many needs is taken to grow with its images, but for the state and gradients.
    """
    images, count = recipe.micro_batch or recipe.batch_size, devices.count
    fixed = min(state * 4 // 3, needed)  # parameters, two moments, and a gradient
    each = max((needed - fixed) / images, 1)
    possible = [n for n in range(count, images, count) if recipe.batch_size % n == 0]
    fitting = [n for n in possible if fixed + n * each <= available]
    if fitting:
        about = format_bytes(round(fixed + fitting[-1] * each))
        return f"--micro-batch {fitting[-1]} would do with about {about}"
    if possible:
        return f"Not even --micro-batch {possible[0]} would do: take a smaller --size"
    return "Take a smaller --size"


# The disk -----------------------------------------------------------------------------------------


class DiskGuard:
    """Keeps a full or missing disk from ending a run; remembers what could not be written."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._identity = folder, _inode(folder)
        self.failing: dict[str, OSError] = {}  # what, and why
        self.say: Callable[[str], None] = print

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Run a block that writes; an OSError in it is reported once, until it succeeds again.

        Raises StorageError where the run's folder is another one than at the start: nothing is
        written into what somebody put there, and no half of a run is begun.
        """
        if _inode(self._folder) != self._identity:
            raise StorageError(
                f"{self._folder} was moved or deleted while the run wrote into it: stopped. Where "
                "it is put back, the same command resumes from its last checkpoint"
            )
        try:
            yield
        except OSError as error:
            known = self.failing.get(what)
            if known is None or known.errno != error.errno:
                self.say(
                    f"warning: {what} cannot be written: {error.strerror or error}. Training goes "
                    "on, and tries again when the next is due"
                )
            self.failing[what] = error
        else:
            if self.failing.pop(what, None) is not None:
                self.say(f"{what} can be written again")

    def refuse_failing(self, newest: Path | None) -> None:
        """Raise StorageError if something could not be written at the last attempt.

        `newest` is the last checkpoint, from which the same command would resume.
        """
        if not self.failing:
            return
        what = "; ".join(f"{name}: {why.strerror or why}" for name, why in self.failing.items())
        full = any(why.errno in NO_ROOM for why in self.failing.values())
        raise StorageError(
            f"not everything could be written to {self._folder}: {what}. "
            f"{'Make room: the' if full else 'The'} same command "
            + (f"resumes from {newest}" if newest else "starts again")
        )


def _inode(folder: Path) -> tuple[int, int] | None:
    """Return which folder on which disk it is, whatever its name."""
    try:
        facts = os.stat(folder)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino
