"""Text that fits a terminal: lines of columns, wrapped paragraphs, tables."""

import io
import os
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO, cast

from vaejax.files import open_to_append

UNKNOWN_WIDTH = 80


def width(stream: TextIO | io.TextIOBase) -> int | None:
    """Return the columns of the terminal that a stream writes to; None where it is none."""
    if not stream.isatty():
        return None
    with suppress(OSError):  # the terminal is gone
        return os.get_terminal_size(stream.fileno()).columns or UNKNOWN_WIDTH  # 0: not known
    return UNKNOWN_WIDTH


def join(parts: Sequence[str], columns: int | None) -> str:
    """Join as many of the first parts as fit, each of them whole; the first one always."""
    line = parts[0]
    for part in parts[1:]:
        longer = f"{line}  {part}"
        if columns is not None and len(longer) > columns:
            break
        line = longer
    return line


def wrap(text: str, columns: int | None) -> str:
    """Break the lines of a text between words, and indent what follows by two; lines that begin
    with a space, as of tables and commands, stay as they are."""
    if columns is None:
        return text
    return "\n".join(
        line
        if line.startswith(" ") or len(line) <= columns
        else textwrap.fill(
            line, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for line in text.split("\n")
    )


@contextmanager
def copied_to(path: Path) -> Iterator[None]:
    """Append every line that is printed meanwhile to a file as well, with its time.

    A line that is overwritten in the terminal, as of progress, is left out. A disk that takes
    nothing ends nothing.
    """
    file = None
    with suppress(OSError):
        file = open_to_append(path)
    if file is None:
        yield
        return
    old = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Copied(stream, file)) for stream in old)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = old
        file.close()


class _Copied(io.TextIOBase):
    """A stream that is also written to a log, line by line."""

    def __init__(self, stream: TextIO | io.TextIOBase, log: io.RawIOBase):
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        self._stream.write(text)
        *complete, self._line = (self._line + text).split("\n")
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        for line in complete:
            with suppress(OSError):
                self._log.write(f"{now}  {_visible(line)}\n".encode(errors="replace"))
        self._line = _visible(self._line)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def _visible(line: str) -> str:
    """Return what stays of a line that was overwritten."""
    return line.rpartition("\r")[2].removeprefix("\x1b[K")


def say(text: str) -> None:
    """Print a text, wrapped to the width of the terminal."""
    print(wrap(text, width(sys.stdout)), flush=True)


def table(
    rows: Sequence[Sequence[str]], *, left: Collection[int], columns: int | None = None
) -> list[str]:
    """Pad cells to columns of equal width: to the left in the columns `left`, else to the right.

    Where the lines are wider than `columns` characters, the last columns are left out, whole; the
    first two stay.
    """
    count = len(rows[0])
    left = {column % count for column in left}
    widths = [max(len(row[i]) for row in rows) for i in range(count)]
    shown = count
    while columns is not None and shown > 2 and 2 * shown + sum(widths[:shown]) > columns:
        shown -= 1

    def pad(column: int, cell: str) -> str:
        return cell.ljust(widths[column]) if column in left else cell.rjust(widths[column])

    lines = ["  ".join(pad(i, cell) for i, cell in enumerate(row[:shown])) for row in rows]
    return [f"  {line}".rstrip() for line in lines]
