"""What a public call asks of its plain arguments: each check is one sentence with the name, the rule and the value."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np


def whole(name: str, value: Any, least: int) -> None:
    """ValueError unless `value` is a whole number (no bool) of `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}")


def seconds(name: str, value: Any, *, zero: bool = False) -> None:
    """ValueError unless `value` is a finite number (no bool) above 0, or also 0."""
    good = not isinstance(value, bool) and isinstance(value, int | float | np.number) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):
        rule = ", 0 or more" if zero else " above 0"
        raise ValueError(f"{name} must be a finite number of seconds{rule}, got {value!r}")


def number(name: str, value: Any) -> None:
    """TypeError unless `value` is a number, or one array or tracer of them."""
    dtype = getattr(value, "dtype", None)
    real = isinstance(value, int | float) if dtype is None else getattr(dtype, "kind", "f") in "iufbV"
    if not real or getattr(value, "ndim", None):
        raise TypeError(f"{name} must be a number, got {value!r}")


def one_of(name: str, value: Any, kind: type, example: str) -> None:
    """TypeError unless `value` is an object of that class; `example` is what would do."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__} such as {example}, got {value!r}")


def place(name: str, value: Any) -> None:
    """TypeError unless `value` is a path, as text or as a `pathlib.Path`."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {value!r}")


def flag(name: str, value: Any) -> None:
    """TypeError unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def instance(name: str, value: Any, *methods: str, example: str) -> None:
    """TypeError unless `value` is an object (no class) with these methods; `example` is what would do."""
    lacking = [method for method in methods if not callable(getattr(value, method, None))]
    if isinstance(value, type) and not lacking:
        raise TypeError(f"{name} is the class {value.__name__}; give an object of it, {example}")
    if lacking:
        raise TypeError(f"{name} {value!r} has no {lacking[0]}(); give {example}")
