"""The Linen adapter: finds a model's layers and intercepts their calls. The only file of the core that knows Linen."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .bank import Bank, apply_bank
from .sites import Where, infer_site, join_path, nodes, own_arrays, select, split_path
from .spec import Site

RESERVED = "__esper_seeds__"
_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.MultiHeadDotProductAttention, "attention"),
    (nn.Dense, "dense"),
    (nn.DenseGeneral, "dense_general"),
    (nn.Conv, "conv"),
    (nn.LayerNorm, "layer_norm"),
    (nn.BatchNorm, "batch_norm"),
)


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

    def intercept(next_call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        called.add(context.method_name)
        if (
            context.method_name != "__call__"
            or module.scope is None
            or not module.scope.has_variable("params", RESERVED)
        ):
            return next_call(*args, **kwargs)
        bank = module.scope.get_variable("params", RESERVED)
        if bank.site.path in inside:  # a subclass that calls super().__call__
            return next_call(*args, **kwargs)
        visited.add(bank.site.path)
        inside.add(bank.site.path)
        try:
            output = next_call(*args, **kwargs)
        finally:
            inside.remove(bank.site.path)
        return with_seeds(module, bank, args, kwargs, output)

    with nn.intercept_methods(intercept):
        result = apply({**variables, "params": _merge(variables["params"], banks)}, *args, **kwargs)
    # A jitted apply that is called again runs from its cache: no layer is called, and its seeds are in the program.
    missed = [path for path, bank in banks.items() if bank.plants and path not in visited]
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
    seen: dict[str, tuple[nn.Module, Any, Any]] = {}

    def intercept(next_call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        output = next_call(*args, **kwargs)
        if context.method_name == "__call__":
            first = _first_input(context.module, args, kwargs)
            seen.setdefault(join_path(context.module.path), (context.module.clone(), first, output))
        return output

    inputs = example if isinstance(example, tuple) else (example,)
    with nn.intercept_methods(intercept):
        jax.eval_shape(
            lambda v, a: model.apply(v, *a, **{**mode(model, False), **kwargs}, mutable=False), variables, inputs
        )
    found: list[Site] = []
    skipped: list[tuple[str, str]] = []
    statistics = {path for path, node in nodes(variables.get("batch_stats", {})) if own_arrays(node)}
    for parts, node in nodes(variables["params"]):
        path = join_path(parts)
        guessed = infer_site(parts, node, parts in statistics)
        if path not in seen:
            if own_arrays(node):
                skipped.append((path, "never called on the example"))
            continue
        module, u, h = seen[path]
        site = traced_site(path, module, guessed, u, h, node)
        if site is not None:
            found.append(site)
        elif own_arrays(node):
            skipped.append((path, type(module).__name__))
    return select(found, skipped, where)


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


def traced_site(
    path: str, module: nn.Module, guessed: Site | None, u: Any, h: Any, node: Mapping[str, Any]
) -> Site | None:
    """The site of a layer that was seen called with input `u` and output `h`; None if it can carry no seeds."""
    kind = next((kind for cls, kind in _KINDS if isinstance(module, cls)), None)
    shaped = hasattr(u, "shape") and hasattr(h, "shape")
    if not shaped or (kind is None and (guessed is None or type(module).__module__.startswith("flax."))):
        return None
    arrays = jax.tree.leaves(dict(node))
    if not arrays or not _last_axis(module, u) or _is_stacked(module, node):
        return None
    dtype = str(jnp.dtype(arrays[0].dtype))
    if kind == "dense_general":
        axes, batch = _dense_axes(module), module.batch_dims
        if batch:
            return None
        inputs = tuple(u.shape[axis] for axis in axes)
        features = module.features if isinstance(module.features, tuple | list) else (module.features,)
        return Site(path, kind, inputs, tuple(features), dtype, traced=True)
    if kind == "conv":
        size = module.kernel_size
        spatial = 1 if isinstance(size, int) else len(size)
        return Site(path, kind, u.shape[-1:], h.shape[-1:], dtype, spatial, traced=True)
    if kind is None:
        assert guessed is not None
        agrees = u.shape[-1] == guessed.in_features and h.shape[-1] == guessed.out_features
        return guessed if agrees and guessed.kind != "dense_general" else None
    return Site(path, kind, u.shape[-1:], h.shape[-1:], dtype, traced=True)


def with_seeds(module: nn.Module, bank: Bank, args: tuple[Any, ...], kwargs: dict[str, Any], h: Any) -> Any:
    """The layer's output with its bank applied, in the layout that the layer gave it."""
    site, u = bank.site, _first_input(module, args, kwargs)
    if not (hasattr(u, "shape") and hasattr(h, "shape")):
        raise _mismatch(site, module, "takes or gives more than one array")
    kind = next((kind for cls, kind in _KINDS if isinstance(module, cls)), site.kind)
    if kind != site.kind and {kind, site.kind} != {"dense", "dense_general"}:
        raise _mismatch(site, module, f"is a {kind} layer")
    if not _last_axis(module, u):
        raise _mismatch(site, module, "normalises another axis than the last")
    inputs = jnp.asarray(u)
    if isinstance(module, nn.DenseGeneral):
        axes = _dense_axes(module)
        inputs = jnp.moveaxis(inputs, axes, range(-len(axes), 0))
        inputs = inputs.reshape(*inputs.shape[: inputs.ndim - len(axes)], -1)
    output = h.reshape(*h.shape[: h.ndim - len(site.out_shape)], -1)
    if inputs.shape[-1] != site.in_features and not (site.kind == "conv" and not site.traced):
        raise _mismatch(site, module, f"has an input of {inputs.shape[-1]} features")
    if h.shape[h.ndim - len(site.out_shape) :] != site.out_shape:
        raise _mismatch(site, module, f"has an output of shape {h.shape}")
    if site.spatial:
        inputs = inputs.reshape(math.prod(inputs.shape[: -site.spatial - 1]), *inputs.shape[-site.spatial - 1 :])
        output = output.reshape(math.prod(output.shape[: -site.spatial - 1]), *output.shape[-site.spatial - 1 :])
    return apply_bank(bank, inputs, output, _kernel_and_bias(module, site)).reshape(h.shape)


