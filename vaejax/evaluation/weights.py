"""Weights out of the files of other programs: pickled NumPy arrays, and what torch.save wrote.

`vaejax.evaluation.pickles` reads what they are pickled in, and runs nothing.
"""

import hashlib
import io
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.lib.stride_tricks import as_strided

from vaejax.errors import UserError
from vaejax.evaluation.pickles import Array, Tensor, as_kind, run

LARGEST = 2**30  # bytes of a file, which is held in memory: those of Inception have 91 MiB
# what torch.save begins its older files with: its magic number, and the version of the format
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
# what reading a damaged or hostile file can raise, here or in the standard library
DAMAGE = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RuntimeError,
    EOFError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


class Weights(NamedTuple):
    """What a file holds: `tree` is nested dictionaries by name, with an `Array` at each leaf."""

    path: Path
    sha256: str
    tree: dict[Any, Any]


def read_numpy(path: Path) -> Weights:
    """A pickle of nested dictionaries of NumPy's float32 arrays.

    Raises UserError, which names the file, for whatever else it is.
    """

    def tree(data: bytes) -> Any:
        return run(io.BytesIO(data))

    return _read(path, tree)


def read_torch(path: Path) -> Weights:
    """What torch.save wrote of a dictionary of tensors, such as a state_dict.

    Raises UserError, which names the file, for whatever else it is.
    """

    def tree(data: bytes) -> Any:
        return _zipped(data) if data[:2] == b"PK" else _in_sequence(io.BytesIO(data))

    return _read(path, tree)


def _read(path: Path, parse: Callable[[bytes], Any]) -> Weights:
    try:
        if (size := path.stat().st_size) > LARGEST or not path.is_file():
            raise UserError(f"{path} is no file of weights: it is no file, or has {size:,} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the weights {path}: {error.strerror}") from None
    try:
        tree = parse(data)
        if not isinstance(tree, dict):
            raise ValueError("it holds no dictionary")
    except DAMAGE as error:
        reason = str(error)[:200] or type(error).__name__
        raise UserError(f"{path} is no file of weights that vaejax can read: {reason}") from None
    return Weights(path, hashlib.sha256(data).hexdigest(), tree)


def take(weights: Weights, *names: str, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """The float32 array of this name, or names one inside the other.

    Raises UserError if it is missing, or has another shape.
    """
    found: Any = weights.tree
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    values = found.values if isinstance(found, Array) else None
    spelled = "/".join(names)
    if values is None or values.dtype != np.float32:
        raise UserError(
            f"{weights.path} is no file of these weights: it has no {spelled}, of float32"
        )
    if values.shape != shape:
        raise UserError(
            f"{weights.path} is no file of these weights: "
            f"{spelled} has shape {values.shape} in the place of {shape}"
        )
    return values


# Torch's two formats. ----------------------------------------------------------------------------


def _zipped(data: bytes) -> dict[str, Array]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        # stored as they are, each once: no small file grows large
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is a compressed zip, which torch.save does not write")
        if sum(member.file_size for member in members) > len(data):
            raise ValueError("its parts declare more bytes than it has")
        (program,) = (m.filename for m in members if m.filename.endswith("/data.pkl"))
        folder = program.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            order = archive.read(f"{folder}byteorder")
            if order != b"little":
                raise ValueError("its numbers are not little-endian")
        tree = as_kind(run(io.BytesIO(archive.read(program))), dict)
        keys = {t.storage.key for t in tree.values() if isinstance(t, Tensor)}
        return _arrays(tree, {key: archive.read(f"{folder}data/{key}") for key in keys})


def _in_sequence(file: io.BytesIO) -> dict[str, Array]:
    """The format before version 1.6: pickles one after the other, then the storages, each after the
    number of its values."""
    if (run(file), run(file)) != (MAGIC, VERSION):
        raise ValueError("it was not written by torch.save")
    if as_kind(run(file), dict).get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    tree, keys = as_kind(run(file), dict), as_kind(run(file), list)
    widths = {t.storage.key: t.storage.dtype for t in tree.values() if isinstance(t, Tensor)}
    stored = {}
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        stored[key] = file.read(max(0, count) * np.dtype(widths[key]).itemsize)
    return _arrays(tree, stored)


def _arrays(tree: dict[str, Any], stored: dict[str, bytes]) -> dict[str, Array]:
    arrays = {}
    for name, tensor in tree.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} is no tensor")
        values = np.frombuffer(stored[tensor.storage.key], tensor.storage.dtype)
        if len(values) != tensor.storage.count:
            raise ValueError(f"{name!r} has {len(values):,} values of {tensor.storage.count:,}")
        steps = zip(tensor.shape, tensor.strides, strict=True)
        last = tensor.offset + sum((n - 1) * step for n, step in steps)
        if not 0 <= tensor.offset <= last < len(values) or math.prod(tensor.shape) > len(values):
            raise ValueError(f"{name!r} reaches beyond its values")
        strides = [step * values.itemsize for step in tensor.strides]
        arrays[name] = Array(as_strided(values[tensor.offset :], tensor.shape, strides))
    return arrays
