"""Finding a host's sites from the shapes and names of its parameters alone. Knows no Flax API."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from .spec import Site, freeze_config

Where = str | Callable[[str, str], bool] | None
ROOT = "."
RESERVED = "__esper_seeds__"
"""Where a site's bank travels among its layer's own parameters."""
_ATTENTION = frozenset({"query", "key", "value", "out"})
_LSTM = frozenset({"ii", "if", "ig", "io", "hi", "hf", "hg", "ho"})


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


def infer_site(
    path: tuple[str, ...], node: Mapping[str, Any], has_statistics: bool, in_attention: bool = False
) -> Site | None:
    """The site a parameter node stands for, or None if it is no supported layer.

    A `kernel` with two axes is a Dense; with more, a DenseGeneral if its name, its parent or its bias says so, else a
    convolution. `scale` and `bias` are a BatchNorm where statistics sit at the same path, else a LayerNorm; `scale`
    alone is an RMSNorm.
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
        if len(kernel) < 2 or len(kernel) > 5 or label.startswith(("Einsum", "ConvLocal")):
            return None
        if len(kernel) == 2:
            return site("dense", kernel[:1], kernel[1:])
        if re.fullmatch(r"Dense_\d+", label):  # stacked more than once
            return None
        if label == "out" and len(kernel) == 3 and (in_attention or bias is not None and len(bias) == 1):
            return site("dense_general", kernel[:-1], kernel[-1:])
        if label in _ATTENTION - {"out"} or label.startswith("DenseGeneral") or (bias is not None and len(bias) > 1):
            split = 1 if bias is None else len(kernel) - len(bias)
            return site("dense_general", kernel[:split], kernel[split:])
        kind = "conv_transpose" if label.startswith("ConvTranspose") else "conv"
        return site(kind, kernel[-2:-1], kernel[-1:], len(kernel) - 2)
    if set(own) == {"embedding"} and len(shapes["embedding"]) == 2:
        return site("embed", shapes["embedding"][:1], shapes["embedding"][1:])
    if set(own) == {"scale", "bias"} and len(shapes["scale"]) == 1:
        features = shapes["scale"]
        if has_statistics or label.startswith("BatchNorm"):
            return site("batch_norm", features, features)
        grouped = label.startswith(("GroupNorm", "InstanceNorm"))
        return site("group_norm" if grouped else "layer_norm", features, features)
    if set(own) == {"scale"} and len(shapes["scale"]) == 1:
        kind = "layer_norm" if label.startswith("LayerNorm") else "rms_norm"
        return site(kind, shapes["scale"], shapes["scale"])
    return None


def find_sites(params: Mapping[str, Any], statistics: Mapping[str, Any], where: Where = None) -> tuple[Site, ...]:
    """All sites of a parameter tree that `where` admits; one warning names the layers that are none."""
    return select(*found_sites(params, statistics), where)


def found_sites(params: Mapping[str, Any], statistics: Mapping[str, Any]) -> tuple[list[Site], list[tuple[str, str]]]:
    """All sites of a parameter tree, and the layers that are none with the reason."""
    found: list[Site] = []
    skipped: list[tuple[str, str]] = []
    counted = {path for path, node in nodes(statistics) if own_arrays(node)}
    for path, node, layers in _regions(params):
        for below, inner in nodes(node, path):
            own = own_arrays(inner)
            beside = set(_parent(params, below))
            fused = _in_fused_cell(beside, below)
            site = None if fused else infer_site(below, inner, below in counted, beside >= _ATTENTION)
            if site is not None:
                stack = {"stack": 0} if layers else {}
                geometry = freeze_config({**dict(site.geometry), **stack})
                found.append(dataclasses.replace(site, layers=layers, geometry=geometry))
            elif own:
                skipped.append((join_path(below), "parameters " + ", ".join(own)))
    return found, skipped


def _regions(node: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any, int]]:
    """The tree in parts `(path, node, layers)`: what a lifted transform stacked along axis 0 as one layer has it.

    A part is stacked where all its arrays have as many rows and one of them can be nothing else than a stack: a norm's
    or bias's second axis, an embedding's third.
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(dict(node))}
    if len(sizes) == 1 and sizes != {()} and any(_only_a_stack(at, inner) for at, inner in nodes(node, path)):
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[1:], leaf.dtype), dict(node))
        yield path, one, sizes.pop()[0]
        return
    plain = {name: child for name, child in node.items() if not isinstance(child, Mapping)}
    if set(node) >= _ATTENTION and not any(_only_a_stack(at, inner) for at, inner in nodes(node, path)):
        yield path, node, 0
        return
    yield path, plain, 0
    for name, child in node.items():
        if isinstance(child, Mapping):
            yield from _regions(child, (*path, name))


def _only_a_stack(path: tuple[str, ...], node: Mapping[str, Any]) -> bool:
    if path and path[-1].startswith("ConvLocal"):  # it has a kernel and a bias of its own for each place
        return False
    shapes = {name: np.shape(leaf) for name, leaf in own_arrays(node).items()}
    kernel, bias = shapes.get("kernel", ()), shapes.get("bias", ())
    if kernel:
        return len(bias) == 2 and len(kernel) > 2 and kernel[:1] + kernel[-1:] == bias and kernel[-2:] != bias
    return len(shapes.get("scale", ())) == 2 or len(shapes.get("embedding", ())) == 3


def _in_fused_cell(beside: set[str], path: tuple[str, ...]) -> bool:
    """Whether a layer is part of an `nn.OptimizedLSTMCell`, which reads its kernels together and calls no layer.

    An `nn.LSTMCell` has the same parameters; its default name tells it.
    """
    return len(path) > 1 and path[-1] in _LSTM and beside >= _LSTM and not path[-2].startswith("LSTMCell")


def _parent(params: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    """The node that holds the one at `path`; of the tree itself nothing."""
    node: Mapping[str, Any] = params if path else {}
    for part in path[:-1]:
        node = node[part]
    return node


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


def matcher(where: Where, name: str = "where") -> Callable[[str, str], bool]:
    """`where` as a predicate on path and kind; a string is a regex searched in the path. `name` is for its errors."""
    if where is None:
        return lambda path, kind: True
    if isinstance(where, str):
        try:
            pattern = re.compile(where)
        except re.error as error:
            raise ValueError(f"{name}={where!r} is no regular expression: {error}") from None
        return lambda path, kind: pattern.search(path) is not None
    if callable(where) and not isinstance(where, type):
        return where
    got = f"the class {where.__name__}" if isinstance(where, type) else type(where).__name__
    raise TypeError(f"{name} must be a regex or a predicate on path and kind, got {got}")


def _attention(path: tuple[str, ...], node: Mapping[str, Any]) -> Site | None:
    if not set(node) >= _ATTENTION:
        return None
    query, out = node["query"], node["out"]
    if not (isinstance(query, Mapping) and isinstance(out, Mapping) and "kernel" in query and "kernel" in out):
        return None
    if len(query["kernel"].shape) != 3 or len(out["kernel"].shape) != 3:
        return None
    dtype = str(np.dtype(query["kernel"].dtype))
    memory = {"memory": tuple(np.shape(node[name]["kernel"])[0] for name in ("key", "value"))}
    inputs, outputs = tuple(query["kernel"].shape[:1]), tuple(out["kernel"].shape[-1:])
    return Site(join_path(path), "attention", inputs, outputs, dtype, geometry=freeze_config(memory))
