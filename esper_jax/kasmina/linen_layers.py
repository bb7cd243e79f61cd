"""What the Linen adapter knows of Linen's own layers: their kinds, geometry, and how their inputs lie."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .bank import Bank, apply_bank
from .blueprints import CONVS, DENSE, NORMS
from .layout import arrange, einsum_shapes
from .sites import RESERVED
from .spec import Site, freeze_config

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.MultiHeadDotProductAttention, "attention"),
    (nn.Dense, "dense"),
    (nn.DenseGeneral, "dense_general"),
    (nn.Einsum, "einsum"),
    (nn.Conv, "conv"),
    (nn.ConvTranspose, "conv_transpose"),
    (nn.Embed, "embed"),
    (nn.LayerNorm, "layer_norm"),
    (nn.RMSNorm, "rms_norm"),
    (nn.GroupNorm, "group_norm"),
    (nn.InstanceNorm, "group_norm"),
    (nn.BatchNorm, "batch_norm"),
)
_ALIKE = (frozenset(DENSE), frozenset(CONVS), frozenset(NORMS))


def kind_of(module: nn.Module) -> str | None:
    """The kind of a Flax layer; None for other modules."""
    return next((kind for cls, kind in _KINDS if isinstance(module, cls)), None)


def geometry_of(module: Any, u: Any) -> dict[str, Any]:
    """What a layer's fields tell beside the shapes of its parameters (see `Site.geometry`)."""
    if isinstance(module, nn.Conv | nn.ConvTranspose):
        spatial = len(tuple_of(module.kernel_size))
        found = {
            "kernel_size": tuple_of(module.kernel_size),
            "strides": broadcast(module.strides, spatial),
            "padding": pairs(module.padding, spatial),
            "kernel_dilation": broadcast(module.kernel_dilation, spatial),
        }
        if isinstance(module, nn.ConvTranspose):
            return {**found, "transpose_kernel": module.transpose_kernel}
        dilation = broadcast(module.input_dilation, spatial)
        return {**found, "input_dilation": dilation, "groups": module.feature_group_count}
    if isinstance(module, nn.DenseGeneral):
        return {"axis": tuple(axis % u.ndim - u.ndim for axis in tuple_of(module.axis))}
    if isinstance(module, nn.MultiHeadDotProductAttention):
        width = module.qkv_features or u.shape[-1]
        return {"heads": module.num_heads, "qkv_features": width}
    if isinstance(module, nn.GroupNorm):
        groups = module.num_groups or u.shape[-1] // module.group_size
        return {"epsilon": module.epsilon, "groups": groups}
    if isinstance(module, nn.InstanceNorm):
        return {"epsilon": module.epsilon, "groups": u.shape[-1]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.BatchNorm):
        return {"epsilon": module.epsilon}
    return {}


def traced_site(
    path: str,
    module: Any,
    guessed: Site | None,
    u: Any,
    h: Any,
    node: Mapping[str, Any],
    known: Mapping[str, Any],
) -> Site | str:
    """The site of a layer that was seen called with input `u` and output `h`, or why it can carry no seeds.

    Args:
      path: the site's path.
      module: the layer.
      guessed: what its parameters alone look like.
      u: its first input.
      h: its output.
      node: its parameters as the host holds them.
      known: what else was seen of it; `stack` is the axis along which its arrays are stacked, None where unknown.
    """
    kind, name = kind_of(module), type(module).__name__
    arrays = jax.tree.leaves(dict(node))
    if not arrays:
        return f"{name} without parameters"
    if not (hasattr(u, "shape") and hasattr(h, "shape")):
        return f"{name}, which takes or gives more than one array"
    if kind is None and (guessed is None or type(module).__module__.startswith("flax.")):
        return name
    if not _last_axis(module, u):
        return f"{name} over another axis than the last"
    if known.get("stack", 0) is None:
        return f"{name}, stacked along more than one axis"
    layers = arrays[0].shape[known["stack"]] if "stack" in known else 0
    found = {**geometry_of(module, u), **_peculiar(module), **known}
    dtype = str(jnp.dtype(arrays[0].dtype))

    def site(inputs: Any, outputs: Any, spatial: int = 0) -> Site:
        known = freeze_config(found)
        return Site(path, kind or "", tuple(inputs), tuple(outputs), dtype, spatial, True, layers, known)

    if kind == "dense_general":
        if module.batch_dims:
            return f"{name} with batch_dims"
        return site((u.shape[axis] for axis in found["axis"]), tuple_of(module.features))
    if kind == "einsum":
        shapes = None
        if found.get("equation"):
            shapes = einsum_shapes(found["equation"], u.ndim, tuple(module.shape))
        return site(*shapes) if shapes else f"{name} of another form than a linear layer"
    if kind in CONVS:
        return site(u.shape[-1:], h.shape[-1:], len(found["kernel_size"]))
    if kind == "embed":
        return site((module.num_embeddings,), h.shape[-1:])
    if kind is None:
        assert guessed is not None
        agrees = u.shape[-1:] == guessed.in_shape and h.shape[-1:] == guessed.out_shape and not layers
        return dataclasses.replace(guessed, geometry=freeze_config(_peculiar(module))) if agrees else name
    return site(u.shape[-1:], h.shape[-1:])