def _kernel_and_bias(module: nn.Module, site: Site) -> tuple[Any, Any] | None:
    """Kernel `[in, out]` and bias of a layer that is linear and nothing else; None for all others."""
    if type(module) not in (nn.Dense, nn.DenseGeneral):
        return None
    params: Mapping[str, Any] = module.variables["params"]
    if set(params) - {RESERVED} - {"kernel", "bias"}:
        return None
    bias = params["bias"].reshape(-1) if "bias" in params else None
    return params["kernel"].reshape(site.in_features, site.out_features), bias


def _mismatch(site: Site, module: nn.Module, found: str) -> ValueError:
    return ValueError(
        f"site {site.path!r} was taken for {site.kind} {site.in_shape} -> {site.out_shape}, but the layer called there "
        f"is {type(module).__name__}, which {found}. Give morph() model= and example= so that kinds and shapes are "
        "traced, or leave the site out with where= (layers stacked by nn.scan or nn.vmap cannot carry seeds yet)"
    )


def _first_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return args[0]
    name = next(iter(list(inspect.signature(type(module).__call__).parameters)[1:]), None)
    return kwargs.get(name) if name else None


def _last_axis(module: nn.Module, u: Any) -> bool:
    """Whether a norm's features are the last axis of its input; True for all other layers."""
    last = (-1, u.ndim - 1)
    if isinstance(module, nn.BatchNorm):
        return module.axis in last
    if isinstance(module, nn.LayerNorm):
        axes = module.feature_axes if isinstance(module.feature_axes, tuple | list) else (module.feature_axes,)
        return len(axes) == 1 and axes[0] in last
    return True


def _is_stacked(module: Any, node: Mapping[str, Any]) -> bool:
    """Whether the parameters hold more axes than the layer itself has: `nn.scan` or `nn.vmap` stacked them."""
    if isinstance(module, nn.MultiHeadDotProductAttention):
        return bool(node["query"]["kernel"].ndim != 3)
    if isinstance(module, nn.DenseGeneral):
        features = module.features if isinstance(module.features, tuple | list) else (module.features,)
        return bool(node["kernel"].ndim != len(_dense_axes(module)) + len(features))
    if isinstance(module, nn.Dense):
        return bool(node["kernel"].ndim != 2)
    if isinstance(module, nn.Conv):
        return bool(node["kernel"].ndim != (1 if isinstance(module.kernel_size, int) else len(module.kernel_size)) + 2)
    if isinstance(module, nn.LayerNorm | nn.BatchNorm):
        return any(leaf.ndim != 1 for leaf in own_arrays(node).values())
    return False


def _dense_axes(module: Any) -> tuple[int, ...]:
    return tuple(module.axis) if isinstance(module.axis, tuple | list) else (module.axis,)


def _merge(params: Mapping[str, Any], banks: Mapping[str, Bank]) -> dict[str, Any]:
    merged = dict(params)
    for path, bank in banks.items():
        node = merged
        for part in split_path(path):
            node[part] = dict(node[part])
            node = node[part]
        node[RESERVED] = bank
    return merged


def _strip(params: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _strip(child) if isinstance(child, Mapping) else child
        for name, child in params.items()
        if name != RESERVED
    }
