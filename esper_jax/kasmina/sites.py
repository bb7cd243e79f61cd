"""Finding a host's sites from the shapes and names of its parameters alone. Knows no Flax API."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from .spec import Site

Where = str | Callable[[str, str], bool] | None
ROOT = "."
_ATTENTION = frozenset({"query", "key", "value", "out"})


def join_path(parts: tuple[str, ...]) -> str:
    """The site path of a module path; the model itself is `"."`."""
    return "/".join(parts) or ROOT


def split_path(path: str) -> tuple[str, ...]:
    """The module path of a site path."""
    return () if path == ROOT else tuple(path.split("/"))


def nodes(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every mapping in a nested parameter tree with its path, parents first."""
    yield path, tree
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from nodes(child, (*path, name))


def own_arrays(node: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that sit directly in a node."""
    return {name: leaf for name, leaf in node.items() if not isinstance(leaf, Mapping)}


def infer_site(path: tuple[str, ...], node: Mapping[str, Any], has_statistics: bool) -> Site | None:
    """The site a parameter node stands for, or None if it is no supported layer.

    A `kernel` with two axes is a Dense; with more, a DenseGeneral if its name, its parent or its bias says so, else a
    convolution. `scale` and `bias` are a BatchNorm where statistics sit at the same path, else a LayerNorm.
    """
    own = own_arrays(node)
    shapes = {name: tuple(np.shape(leaf)) for name, leaf in own.items()}
    label = path[-1] if path else ""
    if not own:
        return _attention(path, node)
    dtype = str(np.dtype(next(iter(own.values())).dtype))

    def site(kind: str, inputs: tuple[int, ...], outputs: tuple[int, ...], spatial: int = 0) -> Site:
        return Site(join_path(path), kind, inputs, outputs, dtype, spatial)

    if "kernel" in own and set(own) <= {"kernel", "bias"}:
        kernel, bias = shapes["kernel"], shapes.get("bias")
        if len(kernel) == 2:
            return site("dense", kernel[:1], kernel[1:])
        if len(kernel) < 2 or len(kernel) > 5 or label.startswith(("ConvTranspose", "Einsum", "ConvLocal")):
            return None
        if label == "out" and bias is not None and len(bias) == 1 and len(kernel) == 3:
            return site("dense_general", kernel[:-1], kernel[-1:])
        if label in _ATTENTION - {"out"} or label.startswith("DenseGeneral") or (bias is not None and len(bias) > 1):
            split = 1 if bias is None else len(kernel) - len(bias)
            return site("dense_general", kernel[:split], kernel[split:])
        return site("conv", kernel[-2:-1], kernel[-1:], len(kernel) - 2)
    if set(own) == {"scale", "bias"} and len(shapes["scale"]) == 1:
        features = shapes["scale"]
        if has_statistics or label.startswith("BatchNorm"):
            return site("batch_norm", features, features)
        if not label.startswith(("GroupNorm", "InstanceNorm")):
            return site("layer_norm", features, features)
    if set(own) == {"scale"} and label.startswith("LayerNorm"):
        return site("layer_norm", shapes["scale"], shapes["scale"])
    return None


def find_sites(params: Mapping[str, Any], statistics: Mapping[str, Any], where: Where = None) -> tuple[Site, ...]:
    """All sites of a parameter tree that `where` admits; one warning names the layers that are none."""
    found, skipped = [], []
    counted = {path for path, node in nodes(statistics) if own_arrays(node)}
    for path, node in nodes(params):
        site = infer_site(path, node, path in counted)
        if site is not None:
            found.append(site)
        elif own := own_arrays(node):
            skipped.append((join_path(path), "parameters " + ", ".join(own)))
    return select(found, skipped, where)


def select(found: list[Site], skipped: list[tuple[str, str]], where: Where) -> tuple[Site, ...]:
    """The sites that `where` admits, in order of path; warns once of the layers skipped, errs when none is left."""
    admits = matcher(where)
    chosen = tuple(sorted((s for s in found if admits(s.path, s.kind)), key=lambda s: s.path))
    named = [f"{path} ({what})" for path, what in skipped if admits(path, "unsupported")]
    if named:
        shown = "; ".join(named[:8]) + (f"; and {len(named) - 8} more" if len(named) > 8 else "")
        warnings.warn(
            f"morph() skipped {len(named)} layer(s) that cannot carry seeds yet: {shown}. They work as before; use "
            "where= to leave them out silently.",
            stacklevel=4,
        )
    if not chosen:
        have = ", ".join(site.path for site in found[:12]) or "no supported layer at all"
        raise ValueError(f"morph() found no site that where={where!r} admits; the host has: {have}")
    return chosen


def matcher(where: Where) -> Callable[[str, str], bool]:
    """`where` as a predicate on path and kind; a string is a regex searched in the path."""
    if where is None:
        return lambda path, kind: True
    if isinstance(where, str):
        try:
            pattern = re.compile(where)
        except re.error as error:
            raise ValueError(f"where={where!r} is no regular expression: {error}") from None
        return lambda path, kind: pattern.search(path) is not None
    if callable(where):
        return where
    raise TypeError(f"where must be a regex or a predicate on path and kind, got {type(where).__name__}")


def _attention(path: tuple[str, ...], node: Mapping[str, Any]) -> Site | None:
    if not set(node) >= _ATTENTION:
        return None
    query, out = node["query"], node["out"]
    if not (isinstance(query, Mapping) and isinstance(out, Mapping) and "kernel" in query and "kernel" in out):
        return None
    if len(query["kernel"].shape) != 3 or len(out["kernel"].shape) != 3:
        return None
    dtype = str(np.dtype(query["kernel"].dtype))
    return Site(join_path(path), "attention", tuple(query["kernel"].shape[:1]), tuple(out["kernel"].shape[-1:]), dtype)
