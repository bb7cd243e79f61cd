"""The nnx adapter: a module's state as plain dicts and back, its sites, and calls with seeds at its layers.

All that knows `flax.nnx` in the core, with `nnx_linen` and `nnx`. Nothing else imports it before a host needs it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .bank import Bank, apply_bank, stacked, unstacked
from .layout import arrange, common_axis, einsum_shapes, stack_axes
from .linen_layers import attended, broadcast, first_input, pairs, tuple_of
from .modules import Embedded, Planted
from .nnx_linen import lifted, lifted_calls, lifted_layers, with_call
from .sites import Where, find_sites, join_path, select
from .spec import Site, freeze_config

_KINDS: tuple[tuple[type[nnx.Module], str], ...] = (
    (nnx.MultiHeadAttention, "attention"),
    (nnx.Linear, "dense"),
    (nnx.LinearGeneral, "dense_general"),
    (nnx.Einsum, "einsum"),
    (nnx.Conv, "conv"),
    (nnx.ConvTranspose, "conv_transpose"),
    (nnx.Embed, "embed"),
    (nnx.LayerNorm, "layer_norm"),
    (nnx.RMSNorm, "rms_norm"),
    (nnx.GroupNorm, "group_norm"),
    (nnx.BatchNorm, "batch_norm"),
)
_COLLECTIONS = {"Param": "params", "BatchStat": "batch_stats"}
BANK = "esper_bank"
"""The attribute under which a bank sits at its layer for the time of a call."""
_CALLED: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("called", default=None)
_INPUTS: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("inputs", default=None)


class BankVariable(nnx.Param):
    """Where a layer's bank travels: with its parameters, so that `nnx.scan` and the like slice it as they do those."""


class SeedVariable(nnx.Variable[Any]):
    """The seeds of a Kasmina layer: `{slot: params}`. No `nnx.Param`, so an optimizer of the host never meets them."""


class LifeVariable(nnx.Variable[Any]):
    """The `SeedState` of a Kasmina layer."""


OWN = (SeedVariable, LifeVariable)


class Form:
    """What an nnx host's variables are beside their arrays: paths, types and metadata. Compared by the first two."""

    def __init__(self, state: Any) -> None:
        self._entries = tuple((path, type(variable), dict(variable.get_metadata())) for path, variable in _flat(state))
        self._key = tuple((path, kind) for path, kind, _ in self._entries)
        own = [(path, variable.get_value()) for path, variable in _flat(state) if isinstance(variable, OWN)]
        self._own = {path: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), value) for path, value in own}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"Form({len(self._entries)} nnx variables)"

    def state(self, host: Mapping[str, Any], own: Mapping[tuple[Any, ...], Any] | None = None) -> Any:
        """An `nnx.State` of a host's collections.

        `own` are the values of a Kasmina layer's variables by path; None puts blank ones there (a morph has its own).

        Raises:
          ValueError: the host holds other variables; it is of another model.
        """
        flat = {}
        for path, kind, metadata in self._entries:
            if path in self._own:
                value = jax.tree.map(lambda known: jnp.zeros(*known), self._own[path], is_leaf=_is_known)
                value = value if own is None else own.get(tuple(map(str, path)), value)
            else:
                value = _get(host.get(collection(kind), {}), path)
            if value is None:
                raise ValueError(
                    f"this morph has no {kind.__name__} at {_name(path)}; it is of another model than the graft"
                )
            flat[path] = kind.from_metadata(value, metadata)
        return nnx.from_flat_state(flat)

    def only(self, name: str, tree: Any) -> Any:
        """The `nnx.State` of one collection's tree, e.g. of gradients for `nnx.Optimizer.update`."""
        chosen = [(path, kind, metadata) for path, kind, metadata in self._entries if collection(kind) == name]
        return nnx.from_flat_state({path: kind.from_metadata(_get(tree, path), meta) for path, kind, meta in chosen})


