"""What a run writes while it trains: metrics.jsonl, TensorBoard, its status."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from vaejax.data.batches import Images
from vaejax.files import atomic, open_to_append
from vaejax.metrics import read_lines
from vaejax.models import autoencoder
from vaejax.priors import Prior
from vaejax.training import copies, run, visualize
from vaejax.training.config import RunSpec
from vaejax.training.devices import device_memory_in_use
from vaejax.training.guards import DiskGuard
from vaejax.training.progress import Progress
from vaejax.training.step import TrainState
from vaejax.training.visualize import Visualizer

# protobuf makes these while it runs
Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
Session: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]


BOARD_PICTURES = 50  # of each kind, in TensorBoard


class Logger:
    """Writes metrics, pictures, status, README and the live line of a run, each when it is due.

    Of several processes one has it. A full disk ends none of it but the checkpoint, which needs the
    metrics on the disk.
    """

    def __init__(
        self,
        folder: Path,
        spec: RunSpec,
        images: Images,
        held_out: Images,
        *,
        environment: Mapping[str, str],
        disk: DiskGuard,
        done: int,
    ):
        self._folder, self._spec, self._disk = folder, spec, disk
        self._images, self._held_out = images, held_out
        # kept here too: a file that is damaged meanwhile is written anew, and is no reason to end
        before = run.last_status(folder)
        self._status = run.initial_status(spec, environment=environment, before=before)
        self._write_status()
        self._model = autoencoder.from_json(spec.model)
        learned = spec.schedule.prior != "normal"
        self._visualizer = Visualizer(
            folder, self._model, held_out, training=images if learned else None
        )
        schedule = spec.schedule
        self._progress = Progress(
            updates=schedule.updates, epochs=schedule.epochs, batch_size=spec.batch_size, done=done
        )
        if done and not (folder / "metrics.jsonl").exists():
            print(f"warning: metrics.jsonl is gone: no metrics of the first {done:,} updates")
        # of a run that is extended in the middle of an epoch, that one is validated at its end only
        validated = done % schedule.updates_per_epoch == 0 or done == schedule.updates
        self._metrics = MetricsWriter(folder, step=done, validated=validated)
        self._lines, self._lines_plotted = 0, -1  # of metrics, that this process has written
        disk.say = self._progress.say
        visualize.write_readme(folder, spec, self._status)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()

    def epoch_begins(self, state: TrainState, epoch: int) -> None:
        """Draw the pictures before the first epoch."""
        if epoch == 1:
            with self._disk.attempt("a picture"):
                self._visualizer.draw_beginning(state)

    def train_metrics(self, metrics: Mapping[str, float], *, step: int, epoch: int) -> None:
        """Write the metrics of update `step`, which counts from 0; non-finite ones are left out."""
        speed = {"images_per_second": self._progress.images_per_second(step + 1)}
        line = {**metrics, **speed}
        finite = {name: value for name, value in line.items() if np.isfinite(value)}
        with self._disk.attempt("a line of metrics"):
            self._metrics.write(step=step, epoch=epoch, split="train", metrics=finite)
        self._lines += 1
        self._progress.show(step + 1, epoch, line, device_memory=device_memory_in_use())

    def epoch_ends(
        self, state: TrainState, metrics: Mapping[str, float], *, step: int, epoch: int
    ) -> None:
        """Write the metrics of the held-out images after `step` updates, and draw the pictures."""
        with self._disk.attempt("a picture"):
            drawn = self._visualizer.draw_epoch_end(state, epoch)
            if epoch % -(-self._spec.schedule.epochs // BOARD_PICTURES) == 0:
                self._metrics.add_pictures(drawn, step=step)
        with self._disk.attempt("a line of metrics"):
            self._metrics.write(step=step, epoch=epoch, split="validation", metrics=metrics)
        self._lines += 1
        self._progress.say(visualize.epoch_line(epoch, self._spec.schedule.epochs, metrics))
        self._write_readme()

    def before_checkpoint(self) -> None:
        """Put all metrics onto the disk. Raises OSError if it does not take them."""
        self._metrics.sync()

    def after_checkpoint(self, step: int) -> None:
        """Record the checkpoint, and plot the curves."""
        with self._disk.attempt("the run's status"):
            self._write_status(saved=step)
        with self._disk.attempt("the curves"):
            self._draw_curves()
        self._write_readme()

    def stopped(self, step: int, *, saved: bool) -> None:
        """Record that the run stopped after `step` updates."""
        self._end("stopped")
        if saved:
            text = f"stopped after update {step:,}, saved: the same command resumes there"
            self._progress.say(text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._progress.say(text)

    def stopped_in_prior(self) -> None:
        """Record that the run stopped while its prior was fitted, whatever the reason."""
        self._end("stopped")

    def diverged(self) -> None:
        """Record that the run diverged."""
        self._end("diverged")

    def finished(self, state: TrainState, prior: Prior | None) -> None:
        """Draw the pictures of the end, the new faces from the learned prior where there is one.

        Say whether those are copies of training faces.

        What could not be written is tried again by the same command: the run counts as stopped
        until then.
        """
        with self._disk.attempt("a picture of the end"):
            self._draw_curves()
            self._visualizer.draw_faces(state, prior)
            schedule = self._spec.schedule
            self._visualizer.draw_film(
                updates=schedule.updates, per_epoch=schedule.updates_per_epoch
            )
        found = None
        with self._disk.attempt("the search for copies"):
            found = self._visualizer.draw_nearest(state, prior, self._images, self._held_out)
        if self._disk.failing:
            self._end("stopped")
            return
        if found:
            self._status = {**self._status, "copies": found}
            self._progress.say(copies.sentence(found))
        self._end("finished")
        self._progress.say(visualize.what_next(self._folder, self._model))

    def attempt(self, what: str) -> AbstractContextManager[None]:
        """Run a block that writes something else; a full disk does not end the run."""
        return self._disk.attempt(what)

    def _draw_curves(self) -> None:
        """Plot the curves, unless nothing was written since they were plotted."""
        if self._lines != self._lines_plotted:
            self._visualizer.draw_curves()
            self._lines_plotted = self._lines

    def _end(self, status: str) -> None:
        with self._disk.attempt("the run's status"):
            self._write_status(status=status)
        self._write_readme()

    def _write_readme(self) -> None:
        with self._disk.attempt("the run's README"):
            visualize.write_readme(self._folder, self._spec, self._status)

    def _write_status(self, **changes: Any) -> None:
        run.write_spec(self._folder, self._spec)
        self._status = run.write_status(self._folder, self._status, **changes)


class PriorLogger:
    """Writes the metrics of a flow, into the folder of the prior, and shows its live line."""

    def __init__(
        self,
        folder: Path,
        spec: RunSpec,
        *,
        disk: DiskGuard,
        done: int,
    ):
        schedule = spec.schedule
        folder.mkdir(parents=True, exist_ok=True)
        self._disk = disk
        self._parts = schedule.epochs
        self._progress = Progress(
            updates=schedule.updates,
            epochs=self._parts,
            batch_size=spec.batch_size,
            done=done,
            what="prior",
        )
        self._metrics = MetricsWriter(folder, step=done)
        disk.say = self._progress.say

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()

    def epoch_begins(self, state: TrainState, epoch: int) -> None:
        """Draw nothing."""

    def train_metrics(self, metrics: Mapping[str, float], *, step: int, epoch: int) -> None:
        """Write the metrics of update `step`, which counts from 0; non-finite ones are left out."""
        line = {**metrics, "images_per_second": self._progress.images_per_second(step + 1)}
        finite = {name: value for name, value in line.items() if np.isfinite(value)}
        with self._disk.attempt("a line of the prior's metrics"):
            self._metrics.write(step=step, epoch=epoch, split="train", metrics=finite)
        self._progress.show(step + 1, epoch, line, device_memory=device_memory_in_use())

    def epoch_ends(
        self, state: TrainState, metrics: Mapping[str, float], *, step: int, epoch: int
    ) -> None:
        """Write the metrics of the held-out faces after `step` updates."""
        with self._disk.attempt("a line of the prior's metrics"):
            self._metrics.write(step=step, epoch=epoch, split="validation", metrics=metrics)
        self._progress.say(f"prior {visualize.epoch_line(epoch, self._parts, metrics)}")

    def before_checkpoint(self) -> None:
        """Put all metrics onto the disk. Raises OSError if it does not take them."""
        self._metrics.sync()

    def after_checkpoint(self, step: int) -> None:
        """Do nothing: a flow has no status of its own."""

    def stopped(self, step: int, *, saved: bool) -> None:
        """Say that the run stopped after `step` updates of its prior."""
        if saved:
            self._progress.say(
                f"stopped after update {step:,} of the prior, saved: the same command resumes there"
            )


class MetricsWriter:
    """`metrics.jsonl`, one object a line, and the same metrics for TensorBoard.

    A run that resumes from a checkpoint at `step` writes again what came after it: those lines are
    removed first, so that every step is there once; and with them the validation of `step` itself,
    unless that is an update which is `validated`.

    Raises OSError if the disk does not take a line. None is lost: the next call tries again.
    """

    def __init__(self, folder: Path, *, step: int, validated: bool = True):
        self.path = folder / "metrics.jsonl"
        kept = self._drop_after(step, validated)
        self._file = open_to_append(self.path)
        self._unwritten = bytearray()
        self._board = _Board(folder / "tensorboard", step=step)
        for line in kept:  # TensorBoard drops all of `step`, that of validation as well
            self._board.add(line)

    def _drop_after(self, step: int, validated: bool) -> list[dict]:
        """Remove the lines after `step`; return those of `step` itself, which stay."""
        if not self.path.exists():
            return []
        kept = []
        with atomic(self.path) as partial, partial.open("w", encoding="utf-8") as new:
            for line, entry in read_lines(self.path):
                # a train line is of the state before update `step` + 1, a validation line of `step`
                if entry["step"] < step + (validated and entry["split"] == "validation"):
                    new.write(line)
                    if entry["step"] == step:
                        kept.append(entry)
        return kept

    def write(self, *, step: int, epoch: int, split: str, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        line = {"step": step, "epoch": epoch, "split": split, **metrics}
        self._unwritten += f"{json.dumps(line)}\n".encode()
        try:
            self._flush()
        finally:
            self._board.add(line)

    def add_pictures(self, drawn: Mapping[str, np.ndarray], *, step: int) -> None:
        """Show pictures `[h w c]` in TensorBoard."""
        for name, picture in drawn.items():
            self._board.add_picture(name, picture, step=step)

    def _flush(self) -> None:
        while self._unwritten:
            del self._unwritten[: self._file.write(self._unwritten)]

    def sync(self) -> None:
        """Put all lines onto the disk: a checkpoint must not be ahead of them."""
        self._flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._board.close()


class _Board:
    """Metrics for TensorBoard, without tensorboardX' own thread.

    That thread dies of a full disk, and the next write would wait for it for ever.
    """

    def __init__(self, folder: Path, *, step: int):
        self._folder, self._step = folder, step
        self._unwritten: list[Mapping[str, Any]] = []  # what may not be on the disk yet
        self._events: EventsWriter | None = None

    def add(self, line: Mapping[str, Any]) -> None:
        self._unwritten.append(line)
        if self._events is None:
            self.flush()
        else:
            with self._new_file_on_error():
                self._write(self._events, line)

    def add_picture(self, name: str, picture: np.ndarray, *, step: int) -> None:
        """Write a picture; one that the disk does not take is lost, as it is a PNG file as well."""
        if self._events is not None:
            with self._new_file_on_error():
                image = summary.image(name, picture, dataformats="HWC")
                event = Event(wall_time=time.time(), step=step, summary=image)
                self._events.write_event(event)

    def flush(self) -> None:
        """Write everything; after a failure into a new file, since the old one's end is unknown."""
        with self._new_file_on_error():
            if self._events is None:
                self._events = self._open()
                for line in self._unwritten:
                    self._write(self._events, line)
            self._events.flush()
        self._unwritten.clear()

    @contextmanager
    def _new_file_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._events = None
            raise

    def close(self) -> None:
        if self._events is not None:
            with suppress(OSError):
                self._events.close()

    def _open(self) -> EventsWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        events = EventsWriter(str(self._folder / "events"), filename_suffix=f".{time.time_ns()}")
        start = Session(status=Session.START)  # TensorBoard drops what came after this step
        events.write_event(Event(wall_time=time.time(), step=self._step, session_log=start))
        return events

    def _write(self, events: EventsWriter, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if name not in ("step", "epoch", "split"):
                scalar = summary.scalar(f"{name}/{line['split']}", value)
                events.write_event(Event(wall_time=time.time(), step=line["step"], summary=scalar))
