"""Frozen dataclasses that are JAX pytrees: array fields are leaves, `static` fields are part of the structure."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """A dataclass field that belongs to the tree's structure: hashable, compared by `jit`, never traced."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and register it as a pytree; gives it `replace(**changes)`."""
    data = dataclasses.dataclass(frozen=True, repr="__repr__" not in cls.__dict__)(cls)
    if "replace" not in cls.__dict__:
        data.replace = lambda self, **changes: dataclasses.replace(self, **changes)  # type: ignore[attr-defined]
    return jax.tree_util.register_dataclass(data)
