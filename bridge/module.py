"""The imported model: a Linen module that owns real parameters at torch's paths and executes the captured graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .graph import BridgeError, Dtype, Graph, Input, Node, Program, Ref, evaluate, flatten, mapped, nest
from .layers import call, make, plain
from .layout import from_flax
from .ops.registry import Last, check_fits, dtype_of, find, gradient_in_one, is_array, unknown
from .plan import LAYER, plan_of

_INNER = (LAYER, "input", "constant", "getitem", "getitem0")


class _Holder(nn.Module):
    """What the model and each torch module in it have in common: children and tensors by torch's names."""

    graph: Graph

    def setup(self) -> None:
        plan, own = plan_of(self.graph), self._own()
        branches: dict[str, None] = {}
        for path, layer in plan.layers.items():
            if path[:-1] == own:
                setattr(self, path[-1], make(layer))
            elif path[: len(own)] == own and len(path) > len(own):
                branches[path[len(own)]] = None
        held: dict[str, Any] = {}
        for places in plan.places.values():
            for place in places:
                path = place.path
                if path[: len(own)] != own or any(path[:n] in plan.layers for n in range(1, len(path))):
                    continue
                if len(path) > len(own) + 1:
                    branches[path[len(own)]] = None
                    continue
                if not self.has_variable(place.collection, path[-1]):
                    raise BridgeError(
                        f"{place.collection}/{'/'.join(path)} has no value: an imported model has no initialisers; use "
                        "the variables that from_torch() or load_imported() gave with it"
                    )
                if place.collection == "params":
                    held[path[-1]] = self.param(path[-1], lambda _, shape=place.shape: jnp.zeros(shape))
                else:
                    held[path[-1]] = self.variable(place.collection, path[-1], lambda: None)
        for name in branches:
            if (*own, name) not in plan.layers:
                setattr(self, name, _Branch(graph=self.graph, at=(*own, name)))
        self.held = held

    def _own(self) -> tuple[str, ...]:
        return ()


class _Branch(_Holder):
    """One torch module: no computation of its own."""

    at: tuple[str, ...] = ()

    def _own(self) -> tuple[str, ...]:
        return self.at


class Imported(_Holder):
    """A torch module as a Flax model.

    `model.apply(variables, *inputs)` gives what the torch module gives in evaluation mode; with `train=True` what it
    gives in training mode, with fresh dropout masks (`rngs={"dropout": key}`) and new statistics
    (`mutable=["batch_stats", "buffers"]`). A model that draws other random numbers takes them from the same stream, in
    evaluation too if torch draws them there. Inputs are arrays, nested as they were in the example.

    Attributes:
      graph: what the torch module computes.
      every_unit: dropout keeps every unit (kept ones are still divided by 1 - rate), and other random numbers are the
        same each time: for comparisons, no other use.

    Raises:
      BridgeError: for inputs of another number, dtype or shape than the captured graph holds for, and for `train=True`
        where only evaluation was imported.
    """

    every_unit: bool = False

    def __call__(self, *args: Any, train: bool = False, **kwargs: Any) -> Any:
        """The outputs, nested as torch's (a ModelOutput becomes a dict)."""
        plan = plan_of(self.graph)
        if train and self.graph.train is None:
            raise BridgeError(
                f"{self.graph.name} was imported for evaluation alone: call it without train=True, or import it with "
                "from_torch(..., train=True)"
            )
        program = plan.programs[1 if train else 0]
        inputs = _bind(self.graph, program, args, kwargs)
        run = _Run(self, program, inputs, train)
        return run()

    def __repr__(self) -> str:
        plan = plan_of(self.graph)
        count = sum(int(np.prod(t.shape)) for t in self.graph.tensors if t.kind == "parameter")
        return (
            f"Imported({self.graph.name}: {count:,} parameters, {len(plan.layers)} layers, "
            f"{len(plan.programs[0].nodes)} operations)"
        )

    def frozen(self, params: Any) -> Any:
        """Which parameters torch had frozen (`requires_grad=False`): params' tree, with True at each that was.

        `params` are the model's, or a morph's (`morph.params`, whose seeds are not frozen).
        JAX differentiates with respect to all of them; this keeps them as they are, whatever optimizer `tx` is:

            optax.chain(tx, optax.masked(optax.set_to_zero(), model.frozen(variables["params"])))
        """
        places = plan_of(self.graph).places
        held = {place.path for tensor in self.graph.tensors if tensor.frozen for place in places[tensor.name]}
        if set(params) == {"host", "seeds"}:
            held = {("host", *path) for path in held}
        return jax.tree.map_with_path(lambda path, _: tuple(getattr(k, "key", k) for k in path) in held, params)

    def save(self, directory: Any, variables: Mapping[str, Any]) -> None:
        """Write graph and variables; `esper_jax.load_imported(directory)` reads them without torch."""
        from .load import save_imported

        save_imported(self, variables, directory)


