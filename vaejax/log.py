"""What a run tells while it learns: metrics.jsonl, TensorBoard, one live line."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from vaejax.files import whole

# which protobuf makes while it runs
Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
Session: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]


class Metrics:
    """`metrics.jsonl`, one object a line, and the same figures for TensorBoard.

    Whoever goes on from a checkpoint at `step` writes again what came after it: those lines are
    taken out first, so that every step stands once; and with them the validation of `step` itself,
    unless that is an update which is `validated`.

    OSError tells that the disk did not take a line. None is lost by it: the next call tries again.
    """

    def __init__(self, folder: Path, *, step: int, validated: bool = True):
        self.path = folder / "metrics.jsonl"
        kept = self._drop_after(step, validated)
        self._file = self.path.open("ab", buffering=0)
        self._unwritten = bytearray()
        self._board = _Board(folder / "tensorboard", step=step)
        for line in kept:  # TensorBoard drops all of `step`, that of validation as well
            self._board.add(line)

    def _drop_after(self, step: int, validated: bool) -> list[dict]:
        """Returns the lines of `step` itself, which stay."""
        if not self.path.exists():
            return []
        kept = []
        with whole(self.path) as partial, partial.open("w", encoding="utf-8") as new:
            for line, entry in lines(self.path):
                # a train line is of the state before update `step` + 1, a validation line of `step`
                if entry["step"] < step + (validated and entry["split"] == "validation"):
                    new.write(line)
                    if entry["step"] == step:
                        kept.append(entry)
        return kept

    def write(self, *, step: int, epoch: int, split: str, figures: Mapping[str, float]) -> None:
        line = {"step": step, "epoch": epoch, "split": split, **figures}
        self._unwritten += f"{json.dumps(line)}\n".encode()
        try:
            self._flush()
        finally:
            self._board.add(line)

    def _flush(self) -> None:
        while self._unwritten:
            del self._unwritten[: self._file.write(self._unwritten)]

    def sync(self) -> None:
        """All lines on the disk: a checkpoint must not know of more than they do."""
        self._flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


class _Board:
    """The figures as TensorBoard reads them, without tensorboardX' own thread: that one dies of a
    full disk, and whoever writes next would wait for it for ever."""

    def __init__(self, folder: Path, *, step: int):
        self._folder, self._step = folder, step
        self._unwritten: list[Mapping[str, Any]] = []  # what may not be on the disk yet
        self._events: EventsWriter | None = None

    def add(self, line: Mapping[str, Any]) -> None:
        self._unwritten.append(line)
        if self._events is None:
            self.flush()
        else:
            with self._trying():
                self._write(self._events, line)

    def flush(self) -> None:
        """Everything into the file; after a failure, into a new one, since of the old one nobody
        knows where it ends."""
        with self._trying():
            if self._events is None:
                self._events = self._begun()
                for line in self._unwritten:
                    self._write(self._events, line)
            self._events.flush()
        self._unwritten.clear()

    @contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._events = None
            raise

    def close(self) -> None:
        if self._events is not None:
            with suppress(OSError):
                self._events.close()

    def _begun(self) -> EventsWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        events = EventsWriter(str(self._folder / "events"), filename_suffix=f".{time.time_ns()}")
        start = Session(status=Session.START)  # what came after this step is void
        events.write_event(Event(wall_time=time.time(), step=self._step, session_log=start))
        return events

    def _write(self, events: EventsWriter, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if name not in ("step", "epoch", "split"):
                figure = summary.scalar(f"{name}/{line['split']}", value)
                events.write_event(Event(wall_time=time.time(), step=line["step"], summary=figure))


def lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line of a `metrics.jsonl` with what it says, but for those that a kill or a full disk
    has cut off, or that are damaged; none where there is no such file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and line.endswith("\n") and _is_whole(entry):
                yield line, entry


def _is_whole(entry: Mapping[str, Any]) -> bool:
    numbers = all(_is_number(value) for key, value in entry.items() if key != "split")
    counts = all(isinstance(n := entry.get(k), int) and n >= 0 for k in ("step", "epoch"))
    return numbers and counts and entry.get("split") in ("train", "validation")


def _is_number(value: Any) -> bool:
    """A finite one, of which sums and pictures can be made."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


class Progress:
    """One line that is written over and over; plain lines, seldom, where there is no terminal."""

    def __init__(self, *, updates: int, epochs: int, batch_size: int, done: int = 0):
        self._updates, self._epochs, self._batch_size = updates, epochs, batch_size
        self._live = sys.stderr.isatty()
        self._start = self._last = (time.monotonic(), done)
        self._shown = -float("inf")

    def images_per_second(self, done: int) -> float:
        """Since this was last asked, with all that happened in between."""
        (then, before), self._last = self._last, (time.monotonic(), done)
        return (done - before) * self._batch_size / (self._last[0] - then)

    def show(
        self, done: int, epoch: int, figures: Mapping[str, float], *, device_memory: int | None
    ) -> None:
        """After `done` updates; `device_memory` in bytes, if the device says."""
        now = time.monotonic()
        if now - self._shown < (0.1 if self._live else 30):
            return
        self._shown = now
        start, first = self._start
        left = (now - start) / (done - first) * (self._updates - done)
        parts = [
            f"epoch {epoch}/{self._epochs}",
            f"step {done:,}/{self._updates:,}",
            *(f"{n} {figures[n]:.5f}" for n in ("loss", "mse", "kl") if n in figures),
            f"{figures['images_per_second']:,.0f} images/s",
            f"{duration(left)} left",
            f"RAM {size(memory())}",
        ]
        if device_memory is not None:
            parts.append(f"device {size(device_memory)}")
        line = "  ".join(parts)
        if self._live:
            width = 80
            with suppress(OSError):  # the terminal is gone
                width = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0: not known
            line = "\r" + line[: width - 1].ljust(width - 1)
        print(line, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        print(text, flush=True)


def memory() -> int:
    """Bytes of RAM that this process holds."""
    return psutil.Process().memory_info().rss


def size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:,.0f} MiB"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
