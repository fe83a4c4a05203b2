"""What a run tells while it learns: metrics.jsonl, TensorBoard, one live line."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from tensorboardX import SummaryWriter


class Metrics:
    """`metrics.jsonl`, one object a line, and the same figures for TensorBoard.

    Whoever goes on from a checkpoint at `step` writes again what came after it: those lines are
    taken out first, so that every step stands once.
    """

    def __init__(self, folder: Path, *, step: int):
        self.path = folder / "metrics.jsonl"
        kept = self._drop_after(step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        for line in kept:  # TensorBoard drops all of `step`, that of validation as well
            self._show(line)

    def _drop_after(self, step: int) -> list[dict]:
        """Returns the lines of `step` itself, which stay."""
        if not self.path.exists():
            return []
        kept = []
        partial = self.path.with_name(".partial-metrics.jsonl")
        with self.path.open(encoding="utf-8") as old, partial.open("w", encoding="utf-8") as new:
            for line in old:
                try:
                    entry = json.loads(line)
                except ValueError:
                    break  # cut off, by a kill or a full disk
                # a train line is of the state before update `step` + 1, a validation line of `step`
                if entry["step"] < step + (entry["split"] == "validation"):
                    new.write(line)
                    if entry["step"] == step:
                        kept.append(entry)
        os.replace(partial, self.path)
        return kept

    def write(self, *, step: int, epoch: int, split: str, figures: Mapping[str, float]) -> None:
        line = {"step": step, "epoch": epoch, "split": split, **figures}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._show(line)

    def _show(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if name not in ("step", "epoch", "split"):
                self._board.add_scalar(f"{name}/{line['split']}", value, line["step"])

    def sync(self) -> None:
        """All lines on the disk: a checkpoint must not know of more than they do."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


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
