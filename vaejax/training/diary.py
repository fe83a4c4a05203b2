"""What a run writes down of itself while it learns; of several processes, one keeps it."""

from collections.abc import Mapping
from pathlib import Path

from vaejax.data.batches import Images
from vaejax.log import Metrics, Progress
from vaejax.training import page, parallel, run
from vaejax.training.album import Album
from vaejax.training.config import Recipe
from vaejax.training.plan import Schedule
from vaejax.training.state import TrainState


class Diary:
    """The figures, the pictures, the page and the line on the terminal, each when it is due."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        plan: Schedule,
        held_out: Images,
        *,
        devices: parallel.Devices,
        done: int,
    ):
        self._folder, self._plan, self._devices = folder, plan, devices
        run.record(folder, "running", devices=str(devices))
        self._album = Album(folder, recipe.model, held_out)
        self._progress = Progress(
            updates=plan.updates, epochs=plan.epochs, batch_size=recipe.batch_size, done=done
        )
        self._metrics = Metrics(folder, step=done)
        page.write(folder)

    def __enter__(self) -> "Diary":
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()

    def epoch_begins(self, state: TrainState, epoch: int) -> None:
        self._album.begin(parallel.here(state), epoch)

    def learned(self, figures: Mapping[str, float], *, step: int, epoch: int) -> None:
        """After update `step`, which counts from 0."""
        speed = {"images_per_second": self._progress.images_per_second(step + 1)}
        line = {**figures, **speed}
        self._metrics.write(step=step, epoch=epoch, split="train", figures=line)
        self._progress.show(step + 1, epoch, line, device_memory=parallel.memory_in_use())

    def epoch_ends(
        self, state: TrainState, figures: Mapping[str, float], *, step: int, epoch: int
    ) -> None:
        """With the figures of the held-out images, after `step` updates."""
        self._album.end(parallel.here(state), epoch)
        self._metrics.write(step=step, epoch=epoch, split="validation", figures=figures)
        self._progress.say(page.epoch_line(epoch, self._plan.epochs, figures))
        page.write(self._folder)

    def before_a_checkpoint(self) -> None:
        self._metrics.sync()

    def after_a_checkpoint(self) -> None:
        self._album.curves()

    def stopped(self, step: int) -> None:
        self._end("stopped")
        self._progress.say(f"stopped after update {step:,}, saved: the same command goes on there")

    def diverged(self) -> None:
        self._end("diverged")

    def finished(self, state: TrainState) -> None:
        self._album.curves()
        self._album.faces(parallel.here(state))
        self._album.film()
        self._end("finished")
        self._progress.say(page.what_next(self._folder))

    def _end(self, status: str) -> None:
        run.record(self._folder, status, devices=str(self._devices))
        page.write(self._folder)
