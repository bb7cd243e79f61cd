"""One exported program of torch as a `Program`: nodes, inputs, constants, conditions. Imports torch."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .graph import HIDING, BridgeError, Dtype, Input, Node, Program, Ref, evaluate
from .inputs import leaf_names
from .ops.random import NOISE
from .ops.registry import find
from .torch_random import NUMBER

_INT32 = 2**31
_SMALL = 1024
_DROPPED = {"device", "layout", "pin_memory", "memory_format", "non_blocking"}
_NOTHING = {
    "aten._assert_tensor_metadata.default",
    "aten.sym_constrain_range_for_size.default",
    "aten.sym_constrain_range.default",
    "aten._assert_scalar.default",
}
_RANDOM = re.compile(
    r"aten\.(rand\w*|normal\w*|bernoulli|uniform|exponential|multinomial|poisson|cauchy|log_normal|geometric|binomial"
    r"|_standard_gamma|_sample_dirichlet|rrelu_with_noise\w*)_?\."
)
_READS_VALUES = {"aten.item.default", "aten._local_scalar_dense.default"}
_BIG_INTS = {"aten.slice.Tensor", "aten.slice_scatter.default", "aten.unfold.default"}
_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def numpy_dtype(dtype: torch.dtype) -> str:
    """A torch dtype by numpy's name."""
    return str(dtype).removeprefix("torch.")


