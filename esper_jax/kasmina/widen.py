"""Width growth for good: the units of a span become columns and rows of the host's own kernels."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import inputs
from . import linen
from .layout import change_at
from .morph import Morph, check_morph, with_spec
from .sites import split_path
from .spec import Plant, Site, Spec

KNOWN = ("dense", "conv")
MOST = 4096


def obstacle(morph: Morph, plant: Plant) -> str:
    """Why a span cannot become part of its layers, or an empty text."""
    spec, config = morph.spec, dict(plant.config)
    first, second = spec.by_path[plant.source], spec.by_path[plant.site]
    if plant.blueprint != "units":
        return f"{plant.blueprint} in a span has no units that could be the layers' own"
    if first.kind not in KNOWN or second.kind not in KNOWN:
        return f"only dense layers and convolutions widen, not {first.kind} and {second.kind}"
    if first.layers:
        return "layers in a stack are not widened"
    if config["norm"] and config["norm"] not in spec.by_path:
        return f"its norm {config['norm']!r} is no site of this morph"
    own = _arrays(morph.params["host"], first)
    if config["bias"] and "bias" not in own:
        return f"{first.path} has no bias to take the units'; germinate units with bias=False there"
    for other in spec.plants:
        same = (other.source, other.site) == (plant.source, plant.site)
        touched = {first.path, second.path, config["norm"]} - {""}
        if not same and (other.site in touched or other.source in touched):
            return f"{other.blueprint} at {other.site} slot {other.slot} has the old width; fold or prune it first"
    return ""


def widened_morph(morph: Morph, plant: Plant) -> Morph:
    """The morph with a span's units in its layers' own kernels; its sites know the new widths."""
    spec, config = morph.spec, dict(plant.config)
    first, second = spec.by_path[plant.source], spec.by_path[plant.site]
    seed = morph.seeds[plant.site][plant.key]
    alpha = morph.state[plant.site].alpha[plant.slot]
    epsilon = dict(spec.by_path[config["norm"]].geometry).get("epsilon", 1e-5) if config["norm"] else None
    params = joined(morph.params["host"], seed, first, second, config["norm"], alpha, epsilon=epsilon)
    bare = with_spec(morph, spec.without(plant.site, plant.slot))
    host = bare.with_params({"host": params, "seeds": bare.seeds}).host
    if config["norm"] and "batch_stats" in host:
        host = type(host)({**host, "batch_stats": _stats(host["batch_stats"], config["norm"], config["units"])})
    width = (first.out_features + config["units"],)
    known: dict[str, dict[str, Any]] = {first.path: {"out_shape": width}, second.path: {"in_shape": width}}
    if config["norm"]:
        known[config["norm"]] = {"in_shape": width, "out_shape": width}
    changed = [dataclasses.replace(site, **known.get(site.path, {})) for site in spec.sites]
    return bare.replace(host=host, spec=Spec(tuple(changed), spec.slots, bare.spec.plants))


def joined(
    params: Any, seed: Any, first: Site, second: Site, norm: str, alpha: Any, *, epsilon: float | None = None
) -> Any:
    """A tree in the structure of the host's params (or its moments) with a span's own at its ends.

    `seed` is in the structure of the units' params. With `epsilon`, that of a norm between, the norm begins as the
    identity in evaluation mode; else (for moments) with zeros.
    """
    enter, leave, bias = seed["enter"], seed["leave"], seed.get("bias")
    units = enter.shape[-1]

    def widen_first(node: Any) -> Any:
        new = {"kernel": _concatenated(node["kernel"], enter, -1, 1.0)}
        if "bias" in node:
            new["bias"] = _concatenated(node["bias"], jnp.zeros((units,)) if bias is None else bias, -1, 1.0)
        return type(node)({**node, **new})

    def widen_second(node: Any) -> Any:
        return type(node)({**node, "kernel": _concatenated(node["kernel"], leave, -2, alpha)})

    def widen_norm(node: Any) -> Any:
        begin = {"scale": 0.0 if epsilon is None else (1 + epsilon) ** 0.5, "bias": 0.0}
        new = {n: _concatenated(node[n], jnp.full((units,), begin[n]), -1, 1.0) for n in begin if n in node}
        return type(node)({**node, **new})

    params = change_at(params, split_path(first.path), widen_first)
    params = change_at(params, split_path(second.path), widen_second)
    return change_at(params, split_path(norm), widen_norm) if norm else params


def _concatenated(old: Any, new: Any, axis: int, scale: Any) -> Any:
    """Arrays side by side, in the old one's dtype and box."""
    leaves, structure = jax.tree.flatten(old)
    wide = (new * scale).astype(leaves[0].dtype)
    return jax.tree.unflatten(structure, [jnp.concatenate([leaves[0], wide], axis)])


