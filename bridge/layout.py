"""Where a torch tensor lives in Flax's variables, and how it lies there: names, transposes, parts, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

_TAKEN = frozenset(dir(nn.Module)) | {"graph", "at", "name", "parent", "scope", "held", "every_unit", "save", "frozen"}


class Place(NamedTuple):
    """A leaf of the variables that holds a torch tensor, or one of several equal parts of it.

    Attributes:
      tensor: torch's dotted name.
      collection: `params`, `batch_stats` or `buffers`.
      path: of the leaf in its collection.
      shape: Flax's.
      perm: torch's axes in Flax's order, before a reshape to `shape`.
      part, parts: which of how many parts along torch's first axis.
      flip: how many of its first axes run backwards (the taps of a transposed convolution).
    """

    tensor: str
    collection: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    perm: tuple[int, ...]
    part: int = 0
    parts: int = 1
    flip: int = 0

    def to_flax(self, value: Any) -> Any:
        """The leaf, from torch's tensor as an array."""
        if self.parts > 1:
            rows = value.shape[0] // self.parts
            value = value[self.part * rows : (self.part + 1) * rows]
        return _flipped(value.transpose(self.perm), self.flip).reshape(self.shape)

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Torch's shape for a leaf of another size; None where it lies in parts, is reshaped or has other axes."""
        plain = self.parts == 1 and len(self.shape) == len(self.perm) == len(shape)
        return tuple(shape[self.perm.index(axis)] for axis in range(len(shape))) if plain else None

    def of_torch(self, shape: tuple[int, ...], leaf: Any) -> Any:
        """The part of torch's tensor (of `shape`) that this leaf is."""
        if self.parts > 1:
            shape = (shape[0] // self.parts, *shape[1:])
        permuted = _flipped(leaf.reshape(tuple(shape[axis] for axis in self.perm)), self.flip)
        return permuted.transpose(tuple(int(axis) for axis in np.argsort(self.perm)))


def _flipped(x: Any, axes: int) -> Any:
    return x[(slice(None, None, -1),) * axes] if axes else x


def from_flax(places: tuple[Place, ...], shape: tuple[int, ...], leaves: list[Any], xp: Any) -> Any:
    """A torch tensor's value from the leaves that hold it; `xp` is numpy or jax.numpy."""
    parts = [place.of_torch(shape, leaf) for place, leaf in zip(places, leaves, strict=True)]
    return parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=0)


def safe(name: str) -> str:
    """A torch attribute's name as a Flax module's: those that Flax uses itself get an underscore."""
    return f"{name}_" if name in _TAKEN else name


def module_path(dotted: str) -> tuple[str, ...]:
    """A torch path as a Flax one."""
    return tuple(safe(part) for part in dotted.split(".")) if dotted else ()


def bare(tensor: str, shape: tuple[int, ...], collection: str) -> Place:
    """A tensor that no layer owns: at its own path, as torch has it."""
    return Place(tensor, collection, module_path(tensor), shape, tuple(range(len(shape))))


def get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The leaf at a path; KeyError where there is none."""
    node: Any = tree
    for part in path:
        node = node[part]
    return node


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set the leaf at a path of nested dicts."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value
