"""An ONNX graph from a JAX program.

JAX traces a function to a list of operations, a jaxpr. Each one that depends on the inputs becomes
a node or a few (`operations.py` says which); the others, such as the factors of a batch norm, are
computed now. A batch may have any size: the program is traced with one that is a large prime, so
that in every shape a multiple of it is the batch, and nothing else is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
from jax.extend.core import Literal
from jaxtyping import PyTree
from onnx import helper, numpy_helper

from vaejax.errors import UserError
from vaejax.export.exported import as_half
from vaejax.kernels import plain_operations
from vaejax.system import versions

BATCH = 1_048_583  # a prime above every field of a model: no other dimension is a multiple of it
OPSET, IR_VERSION = 17, 8  # which onnxruntime 1.12 and later read
SMALL = 64  # numbers of a constant that is compared by its content
MAX_BYTES = 2**31 - 2**20  # of a file of Protocol Buffers

Shape = tuple[int, ...]


class Value(NamedTuple):
    """A value that depends on the inputs.

    Its shape in the graph broadcasts to its shape in the JAX program: what only repeats numbers is
    left to the operation that reads them.
    """

    name: str
    shape: Shape


Operand = Value | np.ndarray


class Equation(NamedTuple):
    """An operation of a JAX program."""

    name: str
    params: Mapping[str, Any]
    operands: Sequence[Operand]
    inputs: Sequence[Any]  # `shape` and `dtype` of each operand in the JAX program
    outputs: Sequence[Any]  # and of each result


Convert = Callable[["Graph", Equation], Sequence[Operand]]

# Functions that are called: their operations take the place of the call.
CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "remat", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}
COMPILED = {"jit", "pjit"}  # of them, those that are computed as a whole if nothing is unknown
# What NumPy does to constants without a copy; JAX would compile a program for each shape.
VIEWS = {"broadcast_in_dim", "expand_dims", "reshape", "rev", "squeeze", "transpose"}


def is_batch(dimension: int) -> bool:
    """Tell whether a dimension is the batch, or the batch times something."""
    return dimension > 0 and dimension % BATCH == 0


class Graph:
    """The nodes and constants of an ONNX graph, as they come."""

    def __init__(self, operations: Mapping[str, Convert], *, half: bool):
        self.nodes: list[onnx.NodeProto] = []
        self.missing: set[str] = set()  # operations that have no form in ONNX here
        self._operations, self._half = operations, half
        self._constants: dict[Any, str] = {}
        self._initializers: list[onnx.TensorProto] = []
        self._casts: list[onnx.NodeProto] = []
        self._weights: dict[int, str] = {}  # names of arrays, by their id
        self._kept: list[np.ndarray] = []  # alive, so that their ids are no other arrays'
        self._count = 0
        self._batch_of = ""

    # Values

    def new_name(self) -> str:
        """Return a name that nothing has yet."""
        self._count += 1
        return f"v{self._count}"

    def name_weights(self, weights: PyTree) -> list[np.ndarray]:
        """Give each array of a tree its path as its name in the file; return the arrays."""
        leaves = jax.tree_util.tree_leaves_with_path(weights)
        for path, array in leaves:
            self._weights[id(array)] = jax.tree_util.keystr(path, simple=True, separator=".")
        self._kept += [array for _, array in leaves]
        return [array for _, array in leaves]

    def constant(self, array: np.ndarray) -> str:
        """Return the name of a constant, which is written once."""
        name = self._weights.get(id(array), "")
        small = not name and array.size < SMALL
        key = (array.dtype.str, array.shape, array.tobytes()) if small else id(array)
        if key in self._constants:
            return self._constants[key]
        self._constants[key] = name = name or f"c{len(self._initializers)}"
        self._kept.append(array)
        stored = np.ascontiguousarray(array).reshape(array.shape)
        if self._half and (half := as_half(stored)) is not None:
            self._initializers.append(numpy_helper.from_array(half, f"{name}.float16"))
            kind = onnx.TensorProto.FLOAT
            self._casts.append(helper.make_node("Cast", [f"{name}.float16"], [name], to=kind))
        else:
            self._initializers.append(numpy_helper.from_array(stored, name))
        return name

    def input(self, name: str, shape: Shape) -> Value:
        """Return an input, whose first dimension is the batch's."""
        self._batch_of = self._batch_of or name
        return Value(name, shape)

    def operand(self, x: Operand) -> str:
        """Return the name of a value or a constant."""
        return x.name if isinstance(x, Value) else self.constant(x)

    def op(
        self, kind: str, *operands: Operand, shape: Shape | None = None, **attributes: Any
    ) -> Value:
        """Add a node with one output, of this shape or of that which the operands broadcast to."""
        name = self.new_name()
        inputs = [self.operand(x) for x in operands]
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        if shape is None:
            shape = np.broadcast_shapes(*(x.shape for x in operands))
        return Value(name, tuple(shape))

    # Shapes

    def full(self, x: Operand, shape: Shape) -> Operand:
        """Repeat the numbers of a value until it has this shape in the graph too."""
        if tuple(x.shape) == tuple(shape):
            return x
        if not any(map(is_batch, shape)):
            if isinstance(x, np.ndarray):
                return np.broadcast_to(x, shape)
            return self.op("Expand", x, integers(*shape), shape=shape)
        padded = (1,) * (len(shape) - len(x.shape)) + tuple(x.shape)
        # a 1 leaves the dimension as it is
        target = [1 if is_batch(d) and p == d else d for d, p in zip(shape, padded, strict=True)]
        return self.op("Expand", x, self.sizes(target), shape=shape)

    def sizes(self, shape: Sequence[int]) -> Operand:
        """Return a shape as a vector of the graph, with the size that the batch really has."""
        if not any(map(is_batch, shape)):
            return integers(*shape)
        if any(is_batch(d) and d != BATCH for d in shape):
            self.missing.add("a constant of several times the batch's size")
        batch = self.op("Shape", Value(self._batch_of, ()), shape=(1,), start=0, end=1)
        parts = [batch if is_batch(d) else integers(d) for d in shape]
        return self.op("Concat", *parts, shape=(len(shape),), axis=0)

    def reshape(self, x: Operand, shape: Shape) -> Operand:
        """Add a Reshape. ONNX computes one dimension, which is the batch's."""
        if isinstance(x, np.ndarray):
            return x.reshape(shape)
        if sum(map(is_batch, shape)) > 1:
            self.missing.add("a shape with the batch in two dimensions")
        sizes = integers(*(-1 if is_batch(d) else d for d in shape))
        return self.op("Reshape", x, sizes, shape=shape)

    def transpose(self, x: Operand, order: Sequence[int]) -> Operand:
        """Add a Transpose."""
        if isinstance(x, np.ndarray):
            return x.transpose(order)
        return self.op("Transpose", x, shape=tuple(x.shape[i] for i in order), perm=list(order))

    # Programs

    def run(self, jaxpr: Any, constants: Iterable[Any], arguments: Iterable[Operand]) -> list:
        """Add the operations of a jaxpr, and return its outputs."""
        known: dict[Any, Operand] = dict(zip(jaxpr.invars, arguments, strict=True))
        known |= zip(jaxpr.constvars, map(np.asarray, constants), strict=True)

        def read(atom: Any) -> Operand:
            if not isinstance(atom, Literal):
                return known[atom]
            like: Any = atom.aval
            return np.asarray(atom.val, like.dtype)

        for e in jaxpr.eqns:
            inputs, outputs = ([atom.aval for atom in atoms] for atoms in (e.invars, e.outvars))
            operands = [read(atom) for atom in e.invars]
            equation = Equation(e.primitive.name, e.params, operands, inputs, outputs)
            known |= zip(e.outvars, self._equation(e, equation), strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, e: Any, equation: Equation) -> Sequence[Operand]:
        name, operands = equation.name, equation.operands
        free = any(is_batch(d) for out in equation.outputs for d in out.shape)
        known = not free and not any(isinstance(x, Value) for x in operands)
        if name in CALLS and not (known and name in COMPILED):
            inner = next(e.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in e.params)
            closed = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            return self.run(*closed, operands)
        if not all(isinstance(out.dtype, np.dtype) for out in equation.outputs):
            return self.without(equation)  # keys of random numbers
        if known and name not in VIEWS:
            inputs = zip(operands, equation.inputs, strict=True)
            full = [np.broadcast_to(x, like.shape) for x, like in inputs]
            results = e.primitive.bind(*full, **e.params)
            return list(map(np.asarray, results if e.primitive.multiple_results else [results]))
        if name not in self._operations:
            return self.without(equation)
        return self._operations[name](self, equation)

    def without(self, equation: Equation, why: str = "") -> list[Value]:
        """Note an operation, or a use of it, without a form in ONNX; return what has its shape."""
        self.missing.add(why or equation.name)
        return [Value("", out.shape) for out in equation.outputs]

    def loop(
        self,
        step: Callable[[Value, Sequence[Value]], Sequence[Operand]],
        start: Sequence[Operand],
        likes: Sequence[Any],
        *,
        steps: int,
    ) -> list[Value]:
        """Add a Loop: `step` gives the next state from the number of the step and the state.

        `likes` have the `shape` and `dtype` of each part of the state.
        """
        count, going = Value(self.new_name(), ()), self.new_name()
        state = [Value(self.new_name(), like.shape) for like in likes]
        outside, self.nodes = self.nodes, []
        results = zip(step(count, state), likes, strict=True)
        ends = [self.op("Identity", self.full(x, like.shape)) for x, like in results]
        went = self.op("Identity", Value(going, ()))
        inside, self.nodes = self.nodes, outside
        flag = partial(helper.make_tensor_value_info, elem_type=onnx.TensorProto.BOOL, shape=[])
        number = helper.make_tensor_value_info(count.name, onnx.TensorProto.INT64, [])
        pairs = zip(state, ends, likes, strict=True)
        before, after = zip(
            *((_info(s.name, x), _info(e.name, x)) for s, e, x in pairs), strict=True
        )
        body = helper.make_graph(
            inside, "step", [number, flag(going), *before], [flag(went.name), *after]
        )
        names = [self.constant(np.asarray(steps, np.int64)), "", *map(self.operand, start)]
        finals = [Value(self.new_name(), like.shape) for like in likes]
        self.nodes.append(helper.make_node("Loop", names, [x.name for x in finals], body=body))
        return finals

    def finish(self, outputs: Mapping[str, Operand]) -> tuple[list, list]:
        """Return the nodes and the initializers that the outputs need, by their names."""
        for name, x in outputs.items():
            self.nodes.append(helper.make_node("Identity", [self.operand(x)], [name]))
        used, nodes = set(outputs), []
        for node in reversed([*self._casts, *self.nodes]):
            if used.intersection(node.output):
                nodes.append(node)
                used.update(_reads(node))
        return nodes[::-1], [i for i in self._initializers if i.name in used]


