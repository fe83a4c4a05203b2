"""What each operation of a JAX program is in ONNX: a function of the graph and the operation.

JAX's names are those of `jax.lax`, ONNX's those of its list of operators, version 17.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
from onnx import helper

from vaejax.export.graph import (
    Convert,
    Equation,
    Graph,
    Operand,
    Shape,
    Value,
    integers,
    is_batch,
)

Operands = Sequence[Operand]
Paddings = Sequence[tuple[int, int]]  # before and after; negative ones crop

ELEMENTWISE = {  # of one value, or of several that broadcast
    "abs": "Abs",
    "add": "Add",
    "add_any": "Add",
    "and": "And",
    "ceil": "Ceil",
    "cos": "Cos",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
}
UNCHANGED = "copy", "copy_p", "optimization_barrier", "stop_gradient"
REDUCTIONS = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


def _full(graph: Graph, e: Equation) -> list[Operand]:
    """Return the operands in their shapes of the JAX program."""
    return [graph.full(x, like.shape) for x, like in zip(e.operands, e.inputs, strict=True)]


def _number(e: Equation, value: int) -> np.ndarray:
    """Return a number of the result's type."""
    return np.asarray(value, e.outputs[0].dtype)


# Number by number ---------------------------------------------------------------------------------


def elementwise(graph: Graph, e: Equation, *, kind: str) -> Operands:
    """Apply the operator of this name number by number."""
    return [graph.op(kind, *e.operands)]


def unchanged(_: Graph, e: Equation) -> Operands:
    """Pass the operands on."""
    return e.operands


