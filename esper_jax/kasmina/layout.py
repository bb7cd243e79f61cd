"""Layers' inputs and outputs as seeds want them, features last; and banks as lifted transforms slice them. No Flax."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .sites import split_path
from .spec import Site

Back = Callable[[Array], Array]


def arrange(site: Site, geometry: Mapping[str, Any], u: Array, h: Array) -> tuple[Array, Array, Back]:
    """A layer's input and output as `[..., features]` (`[N, *space, features]` at convolutions), and the way back.

    Args:
      site: the site; its output's features must be `site.out_shape`.
      geometry: what is known of the layer: `axis` of a dense_general, `equation` of an einsum.
      u: the layer's input; ids `[...]` at an embed.
      h: the layer's output.

    Returns:
      `(inputs, output, back)`; `back(output)` has `h`'s own layout.
    """
    if site.kind == "embed":
        return jnp.asarray(u), h, lambda y: y
    inputs, output = jnp.asarray(u), h
    back: Back = lambda y: y.reshape(h.shape)  # noqa: E731
    if site.kind == "einsum":
        reads, writes = einsum_axes(geometry["equation"], inputs.ndim)
        inputs = jnp.moveaxis(inputs, reads, range(-len(reads), 0))
        output = jnp.moveaxis(output, writes, range(-len(writes), 0))
        shape = output.shape
        back = lambda y: jnp.moveaxis(y.reshape(shape), range(-len(writes), 0), writes)  # noqa: E731
    elif "axis" in geometry:
        axes = geometry["axis"]
        inputs = jnp.moveaxis(inputs, axes, range(-len(axes), 0))
    if site.kind in ("dense_general", "einsum"):
        inputs = _flat(inputs, len(site.in_shape))
        output = _flat(output, len(site.out_shape))
    if site.spatial:
        inputs, output = (_batched(x, site.spatial) for x in (inputs, output))
    return inputs, output, back


def _flat(x: Array, axes: int) -> Array:
    return x.reshape(*x.shape[: x.ndim - axes], -1)


def _batched(x: Array, spatial: int) -> Array:
    return x.reshape(math.prod(x.shape[: -spatial - 1]), *x.shape[-spatial - 1 :])


def einsum_letters(equation: str, ndim: int) -> tuple[str, str, str]:
    """Input, kernel and output of an einsum equation, each axis a letter (those of an ellipsis are capitals)."""
    operands, result = equation.replace(" ", "").split("->")
    left, right = operands.split(",")
    free = "".join(c for c in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in equation)
    hidden = free[: ndim - len(left.replace("...", ""))]
    return left.replace("...", hidden), right, result.replace("...", hidden)


def einsum_shapes(equation: str, ndim: int, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """`(in_shape, out_shape)` of a layer written as an einsum with an input of `ndim` axes; None if it is not linear.

    It is a linear map where each axis of the kernel is summed with the input's, or stands in the output alone.
    """
    left, right, result = einsum_letters(equation, ndim)
    summed = [c for c in right if c in left and c not in result]
    made = [c for c in right if c in result and c not in left]
    whole = len(summed) + len(made) == len(right) == len(set(right)) == len(kernel) and summed and made
    if not whole or any(c not in result for c in left if c not in summed):
        return None
    sizes = dict(zip(right, kernel, strict=True))
    return tuple(sizes[c] for c in summed), tuple(sizes[c] for c in made)


def einsum_axes(equation: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of the input that the kernel sums over, and those of the output that it makes, in the kernel's order."""
    left, right, result = einsum_letters(equation, ndim)
    reads = tuple(left.index(c) for c in right if c in left)
    return reads, tuple(result.index(c) for c in right if c not in left)


def kernel_order(equation: str) -> tuple[int, ...]:
    """The axes of an einsum's kernel, those that are summed first: in this order it is `[*in_shape, *out_shape]`."""
    left, right, _ = einsum_letters(equation, len(equation.split(",")[0].replace("...", "")))
    return tuple(sorted(range(len(right)), key=lambda i: right[i] not in left))


AXES = (0, -1, 1, -2, 2, -3, 3)
"""Where a lifted transform may have stacked layers, likeliest first; negative ones count from each array's end."""


def stack_axes(stacked: Mapping[str, Any], single: Mapping[str, Any]) -> frozenset[int]:
    """Axes along which a lifted transform may have stacked a layer's arrays, from their shapes with it and without."""
    pairs = [(np.shape(stacked[name]), np.shape(single[name])) for name in stacked if name in single]
    return frozenset(axis for axis in AXES if all(_without(whole, axis) == one for whole, one in pairs))


def common_axis(path: tuple[str, ...], axes: Mapping[tuple[str, ...], frozenset[int]]) -> int | None:
    """The axis of a layer's stack: one that all stacked layers below the highest possible ancestor agree on.

    One layer alone may leave it open: a bias `[width, layers]` is stacked along 1 or along -1.
    """
    for depth in range(len(path) + 1):
        below = [found for other, found in axes.items() if other[:depth] == path[:depth]]
        shared = frozenset.intersection(*below) if below else frozenset()
        if shared:
            return next(axis for axis in AXES if axis in shared)
    return None


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...] | None:
    if not -len(shape) <= axis < len(shape):
        return None
    at = axis % len(shape)
    return shape[:at] + shape[at + 1 :]


def to_stack(tree: Any, axis: int) -> Any:
    """Arrays `[layers, ...]` with that axis where the transform slices them; `from_stack` takes a slice apart."""
    if axis >= 0:
        return jax.tree.map(lambda leaf: leaf.reshape((1,) * axis + leaf.shape), tree)
    return jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, 0, -1).reshape(*leaf.shape[1:], leaf.shape[0], *_ones(axis)), tree
    )


def from_stack(tree: Any, axis: int) -> Any:
    """One layer's arrays `[...]` from what the transform sliced out of `to_stack`."""
    if axis >= 0:
        return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[axis:]), tree)
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[: leaf.ndim - len(_ones(axis))]), tree)


def _ones(axis: int) -> tuple[int, ...]:
    return (1,) * (-axis - 1)


def host_arrays(params: Any, site: Site) -> dict[str, Array]:
    """The arrays of a site's layer by name, out of any boxes; `[layers, ...]` first where it is a stack."""
    node, axis = _node(params, site), dict(site.geometry).get("stack", 0)
    found = {name: jax.tree.leaves(leaf)[0] for name, leaf in node.items() if not isinstance(leaf, Mapping)}
    return {name: jnp.moveaxis(leaf, axis, 0) if site.layers else leaf for name, leaf in found.items()}


def with_host_arrays(params: Any, site: Site, arrays: Mapping[str, Array]) -> Any:
    """The host's params with a layer's arrays, as `host_arrays` gives them, in the place of its own."""
    axis = dict(site.geometry).get("stack", 0)

    def put(node: Any) -> Any:
        new = {}
        for name, leaf in arrays.items():
            structure = jax.tree.structure(node[name])
            new[name] = jax.tree.unflatten(structure, [jnp.moveaxis(leaf, 0, axis) if site.layers else leaf])
        return type(node)({**node, **new})

    return change_at(params, split_path(site.path), put)


def change_at(tree: Any, parts: tuple[str, ...], change: Callable[[Any], Any]) -> Any:
    """A nested mapping with one node changed."""
    if not parts:
        return change(tree)
    return type(tree)({**tree, parts[0]: change_at(tree[parts[0]], parts[1:], change)})


def _node(params: Any, site: Site) -> Mapping[str, Any]:
    for part in split_path(site.path):
        params = params[part]
    node: Mapping[str, Any] = params
    return node
