"""The Linen adapter: finds a model's layers and intercepts their calls. With `linen_layers`, all that knows Linen."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .bank import Bank, stacked, unstacked
from .layout import common_axis, stack_axes
from .linen_layers import equation_of, first_input, traced_site, with_seeds
from .sites import RESERVED, Where, infer_site, join_path, nodes, own_arrays, select, split_path
from .spec import Site


def model_of(apply: Any) -> nn.Module | None:
    """The Linen module behind `model`, `model.apply`, or a partial or jitted form of it; None for other callables."""
    while True:
        if isinstance(apply, nn.Module):
            return apply
        if isinstance(apply, functools.partial):
            apply = apply.func
        elif inspect.ismethod(apply):
            return apply.__self__ if isinstance(apply.__self__, nn.Module) else None
        elif hasattr(apply, "__wrapped__"):
            apply = apply.__wrapped__
        else:
            return None


def unboxed(variables: Any) -> Any:
    """Variables without the boxes of partition metadata that Flax may put around arrays (`nn.with_partitioning`)."""
    if isinstance(variables, Mapping):
        return {name: unboxed(child) for name, child in variables.items()}
    return nn.meta.unbox(variables)


def mode(model: Any, train: bool) -> dict[str, bool]:
    """The keyword by which the model's `__call__` is told that it trains, with its value; {} if it has none."""
    if not isinstance(model, nn.Module):
        return {}
    names = inspect.signature(type(model).__call__).parameters
    for name, value in (("train", train), ("training", train), ("is_training", train), ("deterministic", not train)):
        if name in names:
            return {name: value}
    return {"use_running_average": not train} if "use_running_average" in names else {}


def call(
    apply: Callable[..., Any], variables: Mapping[str, Any], banks: Mapping[str, Bank], *args: Any, **kwargs: Any
) -> Any:
    """`apply(variables, *args, **kwargs)` with each site's bank applied to its layer's output.

    The banks travel inside `params`, each at its layer's own path, so that lifted transforms (`nn.remat`, `nn.scan`)
    carry them; they are taken out of any variables that come back.
    """
    called: set[str] = set()
    visited: set[str] = set()
    inside: set[str] = set()
    inputs: dict[str, Any] = {}

    def intercept(next_call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if _maps_a_bank(args):
            return args[1]
        called.add(context.method_name)
        if (
            context.method_name != "__call__"
            or module.scope is None
            or not module.scope.has_variable("params", RESERVED)
        ):
            return next_call(*args, **kwargs)
        bank = unstacked(module.scope.get_variable("params", RESERVED))
        if bank.site.path in inside:  # a subclass that calls super().__call__
            return next_call(*args, **kwargs)
        visited.add(bank.site.path)
        inside.add(bank.site.path)
        try:
            output = next_call(*args, **kwargs)
        finally:
            inside.remove(bank.site.path)
        return with_seeds(module, bank, args, kwargs, output, inputs)

    try:
        with nn.intercept_methods(intercept):
            result = apply({**variables, "params": _merge(variables["params"], banks)}, *args, **kwargs)
    except Exception as error:
        if guessed := [path for path, bank in banks.items() if not bank.site.traced]:
            error.add_note(
                f"morph() knows {', '.join(guessed)} by their parameters alone; if the error comes from there, give it "
                "model= and example= so that the layers are traced"
            )
        raise
    # A jitted apply that is called again runs from its cache: no layer is called, and its seeds are in the program.
    missed = [bank.site.path for bank in banks.values() if bank.plants and bank.site.path not in visited]
    if missed and called and "method" not in kwargs:
        warnings.warn(
            f"seeds at {', '.join(missed)} have no effect: the model never called that layer in this forward pass "
            "(its parameters are read directly, or the layer is unused).",
            stacklevel=3,
        )
    returns_variables = kwargs.get("mutable", False) is not False
    if returns_variables and isinstance(result, tuple) and len(result) == 2:
        output, updated = result
        if isinstance(updated, Mapping) and "params" in updated:
            updated = {**updated, "params": _strip(updated["params"])}
        return output, updated
    return result


def trace_sites(
    model: nn.Module, variables: Mapping[str, Any], example: Any, where: Where, kwargs: Mapping[str, Any]
) -> tuple[Site, ...]:
    """The model's sites with kinds, shapes and dtypes read off a trace of one call on `example` (shapes only)."""
    inputs = example if isinstance(example, tuple) else (example,)
    return select(*traced_layers(model, variables, inputs, kwargs), where)


def traced_layers(
    model: nn.Module, variables: Mapping[str, Any], inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Site], list[tuple[str, str]]]:
    """The sites that one traced call shows, and the layers that are none with the reason."""
    seen: dict[str, Seen] = {}
    tied: set[str] = set()
    wrappers: list[str] = []

    def intercept(next_call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        wraps = context.method_name == "__call__" and isinstance(module, nn.WeightNorm | nn.SpectralNorm)
        wrappers.extend([type(module).__name__] * wraps)
        output = next_call(*args, **kwargs)
        del wrappers[len(wrappers) - wraps :]
        path = join_path(module.path)
        if context.method_name == "__call__" and module.scope is not None and path not in seen:
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _own_params(module))
            known = {"equation": equation_of(module, args, kwargs)} if isinstance(module, nn.Einsum) else {}
            known |= {"custom": f"inside {wrappers[-1]}"} if wrappers else {}
            seen[path] = Seen(module.clone(), first_input(module, args, kwargs), output, shapes, known)
        elif context.method_name == "attend":
            tied.add(path)
        return output

    mutable = [name for name in variables if name != "params"]  # e.g. statistics that the call updates
    rngs = {"params": jax.random.key(0)}  # for any stream
    given = {"rngs": rngs, **mode(model, False), **kwargs, "mutable": mutable}
    with nn.intercept_methods(intercept):
        try:
            jax.eval_shape(lambda v, a: model.apply(v, *a, **given), variables, inputs)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be traced on example= ({shapes_text(inputs)}) with these variables: "
                f"{type(error).__name__}: {error}"
            ) from error
    axes = _stacks(variables["params"], seen)
    found: list[Site] = []
    skipped: list[tuple[str, str]] = []
    statistics = {path for path, node in nodes(variables.get("batch_stats", {})) if own_arrays(node)}
    whole = {split_path(path) for path, at in seen.items() if getattr(at.module, "one_site", False)}
    for parts, node in nodes(variables["params"]):
        path = join_path(parts)
        if any(parts[:n] in whole for n in range(1, len(parts))):
            continue
        if path not in seen:
            if own_arrays(node):
                skipped.append((path, "never called on the example"))
            continue
        at = seen[path]
        guessed = infer_site(parts, node, parts in statistics)
        known = {**at.known, **({"tied": True} if path in tied else {})}
        if isinstance(at.module, nn.MultiHeadDotProductAttention):
            known["memory"] = tuple(at.params[name]["kernel"].shape[0] for name in ("key", "value"))
        if any(other[: len(parts)] == parts for other in axes):
            known["stack"] = common_axis(parts, axes)
        site = traced_site(path, at.module, guessed, at.u, at.h, node, known)
        if isinstance(site, Site):
            found.append(site)
        elif own_arrays(node):
            skipped.append((path, site))
    return found, skipped