def _stats(stats: Any, norm: str, units: int) -> Any:
    begin = {"mean": 0.0, "var": 1.0}
    grow = lambda node: type(node)(  # noqa: E731
        {n: _concatenated(leaf, jnp.full((units,), begin[n]), -1, 1.0) for n, leaf in node.items()}
    )
    return change_at(stats, split_path(norm), grow)


def _arrays(params: Any, site: Site) -> Mapping[str, Any]:
    for part in split_path(site.path):
        params = params[part]
    found: Mapping[str, Any] = params
    return found


def sizes_changed(before: Morph, after: Morph) -> dict[str, tuple[int, int]]:
    """The layers whose number of output features folding has changed: `{path: (old, new)}`.

    Raises:
      TypeError: `before` or `after` is no `Morph`.
    """
    check_morph(before, "sizes_changed", "before")
    check_morph(after, "sizes_changed", "after")
    old = before.spec.by_path
    return {
        site.path: (old[site.path].out_features, site.out_features)
        for site in after.spec.sites
        if site.path in old and site.out_features != old[site.path].out_features
    }


def widened(model: Any, before: Morph, after: Morph, example: Any, **kwargs: Any) -> Any:
    """The Linen module that a widened morph's host is for: the same one with larger sizes in its fields.

    Every field that holds an old size, alone or in a tuple, is tried with the new one; the module whose parameters
    have the shapes of `after`'s host is it.

    Args:
      model: the module that `before`'s host is for.
      before: the morph before `fold`.
      after: the morph after it.
      example: one input, an array or a tuple of arguments; only its shape matters.
      **kwargs: keyword arguments of the module's `init`.

    Returns:
      The wider module.

    Raises:
      ValueError: the sizes are not fields of the module; the message lists which layers must be larger, to be changed
        in its code. TypeError: `model` is no Linen module, `before` or `after` no `Morph`, or `example` has no array.
    """
    sizes = sizes_changed(before, after)
    if linen.model_of(model) is not model or model is None:
        raise TypeError(f"widened() needs a Linen module as model, got {model!r}")
    args = inputs("example", example)
    shapes = jax.tree.map(np.shape, after.params["host"])
    places = _places(model, dict(sizes.values()))
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    for count in range(1, 1 + min(len(places), 12)):
        for chosen in itertools.islice(itertools.combinations(places, count), MOST):
            wider = _with(model, chosen)
            try:
                made = jax.eval_shape(lambda w=wider: w.init(keys, *args, **kwargs))
            except Exception:  # these sizes do not go together
                continue
            if jax.tree.map(np.shape, dict(made["params"])) == shapes:
                return wider
    told = ", ".join(f"{path} from {old} to {new}" for path, (old, new) in sizes.items()) or "none"
    name = type(model).__name__
    raise ValueError(f"no field of {name} holds the sizes that have grown: {told}; change them in its code")


def _places(model: Any, sizes: Mapping[int, int]) -> list[tuple[str, int | None, int]]:
    """Fields of a module that hold an old size: `(name, index in a tuple or None, new size)`."""
    found: list[tuple[str, int | None, int]] = []
    for field in dataclasses.fields(model):
        value = getattr(model, field.name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value in sizes:
            found.append((field.name, None, sizes[value]))
        elif isinstance(value, tuple | list):
            numbers = [(i, part) for i, part in enumerate(value) if isinstance(part, int) and part in sizes]
            found += [(field.name, i, sizes[part]) for i, part in numbers]
    return found


def _with(model: Any, chosen: tuple[tuple[str, int | None, int], ...]) -> Any:
    changes: dict[str, Any] = {}
    for name, index, size in chosen:
        if index is None:
            changes[name] = size
        else:
            value = list(changes.get(name, getattr(model, name)))
            value[index] = size
            changes[name] = type(getattr(model, name))(value)
    return model.clone(**changes)
