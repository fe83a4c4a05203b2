"""Attributes of faces, from a CSV with a column `file` and one column an attribute.

`file` is the path below the data's root. An empty cell, or a file without a row, is unknown.
"""

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vaejax.errors import UserError
from vaejax.files import printable, read_bytes

FILE = "file"  # the column of paths
MAX_BYTES = 256 << 20  # of a CSV: ten thousand faces take one megabyte
MAX_VALUES = 256  # of an attribute: more are texts or numbers, and no attribute


class Labels(NamedTuple):
    """The attributes of faces, by file."""

    attributes: dict[str, list[str]]  # the values of each attribute, in alphabetical order
    files: dict[str, tuple[int, ...]]  # for each attribute the number of its value, 0 if unknown
    sha256: str  # of the CSV, in hex; "" without one

    def of(self, paths: Iterable[str]) -> Int[np.ndarray, "n a"]:
        """Return the numbers of the values of each file's attributes, from 1; 0 if unknown."""
        unknown = (0,) * len(self.attributes)
        rows = [self.files.get(path, unknown) for path in paths]
        return np.asarray(rows, np.int32).reshape(len(rows), len(unknown))


NO_LABELS = Labels({}, {}, "")


def read_labels(path: Path) -> Labels:
    """Read a CSV of labels.

    Raises UserError for a file that cannot be read, has no column `file` or no attribute, names a
    file twice, or has an attribute with more than 256 values.
    """
    name = printable(path)
    try:
        content = read_bytes(path, max_bytes=MAX_BYTES, links=True)
        rows = list(csv.DictReader(content.decode("utf-8-sig").splitlines()))
    except OSError as error:
        raise UserError(f"--labels {name} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {name} is no CSV in UTF-8: {error}") from None
    columns = [column for column in (rows[0] if rows else {}) if column]
    if FILE not in columns or len(columns) < 2:
        raise UserError(
            f"--labels {name}: it needs a column {FILE!r} with paths below the data's root, and a "
            f"column for each attribute; its columns are {', '.join(columns)[:200] or 'none'}"
        )
    columns.remove(FILE)
    attributes = {
        column: sorted({value for row in rows if (value := (row[column] or "").strip())})
        for column in columns
    }
    for column, values in attributes.items():
        if not 0 < len(values) <= MAX_VALUES:
            raise UserError(
                f"--labels {name}: the attribute {column!r} has {len(values):,} values; it needs 1 "
                f"to {MAX_VALUES}"
            )
    number = {c: {v: i for i, v in enumerate(vs, 1)} for c, vs in attributes.items()}
    files: dict[str, tuple[int, ...]] = {}
    for row in rows:
        file = row[FILE] or ""
        if file in files:
            raise UserError(f"--labels {name}: {printable(file)} has two rows")
        files[file] = tuple(number[c].get((row[c] or "").strip(), 0) for c in columns)
    return Labels(attributes, files, hashlib.sha256(content).hexdigest())


def parse_condition(text: str, attributes: dict[str, list[str]]) -> list[int]:
    """Return the number of each attribute's value in "hair_colour=blue,glasses=no"; 0 if not named.

    Raises UserError, with what there is, for an unknown attribute or value.
    """
    numbers = dict.fromkeys(attributes, 0)
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or name not in attributes:
            known = "; ".join(f"{n}={'|'.join(vs[:20])}" for n, vs in attributes.items())
            raise UserError(f"--condition {part}: there is {known or 'none in this run'}")
        if value not in attributes[name]:
            raise UserError(f"--condition {part}: {name} is {', '.join(attributes[name])}")
        numbers[name] = 1 + attributes[name].index(value)
    return list(numbers.values())
