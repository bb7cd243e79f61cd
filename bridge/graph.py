"""The captured graph: what a torch module computes, as plain data. Serialisable, hashable, and without torch."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

FORMAT = 1
HIDING = "multi_head_attention_forward"
"""A function of torch.nn.functional that computes layers where no hook and no function mode sees them."""


class BridgeError(ValueError):
    """A torch module, graph or file that the bridge cannot take, with the cause and what to do."""


class Ref(NamedTuple):
    """The value of another node, a parameter, a buffer or an input, by name."""

    name: str


class Dtype(NamedTuple):
    """A dtype by numpy's name; `int64` and `float64` become 32 bit where JAX runs without x64."""

    name: str


class Node(NamedTuple):
    """One operation.

    Attributes:
      name: of its value.
      op: the ATen operator with overload (`aten.linear.default`), or `layer` for a call of a Flax layer.
      args: positional arguments; `Ref`s, `Dtype`s, numbers, strings, None and tuples of them.
      kwargs: keyword arguments as pairs.
      path: the torch module in whose forward it ran, as its dotted name (with `.multi_head_attention_forward()` where
        it ran in that function of torch's).
    """

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    path: str = ""

    def refs(self) -> Iterator[Ref]:
        """All values it reads, in order."""
        yield from refs_in((self.args, tuple(value for _, value in self.kwargs)))


