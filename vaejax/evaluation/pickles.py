"""Pickles read as data: nothing in them is ever executed.

A pickle is a program for a machine with a stack. `pickletools.genops` takes it apart and runs
nothing; the machine here knows only what files of weights hold: dictionaries, lists, tuples, texts,
numbers, bytes, NumPy's arrays of float32, and torch's tensors. Whatever else a file asks for is
refused by its name.
"""

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST = 200_000  # instructions of a pickle: those of Inception's weights are some 20,000


@dataclass(frozen=True)
class Name:
    """A function or class that a pickle asks for: compared with texts, and never looked up."""

    text: str  # "OrderedDict of collections"


@dataclass
class Array:
    """One that a file declares first and fills later, as NumPy's pickles do."""

    values: np.ndarray | None = None


@dataclass
class Dtype:
    code: str
    order: str = ""


@dataclass(frozen=True)
class Storage:
    """Where a tensor's values lie: one after the other, with others' perhaps."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class Tensor:
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in values


MARK = Name("the mark")
STORAGES = {"FloatStorage of torch": "<f4", "LongStorage of torch": "<i8"}
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


def run(file: io.BytesIO) -> Any:
    """What the pickle at this place of the file builds.

    Raises ValueError for anything that weights do not need.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for count, (code, given, _) in enumerate(pickletools.genops(file)):
        if count > MOST:
            raise ValueError(f"it has more than {MOST:,} instructions")
        match code.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name]())
            case name if name in LITERALS:
                stack.append(given)
            case name if name in TUPLES:
                stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
            case "TUPLE":
                stack.append(tuple(_since_mark(stack)))
            case "BINPUT" | "LONG_BINPUT":
                memo[given] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[given])
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if code.name == "APPEND" else _since_mark(stack)
                as_kind(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if code.name == "SETITEM" else None
                _set(stack, items or _since_mark(stack))
            case "GLOBAL":
                module, _, attribute = str(given).rpartition(" ")
                stack.append(Name(f"{attribute} of {module}"))
            case "STACK_GLOBAL":
                attribute, module = as_kind(stack.pop(), str), as_kind(stack.pop(), str)
                stack.append(Name(f"{attribute} of {module}"))
            case "REDUCE":
                arguments, called = as_kind(stack.pop(), tuple), as_kind(stack.pop(), Name)
                stack.append(_call(called, arguments))
            case "BUILD":
                state = stack.pop()
                _fill(stack[-1], state)
            case "BINPERSID":
                stack.append(_storage(as_kind(stack.pop(), tuple)))
            case other:
                raise ValueError(f"it has an instruction that weights do not need, {other}")
    (result,) = stack
    return result


def as_kind(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"it has a {type(value).__name__} in the place of a {kind.__name__}")
    return value


def _since_mark(stack: list[Any]) -> list[Any]:
    items = []
    while (item := stack.pop()) is not MARK:
        items.append(item)
    return items[::-1]


def _set(stack: list[Any], items: list[Any]) -> None:
    target = as_kind(stack[-1], dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[as_kind(key, str)] = value


def _call(called: Name, arguments: tuple[Any, ...]) -> Any:
    """The few functions that files of weights call, in words of our own."""
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


def _fill(target: Any, state: Any) -> None:
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
            raise ValueError(f"it fills a {type(target).__name__} as weights are not filled")


def _sizes(values: tuple[Any, ...]) -> tuple[int, ...]:
    if not all(type(n) is int and 0 <= n < 2**40 for n in values):
        raise ValueError("it has an array of a shape that is none")
    return values


def _storage(identity: tuple[Any, ...]) -> Storage:
    match identity:
        case ("storage", Name(text), str() as key, str(), int() as count, *rest):
            # older files name a part of a storage here, which no state_dict has needed since
            if text in STORAGES and rest in ([], [None]):
                return Storage(key, STORAGES[text], count)
    raise ValueError("it has tensors of a kind that weights do not need")
