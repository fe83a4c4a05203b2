"""Errors for people: what, where, how many, how to mend it. The programs print them as one line."""


class VaejaxError(Exception):
    """Anything that a person can mend; `exit_code` is what the program ends with."""

    exit_code = 1


class UserError(VaejaxError):
    """A request that cannot be met: refused before any work is done, and nothing is written."""

    exit_code = 2


class CheckpointError(VaejaxError):
    """No checkpoint can be used, and starting from zero was not asked for."""

    exit_code = 3


class DivergedError(VaejaxError):
    """The loss stopped being finite."""

    exit_code = 4


class StorageError(VaejaxError):
    """The disk did not take what a run had to write, until its end."""

    exit_code = 5


class MemoryLowError(VaejaxError):
    """Too little memory was left: the run saved itself, and the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h