def convert_type(graph: Graph, e: Equation) -> Operands:
    """Write `convert_element_type` as Cast."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(e.params["new_dtype"]))
    return [graph.op("Cast", *e.operands, to=kind)]


def expm1(graph: Graph, e: Equation) -> Operands:
    """Compute exp(x) - 1, for which ONNX has no operator."""
    return [graph.op("Sub", graph.op("Exp", *e.operands), _number(e, 1))]


def erfc(graph: Graph, e: Equation) -> Operands:
    """Compute 1 - erf(x)."""
    return [graph.op("Sub", _number(e, 1), graph.op("Erf", *e.operands))]


def log1p(graph: Graph, e: Equation) -> Operands:
    """Compute log(1 + x)."""
    return [graph.op("Log", graph.op("Add", *e.operands, _number(e, 1)))]


def rsqrt(graph: Graph, e: Equation) -> Operands:
    """Compute 1 / sqrt(x)."""
    return [graph.op("Reciprocal", graph.op("Sqrt", *e.operands))]


def square(graph: Graph, e: Equation) -> Operands:
    """Compute x x."""
    return [graph.op("Mul", *e.operands, *e.operands)]


def integer_power(graph: Graph, e: Equation) -> Operands:
    """Compute a power of a constant whole number."""
    if e.params["y"] == 2:
        return square(graph, e)
    return [graph.op("Pow", *e.operands, _number(e, e.params["y"]))]


def not_equal(graph: Graph, e: Equation) -> Operands:
    """Compare for inequality."""
    return [graph.op("Not", graph.op("Equal", *e.operands))]


def select(graph: Graph, e: Equation) -> Operands:
    """Write `select_n` of two cases as Where."""
    if e.inputs[0].dtype != bool:
        graph.missing.add("select_n by a number")
    condition, if_false, if_true = e.operands[:3]
    return [graph.op("Where", condition, if_true, if_false)]


def clamp(graph: Graph, e: Equation) -> Operands:
    """Limit x to low and high."""
    low, x, high = e.operands
    return [graph.op("Min", graph.op("Max", x, low), high)]


# Shapes -------------------------------------------------------------------------------------------


def broadcast(graph: Graph, e: Equation) -> Operands:
    """Insert dimensions of 1: numbers are repeated only where an operation needs it."""
    (x,), (out,) = e.operands, e.outputs
    shape = [1] * len(out.shape)
    for dimension, size in zip(e.params["broadcast_dimensions"], x.shape, strict=True):
        shape[dimension] = size
    return [x if tuple(shape) == x.shape else graph.reshape(x, tuple(shape))]


def reshape(graph: Graph, e: Equation) -> Operands:
    """Write a change of shape as Reshape, with all numbers there."""
    return [graph.reshape(_full(graph, e)[0], e.outputs[0].shape)]


def transpose(graph: Graph, e: Equation) -> Operands:
    """Permute the dimensions."""
    return [graph.transpose(e.operands[0], e.params["permutation"])]


def concatenate(graph: Graph, e: Equation) -> Operands:
    """Join arrays along a dimension."""
    shape, axis = e.outputs[0].shape, e.params["dimension"]
    return [graph.op("Concat", *_full(graph, e), shape=shape, axis=axis)]


def stack(graph: Graph, e: Equation) -> Operands:
    """Join arrays along a new dimension."""
    (out,), axis = e.outputs, e.params["axis"]
    shape = (*out.shape[:axis], 1, *out.shape[axis + 1 :])
    parts = [graph.reshape(x, shape) for x in _full(graph, e)]
    return [graph.op("Concat", *parts, shape=out.shape, axis=axis)]


def _slice(
    graph: Graph,
    x: Operand,
    starts: Sequence[int],
    ends: Sequence[int],
    strides: Sequence[int] | None = None,
) -> Operand:
    """Add a Slice; a batch is taken as a whole."""
    shape, axes = list(x.shape), []
    strides = strides or [1] * len(shape)
    for i, (start, end, stride) in enumerate(zip(starts, ends, strides, strict=True)):
        if (start, end, stride) != (0, x.shape[i], 1):
            axes.append(i)
            shape[i] = -(-(end - start) // stride)
            if is_batch(x.shape[i]):
                graph.missing.add("a slice of the batch")
    if not axes:
        return x
    bounds = (integers(*(values[i] for i in axes)) for values in (starts, ends))
    steps = integers(*(strides[i] for i in axes))
    return graph.op("Slice", x, *bounds, integers(*axes), steps, shape=tuple(shape))


def slice_(graph: Graph, e: Equation) -> Operands:
    """Take a part along each dimension."""
    p = e.params
    (x,) = _full(graph, e)
    return [_slice(graph, x, p["start_indices"], p["limit_indices"], p["strides"])]


def split(graph: Graph, e: Equation) -> Operands:
    """Take the parts along a dimension one by one."""
    (x,), axis, first, parts = _full(graph, e), e.params["axis"], 0, []
    for size in e.params["sizes"]:
        starts, ends = [0] * len(x.shape), list(x.shape)
        starts[axis], ends[axis] = first, first + int(size)
        parts.append(_slice(graph, x, starts, ends))
        first += int(size)
    return parts


def reverse(graph: Graph, e: Equation) -> Operands:
    """Turn dimensions around, by steps of -1."""
    (x,) = _full(graph, e)
    axes = e.params["dimensions"]
    if isinstance(x, np.ndarray):
        return [np.flip(x, axes)]
    if any(is_batch(x.shape[axis]) for axis in axes):
        graph.missing.add("a reversal of the batch")
    # -1 is the last number; an end before the first one includes it
    starts, ends, steps = ([n] * len(axes) for n in (-1, -(2**31), -1))
    bounds = map(lambda values: integers(*values), (starts, ends, axes, steps))
    return [graph.op("Slice", x, *bounds, shape=x.shape)]


def pad(graph: Graph, e: Equation) -> Operands:
    """Put a number around an array, or crop where its width is negative."""
    (x, value), low, high = _full(graph, e), [], []
    for before, after, inside in e.params["padding_config"]:
        if inside:
            graph.missing.add("pad between numbers")
        low.append(before)
        high.append(after)
    return [graph.op("Pad", x, integers(*low, *high), value, shape=e.outputs[0].shape)]


def gather(graph: Graph, e: Equation) -> Operands:
    """Take rows of a table by their numbers, as an embedding does."""
    (table, rows), p, (out,) = _full(graph, e), e.params, e.outputs
    d, rank = p["dimension_numbers"], len(out.shape)
    whole = tuple(p["slice_sizes"]) == (1, *table.shape[1:])
    last = tuple(range(rank - len(table.shape) + 1, rank))
    if not whole or d.start_index_map != (0,) or tuple(d.offset_dims) != last:
        graph.missing.add("gather of other things than rows of a table")
    if d.collapsed_slice_dims != (0,) or d.operand_batching_dims:
        graph.missing.add("gather of other things than rows of a table")
    rows = graph.reshape(rows, rows.shape[:-1])
    return [graph.op("Gather", table, rows, shape=out.shape, axis=0)]


# Sums, products and windows -----------------------------------------------------------------------


def _refuse_batch(graph: Graph, e: Equation, axes: Sequence[int]) -> None:
    """Note a result that depends on the size of the batch: it was computed with another one."""
    if any(is_batch(e.inputs[0].shape[axis]) for axis in axes):
        graph.missing.add(f"{e.name} over the batch")


def reduce_sum(graph: Graph, e: Equation) -> Operands:
    """Sum over dimensions."""
    axes = e.params["axes"]
    _refuse_batch(graph, e, axes)
    (x,), shape = _full(graph, e), e.outputs[0].shape
    return [graph.op("ReduceSum", x, integers(*axes), shape=shape, keepdims=0)]


def reduce_extreme(graph: Graph, e: Equation, *, kind: str) -> Operands:
    """Take the largest or smallest number over dimensions."""
    axes = list(e.params["axes"])
    _refuse_batch(graph, e, axes)
    return [graph.op(kind, *_full(graph, e), shape=e.outputs[0].shape, axes=axes, keepdims=0)]


def arg_extreme(graph: Graph, e: Equation, *, kind: str) -> Operands:
    """Find the index of the largest or smallest number along a dimension."""
    (axis,) = e.params["axes"]
    _refuse_batch(graph, e, [axis])
    shape = e.outputs[0].shape
    index = graph.op(kind, *_full(graph, e), shape=shape, axis=axis, keepdims=0)
    return [graph.op("Cast", index, to=helper.np_dtype_to_tensor_dtype(e.outputs[0].dtype))]


def dot(graph: Graph, e: Equation) -> Operands:
    """Multiply matrices as MatMul where it does just that, else as Einsum."""
    (contracted_a, contracted_b), (batch_a, batch_b) = e.params["dimension_numbers"]
    (a, b), shape = _full(graph, e), e.outputs[0].shape
    last = len(a.shape) - 1
    if len(b.shape) == 2 and not batch_a and (contracted_a, contracted_b) == ((last,), (0,)):
        return [graph.op("MatMul", a, b, shape=shape)]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    of_a, of_b = [""] * len(a.shape), [""] * len(b.shape)
    pairs = [*zip(batch_a, batch_b, strict=True), *zip(contracted_a, contracted_b, strict=True)]
    for i, j in pairs:
        of_a[i] = of_b[j] = next(letters)
    of_a, of_b = ([letter or next(letters) for letter in each] for each in (of_a, of_b))
    alone_a = [c for i, c in enumerate(of_a) if i not in (*batch_a, *contracted_a)]
    alone_b = [c for j, c in enumerate(of_b) if j not in (*batch_b, *contracted_b)]
    of_result = [*(of_a[i] for i in batch_a), *alone_a, *alone_b]
    equation = f"{''.join(of_a)},{''.join(of_b)}->{''.join(of_result)}"
    return [graph.op("Einsum", a, b, shape=shape, equation=equation)]


def _crop(graph: Graph, x: Operand, paddings: Paddings) -> Operand:
    """Cut off what negative paddings of the last dimensions say; ONNX has none."""
    low, high = ([0] * (len(x.shape) - len(paddings)) for _ in range(2))
    low += [min(before, 0) for before, _ in paddings]
    high += [min(after, 0) for _, after in paddings]
    if not any(low) and not any(high):
        return x
    shape = tuple(n + a + b for n, a, b in zip(x.shape, low, high, strict=True))
    return graph.op("Pad", x, integers(*low, *high), shape=shape)


def _pads(paddings: Paddings) -> list[int]:
    """Return positive paddings in ONNX's order."""
    return [max(low, 0) for low, _ in paddings] + [max(high, 0) for _, high in paddings]


