"""A disk that is full, or away, does not end a run."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vaejax.errors import StorageError


class Disk:
    """What cannot be written at the moment. One line says so, and one that it can be again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._place = folder, _place(folder)
        self.failing: dict[str, OSError] = {}  # what, and why
        self.say: Callable[[str], None] = print

    @contextmanager
    def tries(self, what: str) -> Iterator[None]:
        """A block that writes; an OSError in it is told, and remembered until it goes well.

        Raises StorageError where the run's folder is another one than at the start: nothing is
        written into what somebody put there, and no half of a run is begun.
        """
        if _place(self._folder) != self._place:
            raise StorageError(
                f"{self._folder} was moved or deleted while the run wrote into it: stopped. Where "
                "it is put back, the same command goes on from its last checkpoint"
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


@contextmanager
def refused_by_disk(path: Path) -> Iterator[None]:
    """An OSError in what must be written before a run can begin becomes a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from None


def _place(folder: Path) -> tuple[int, int] | None:
    """Which folder on which disk it is, whatever its name."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino
