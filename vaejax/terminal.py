"""Text that fits a terminal: lines of columns, wrapped paragraphs, tables."""

import io
import os
import sys
import textwrap
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TextIO

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