def convolution(graph: Graph, e: Equation) -> Operands:
    """Convolve in ONNX's order: image N C H W, kernel O I H W."""
    (x, kernel), p, (out,) = _full(graph, e), e.params, e.outputs
    numbers, dilated = p["dimension_numbers"], any(n != 1 for n in p["lhs_dilation"])
    groups = p["feature_group_count"]
    if not isinstance(kernel, np.ndarray):
        return graph.without(e, "a convolution whose kernel depends on the input")
    if p["batch_group_count"] != 1 or (dilated and groups != 1):
        graph.missing.add("a transposed convolution of groups")
    kernel = np.transpose(kernel, numbers.rhs_spec)
    settings: dict[str, Any] = {
        "kernel_shape": kernel.shape[2:],
        "dilations": p["rhs_dilation"],
        "group": groups,
    }
    x = graph.transpose(x, numbers.lhs_spec)
    shape = tuple(out.shape[i] for i in numbers.out_spec)
    if dilated:
        y = _transposed_convolution(graph, p, x, kernel, shape, settings)
    else:
        settings |= {"strides": p["window_strides"], "pads": _pads(p["padding"])}
        y = graph.op("Conv", _crop(graph, x, p["padding"]), kernel, shape=shape, **settings)
    return [graph.transpose(y, np.argsort(numbers.out_spec).tolist())]


