"""A checkpoint when it is due, or a line that says why there is none."""

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain

from vaejax.errors import StorageError
from vaejax.log import size
from vaejax.training import checkpoint, parallel, programs
from vaejax.training.config import Config
from vaejax.training.diary import Diary
from vaejax.training.disk import Disk
from vaejax.training.state import TrainState

CHECKPOINT = "a checkpoint"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save(
    folder: Path,
    state: TrainState,
    batches: grain.DatasetIterator,
    settings: Mapping[str, Any],
    config: Config,
    disk: Disk,
    diary: Diary | None,
) -> None:
    """Write a checkpoint, or say that it could not be written."""
    with disk.tries(CHECKPOINT):
        if diary:
            diary.before_a_checkpoint()
        try:
            checkpoint.save(folder, state, batches, settings=settings, keep=config.keep)
        except OSError as error:
            needed, free = programs.state_bytes(state), shutil.disk_usage(folder).free
            newest = last(folder)
            raise OSError(
                error.errno,
                f"{error.strerror} ({size(needed)} are needed, {size(free)} are free); "
                + (f"the last one is {newest}" if newest else "there is none yet"),
            ) from error
    parallel.release()
    if diary and CHECKPOINT not in disk.failing:
        diary.after_a_checkpoint(int(state.step))


def refuse_unsaved(folder: Path, disk: Disk) -> None:
    """StorageError for a run at whose end the disk still did not take something."""
    if disk.failing:
        what = "; ".join(f"{name}: {why.strerror or why}" for name, why in disk.failing.items())
        newest = last(folder)
        from_there = f"goes on from {newest}" if newest else "begins again"
        full = any(why.errno in NO_ROOM for why in disk.failing.values())
        raise StorageError(
            f"not everything could be written to {folder}: {what}. "
            f"{'Make room: the' if full else 'The'} same command {from_there}"
        )


def last(folder: Path) -> Path | None:
    steps = [s for s in checkpoint.steps(folder) if checkpoint.is_finished(folder, s)]
    return checkpoint.path(folder, steps[-1]) if steps else None
