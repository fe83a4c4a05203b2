"""The command line: how it is read, and how its errors are told; what the experiments share."""

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar

import tyro

from vaejax import commands
from vaejax.data.entries import printable
from vaejax.errors import StorageError, UserError, VaejaxError

if TYPE_CHECKING:
    from vaejax.training.config import Config

Flags = TypeVar("Flags", bound="Config")


@contextmanager
def for_people() -> Iterator[None]:
    """Errors that a person can mend become one line and an exit code."""
    _open_streams()
    try:
        yield
    except VaejaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a disk that is full, a file that may not be read
        where = f"{printable(error.filename)}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(StorageError.exit_code)


def _open_streams() -> None:
    """Streams that were closed by whoever started this (`>&-`) lead nowhere: or else the next file
    that is opened would be standard output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free one
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  as long as the process


@contextmanager
def unbroken() -> Iterator[None]:
    """A run does not end because nobody listens any more: a closed pipe, or a terminal that is
    gone, is written to as if it were there; nor because a terminal lacks a letter."""
    old = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Unbroken(sys.stdout), Unbroken(sys.stderr)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.close()
        sys.stdout, sys.stderr = old
        signal.signal(signal.SIGHUP, hangup)


class Unbroken(io.TextIOBase):
    """A stream that never fails: what a full disk does not take waits for the next writing, what
    nobody reads any more is lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        self._trying(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._trying(self._stream.flush)

    def close(self) -> None:
        """Leave nothing in the stream that could fail later, and the stream itself open."""
        self._trying(self._stream.flush, last=True)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def _trying(self, act: Callable[[], Any], *, last: bool = False) -> None:
        try:
            act()
        except OSError as error:
            if last or error.errno in (errno.EPIPE, errno.EIO):
                # for what is still in the buffer, and for all that others write there
                with suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
                    self._stream.flush()


def experiment(main: Callable[[Flags], None], config: type[Flags], description: str | None) -> None:
    """Run an experiment's `main` on the flags of the command line."""
    from vaejax.training import parallel

    with for_people(), unbroken():
        flags = parse(config, description=description)
        parallel.configure(keep=not flags.dry_run)
        parallel.join(flags.coordinator, flags.processes, flags.process_id)
        if not parallel.is_first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
        main(flags)


def parse(flags: Any, **settings: Any) -> Any:
    """The command line as a dataclass; a wrong one is a UserError, in a line, not in a box."""
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            return tyro.cli(flags, **settings)
    except SystemExit as stop:
        if stop.code != 2:
            raise
        # tyro draws a box: a title, a rule, what is wrong, a rule, where to read on
        plain = re.sub(r"[╭╮╰╯│]", " ", errors.getvalue())
        parts = [" ".join(part.split()) for part in re.split(r"[-─]{8,}", plain)]
        wrong = next(part for part in parts[1:] if part) if len(parts) > 1 else parts[0]
        wrong = wrong.split(" Got errors:")[0]  # every type that was tried
        raise UserError(f"{wrong} (--help lists what there is)") from None


def main() -> None:
    """The `vaejax` command."""
    known = (
        Annotated[commands.Prepare, tyro.conf.subcommand("prepare")]
        | Annotated[commands.Sample, tyro.conf.subcommand("sample")]
        | Annotated[commands.Denoise, tyro.conf.subcommand("denoise")]
        | Annotated[commands.Reconstruct, tyro.conf.subcommand("reconstruct")]
        | Annotated[commands.Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[commands.Compare, tyro.conf.subcommand("compare")]
        | Annotated[commands.Summary, tyro.conf.subcommand("summary")]
        | Annotated[commands.Runs, tyro.conf.subcommand("runs")]
        | Annotated[commands.Doctor, tyro.conf.subcommand("doctor")]
    )
    act = {
        commands.Prepare: commands.prepare,
        commands.Sample: commands.sample,
        commands.Denoise: commands.denoise,
        commands.Reconstruct: commands.reconstruct,
        commands.Evaluate: commands.evaluate,
        commands.Compare: commands.compare,
        commands.Summary: commands.summary,
        commands.Runs: commands.runs,
        commands.Doctor: commands.doctor,
    }
    with for_people():
        command = parse(known, prog="vaejax", description="An autoencoder laboratory for faces.")
        act[type(command)](command)