def with_seeds(
    module: Any,
    bank: Bank,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    h: Any,
    inputs: dict[str, Any] | None = None,
) -> Any:
    """The layer's output with its bank applied, in the layout that the layer gave it."""
    site, u = bank.site, first_input(module, args, kwargs)
    if not (hasattr(u, "shape") and hasattr(h, "shape")):
        if not bank.plants:  # a probe alone: there is nothing to measure
            return h
        raise _mismatch(site, module, "takes or gives more than one array")
    kind = kind_of(module) or site.kind
    if kind != site.kind and not any({kind, site.kind} <= alike for alike in _ALIKE):
        raise _mismatch(site, module, f"is a {kind} layer")
    if not _last_axis(module, u):
        raise _mismatch(site, module, "normalises another axis than the last")
    geometry = geometry_of(module, u)
    if isinstance(module, nn.Einsum):
        geometry["equation"] = equation_of(module, args, kwargs)
    given, output, back = arrange(site, geometry, u, h)
    free = site.kind == "embed" or (site.kind in CONVS and not site.traced)
    if not free and given.shape[-1] != site.in_features:
        raise _mismatch(site, module, f"has an input of {given.shape[-1]} features")
    if output.shape[-1] != site.out_features:
        raise _mismatch(site, module, f"has an output of shape {h.shape}")
    call = attended(module, args, kwargs) if site.kind == "attention" else None
    return back(apply_bank(bank, given, output, _kernel_and_bias(module, site), inputs, call))


def attended(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Queries, keys, values and mask of an attention layer's call."""
    given = _signature(module).bind(module, *args, **kwargs).arguments
    queries, shared = given["inputs_q"], given.get("inputs_kv")
    keys = given.get("inputs_k")
    keys = keys if keys is not None else shared if shared is not None else queries
    values = given.get("inputs_v")
    return queries, keys, values if values is not None else keys, given.get("mask")


def _peculiar(module: Any) -> dict[str, str]:
    """Why a layer's arrays may mean something else than in Flax's own layer, as `custom`, or nothing."""
    name = type(module).__name__
    if not type(module).__module__.startswith("flax.") and not getattr(module, "keeps_meaning", False):
        return {"custom": f"a {name}, not one of Flax's own layers"}
    if getattr(module, "mask", None) is not None:
        return {"custom": f"a {name} with a mask"}
    return {}


def _kernel_and_bias(module: nn.Module, site: Site) -> tuple[Any, Any] | None:
    """Kernel `[in, out]` and bias of a layer that is linear and nothing else; None for all others."""
    if type(module) not in (nn.Dense, nn.DenseGeneral):
        return None
    params: Mapping[str, Any] = nn.meta.unbox(module.variables["params"])
    if set(params) - {RESERVED} - {"kernel", "bias"}:
        return None
    bias = params["bias"].reshape(-1) if "bias" in params else None
    return params["kernel"].reshape(site.in_features, site.out_features), bias


def equation_of(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The equation of an `nn.Einsum`, given to the layer or to its call."""
    given = kwargs.get("einsum_str", args[1] if len(args) > 1 else None)
    equation: str | None = given or module.einsum_str
    return equation


def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a layer's call."""
    if args:
        return args[0]
    name = next(iter(list(_signature(module).parameters)[1:]), None)
    return kwargs.get(name) if name else None


def _signature(module: Any) -> inspect.Signature:
    """How a layer is called: the signature of the first class in its line that names its arguments."""
    for cls in type(module).__mro__:
        signature = inspect.signature(cls.__call__)
        if any(p.kind is p.POSITIONAL_OR_KEYWORD and name != "self" for name, p in signature.parameters.items()):
            return signature
    return inspect.signature(type(module).__call__)


def _mismatch(site: Site, module: nn.Module, found: str) -> ValueError:
    return ValueError(
        f"site {site.path!r} was taken for {site.kind} {site.in_shape} -> {site.out_shape}, but the layer called there "
        f"is {type(module).__name__}, which {found}. Give morph() model= and example= so that kinds and shapes are "
        "traced, or leave the site out with where="
    )


def _last_axis(module: Any, u: Any) -> bool:
    """Whether a norm's features are the last axis of its input; True for all other layers."""
    last = (-1, u.ndim - 1)
    if isinstance(module, nn.BatchNorm):
        return module.axis in last
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.InstanceNorm):
        axes = tuple_of(module.feature_axes)
        return len(axes) == 1 and axes[0] in last
    return True


def tuple_of(value: Any) -> tuple[Any, ...]:
    """One thing as a tuple of it."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def broadcast(value: Any, spatial: int) -> tuple[int, ...]:
    """A number for each spatial axis; None is 1."""
    return (1,) * spatial if value is None else (value,) * spatial if isinstance(value, int) else tuple(value)


def pairs(value: Any, spatial: int) -> Any:
    """A padding as a string, or as a pair a spatial axis."""
    if isinstance(value, str):
        return value
    each = (value,) * spatial if isinstance(value, int) else tuple(value)
    return tuple((pad, pad) if isinstance(pad, int) else tuple(pad) for pad in each)