def _reads(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node reads, and the nodes inside it."""
    names = set(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            names |= _reads(inner)
    return names


def integers(*values: int) -> np.ndarray:
    """Return a vector of integers, as ONNX wants shapes and axes."""
    return np.asarray(values, np.int64)


class Network(NamedTuple):
    """A function of weights and inputs, to be written as ONNX."""

    name: str
    function: Callable[..., PyTree]  # (weights, *inputs) -> arrays [b ...]
    weights: PyTree
    inputs: Mapping[str, jax.ShapeDtypeStruct]  # by name, without the batch
    outputs: Sequence[str]  # the names of what the function returns, in the order of its leaves


def to_onnx(network: Network, *, half: bool, metadata: Mapping[str, str]) -> bytes:
    """Write a network as ONNX, opset 17, for batches of any size; checked by ONNX's own checker.

    It computes in float32. With `half` large arrays of weights are stored as float16. Raises
    UserError, with the operations, where some have no form in ONNX here, and for a network of more
    than 2 GiB.
    """
    from vaejax.export.operations import OPERATIONS

    weights = jax.tree.map(np.asarray, network.weights)
    shapes = {name: (BATCH, *like.shape) for name, like in network.inputs.items()}
    likes = [jax.ShapeDtypeStruct(shapes[n], x.dtype) for n, x in network.inputs.items()]
    with plain_operations():
        closed = jax.make_jaxpr(network.function)(weights, *likes)
    graph = Graph(OPERATIONS, half=half)
    arrays = graph.name_weights(weights)
    inputs = [graph.input(name, shape) for name, shape in shapes.items()]
    results = graph.run(closed.jaxpr, closed.consts, [*arrays, *inputs])
    avals = dict(zip(network.outputs, closed.out_avals, strict=True))
    outputs = {
        name: graph.full(x, aval.shape)
        for (name, aval), x in zip(avals.items(), results, strict=True)
    }
    _require_all(graph.missing, network.name)
    nodes, initializers = graph.finish(outputs)
    model = helper.make_model(
        helper.make_graph(
            nodes,
            network.name,
            [_info(name, like) for name, like in zip(shapes, likes, strict=True)],
            [_info(name, aval) for name, aval in avals.items()],
            initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="vaejax",
        producer_version=versions()["vaejax"],
    )
    helper.set_model_props(model, dict(metadata))
    if model.ByteSize() > MAX_BYTES:
        raise UserError(f"the {network.name} has more than 2 GiB, and ONNX needs it in one file")
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _require_all(missing: set[str], name: str) -> None:
    if missing:
        raise UserError(
            f"the {name} cannot be written as ONNX, which has no form here for: "
            f"{', '.join(sorted(missing))}"
        )


def _info(name: str, aval: Any) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype))
    return helper.make_tensor_value_info(
        name, kind, ["batch" if d == BATCH else d for d in aval.shape]
    )