def check_runs(graph: Graph) -> None:
    """BridgeError for operators without a form here, and for 64 bit tensors where JAX runs in 32."""
    for program in plan_of(graph).programs:
        for node in program.nodes:
            if node.op not in _INNER and find(node.op) is None:
                raise unknown(node.op, f"{node.path or 'the module'} of {graph.name}")
    if any(tensor.dtype == "float64" for tensor in graph.tensors) and not jax.config.jax_enable_x64:
        raise BridgeError(
            f"{graph.name} has float64 tensors, and JAX runs in 32 bit: give module.float(), or run "
            'jax.config.update("jax_enable_x64", True) before anything else'
        )


class _Run:
    """One execution of a program, inside the model's call."""

    def __init__(self, model: Imported, program: Program, inputs: list[Any], train: bool) -> None:
        self.model, self.program, self.inputs, self.train = model, program, inputs, train
        self.plan = plan_of(model.graph)
        self.shapes = {tensor.name: tensor.shape for tensor in model.graph.tensors}
        self.values: dict[str, Any] = {}
        self.torch_layout: dict[str, Any] = {}

    def __call__(self) -> Any:
        for node in self.program.nodes:
            self._node(node)
        outputs = [self._value(ref) for ref in self.program.outputs]
        for name, ref in self.program.updates:
            (place,) = self.plan.places[name]
            holder, leaf = self._holder(place.path[:-1]), place.path[-1]
            if not self.train and not holder.is_mutable_collection(place.collection):
                continue  # who evaluates and asks for no new buffers gets none
            dtype = holder.get_variable(place.collection, leaf).dtype
            changed = jax.lax.stop_gradient(place.to_flax(self._value(ref))).astype(dtype)
            holder.put_variable(place.collection, leaf, changed)
        return nest(self.program.structure, outputs)

    def _holder(self, path: tuple[str, ...]) -> Any:
        module: Any = self.model
        for part in path:
            module = getattr(module, part)
        return module

    def _tensor(self, name: str) -> Any:
        """A torch tensor's value, put together from the leaves that hold it."""
        places = self.plan.places[name]
        leaves = []
        for place in places:
            holder, path = self.model, place.path
            for i, part in enumerate(path[:-1]):
                holder = getattr(holder, part)
                if path[: i + 1] in self.plan.layers:
                    leaf: Any = holder.variables[place.collection]
                    for inner in path[i + 1 :]:
                        leaf = leaf[inner]
                    leaves.append(nn.meta.unbox(leaf))
                    break
            else:
                held: Any = holder.held[path[-1]]
                leaves.append(nn.meta.unbox(held.value if isinstance(held, nn.Variable) else held))
        return from_flax(places, self.shapes[name], leaves, jnp)

    def _raw(self, value: Any) -> Any:
        """An argument, arrays perhaps with their channels last."""
        if not isinstance(value, Ref):
            return value
        name = value.name
        if name not in self.values and name.startswith("torch:"):
            self.values[name] = self._tensor(name.removeprefix("torch:"))
        return self.values[name]

    def _value(self, value: Any) -> Any:
        """An argument in torch's layout."""
        found = self._raw(value)
        if isinstance(found, Last):
            if value.name not in self.torch_layout:
                self.torch_layout[value.name] = plain(found)
            return self.torch_layout[value.name]
        return found

    def _draw(self) -> Any:
        if self.model.every_unit:
            return None
        if not self.model.has_rng("dropout") and not self.model.has_rng("params"):  # which Flax takes for any stream
            where = " in training" if self.train else " in evaluation (Tolaria: eval_kwargs={'rngs': ...})"
            raise BridgeError(
                f"{self.model.graph.name} draws random numbers{where}: call it with "
                "rngs={'dropout': jax.random.key(...)}, as an nnx module make it with nnx.Rngs(dropout=...)"
            )
        return self.model.make_rng("dropout")

    def _node(self, node: Node) -> None:
        if node.op == LAYER:
            path = tuple(node.args[0].split("/"))
            layer = self.plan.layers[path]
            inputs = tuple(self._raw(arg) for arg in node.args[1:])
            found = call(layer, self._holder(path), inputs, dict(node.kwargs), self._draw)
            self.values[node.name] = self._forked(node, found[0])
            if len(found) > 1:
                self.values[f"{node.name}:1"] = found[1]
            return
        self.values[node.name] = self._forked(node, self._apply(node))

    def _forked(self, node: Node, value: Any) -> Any:
        forked = node.name in self.plan.forks and is_array(value) and jnp.issubdtype(value.dtype, jnp.inexact)
        return gradient_in_one(value) if forked else value

    def _apply(self, node: Node) -> Any:
        if node.op == "input":
            return self.inputs[node.args[0]]
        if node.op == "getitem0":
            return self._raw(node.args[0])
        if node.op == "getitem":
            return self._raw(node.args[0])[node.args[1]]
        if node.op == "constant":
            values, shape, dtype = node.args
            if dtype.name.startswith("complex"):
                values = [complex(re, im) for re, im in values]
            return jnp.asarray(np.asarray(values).reshape(shape), dtype_of(dtype))
        op = find(node.op)
        if op is None:  # its form was taken away since the import
            raise unknown(node.op, node.path)
        more = {"draw": self._draw} if op.random else {}
        if op.elementwise or op.channels:
            args, kwargs = mapped(node.args, self._raw), {k: mapped(v, self._raw) for k, v in node.kwargs}
            rank = _common_rank((args, tuple(kwargs.values())))
            if rank and op.elementwise:
                args, kwargs = _last(args, rank), {k: _last(v, rank) for k, v in kwargs.items()}
                return Last(op.fn(*args, **kwargs, **more))
            if rank and op.channels and _all_last(args[0]):
                args = (_stripped(args[0]), *(mapped(arg, plain) for arg in args[1:]))
                return op.fn(*args, **{k: mapped(v, plain) for k, v in kwargs.items()}, **more, last=True)
        args, kwargs = mapped(node.args, self._value), {k: mapped(v, self._value) for k, v in node.kwargs}
        return op.fn(*args, **kwargs, **more)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, tuple) and not isinstance(value, Last | Ref | Dtype):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _common_rank(value: Any) -> int:
    """The rank of all channels-last arrays, if there are any and nothing has more axes; else 0."""
    arrays = [leaf for leaf in _leaves(value) if isinstance(leaf, Last) or is_array(leaf)]
    ranks = {leaf.array.ndim for leaf in arrays if isinstance(leaf, Last)}
    if len(ranks) != 1:
        return 0
    rank = ranks.pop()
    return rank if all(isinstance(leaf, Last) or leaf.ndim <= rank for leaf in arrays) else 0


