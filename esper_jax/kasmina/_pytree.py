"""Frozen dataclasses that are JAX pytrees: array fields are leaves, `static` fields are part of the structure."""

from __future__ import annotations

import dataclasses
from typing import Any, Self, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """A dataclass field that belongs to the tree's structure: hashable, compared by `jit`, never traced."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key, or the shape of one."""
    return hasattr(leaf, "dtype") and bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def check_key(key: Any) -> None:
    """TypeError unless `key` is a PRNG key, typed or raw."""
    if not (hasattr(key, "dtype") and (is_key(key) or key.dtype == "uint32" and key.shape[-1:] == (2,))):
        raise TypeError(f"key must be a PRNG key such as jax.random.key(0), got {type(key).__name__}: {key!r}")


class Struct:
    """Base of the pytree dataclasses."""

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed. (`dataclasses.replace` takes several times as long, as small steps feel.)"""
        copy = object.__new__(type(self))
        fields, ours = copy.__dict__, self.__dict__
        fields.update(ours)
        fields.update(changes)
        if len(fields) > len(ours):
            unknown, known = (", ".join(names) for names in (fields.keys() - ours.keys(), ours))
            raise TypeError(f"{type(self).__name__} has no {unknown}; its fields are {known}")
        return copy


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and register it as a pytree."""
    data = dataclasses.dataclass(frozen=True, repr="__repr__" not in cls.__dict__)(cls)
    return jax.tree_util.register_dataclass(data)
