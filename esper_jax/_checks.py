"""What a public call asks of its plain arguments: each check is one sentence with the name, the rule and the value."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

INT32 = 2**31 - 1
"""The largest count that the arrays of a state hold."""


def finite(value: Any) -> bool:
    """Whether `value` is a number that a float holds: no bool, no array, no NaN and not infinite."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    try:
        return real and math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def whole(name: str, value: Any, least: int | None, most: int | None = None) -> None:
    """ValueError unless `value` is a whole number (no bool) of `least` or more and `most` or less, where they are."""
    known = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not known or (least is not None and value < least):
        rule = "" if least is None else f" of {least} or more"
        raise ValueError(f"{name} must be a whole number{rule}, got {value!r}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be {most} or less, got {value!r}")


def real(name: str, value: Any, *, least: float | None = None, most: float = math.inf, below: float = math.inf) -> None:
    """ValueError unless `value` is a finite number (no bool) of `least` or more, `most` or less, and below `below`."""
    known = finite(value)
    if known and (least is None or value >= least) and value <= most and value < below:
        return
    if most < math.inf:
        rule = f"between {least} and {most}"
    elif below < math.inf:
        rule = f"{least} or more and below {below}"
    elif least is None:
        rule = "a finite number"
    else:
        rule = f"{least} or more" if known else f"a finite number of {least} or more"
    raise ValueError(f"{name} must be {rule}, got {value!r}")


def seconds(name: str, value: Any, *, zero: bool = False) -> None:
    """ValueError unless `value` is a finite number (no bool) above 0, or also 0."""
    if not finite(value) or value < 0 or (value == 0 and not zero):
        rule = ", 0 or more" if zero else " above 0"
        raise ValueError(f"{name} must be a finite number of seconds{rule}, got {value!r}")


def number(name: str, value: Any) -> None:
    """TypeError unless `value` is a number (no bool, but NaN will do), or an array or tracer of a single one."""
    dtype = getattr(value, "dtype", None)
    real = isinstance(value, int | float) if dtype is None else getattr(dtype, "kind", "f") in "iufV"
    if not real or isinstance(value, bool | type) or getattr(value, "ndim", None):
        raise TypeError(f"{name} must be a number, got {value!r}")


def one_of(name: str, value: Any, kind: type, example: str) -> None:
    """TypeError unless `value` is an object of that class; `example` is what would do."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__} such as {example}, got {value!r}")


def function(name: str, value: Any, example: str) -> None:
    """TypeError unless `value` can be called and is no class; `example` is what would do."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be a function such as {example}, got {value!r}")


def words(name: str, value: Any, example: str) -> tuple[str, ...]:
    """A sequence of strings as a tuple; TypeError unless `value` is one, and no string itself."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(one, str) for one in value):
        raise TypeError(f"{name} must be a sequence of strings such as {example}, got {value!r}")
    return tuple(value)


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


def line(name: str, value: Any, *, empty: bool = False) -> None:
    """ValueError unless `value` is a string of one line that is printable, and not blank unless `empty` allows it."""
    if not isinstance(value, str) or not value.isprintable() or not (empty or value.strip()):
        raise ValueError(f"{name} must be a text of one line{'' if empty else ', not blank'}, got {value!r}")


def objects(name: str, value: Any, *methods: str, example: str) -> tuple[Any, ...]:
    """What is in an iterable, as a tuple; TypeError unless all are objects with these methods."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise TypeError(f"{name} must be a sequence such as [{example}], got {value!r}")
    found = tuple(value)
    for one in found:
        instance(f"one of {name},", one, *methods, example=f"one such as {example}")
    return found


def pairs(name: str, value: Any, example: str) -> tuple[tuple[str, str], ...]:
    """Pairs of strings as a tuple of tuples; TypeError unless `value` is an iterable of such pairs."""
    known = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    found = tuple(value) if known else ()
    two = lambda one: isinstance(one, tuple | list) and len(one) == 2 and all(isinstance(p, str) for p in one)  # noqa: E731
    if not known or not all(map(two, found)):
        raise TypeError(f"{name} must be pairs of strings such as {example}, got {value!r}")
    return tuple((first, second) for first, second in found)


def by_name(name: str, value: Any, example: str) -> None:
    """TypeError unless `value` is a mapping whose keys are strings; `example` is what would do."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must be a mapping of names such as {example}, got {value!r}")


def inputs(name: str, value: Any) -> tuple[Any, ...]:
    """The arguments of a model's call, of a tuple or a single one; TypeError unless there is an array among them."""
    if not any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value)):
        raise TypeError(f"{name} must be an array, or a tuple of arguments with an array among them, got {value!r}")
    return value if isinstance(value, tuple) else (value,)


def together(call: str, model: Any, example: Any) -> None:
    """ValueError unless `model` and `example` are both given or neither is."""
    if (model is None) != (example is None):
        raise ValueError(f"{call} takes model= and example= together; only one of them was given")
