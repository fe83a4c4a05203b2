"""What a run writes down of itself while it learns; of several processes, one keeps it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vaejax.data.batches import Images
from vaejax.log import Metrics, Progress
from vaejax.training import page, parallel, run
from vaejax.training.album import Album
from vaejax.training.config import Recipe
from vaejax.training.disk import Disk
from vaejax.training.plan import Schedule
from vaejax.training.state import TrainState


class Diary:
    """The figures, the pictures, the page and the line on the terminal, each when it is due.

    A full disk ends none of it but the checkpoint that needs the figures on the disk.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        recipe: Recipe,
        plan: Schedule,
        held_out: Images,
        *,
        devices: parallel.Devices,
        disk: Disk,
        done: int,
    ):
        self._folder, self._settings, self._plan = folder, settings, plan
        # kept here too: a file that is damaged meanwhile is written anew, and is no reason to end
        self._state = run.describe(settings, devices=str(devices), before=run.remembered(folder))
        self._record()
        self._model = recipe.model
        self._album = Album(folder, recipe.model, held_out)
        self._progress = Progress(
            updates=plan.updates, epochs=plan.epochs, batch_size=recipe.batch_size, done=done
        )
        if done and not (folder / "metrics.jsonl").exists():
            print(f"warning: metrics.jsonl is gone: no figures of the first {done:,} updates")
        # of a run that is extended in the middle of an epoch, that one is validated at its end only
        validated = done % plan.per_epoch == 0 or done == plan.updates
        self._metrics = Metrics(folder, step=done, validated=validated)
        self._disk = disk
        disk.say = self._progress.say
        page.write(folder, settings, self._state)

    def __enter__(self) -> "Diary":
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()

    def epoch_begins(self, state: TrainState, epoch: int) -> None:
        with self._disk.tries("a picture"):
            self._album.begin(parallel.here(state), epoch)

    def learned(self, figures: Mapping[str, float], *, step: int, epoch: int) -> None:
        """After update `step`, which counts from 0; what is no number is left out."""
        speed = {"images_per_second": self._progress.images_per_second(step + 1)}
        line = {**figures, **speed}
        numbers = {name: value for name, value in line.items() if np.isfinite(value)}
        with self._disk.tries("a line of figures"):
            self._metrics.write(step=step, epoch=epoch, split="train", figures=numbers)
        self._progress.show(step + 1, epoch, line, device_memory=parallel.memory_in_use())

    def epoch_ends(
        self, state: TrainState, figures: Mapping[str, float], *, step: int, epoch: int
    ) -> None:
        """With the figures of the held-out images, after `step` updates."""
        with self._disk.tries("a picture"):
            self._album.end(parallel.here(state), epoch)
        with self._disk.tries("a line of figures"):
            self._metrics.write(step=step, epoch=epoch, split="validation", figures=figures)
        self._progress.say(page.epoch_line(epoch, self._plan.epochs, figures))
        with self._disk.tries("the run's page"):
            page.write(self._folder, self._settings, self._state)

    def before_a_checkpoint(self) -> None:
        """All figures onto the disk; OSError where they cannot be had there."""
        self._metrics.sync()

    def after_a_checkpoint(self, step: int) -> None:
        with self._disk.tries("the run's state"):
            self._record(saved=step)
        with self._disk.tries("the curves"):
            self._album.curves()

    def stopped(self, step: int, *, saved: bool) -> None:
        self._end("stopped")
        if saved:
            text = f"stopped after update {step:,}, saved: the same command goes on there"
            self._progress.say(text)

    def diverged(self) -> None:
        self._end("diverged")

    def finished(self, state: TrainState) -> None:
        """The pictures of the end. What could not be written is tried again by the same command:
        the run counts as stopped until then."""
        with self._disk.tries("a picture of the end"):
            self._album.curves()
            self._album.faces(parallel.here(state))
            self._album.film()
        if self._disk.failing:
            self._end("stopped")
            return
        self._end("finished")
        self._progress.say(page.what_next(self._folder, self._model))

    def _end(self, status: str) -> None:
        with self._disk.tries("the run's page"):
            self._record(status=status)
            page.write(self._folder, self._settings, self._state)

    def _record(self, **changes: Any) -> None:
        run.write(self._folder, "config.json", self._settings)
        self._state = run.record(self._folder, self._state, **changes)