def shapes_text(inputs: tuple[Any, ...]) -> str:
    """The arguments of an example in words: shapes, or types where there is none."""
    return ", ".join(str(getattr(leaf, "shape", type(leaf).__name__)) for leaf in inputs)


class Seen(NamedTuple):
    """One layer's first call in a trace."""

    module: nn.Module
    u: Any
    h: Any
    params: Any
    known: dict[str, Any]


def _stacks(params: Mapping[str, Any], seen: Mapping[str, Seen]) -> dict[tuple[str, ...], frozenset[int]]:
    """Of each layer that saw other shapes than the host holds: the axes along which its arrays may be stacked."""
    found = {}
    for parts, node in nodes(params):
        own, at = own_arrays(node), seen.get(join_path(parts))
        if own and at is not None and any(jnp.shape(own[n]) != jnp.shape(at.params[n]) for n in own if n in at.params):
            found[parts] = stack_axes(own, at.params)
    return found


def _maps_a_bank(args: tuple[Any, ...]) -> bool:
    """Whether a call is given an array of a bank by its path, as `nn.SpectralNorm` and `nn.WeightNorm` do.

    They rewrite all parameters of the layer within, and a seed's are none of theirs.
    """
    path = args[0] if len(args) > 1 else ()
    return isinstance(path, tuple) and any(getattr(entry, "key", None) == RESERVED for entry in path)


def _own_params(module: Any) -> dict[str, Any]:
    return dict(module.variables.get("params", {}))


def blueprint_functions(
    name: str, module: Callable[..., nn.Module], reads: str
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`init` and `apply` of a blueprint given as `module(site, **config) -> nn.Module`.

    The site and config are static, so the module is rebuilt wherever it is needed.
    """

    def init(key: jax.Array, site: Site, **config: Any) -> Any:
        built = module(site, **config)
        if not isinstance(built, nn.Module):
            raise TypeError(f"blueprint {name!r}: module= must give a flax.linen.Module, got {type(built).__name__}")
        features = site.in_features if reads == "input" else site.out_features
        variables = built.init(key, jnp.zeros((1,) + (8,) * site.spatial + (features,), site.dtype))
        if extra := sorted(set(variables) - {"params"}):
            raise TypeError(
                f"blueprint {name!r}: a seed may have parameters only, its module also has {', '.join(extra)}"
            )
        return variables["params"]

    def apply(params: Any, u: jax.Array, site: Site, **config: Any) -> jax.Array:
        output: Any = module(site, **config).apply({"params": params}, u)
        return output

    return init, apply


def _merge(params: Mapping[str, Any], banks: Mapping[str, Bank]) -> dict[str, Any]:
    merged = dict(params)
    for path, bank in banks.items():
        node = merged
        for part in split_path(path):
            node[part] = dict(node[part])
            node = node[part]
        node[RESERVED] = stacked(bank)
    return merged


def _strip(params: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _strip(child) if isinstance(child, Mapping) else child
        for name, child in params.items()
        if name != RESERVED
    }
