"""The training loop: a `for`, with periodic things as `if`; and the validation after an epoch."""

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Array, Key

from vaejax.data.batches import Images
from vaejax.losses import MIN_VARIANCE, Metrics
from vaejax.system import format_bytes
from vaejax.training import checkpoint
from vaejax.training.compiled import EvalStep, state_bytes
from vaejax.training.config import RunSpec
from vaejax.training.devices import (
    Devices,
    any_process,
    compiled_programs,
    is_single_process,
    release_memory,
    rows,
)
from vaejax.training.guards import (
    DiskGuard,
    FiniteGuard,
    MemoryGuard,
    SignalGuard,
)
from vaejax.training.logger import Logger, PriorLogger
from vaejax.training.step import TrainState

CHECKPOINT = "a checkpoint"


class Steps(NamedTuple):
    """What the loop calls, compiled and with its constant arguments bound."""

    train: Callable[[TrainState, Any], tuple[TrainState, Metrics]]  # (state, batch)
    validate: Callable[[TrainState], dict[str, float]]


class Guards(NamedTuple):
    """What may end a run early."""

    signals: SignalGuard
    finite: FiniteGuard
    memory: MemoryGuard


def train(
    state: TrainState,
    batches: grain.DatasetIterator,
    *,
    spec: RunSpec,
    steps: Steps,
    logger: Logger | PriorLogger | None,
    checkpoints: "Checkpoints",
    guards: Guards,
) -> TrainState:
    """Make every update that is left, with everything that is shown and saved in between.

    Raises Interrupted or MemoryLowError for a run that was saved early, DivergedError, and
    StorageError if the folder is gone.
    """
    schedule = spec.schedule
    per_epoch, updates = schedule.updates_per_epoch, schedule.updates
    programs = None
    for n in range(int(state.step), updates):
        epoch, done = n // per_epoch + 1, n + 1
        if logger and n % per_epoch == 0:
            logger.epoch_begins(state, epoch)
        state, metrics = steps.train(state, next(batches))
        guards.finite.add(n, metrics)
        if logger and n % schedule.log_steps == 0:
            values = {name: float(value) for name, value in metrics.items()}
            logger.train_metrics(values, step=n, epoch=epoch)

        last = done == updates
        if last or done % per_epoch == 0:
            guards.finite.catch_up()
            held_out = steps.validate(state)
            guards.finite.check_held_out(held_out, step=done)
            if logger:
                logger.epoch_ends(state, held_out, step=done, epoch=epoch)
            programs = _warn_of_recompilation(programs)

        signaled = guards.signals.received is not None
        memory_problem, late = guards.memory.problem(), checkpoints.late()
        if not is_single_process():  # they stop and save at the same update
            signaled, late, memory_problem = _agree(
                signaled, late, memory_problem, meet=n % schedule.log_steps == 0
            )
        stops = not last and (signaled or bool(memory_problem))
        due = late or checkpoints.due(done)
        # an update that was not applied has changed nothing since the last checkpoint
        if last or stops or (due and guards.finite.catch_up()):
            guards.finite.catch_up()
            checkpoints.save(state, batches.get_state(), logger)
        if stops:
            if logger:
                logger.stopped(done, saved=not checkpoints.failing)
            checkpoints.refuse_unsaved()
            raise guards.memory.error(memory_problem) if memory_problem else guards.signals.error()
    return state


def _agree(
    signaled: bool, late: bool, memory_problem: str, *, meet: bool
) -> tuple[bool, bool, str]:
    """Agree with the other processes, at updates at which all of them ask."""
    if not meet:
        return False, False, ""
    signaled, late, low = any_process(signaled, late, bool(memory_problem))
    problem = (memory_problem or "another process is short of memory") if low else ""
    return signaled, late, problem


def _warn_of_recompilation(known: int | None) -> int:
    """Warn where programs were compiled after the first epoch; return how many there are."""
    names = compiled_programs()
    if known is not None and len(names) > known:
        print(
            f"warning: {len(names) - known} programs were compiled after the first epoch "
            f"({', '.join(sorted(set(names[known:])))}): each costs time and memory that stays; "
            "shapes that change from batch to batch would be a reason",
            file=sys.stderr,
        )
    return len(names)


# Checkpoints --------------------------------------------------------------------------------------


class Checkpoints:
    """Writes checkpoints when they are due, or reports why it cannot."""

    def __init__(
        self, folder: Path, spec: RunSpec, disk: DiskGuard, *, environment: Mapping[str, str]
    ):
        self._folder, self._spec, self._disk = folder, spec, disk
        self._environment = environment
        self._saved = time.monotonic()

    def late(self) -> bool:
        """Tell whether the last checkpoint was so many minutes ago that one is due."""
        return time.monotonic() - self._saved > 60 * self._spec.schedule.checkpoint_minutes

    def due(self, done: int) -> bool:
        """Tell whether a checkpoint is due after so many updates."""
        every = self._spec.schedule.checkpoint_steps
        return every is not None and done % every == 0

    @property
    def failing(self) -> bool:
        """Whether something could not be written at the last attempt."""
        return bool(self._disk.failing)

    def save(
        self,
        state: TrainState,
        position: Mapping[str, Any],
        logger: Logger | PriorLogger | None,
    ) -> None:
        """Write a checkpoint, the metrics before it; or report that it could not be written."""
        with self._disk.attempt(CHECKPOINT):
            if logger:
                logger.before_checkpoint()
            try:
                checkpoint.save(
                    self._folder,
                    state,
                    position,
                    spec=self._spec.to_json(),
                    environment=self._environment,
                    keep=self._spec.schedule.keep,
                )
            except OSError as error:
                raise self._with_room(error, state) from error
        release_memory()
        if logger and CHECKPOINT not in self._disk.failing:
            logger.after_checkpoint(int(state.step))
        self._saved = time.monotonic()

    def _with_room(self, error: OSError, state: TrainState) -> OSError:
        needed, free = state_bytes(state), shutil.disk_usage(self._folder).free
        newest = checkpoint.newest_path(self._folder)
        return OSError(
            error.errno,
            f"{error.strerror} ({format_bytes(needed)} are needed, {format_bytes(free)} are free); "
            + (f"the last one is {newest}" if newest else "there is none yet"),
        )

    def refuse_unsaved(self) -> None:
        """Raise StorageError for a run at whose end the disk still did not take something."""
        self._disk.refuse_failing(checkpoint.newest_path(self._folder))


# Validation ---------------------------------------------------------------------------------------


def validate(
    eval_step: EvalStep,
    state: TrainState,
    held_out: Images,
    key: Key[Array, ""],
    batch_size: int,
    *,
    devices: Devices,
) -> dict[str, float]:
    """Compute the metrics of all held-out images: means over the images, with the same noise each
    time, independent of the batch size.

    A first pass finds the mse, which no variance changes; a second one uses it as the variance of
    the likelihood.
    """
    began = time.monotonic()

    def pass_over_images(variance: float) -> dict[str, float]:
        sums: dict[str, float] = {}
        for first in range(0, len(held_out), batch_size):
            indices = np.arange(first, min(first + batch_size, len(held_out)))
            mine = held_out.read(indices[rows(devices, len(indices))])
            metrics = eval_step(state, mine, key, first, variance, batch=len(indices))
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(indices)
        return {name: value / len(held_out) for name, value in sums.items()}

    variance = max(pass_over_images(1.0)["mse"], MIN_VARIANCE)
    metrics = pass_over_images(variance)
    return metrics | {"images_per_second": 2 * len(held_out) / (time.monotonic() - began)}