def collection(kind: type) -> str:
    """The collection that variables of a type are in: `params` for `nnx.Param` and its kin, `batch_stats`, ..."""
    if issubclass(kind, nnx.Param):
        return "params"
    name = kind.__name__
    return _COLLECTIONS.get(name, re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower())


def is_host(value: Any) -> bool:
    """Whether it is an nnx module or state."""
    return isinstance(value, nnx.Module | nnx.State)


def take(host: Any) -> tuple[dict[str, Any], Form]:
    """An nnx module or state as `{collection: nested dict of arrays}`, and its form."""
    state = nnx.state(host) if isinstance(host, nnx.Module) else host
    return collections(state), Form(state)


def collections(state: Any) -> dict[str, Any]:
    """The arrays of an `nnx.State` by collection and path; the keys of lists become text."""
    found: dict[str, Any] = {"params": {}}
    for path, variable in _flat(state):
        if isinstance(variable, OWN):  # a morph keeps these itself
            continue
        at = found.setdefault(collection(type(variable)), {})
        for part in path[:-1]:
            at = at.setdefault(str(part), {})
        at[str(path[-1])] = variable.get_value()
    return found


def embedded(host: Any) -> dict[str, Embedded]:
    """The seeds that Kasmina layers of a module carry, by site."""
    found = {}
    layers: Any = nnx.iter_modules(host) if isinstance(host, nnx.Module) else ()
    for path, module in layers:
        if isinstance(getattr(module, "kasmina_seeds", None), SeedVariable):
            name = join_path(tuple(map(str, path)))
            site = dataclasses.replace(module.kasmina_site, path=name)
            plants = tuple(dataclasses.replace(plant, site=name) for plant in module.kasmina_plants)
            planted = Planted(module.kasmina_life.get_value(), site, plants)
            found[name] = Embedded(planted, module.kasmina_seeds.get_value())
    return found


def sites_of(
    host: Any, variables: Mapping[str, Any], where: Where, example: Any, kwargs: Mapping[str, Any]
) -> tuple[Site, ...]:
    """The sites of an nnx module, exactly; of a state alone, and of Linen modules inside, from shapes and names.

    With `example` those inside are traced.
    """
    if not isinstance(host, nnx.Module):
        return find_sites(variables["params"], variables.get("batch_stats", {}), where)
    modules = [(tuple(map(str, path)), module) for path, module in nnx.iter_modules(host)]
    axes = {}
    for path, module in modules:
        own, single = _own(module), _single(module)
        if any(own[name].shape != shape for name, shape in single.items() if name in own):
            shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in single.items()}
            axes[path] = stack_axes({n: leaf for n, leaf in own.items() if n in shapes}, shapes)
    found, skipped = lifted_layers(host, variables, example, kwargs)
    for path, module in modules:
        if isinstance(module, nnx.bridge.ToNNX):
            continue
        below = [other for other in axes if other[: len(path)] == path]
        site = site_of_layer(path, module, common_axis(path, axes) if below else 0, bool(below))
        if isinstance(site, Site):
            found.append(site)
        elif _own(module):
            skipped.append((join_path(path), site))
    return select(found, skipped, where)


