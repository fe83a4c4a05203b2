"""Exceptions whose message a user can act on; the programs print it as one line and exit.

A message says what is wrong, where and how often, and how to correct it. `exit_code` of a class is
the exit status of the program.
"""


class VaejaxError(Exception):
    """Base class of all errors that a user can correct."""

    exit_code = 1


class UserError(VaejaxError):
    """An invalid request: it is refused before any work is done, and nothing is written."""

    exit_code = 2


class CheckpointError(VaejaxError):
    """A run has no usable checkpoint: there is none yet, or all are damaged or of another run."""

    exit_code = 3


class DivergedError(VaejaxError):
    """The loss became NaN or infinite."""

    exit_code = 4


class StorageError(VaejaxError):
    """A run ended before the disk accepted everything that it had to write."""

    exit_code = 5


class Interrupted(VaejaxError):
    """A signal stopped the run, which has saved itself; the exit code is 128 plus its number."""

    def __init__(self, message: str, *, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class MemoryLowError(VaejaxError):
    """Too little memory was free: the run saved a checkpoint, and the same command resumes it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h
