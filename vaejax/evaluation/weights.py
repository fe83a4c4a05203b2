"""Weights from files of other programs: pickles of NumPy arrays, and files of torch.save.

Nothing in a file is ever executed. A pickle is a program for a machine with a stack.
`pickletools.genops` splits it into instructions and runs none of them; `parse_pickle` interprets
only what files of weights hold: dictionaries, lists, tuples, texts, numbers, bytes, NumPy arrays of
float32 and torch tensors. It refuses everything else by its name.
"""

import hashlib
import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.lib.stride_tricks import as_strided

from vaejax.errors import UserError
from vaejax.files import read_bytes

MAX_BYTES = 2**30  # of a file, which is held in memory: Inception's has 91 MiB
MAX_INSTRUCTIONS = 200_000  # of a pickle: that of Inception's weights has about 20,000
# what older files of torch.save begin with: the magic number, and the version of the format
TORCH_MAGIC, TORCH_VERSION = 0x1950A86A20F9469CFC6C, 1001
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
    """Read a pickle of nested dictionaries of float32 NumPy arrays.

    Raises UserError, which names the file, for anything else.
    """

    def parse(data: bytes) -> Any:
        return parse_pickle(io.BytesIO(data))

    return _read(path, parse)


def read_torch(path: Path) -> Weights:
    """Read a dictionary of tensors, such as a state_dict, that torch.save wrote.

    Raises UserError, which names the file, for anything else.
    """

    def parse(data: bytes) -> Any:
        return _parse_zip(data) if data[:2] == b"PK" else _parse_sequence(io.BytesIO(data))

    return _read(path, parse)


def _read(path: Path, parse: Callable[[bytes], Any]) -> Weights:
    try:
        data = read_bytes(path, max_bytes=MAX_BYTES, links=True)
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
    """Return the float32 array at a path of names, one inside the other.

    Raises UserError if it is missing or has another shape.
    """
    node: Any = weights.tree
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    values = node.values if isinstance(node, Array) else None
    spelled = "/".join(names)
    if values is None or values.dtype != np.float32:
        raise UserError(
            f"{weights.path} is no file of these weights: it has no {spelled}, of float32"
        )
    if values.shape != shape:
        raise UserError(
            f"{weights.path} is no file of these weights: "
            f"{spelled} has shape {values.shape} instead of {shape}"
        )
    return values


# Pickles ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """A function or class that a pickle names: it is compared with texts, and never imported."""

    text: str  # "OrderedDict of collections"


@dataclass
class Array:
    """An array that a file declares first and fills later, as pickles of NumPy do."""

    values: np.ndarray | None = None


@dataclass
class Dtype:
    """A NumPy dtype, with the byte order that a later instruction sets."""

    code: str
    order: str = ""


@dataclass(frozen=True)
class Storage:
    """A range of values in a file, which several tensors may share."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class Tensor:
    """A torch tensor: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in values