def _last(value: Any, rank: int) -> Any:
    """Arguments with their channels last, arrays of fewer axes as they would be broadcast."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Last):
            return leaf.array
        if not is_array(leaf) or leaf.ndim == 0:
            return leaf
        return jnp.moveaxis(leaf.reshape((1,) * (rank - leaf.ndim) + leaf.shape), 1, -1)

    return _mapped_last(value, one)


def _mapped_last(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple) and not isinstance(value, Last | Dtype):
        return tuple(_mapped_last(item, change) for item in value)
    return change(value)


def _all_last(value: Any) -> bool:
    return all(isinstance(leaf, Last) for leaf in _leaves(value))


def _stripped(value: Any) -> Any:
    return _mapped_last(value, lambda leaf: leaf.array)


# --- inputs ---


def _bind(graph: Graph, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The flat inputs of a call, checked against what the graph holds for."""
    _, positional, keywords = graph.takes
    count, keys = len(positional) - 1, list(keywords[1])
    rest, given = dict(kwargs), list(args)
    for name in graph.names[len(given) : count]:
        if name in rest:
            given.append(rest.pop(name))
    beyond, given = given[count:], given[:count]  # of those that the example named
    rest.update(zip(graph.names[count:], beyond, strict=False))
    constants = {i.name: i.value for i in program.inputs if not i.dtype}
    for name in [*graph.names[len(given) : count]]:
        if name in constants:
            given.append(constants[name])
    for key in keys:
        if key not in rest and key in constants:
            rest[key] = constants[key]
    if len(given) != count or len(beyond) > len(graph.names[count:]) or set(rest) != set(keys):
        raise BridgeError(
            f"{graph.name} takes {', '.join(spec.name for spec in program.inputs)}; got {len(args)} positional input(s)"
            + (f" and {', '.join(sorted(kwargs))}" if kwargs else "")
        )
    found = flatten(graph.takes, (tuple(given), rest))
    flat = [_checked(graph, spec, found[i][1]) for i, spec in enumerate(program.inputs)]
    _check_sizes(graph, program, flat)
    return flat


