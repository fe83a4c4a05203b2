"""The command line: how it is parsed and how errors are shown; what all experiments share."""

import errno
import importlib.util
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar

import tyro

from vaejax import commands, latent_commands
from vaejax.errors import Interrupted, StorageError, UserError, VaejaxError
from vaejax.files import printable

if TYPE_CHECKING:
    from vaejax.training.config import Config

Flags = TypeVar("Flags", bound="Config")
RENAMED = {  # flags and values of earlier versions, and what they are called now
    "--objective": "--loss mse_kl|sigma_vae",
    "--norm frozen": "--norm affine",
}


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Show an error that a person can mend as one line, and end with its exit code."""
    _open_streams()
    try:
        yield
    except Interrupted as error:  # the run has said so itself
        sys.exit(error.exit_code)
    except VaejaxError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a disk that is full, a file that may not be read
        where = f"{printable(error.filename)}: " if error.filename else ""
        print(f"error: {where}{printable(error.strerror or str(error))}", file=sys.stderr)
        sys.exit(StorageError.exit_code)


def _open_streams() -> None:
    """Connect streams that were closed by the caller (`>&-`) to the null device.

    Otherwise the next file that is opened would be standard output.
    """
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
def unbreakable_output() -> Iterator[None]:
    """Keep a run alive when its output breaks: a closed pipe, a closed terminal, a missing letter.

    What is written to them is lost, and the run goes on.
    """
    old = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = UnbreakableStream(sys.stdout), UnbreakableStream(sys.stderr)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.close()
        sys.stdout, sys.stderr = old
        signal.signal(signal.SIGHUP, hangup)


class UnbreakableStream(io.TextIOBase):
    """A stream that never fails.

    What a full disk does not take is kept for the next write; what nobody reads any more is lost.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Write text, as far as anybody takes it."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, as far as it can be."""
        self._attempt(self._stream.flush)

    def close(self) -> None:
        """Flush what could fail later; the stream itself stays open."""
        self._attempt(self._stream.flush, last=True)

    def isatty(self) -> bool:
        """Tell whether it is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor of the stream."""
        return self._stream.fileno()

    def _attempt(self, act: Callable[[], Any], *, last: bool = False) -> None:
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
    from vaejax.training import devices

    with errors_as_messages(), unbreakable_output():
        flags = parse(config, description=description)
        devices.configure(keep=not flags.dry_run)
        devices.initialize_processes(flags.coordinator, flags.processes, flags.process_id)
        if not devices.is_first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
        main(flags)


def parse(flags: Any, **settings: Any) -> Any:
    """Parse the command line as a dataclass. Raises UserError, in one line, for a wrong one."""
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
        words = " ".join(sys.argv[1:]).replace("=", " ")
        for old, new in RENAMED.items():
            if f" {old} " in f" {words} ":
                raise UserError(f"{old} is called {new} now") from None
        raise UserError(f"{wrong} (--help lists what there is)") from None


DESCRIPTION = """An autoencoder laboratory for faces.

`vaejax --import FILE.py COMMAND` first imports a file that defines models of your own.
"""


def _import_files() -> None:
    """Import the files of leading `--import FILE.py`, so that the models they define are known."""
    while sys.argv[1:2] == ["--import"]:
        if len(sys.argv) < 3 or not os.path.isfile(sys.argv[2]):
            raise UserError(f"--import {' '.join(sys.argv[2:3])}: there is no such file")
        spec = importlib.util.spec_from_file_location(Path(sys.argv[2]).stem, sys.argv[2])
        if spec is None or spec.loader is None:
            raise UserError(f"--import {sys.argv[2]}: it is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        del sys.argv[1:3]


def main() -> None:
    """Run the `vaejax` command."""
    kinds = (
        Annotated[commands.Prepare, tyro.conf.subcommand("prepare")]
        | Annotated[commands.Sample, tyro.conf.subcommand("sample")]
        | Annotated[commands.FitPrior, tyro.conf.subcommand("fit-prior")]
        | Annotated[commands.Denoise, tyro.conf.subcommand("denoise")]
        | Annotated[commands.Reconstruct, tyro.conf.subcommand("reconstruct")]
        | Annotated[latent_commands.Interpolate, tyro.conf.subcommand("interpolate")]
        | Annotated[latent_commands.Traverse, tyro.conf.subcommand("traverse")]
        | Annotated[latent_commands.ComputeDirections, tyro.conf.subcommand("directions")]
        | Annotated[latent_commands.Edit, tyro.conf.subcommand("edit")]
        | Annotated[latent_commands.ShowNearest, tyro.conf.subcommand("nearest")]
        | Annotated[commands.Export, tyro.conf.subcommand("export")]
        | Annotated[commands.Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[commands.Compare, tyro.conf.subcommand("compare")]
        | Annotated[commands.Summary, tyro.conf.subcommand("summary")]
        | Annotated[commands.Runs, tyro.conf.subcommand("runs")]
        | Annotated[commands.Doctor, tyro.conf.subcommand("doctor")]
    )
    run = {
        commands.Prepare: commands.prepare,
        commands.Sample: commands.sample,
        commands.FitPrior: commands.fit_prior,
        commands.Denoise: commands.denoise,
        commands.Reconstruct: commands.reconstruct,
        latent_commands.Interpolate: latent_commands.interpolate,
        latent_commands.Traverse: latent_commands.traverse,
        latent_commands.ComputeDirections: latent_commands.compute_directions,
        latent_commands.Edit: latent_commands.edit,
        latent_commands.ShowNearest: latent_commands.show_nearest,
        commands.Export: commands.export,
        commands.Evaluate: commands.evaluate,
        commands.Compare: commands.compare,
        commands.Summary: commands.summary,
        commands.Runs: commands.runs,
        commands.Doctor: commands.doctor,
    }
    with errors_as_messages():
        _import_files()
        command = parse(kinds, prog="vaejax", description=DESCRIPTION)
        run[type(command)](command)