def _transposed_convolution(
    graph: Graph,
    p: Any,
    x: Operand,
    kernel: np.ndarray,
    shape: Shape,
    settings: dict[str, Any],
) -> Value:
    """Convolve an image with zeros between its pixels, which ONNX's ConvTranspose does.

    It turns the kernel, and what it calls padding is cut off: of a kernel of k taps, with a
    dilation of d, k' - 1 less JAX's padding, where k' = d (k - 1) + 1.
    """
    if any(n != 1 for n in p["window_strides"]):
        graph.missing.add("a convolution with stride of an image with zeros between its pixels")
    kernel = np.flip(kernel.swapaxes(0, 1), tuple(range(2, kernel.ndim)))
    reach = [d * (k - 1) for k, d in zip(kernel.shape[2:], p["rhs_dilation"], strict=True)]
    cut = [(r - low, r - high) for r, (low, high) in zip(reach, p["padding"], strict=True)]
    more = [(max(-low, 0), max(-high, 0)) for low, high in cut]  # zeros around the result
    inside = [n - low - high for n, (low, high) in zip(shape[2:], more, strict=True)]
    y = graph.op(
        "ConvTranspose",
        *(x, kernel),
        shape=(*shape[:2], *inside),
        strides=p["lhs_dilation"],
        pads=_pads(cut),
        **settings,
    )
    if not any(map(any, more)):
        return y
    low, high = ([0, 0, *(pair[i] for pair in more)] for i in range(2))
    return graph.op("Pad", y, integers(*low, *high), shape=shape)


def pool(graph: Graph, e: Equation, *, kind: str) -> Operands:
    """Pool windows of images N H W C, whose channels come last."""
    p, (out,) = e.params, e.outputs
    window, strides, padding = (p[n] for n in ("window_dimensions", "window_strides", "padding"))
    rank = len(window)
    plain = all(n == 1 for name in ("base_dilation", "window_dilation") for n in p[name])
    if not plain or (window[0], window[-1], strides[0], strides[-1]) != (1, 1, 1, 1):
        graph.missing.add(f"{e.name} of other things than the pixels of images")
    inner = slice(1, rank - 1)
    x = graph.transpose(_full(graph, e)[0], [0, rank - 1, *range(1, rank - 1)])
    y = graph.op(
        kind,
        x,
        shape=(out.shape[0], out.shape[-1], *out.shape[inner]),
        kernel_shape=window[inner],
        strides=strides[inner],
        pads=_pads(padding[inner]),
        **({"count_include_pad": 1} if kind == "AveragePool" else {}),
    )
    if kind == "AveragePool":
        y = graph.op("Mul", y, _number(e, prod(window)))
    return [graph.transpose(y, [0, *range(2, rank), 1])]


# Loops --------------------------------------------------------------------------------------------


def scan(graph: Graph, e: Equation) -> Operands:
    """Write a scan without outputs at every step as ONNX's Loop."""
    p, inner = e.params, e.params["jaxpr"]
    constants, carried = p["num_consts"], p["num_carry"]
    if len(e.outputs) > carried:
        return graph.without(e, "scan with an output at every step")
    full = [graph.full(x, e.inputs[i].shape) for i, x in enumerate(e.operands) if i >= constants]
    start, rows = full[:carried], full[carried:]

    def step(count: Value, state: Sequence[Value]) -> Operands:
        i: Operand = count
        if p["reverse"]:
            i = graph.op("Sub", np.asarray(p["length"] - 1, np.int64), count)
        row = [graph.op("Gather", x, i, shape=x.shape[1:], axis=0) for x in rows]
        operands = [*e.operands[:constants], *state, *row]
        return graph.run(inner.jaxpr, inner.consts, operands)[:carried]

    return graph.loop(step, start, e.outputs[:carried], steps=p["length"])


OPERATIONS: dict[str, Convert] = {
    **{name: partial(elementwise, kind=kind) for name, kind in ELEMENTWISE.items()},
    **dict.fromkeys(UNCHANGED, unchanged),
    **{name: partial(reduce_extreme, kind=kind) for name, kind in REDUCTIONS.items()},
    "argmax": partial(arg_extreme, kind="ArgMax"),
    "argmin": partial(arg_extreme, kind="ArgMin"),
    "broadcast_in_dim": broadcast,
    "clamp": clamp,
    "concatenate": concatenate,
    "conv_general_dilated": convolution,
    "convert_element_type": convert_type,
    "dot_general": dot,
    "erfc": erfc,
    "expand_dims": reshape,
    "expm1": expm1,
    "gather": gather,
    "integer_pow": integer_power,
    "log1p": log1p,
    "ne": not_equal,
    "pad": pad,
    "reduce_sum": reduce_sum,
    "reduce_window_max": partial(pool, kind="MaxPool"),
    "reduce_window_sum": partial(pool, kind="AveragePool"),
    "reshape": reshape,
    "rev": reverse,
    "rsqrt": rsqrt,
    "scan": scan,
    "select_n": select,
    "slice": slice_,
    "split": split,
    "square": square,
    "squeeze": reshape,
    "stack": stack,
    "transpose": transpose,
}
