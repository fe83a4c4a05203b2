"""A disk that is full, or away, does not end a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Disk:
    """What cannot be written at the moment. One line says so, and one that it can be again."""

    def __init__(self) -> None:
        self.failing: dict[str, str] = {}  # what, and why
        self.say: Callable[[str], None] = print

    @contextmanager
    def tries(self, what: str) -> Iterator[None]:
        """A block that writes; an OSError in it is told, and remembered until it goes well."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            if self.failing.get(what) != reason:
                self.say(
                    f"warning: {what} cannot be written: {reason}. Training goes on, and tries "
                    "again when the next is due"
                )
            self.failing[what] = reason
        else:
            if self.failing.pop(what, None) is not None:
                self.say(f"{what} can be written again")