class Reader:
    """Reads one exported program.

    Args:
      exported: what torch.export gave.
      module: the module itself, for the names of tensors that share memory.
      signature: of its forward as it was called, for the names of inputs.
      name: the torch class, for messages.
      mode: `evaluate` or `train`, for the names of large constants.
    """

    def __init__(
        self, exported: ExportedProgram, module: torch.nn.Module, signature: inspect.Signature, name: str, mode: str
    ) -> None:
        self.exported, self.signature, self.name, self.mode = exported, signature, name, mode
        self.values: dict[str, Any] = {}  # what a node of torch's graph became
        self.nodes: list[Node] = []
        self.large: dict[str, Any] = {}
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        first: dict[int, str] = {}
        self.canonical = {path: first.setdefault(id(tensor), path) for path, tensor in named}
        modules = module.named_modules(remove_duplicate=False)
        self.paths = {path: first.setdefault(id(child), path) for path, child in modules}

    def read(self) -> tuple[Program, dict[str, Any], Any]:
        """The program, its large constants by name, and how its inputs nest."""
        exported = self.exported
        inputs: list[Input] = []
        specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs if hasattr(spec.arg, "name")}
        where = leaf_names(exported.call_spec.in_spec, self.signature)
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                if spec.kind == InputKind.USER_INPUT:
                    inputs.append(self._input(node, where[len(inputs)], spec))
                    self.values[node.name] = Ref(node.name)
                    self.nodes.append(Node(node.name, "input", (len(inputs) - 1,)))
                elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                    self.values[node.name] = Ref(f"torch:{self.canonical[spec.target]}")
                elif spec.kind == InputKind.CONSTANT_TENSOR:
                    self.values[node.name] = self._constant(node.name, exported.constants[spec.target])
                else:
                    raise BridgeError(f"{self.name} takes a {spec.kind.name.lower()}, which has no form in JAX")
        self._run(exported.graph_module, "")
        outputs, updates = self._outputs()
        structure = _structure(exported.call_spec.out_spec)
        takes = _structure(exported.call_spec.in_spec)
        tokens = {place: i for i, place in enumerate(where)}
        guards = tuple(_guard(text, tokens, self.name) for text in getattr(exported, "_guards_code", None) or [])
        ranges = tuple(
            (str(symbol), int(r.lower), None if r.upper > _INT32 else int(r.upper))
            for symbol, r in exported.range_constraints.items()
            if str(symbol).startswith("s")
        )
        nodes = tuple(n for n in _alive(self.nodes, outputs, updates))
        return Program(nodes, outputs, structure, updates, tuple(inputs), ranges, guards), self.large, takes

    def _input(self, node: Any, where: str, spec: Any) -> Input:
        value = node.meta.get("val")
        if isinstance(spec.arg, ConstantArgument) or not isinstance(value, torch.Tensor):
            if not isinstance(value, int | float | bool | str | type(None)):
                raise BridgeError(
                    f"{self.name}: input {where} is a {type(value).__name__}; give arrays or plain constants"
                )
            return Input(where, "", (), value)
        return Input(where, numpy_dtype(value.dtype), tuple(_size(size) for size in value.shape))

    def _constant(self, name: str, tensor: Any) -> Ref:
        if not isinstance(tensor, torch.Tensor):
            raise BridgeError(f"{self.name}: its forward uses a {type(tensor).__name__} that is no tensor")
        if tensor.numel() > _SMALL:
            path = f"constants.{self.mode}_{name}"
            self.large[path] = tensor.detach()
            return Ref(f"torch:{path}")
        if not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel():
            self._check_int(int(tensor.max()), name)
            self._check_int(int(tensor.min()), name)
        values = tensor.detach().to(torch.complex128 if tensor.is_complex() else None).flatten().tolist()
        if tensor.is_complex():
            values = [(v.real, v.imag) for v in values]
        self.nodes.append(
            Node(name, "constant", (_frozen(values), tuple(tensor.shape), Dtype(numpy_dtype(tensor.dtype))))
        )
        return Ref(name)

    def _check_int(self, value: int, where: str) -> None:
        if not -_INT32 <= value < _INT32 and not _x64():
            raise BridgeError(
                f"{self.name}: {where} holds {value}, which overflows the 32 bit integers that JAX computes with; run "
                'jax.config.update("jax_enable_x64", True) before anything else'
            )

    def _run(self, graph_module: GraphModule, prefix: str) -> Any:
        """Append a graph's operations; returns its outputs."""
        for node in graph_module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                if node.op == "get_attr":
                    self.values[node.name] = getattr(graph_module, node.target, None)
                continue
            if node.op == "output":
                return self._value(node.args[0])
            self._call(node, prefix)
        return ()

    def _call(self, node: Any, prefix: str) -> None:
        op, path = _target(node.target), _path(node)
        path = self.paths.get(path, path)
        if HIDING in (node.meta.get("stack_trace") or ""):
            path = f"{path}.{HIDING}()".removeprefix(".")
        if op in _NOTHING:
            return
        where = f"{path or 'the module'} of {self.name}"
        if op.startswith("higher_order.") or any(name in op for name in _INLINED):
            self._inline(node, op, prefix, where)
            return
        if op in _READS_VALUES:
            raise BridgeError(
                f"{where} reads a tensor's value as a number (.item(), int(), float(): {_line(node)}); a "
                "compiled program "
                "cannot: keep it a tensor"
            )
        if _RANDOM.match(op) and find(op) is None:
            raise BridgeError(
                f"{where} draws random numbers by {op} ({_line(node)}), which the bridge has no form for: give the "
                "noise to the model as an input, or register_op() a form of your own and import with verify=False"
            )
        sizes = [size for leaf in pytree.tree_leaves(node.meta.get("val")) for size in getattr(leaf, "shape", ())]
        if any(re.search(r"\bu\d+\b", str(size)) for size in sizes):
            raise BridgeError(
                f"{where}: the shape of {op} depends on the values of a tensor ({_line(node)}); a compiled "
                "program has one "
                "shape for all values: use torch.where or a mask instead"
            )
        if op == "aten.instance_norm.default" and node.args[3] is not None and node.args[5]:
            raise BridgeError(
                f"{where} calls torch.instance_norm with running statistics, whose update torch's export loses: call "
                "torch.nn.functional.instance_norm, or make it "
                "with track_running_stats=False"
            )
        args = self._value(node.args)
        named = {k: v for k, v in node.kwargs.items() if k not in _DROPPED}
        if op in NOISE and NUMBER in (node.meta.get("custom") or {}):
            named["number"] = node.meta["custom"][NUMBER]
            if any(isinstance(arg, list | tuple) for arg in node.args):  # of a size: torch's default dtype at that time
                named.setdefault("dtype", node.meta["val"].dtype)
        kwargs = tuple((k, self._value(v)) for k, v in named.items())
        if op not in _BIG_INTS:
            for value in _numbers((args, tuple(v for _, v in kwargs))):
                self._check_int(value, f"{op} in {where}")
        name = prefix + node.name
        self.values[node.name] = Ref(name)
        self.nodes.append(Node(name, op, args, kwargs, path))

    def _inline(self, node: Any, op: str, prefix: str, where: str) -> None:
        bodies = [self._get(arg) for arg in node.args if isinstance(self._get(arg), GraphModule)]
        if not any(name in op for name in _INLINED) or len(bodies) != 1:
            raise BridgeError(
                f"{where} uses {op}, which the bridge has no form for; write it with plain torch operations"
            )
        at = next(i for i, arg in enumerate(node.args) if self._get(arg) is bodies[0])
        outer, given = dict(self.values), [self._value(arg) for arg in node.args[at + 1 :]]
        body = bodies[0]
        places = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        for place, value in zip(places, given, strict=True):
            self.values[place.name] = value
        result = self._run(body, f"{prefix}{node.name}_")
        self.values = {**outer, node.name: result}

    def _get(self, arg: Any) -> Any:
        return self.values.get(arg.name) if isinstance(arg, torch.fx.Node) else arg

    def _value(self, value: Any) -> Any:
        """An argument of torch's graph as ours."""
        if isinstance(value, torch.fx.Node):
            if value.target is operator.getitem and isinstance(self._get(value.args[0]), tuple):
                inner = self._get(value.args[0])
                if not isinstance(inner, Ref):
                    return inner[value.args[1]]
            return self.values[value.name]
        if isinstance(value, list | tuple):
            return tuple(self._value(item) for item in value)
        if isinstance(value, torch.dtype):
            return Dtype(numpy_dtype(value))
        if isinstance(value, torch.device | torch.layout | torch.memory_format):
            return None
        if isinstance(value, torch.SymInt):
            return int(value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, complex):
            return ("complex", value.real, value.imag)
        raise BridgeError(f"{self.name}: an operation takes a {type(value).__name__}, which has no form in the graph")

    def _outputs(self) -> tuple[tuple[Any, ...], tuple[tuple[str, Ref], ...]]:
        given = next(node for node in self.exported.graph.nodes if node.op == "output").args[0]
        outputs, updates = [], []
        for spec, value in zip(self.exported.graph_signature.output_specs, given, strict=True):
            if spec.kind == OutputKind.USER_OUTPUT:
                outputs.append(self._value(value))
            elif spec.kind == OutputKind.BUFFER_MUTATION:
                updates.append((self.canonical[spec.target], self._value(value)))
            elif spec.kind == OutputKind.USER_INPUT_MUTATION:
                raise BridgeError(
                    f"{self.name} writes into its input {spec.target!r} in place; a pure function cannot: "
                    "clone it first"
                )
            elif spec.kind == OutputKind.PARAMETER_MUTATION:
                raise BridgeError(
                    f"{self.name} changes its parameter {spec.target!r} in its forward, as nn.Embedding(max_norm=...) "
                    "does; a pure function cannot"
                )
            else:
                raise BridgeError(f"{self.name} gives a {spec.kind.name.lower()}, which has no form in JAX")
        return tuple(outputs), tuple(updates)