MARK = Name("the mark")
STORAGE_DTYPES = {"FloatStorage of torch": "<f4", "LongStorage of torch": "<i8"}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: MARK,
}
LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES",
    "SHORT_BINBYTES",
}  # fmt: skip
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def parse_pickle(file: io.BytesIO) -> Any:
    """Build what the pickle at the file's current position describes, and stop behind it.

    Raises ValueError for an instruction, a function or a type that weights do not need, and one of
    `DAMAGE` for a damaged pickle.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for count, (code, argument, _) in enumerate(pickletools.genops(file)):
        if count > MAX_INSTRUCTIONS:
            raise ValueError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        match code.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name]())
            case name if name in LITERALS:
                stack.append(argument)
            case name if name in TUPLES:
                stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
            case "TUPLE":
                stack.append(tuple(_pop_to_mark(stack)))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if code.name == "APPEND" else _pop_to_mark(stack)
                _require(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if code.name == "SETITEM" else None
                _set_items(stack, items or _pop_to_mark(stack))
            case "GLOBAL":
                module, _, attribute = str(argument).rpartition(" ")
                stack.append(Name(f"{attribute} of {module}"))
            case "STACK_GLOBAL":
                attribute, module = _require(stack.pop(), str), _require(stack.pop(), str)
                stack.append(Name(f"{attribute} of {module}"))
            case "REDUCE":
                arguments, called = _require(stack.pop(), tuple), _require(stack.pop(), Name)
                stack.append(_call(called, arguments))
            case "BUILD":
                state = stack.pop()
                _set_state(stack[-1], state)
            case "BINPERSID":
                stack.append(_storage(_require(stack.pop(), tuple)))
            case other:
                raise ValueError(f"it has an instruction that weights do not need, {other}")
    (result,) = stack
    return result


def _require(value: Any, kind: type) -> Any:
    """Return the value. Raises ValueError if it is of another type."""
    if type(value) is not kind:
        raise ValueError(f"it has a {type(value).__name__} instead of a {kind.__name__}")
    return value


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    items = []
    while (item := stack.pop()) is not MARK:
        items.append(item)
    return items[::-1]


def _set_items(stack: list[Any], items: list[Any]) -> None:
    target = _require(stack[-1], dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_require(key, str)] = value


def _call(called: Name, arguments: tuple[Any, ...]) -> Any:
    """Do what the few functions do that files of weights call, without calling them."""
    match called.text, arguments:
        case (
            "_reconstruct of numpy.core.multiarray" | "_reconstruct of numpy._core.multiarray",
            (Name("ndarray of numpy"), _, _),
        ):
            return Array()
        case "dtype of numpy", (str() as code, False, True):
            return Dtype(code)
        case "OrderedDict of collections", ():
            return {}
        case (
            "_rebuild_tensor_v2 of torch._utils",
            (Storage() as storage, int() as offset, tuple() as shape, tuple() as strides, *_),
        ):
            return Tensor(storage, offset, _sizes(shape), _sizes(strides))
    raise ValueError(f"it calls for {called.text!r}, which weights do not need")


def _set_state(target: Any, state: Any) -> None:
    match target, state:
        case Dtype(), (int(), str() as order, *_):
            target.order = order
        case Array(), (1, tuple() as shape, Dtype() as dtype, bool() as by_column, bytes() as data):
            if (dtype.order, dtype.code) != ("<", "f4"):
                raise ValueError(f"it has an array of {dtype.order + dtype.code!r}, not of '<f4'")
            order = "F" if by_column else "C"
            target.values = np.frombuffer(data, "<f4").reshape(_sizes(shape), order=order)
        case dict(), dict():
            pass  # what torch notes of the modules beside their weights
        case _:
            raise ValueError(f"it sets the state of a {type(target).__name__}, unlike weights")


def _sizes(values: tuple[Any, ...]) -> tuple[int, ...]:
    if not all(type(n) is int and 0 <= n < 2**40 for n in values):
        raise ValueError("it has an array of an impossible shape")
    return values


def _storage(description: tuple[Any, ...]) -> Storage:
    match description:
        case ("storage", Name(text), str() as key, str(), int() as count, *rest):
            # older files name a part of a storage here, which no state_dict has needed since
            if text in STORAGE_DTYPES and rest in ([], [None]):
                return Storage(key, STORAGE_DTYPES[text], count)
    raise ValueError("it has tensors of a type that weights do not need")


# The two formats of torch.save --------------------------------------------------------------------


def _parse_zip(data: bytes) -> dict[str, Array]:
    """Read the format since torch 1.6: a zip with a pickle and one member per storage."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        # uncompressed, and each only once: no small file grows large
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
        tree = _require(parse_pickle(io.BytesIO(archive.read(program))), dict)
        keys = {t.storage.key for t in tree.values() if isinstance(t, Tensor)}
        return _to_arrays(tree, {key: archive.read(f"{folder}data/{key}") for key in keys})


def _parse_sequence(file: io.BytesIO) -> dict[str, Array]:
    """Read the format before torch 1.6: pickles one after the other, then the storages, each after
    the number of its values."""
    if (parse_pickle(file), parse_pickle(file)) != (TORCH_MAGIC, TORCH_VERSION):
        raise ValueError("it was not written by torch.save")
    if _require(parse_pickle(file), dict).get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    tree, keys = _require(parse_pickle(file), dict), _require(parse_pickle(file), list)
    widths = {t.storage.key: t.storage.dtype for t in tree.values() if isinstance(t, Tensor)}
    stored = {}
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        stored[key] = file.read(max(0, count) * np.dtype(widths[key]).itemsize)
    return _to_arrays(tree, stored)


def _to_arrays(tree: dict[str, Any], stored: dict[str, bytes]) -> dict[str, Array]:
    """Turn tensors into arrays over the bytes of their storages. Raises ValueError for a tensor
    that reaches beyond its storage."""
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