def _checked(graph: Graph, spec: Input, value: Any) -> Any:
    where = f"{graph.name}: input {spec.name}"
    if not spec.dtype:
        if isinstance(value, jax.core.Tracer):
            raise BridgeError(
                f"{where} is the constant {spec.value!r} of the captured graph and cannot be traced: leave it "
                "out, or name "
                "it in jit's static_argnames"
            )
        if value is not spec.value and value != spec.value:
            raise BridgeError(f"{where} was {spec.value!r} when the model was captured, got {value!r}; capture it anew")
        return value
    if not (is_array(value) or isinstance(value, int | float | bool | list)):
        raise BridgeError(f"{where} must be an array, got {type(value).__name__}")
    wanted = dtype_of(Dtype(spec.dtype))
    check_fits(where, value, wanted)
    array = jnp.asarray(value)
    kinds = [jnp.issubdtype(array.dtype, kind) == jnp.issubdtype(wanted, kind) for kind in (jnp.inexact, jnp.bool_)]
    if not all(kinds):
        raise BridgeError(f"{where} must be {wanted}, got {array.dtype}")
    if jnp.issubdtype(wanted, jnp.integer) and array.dtype != wanted:
        array = array.astype(wanted)
    if array.ndim != len(spec.dims):
        shown = " x ".join(map(str, spec.dims))
        raise BridgeError(f"{where} must have {len(spec.dims)} axes ({shown}), got shape {array.shape}")
    return array


def _check_sizes(graph: Graph, program: Program, flat: list[Any]) -> None:
    known: dict[str, int] = {}
    for i, (spec, value) in enumerate(zip(program.inputs, flat, strict=True)):
        for axis, dim in enumerate(spec.dims):
            known[f"d{i}_{axis}"] = value.shape[axis]
            if isinstance(dim, str) and dim.isidentifier():
                known.setdefault(dim, value.shape[axis])
    for spec, value in zip(program.inputs, flat, strict=True):
        for axis, dim in enumerate(spec.dims):
            wanted = dim if isinstance(dim, int) else evaluate(dim, known)
            if value.shape[axis] != wanted:
                free = "" if isinstance(dim, int) else f" ({dim})"
                raise BridgeError(
                    f"{graph.name}: input {spec.name} must have {wanted}{free} along axis {axis}, got shape "
                    f"{value.shape}; "
                    "the captured graph holds for this size alone"
                )
    for symbol, low, high in program.ranges:
        size = known.get(symbol)
        if size is not None and (size < low or (high is not None and size > high)):
            upto = f" to {high}" if high is not None else " or more"
            raise BridgeError(f"{graph.name}: the size {symbol} must be {low}{upto}, got {size}")
    for guard in program.guards:
        try:
            holds = evaluate(guard, known)
        except ZeroDivisionError:
            holds = False
        if not holds:
            shown = guard
            for i, spec in enumerate(program.inputs):
                for axis in range(len(spec.dims)):
                    shown = shown.replace(f"d{i}_{axis}", f"{spec.name}.shape[{axis}]")
            shapes = ", ".join(f"{s.name} {v.shape}" for s, v in zip(program.inputs, flat, strict=True) if s.dtype)
            raise BridgeError(f"{graph.name}: the captured graph holds only where {shown}; got {shapes}")
