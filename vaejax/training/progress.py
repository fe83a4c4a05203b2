"""The line that shows how far a run is."""

import sys
import time
from collections.abc import Mapping

from vaejax import terminal
from vaejax.metrics import shown_in
from vaejax.system import format_bytes, format_duration, process_memory


class Progress:
    """One line that is overwritten; a plain line every 30 s where there is no terminal."""

    def __init__(
        self, *, updates: int, epochs: int, batch_size: int, done: int = 0, what: str = ""
    ):
        self._updates, self._epochs, self._batch_size = updates, epochs, batch_size
        self._what = f"{what} " if what else ""  # is trained, where it is not the autoencoder
        self._live = sys.stderr.isatty()
        self._start = self._last = (time.monotonic(), done)
        self._shown = -float("inf")

    def images_per_second(self, done: int) -> float:
        """Return the speed since the last call, everything in between included."""
        (then, before), self._last = self._last, (time.monotonic(), done)
        return (done - before) * self._batch_size / (self._last[0] - then)

    def show(
        self, done: int, epoch: int, metrics: Mapping[str, float], *, device_memory: int | None
    ) -> None:
        """Show the line after `done` updates; `device_memory` is in bytes, if the device knows."""
        now = time.monotonic()
        if now - self._shown < (0.1 if self._live else 30):
            return
        self._shown = now
        start, first = self._start
        left = (now - start) / (done - first) * (self._updates - done)
        shown = {n: f"{n} {metrics[n]:.5f}" for n in shown_in("progress") if n in metrics}
        first_two, others = list(shown.values())[:2], list(shown.values())[2:]
        parts = [
            f"{self._what}epoch {epoch}/{self._epochs}",
            f"step {done:,}/{self._updates:,}",
            f"{format_duration(left)} left",
            *first_two,
            f"{metrics['images_per_second']:,.0f} images/s",
            *others,
            f"RAM {format_bytes(process_memory())}",
        ]
        if device_memory is not None:
            parts.append(f"device {format_bytes(device_memory)}")
        columns = terminal.width(sys.stderr)
        line = terminal.join(parts, columns and columns - 1)
        if columns:
            line = "\r" + line.ljust(columns - 1)
        print(line, end="" if columns else "\n", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        terminal.say(text)