def _x64() -> bool:
    import jax

    return bool(jax.config.jax_enable_x64)


def _frozen(values: Any) -> Any:
    return tuple(_frozen(v) for v in values) if isinstance(values, list | tuple) else values


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, tuple) and not isinstance(value, Ref | Dtype):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _alive(nodes: list[Node], outputs: Any, updates: Any) -> list[Node]:
    """The nodes that something reads."""
    wanted = {value.name for value in outputs if isinstance(value, Ref)} | {ref.name for _, ref in updates}
    kept = []
    for node in reversed(nodes):
        if node.name in wanted or node.op == "input":
            kept.append(node)
            wanted |= {ref.name for ref in node.refs()}
    return kept[::-1]


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    if target is operator.getitem:
        return "getitem"
    return f"sym.{getattr(target, '__name__', str(target))}"


def _path(node: Any) -> str:
    stack = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
    stack = [re.sub(r"@\d+", "", path) for path in stack if not path.startswith("_empty_nn_module_stack")]
    return stack[-1] if stack else ""


def _line(node: Any) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    return lines[-1] if lines else "no line known"


def _size(size: Any) -> int | str:
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_number else str(size.node.expr)


def _structure(spec: Any) -> Any:
    return _encode(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))


def _encode(tree: Any) -> Any:
    if isinstance(tree, bool) or not isinstance(tree, int | tuple | list | Mapping):
        fields = {k: v for k, v in vars(tree).items() if v is not None} if hasattr(tree, "__dict__") else None
        if fields:
            return _encode(fields)
        raise BridgeError(f"inputs or outputs hold a {type(tree).__name__}; use tuples, lists and dicts of tensors")
    if isinstance(tree, int):
        return tree
    if isinstance(tree, Mapping):
        return ["dict", [str(key) for key in tree], *(_encode(value) for value in tree.values())]
    return ["list" if isinstance(tree, list) else "tuple", *(_encode(value) for value in tree)]


def _guard(text: str, tokens: Mapping[str, int], name: str) -> str:
    """A condition of torch's on `L['x'].size()[0]` over our own names (`d0_0`)."""

    def own(match: re.Match[str]) -> str:
        place = match[1] + match[2]
        if place not in tokens:
            raise BridgeError(f"{name}: torch guards on {match[0]}, which is none of its inputs")
        return f"d{tokens[place]}_{match[3]}"

    changed = re.sub(r"L\['(\w+)'\]((?:\[[^\]]+\])*)\.size\(\)\[(\d+)\]", own, text)
    try:
        evaluate(changed, dict.fromkeys(re.findall(r"d\d+_\d+", changed), 2))
    except ZeroDivisionError:
        pass
    except (KeyError, SyntaxError, BridgeError) as error:
        raise BridgeError(
            f"{name}: torch holds its graph for valid only where {text}, which cannot be checked"
        ) from error
    return changed
