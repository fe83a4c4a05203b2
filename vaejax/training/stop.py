"""Signals: a request to stop is met between two steps, a terminal that is gone is not missed."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Stop:
    """Ctrl-C and SIGTERM ask for a stop between two steps; a second one stops at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        old = {s: signal.signal(s, self._asked) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: object) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        # print() may be what was interrupted, and cannot be entered twice
        with suppress(OSError, ValueError):
            text = f"\n{self.signal.name}: finishing the step and saving …\n"
            os.write(sys.stderr.fileno(), text.encode())