class Input(NamedTuple):
    """One array (or constant) that the model takes.

    Attributes:
      name: where it sits in the call, e.g. `x` or `batch['ids']`.
      dtype: numpy's name of its dtype; empty for a constant.
      dims: each an int, or a symbol's expression such as `s0` or `2*s0`.
      value: of a constant.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...] = ()
    value: Any = None


class Tensor(NamedTuple):
    """A parameter or buffer of the torch module.

    Attributes:
      name: torch's dotted name.
      shape: torch's shape.
      dtype: numpy's name.
      kind: `parameter` or `buffer`.
      persistent: whether torch's `state_dict` holds it.
      frozen: a parameter with `requires_grad=False`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    persistent: bool = True
    frozen: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What one mode (evaluation or training) computes.

    Attributes:
      nodes: in order of execution.
      outputs: the flat outputs, Refs or constants.
      structure: how the outputs nest (see `nest`).
      updates: `(buffer, Ref)` for each buffer that the call changes.
      ranges: `(symbol, low, high)` of each free dimension; high None is unbounded.
      guards: conditions on the inputs' sizes, over names such as `d0_1` (input 0, dimension 1).
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]
    structure: Any
    updates: tuple[tuple[str, Ref], ...]
    inputs: tuple[Input, ...]
    ranges: tuple[tuple[str, int, int | None], ...]
    guards: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A captured torch module.

    Attributes:
      name: the torch class.
      evaluate, train: the two programs; None where only evaluation was captured.
      takes: how the inputs nest: `(args, kwargs)` with leaf indices.
      names: the parameters of torch's `forward`, for calls by keyword.
      tensors: parameters and buffers; programs refer to them by `torch:<dotted name>`.
      aliases: `(other name, name)` of tied tensors.
      modules: `(dotted name, class, plain)` of every torch module; plain: its forward is one layer of torch's and no
        more.
    """

    name: str
    evaluate: Program
    train: Program | None
    takes: Any
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    aliases: tuple[tuple[str, str], ...]
    modules: tuple[tuple[str, str, bool], ...]

    @functools.cached_property
    def digest(self) -> str:
        """A hash of all it says; equal graphs are one static argument to `jit`."""
        return hashlib.sha256(dumps(self).encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self.digest == other.digest

    def __repr__(self) -> str:
        training = f"{len(self.train.nodes)} in training" if self.train else "none in training"
        return f"Graph({self.name}: {len(self.evaluate.nodes)} nodes, {training}, {len(self.tensors)} tensors)"

    def programs(self) -> tuple[Program, ...]:
        """The program of evaluation, and that of training if there is one."""
        return (self.evaluate, self.train) if self.train else (self.evaluate,)


def refs_in(value: Any) -> Iterator[Ref]:
    """All Refs in nested arguments."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple) and not isinstance(value, Dtype):
        for item in value:
            yield from refs_in(item)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested arguments with `change` applied to each leaf (Refs and Dtypes are leaves)."""
    if isinstance(value, tuple) and not isinstance(value, Ref | Dtype):
        return tuple(mapped(item, change) for item in value)
    return change(value)


# --- nesting: tuples, lists and dicts around leaf indices ---


def nest(structure: Any, leaves: Any) -> Any:
    """Leaves put back as they were: `["tuple", ...]`, `["list", ...]`, `["dict", [key, ...], ...]` or an index."""
    if isinstance(structure, int):
        return leaves[structure]
    form, *children = structure
    if form == "dict":
        keys, *values = children
        return {key: nest(value, leaves) for key, value in zip(keys, values, strict=True)}
    return (tuple if form == "tuple" else list)(nest(child, leaves) for child in children)


def flatten(structure: Any, value: Any, where: str = "") -> dict[int, tuple[str, Any]]:
    """Leaves of a value nested like `structure`: `{index: (where, leaf)}`; a BridgeError where it is not."""
    if isinstance(structure, int):
        return {structure: (where or "output", value)}
    form, *children = structure
    if form == "dict":
        keys, *inner = children
        if not isinstance(value, Mapping) or set(value) != set(keys):
            found = f"keys {sorted(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
            raise BridgeError(f"{where or 'the inputs'}: expected a dict with keys {list(keys)}, got {found}")
        pairs = [
            (f"{where}[{key!r}]" if where else str(key), child, value[key])
            for key, child in zip(keys, inner, strict=True)
        ]
    else:
        if not isinstance(value, tuple | list) or len(value) != len(children):
            found = f"{len(value)} values" if isinstance(value, tuple | list) else type(value).__name__
            raise BridgeError(f"{where or 'the inputs'}: expected {len(children)} values, got {found}")
        pairs = [(f"{where}[{i}]" if where else str(i), child, value[i]) for i, child in enumerate(children)]
    found_leaves: dict[int, tuple[str, Any]] = {}
    for name, child, item in pairs:
        found_leaves.update(flatten(child, item, name))
    return found_leaves


# --- conditions on sizes ---

_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "Max": max,
    "Min": min,
    "max": max,
    "min": min,
    "Eq": operator.eq,
    "Ne": operator.ne,
    "TruncToInt": int,
    "ToFloat": float,
}


def evaluate(expression: str, known: Mapping[str, int]) -> Any:
    """A condition or size over known symbols. Arithmetic and comparisons only: nothing a file says is executed."""
    return _evaluate(ast.parse(expression, mode="eval").body, known)


def _evaluate(node: ast.AST, known: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name):
        return known[node.id]
    if isinstance(node, ast.BinOp):
        return _ARITHMETIC[type(node.op)](_evaluate(node.left, known), _evaluate(node.right, known))
    if isinstance(node, ast.UnaryOp):
        value = _evaluate(node.operand, known)
        return -value if isinstance(node.op, ast.USub) else not value
    if isinstance(node, ast.BoolOp):
        values = (_evaluate(item, known) for item in node.values)
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.Compare):
        sides = [_evaluate(side, known) for side in (node.left, *node.comparators)]
        return all(_COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:], strict=False))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        return _CALLS[node.func.id](*(_evaluate(arg, known) for arg in node.args))
    raise BridgeError(f"a condition on sizes of a form that is not understood: {ast.unparse(node)}")


# --- as JSON ---


def dumps(graph: Graph) -> str:
    """The graph as JSON."""
    return json.dumps({"format": FORMAT, **_plain(graph)}, separators=(",", ":"))


def loads(text: str, where: str = "the graph") -> Graph:
    """A graph from JSON; a BridgeError names `where` when it is none."""
    try:
        data = json.loads(text)
        if data.pop("format") != FORMAT:
            raise BridgeError(f"{where} was saved in another format; this version reads format {FORMAT}")
        train = data.pop("train")
        programs = {"evaluate": _program(data.pop("evaluate")), "train": _program(train) if train else None}
        tensors = tuple(Tensor(t[0], tuple(t[1]), *t[2:]) for t in data.pop("tensors"))
        pairs = {name: tuple(tuple(row) for row in data.pop(name)) for name in ("aliases", "modules")}
        return Graph(**programs, tensors=tensors, names=tuple(data.pop("names")), **pairs, **data)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise BridgeError(f"{where} holds no graph of this library: {error}") from error


def _program(data: dict[str, Any]) -> Program:
    return Program(
        nodes=tuple(
            Node(name, op, _decode(args), tuple((k, _decode(v)) for k, v in kwargs), path)
            for name, op, args, kwargs, path in data["nodes"]
        ),
        outputs=_decode(data["outputs"]),
        structure=data["structure"],
        updates=tuple((name, _decode(ref)) for name, ref in data["updates"]),
        inputs=tuple(Input(n, d, tuple(dims), value) for n, d, dims, value in data["inputs"]),
        ranges=tuple((symbol, low, high) for symbol, low, high in data["ranges"]),
        guards=tuple(data["guards"]),
    )


def _plain(value: Any) -> dict[str, Any]:
    shown = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Program):
            item = _plain(item)
        elif field.name in ("nodes", "outputs", "updates"):
            item = _encode(item)
        shown[field.name] = item
    return shown


def _encode(value: Any) -> Any:
    if isinstance(value, Node):
        return [value.name, value.op, _encode(value.args), [[k, _encode(v)] for k, v in value.kwargs], value.path]
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, Dtype):
        return {"dtype": value.name}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return Ref(value["ref"]) if "ref" in value else Dtype(value["dtype"])
    return tuple(_decode(item) for item in value) if isinstance(value, list) else value