def site_of_layer(path: tuple[str, ...], module: Any, axis: int | None = 0, is_stack: bool = False) -> Site | str:
    """A layer's site, or why it can carry no seeds."""
    kind, name = _kind(module), type(module).__name__
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    if kind is None or not leaves:
        return name
    if axis is None:
        return f"{name}, stacked along more than one axis"
    geometry = _geometry(module)
    layers = leaves[0].shape[axis] if is_stack else 0
    if is_stack:
        geometry["stack"] = axis
    dtype = str(jnp.dtype(leaves[0].dtype))

    def site(inputs: tuple[int, ...], outputs: tuple[int, ...], spatial: int = 0) -> Site:
        return Site(join_path(path), kind or "", inputs, outputs, dtype, spatial, True, layers, freeze_config(geometry))

    if kind == "dense_general":
        if tuple_of(module.batch_axis or ()):
            return f"{name} with batch_axis"
        return site(tuple_of(module.in_features), tuple_of(module.out_features))
    if kind == "einsum":
        equation = module.einsum_str
        explicit = len(equation.split(",")[0].replace("...", "").replace(" ", "")) if equation else 0
        shapes = einsum_shapes(equation, explicit, tuple(module.kernel_shape)) if equation else None
        return site(*shapes) if shapes else f"{name} of another form than a linear layer"
    if kind in ("conv", "conv_transpose"):
        return site((module.in_features,), (module.out_features,), len(tuple_of(module.kernel_size)))
    if kind == "embed":
        return site((module.num_embeddings,), (module.features,))
    if kind in ("dense", "attention"):
        return site((module.in_features,), (module.out_features,))
    last = {"batch_norm": "axis", "group_norm": "feature_axis"}.get(kind, "feature_axes")
    if set(tuple_of(getattr(module, last, -1))) != {-1}:
        return f"{name} over another axis than the last"
    (features,) = next(iter(_single(module).values()))
    return site((features,), (features,))


