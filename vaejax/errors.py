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
