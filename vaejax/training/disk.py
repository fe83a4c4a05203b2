"""A disk that is full, or away, does not end a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Disk:
    """What cannot be written at the moment. One line says so, and one that it can be again."""

    def __init__(self) -> None:
        self.failing: dict[str, OSError] = {}  # what, and why
        self.say: Callable[[str], None] = print

    @contextmanager
    def tries(self, what: str) -> Iterator[None]:
        """A block that writes; an OSError in it is told, and remembered until it goes well."""
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