def _single(module: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's own parameters where it stands alone."""
    kind = _kind(module)
    if kind == "dense":
        return {"kernel": (module.in_features, module.out_features), "bias": (module.out_features,)}
    if kind == "dense_general":
        inputs, outputs = tuple_of(module.in_features), tuple_of(module.out_features)
        return {} if tuple_of(module.batch_axis or ()) else {"kernel": (*inputs, *outputs), "bias": outputs}
    if kind in ("conv", "conv_transpose"):
        return {"kernel": tuple(module.kernel_shape), "bias": (module.out_features,)}
    if kind == "einsum":
        return {"kernel": tuple(module.kernel_shape)}
    if kind == "embed":
        return {"embedding": (module.num_embeddings, module.features)}
    if kind in ("layer_norm", "rms_norm", "batch_norm"):
        features = (module.num_features,)
        return dict.fromkeys(("scale", "bias"), features)
    if kind == "group_norm":
        own = _own(module)
        return {name: leaf.shape[-1:] for name, leaf in own.items()}
    return {}


def _own(module: Any) -> dict[str, Any]:
    """The arrays of the parameters that a module holds itself."""
    held = {name: value for name, value in vars(module).items() if isinstance(value, nnx.Param)}
    return {name: variable.get_value() for name, variable in held.items() if variable.get_value() is not None}


def _geometry(module: Any) -> dict[str, Any]:
    if isinstance(module, nnx.Conv | nnx.ConvTranspose):
        size = tuple_of(module.kernel_size)
        spatial = len(size)
        found = {
            "kernel_size": size,
            "strides": broadcast(module.strides, spatial),
            "padding": pairs(module.padding, spatial),
            "kernel_dilation": broadcast(module.kernel_dilation, spatial),
        }
        if isinstance(module, nnx.ConvTranspose):
            return {**found, "transpose_kernel": module.transpose_kernel}
        return {
            **found,
            "input_dilation": broadcast(module.input_dilation, spatial),
            "groups": module.feature_group_count,
        }
    if isinstance(module, nnx.LinearGeneral):
        return {"axis": tuple_of(module.axis)}
    if isinstance(module, nnx.Einsum):
        return {"equation": module.einsum_str}
    if isinstance(module, nnx.MultiHeadAttention):
        memory = (module.in_kv_features,) * 2
        return {"heads": module.num_heads, "qkv_features": module.qkv_features, "memory": memory}
    if isinstance(module, nnx.GroupNorm):
        return {"epsilon": module.epsilon, "groups": module.num_groups}
    return {"epsilon": module.epsilon} if hasattr(module, "epsilon") else {}


def call(
    model: Any,
    form: Form,
    host: Mapping[str, Any],
    banks: Mapping[str, Bank],
    train: bool | None,
    args: Any,
    kwargs: Any,
) -> tuple[Any, Any]:
    """The model's output on a host's variables with banks at its layers, and its `nnx.State` after the call.

    The call works on a copy of the model, whose layers are changed for its time only; `train` sets its mode, None
    leaves it as the model has it.
    """
    copy = nnx.merge(nnx.graphdef(model), form.state(host))
    if train is not None:
        copy.train() if train else copy.eval()
    others = tuple(name for name in host if name != "params")
    with lifted_calls(lifted(copy), banks, train, others) as own, _planted(copy, own):
        output = copy(*args, **kwargs)
    return output, nnx.state(copy)


@contextlib.contextmanager
def _planted(module: Any, banks: Mapping[str, Bank]) -> Iterator[None]:
    """The module with banks at its layers, each in the place of its class, and as it was afterwards."""
    modules = {join_path(tuple(map(str, path))): part for path, part in nnx.iter_modules(module)} if banks else {}
    changed: list[Any] = []
    tokens = _CALLED.set(set()), _INPUTS.set({})
    try:
        for path, bank in banks.items():
            layer = modules[path]
            layer.__class__ = _seeded(type(layer))
            setattr(layer, BANK, BankVariable(stacked(bank)))
            changed.append(layer)
        yield
        called = _CALLED.get() or set()
        missed = [path for path, bank in banks.items() if bank.plants and path not in called]
        if missed and called:
            warnings.warn(
                f"seeds at {', '.join(missed)} have no effect: the model never called that layer in this forward pass "
                "(its parameters are read directly, or the layer is unused).",
                stacklevel=5,
            )
    finally:
        _CALLED.reset(tokens[0])
        _INPUTS.reset(tokens[1])
        for layer in changed:
            delattr(layer, BANK)
            layer.__class__ = type(layer).__mro__[1]


@functools.cache
def _seeded(cls: type) -> type:
    """A class of layers like `cls` that apply their bank to their output."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.__call__(self, *args, **kwargs)  # type: ignore[operator]
        bank = unstacked(getattr(self, BANK).get_value())
        if (called := _CALLED.get()) is not None:
            called.add(bank.site.path)
        return with_seeds(self, cls, bank, args, kwargs, output)

    return with_call(cls, __call__)


def with_seeds(module: Any, cls: type, bank: Bank, args: Any, kwargs: Any, h: Any) -> Any:
    """The layer's output with its bank applied, in the layout that the layer gave it."""
    site, u = bank.site, first_input(module, args, kwargs)
    if not (hasattr(u, "shape") and hasattr(h, "shape")):
        if not bank.plants:
            return h
        raise ValueError(f"site {site.path!r}: {cls.__name__} takes or gives more than one array")
    inputs, output, back = arrange(site, _geometry(module), jnp.asarray(u), h)
    if output.shape[-1] != site.out_features:
        raise ValueError(
            f"site {site.path!r}: {cls.__name__} gave an output of shape {h.shape}, not of {site.out_shape}"
        )
    linear = None
    if cls in (nnx.Linear, nnx.LinearGeneral):
        own = _own(module)
        bias = own["bias"].reshape(-1) if "bias" in own else None
        linear = own["kernel"].reshape(site.in_features, site.out_features), bias
    call = attended(module, args, kwargs) if site.kind == "attention" else None
    return back(apply_bank(bank, inputs, output, linear, _INPUTS.get(), call))


def _kind(module: Any) -> str | None:
    return next((kind for cls, kind in _KINDS if isinstance(module, cls)), None)


def _flat(state: Any) -> list[tuple[tuple[Any, ...], Any]]:
    flat = nnx.to_flat_state(state)
    return sorted(flat, key=lambda entry: tuple(map(str, entry[0])))


def _is_known(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple)


def _get(tree: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        tree = tree.get(str(part)) if isinstance(tree, Mapping) else None
    return tree


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
