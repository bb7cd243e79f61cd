"""Torch's random numbers while it is compared with: the same as JAX is given. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .ops.random import exponentials, first_above, normals, units


class EveryUnit(TorchDispatchMode):
    """Meanwhile dropout in torch keeps every unit, still divided by 1 - rate, and other noise is the same each time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.native_dropout.default:
            scaled = args[0] / (1 - args[1]) if args[2] else args[0]
            return scaled, torch.ones_like(args[0], dtype=torch.bool)
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        given = _given(func, args, kwargs)
        if name == "rrelu_with_noise" and given["training"]:
            return _rrelu(func, given)
        found = func(*args, **kwargs)
        if name in _NOISE:
            found.copy_(_NOISE[name](tuple(found.shape), given))
        return found


def _given(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, with the defaults of the rest."""
    named = {}
    for place, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        named[argument.name] = args[place] if place < len(args) else kwargs.get(argument.name, default)
    return named


def _rrelu(func: Any, given: dict[str, Any]) -> torch.Tensor:
    x, noise = given["self"], given["noise"]
    slopes = given["lower"] + (given["upper"] - given["lower"]) * _of(units, tuple(x.shape), x)
    noise.copy_(torch.where(x > 0, torch.ones_like(x), slopes))
    return x.mul_(noise) if func._schema.name.endswith("_") else x * noise


def _of(numbers: Any, shape: tuple[int, ...], like: Any = None) -> torch.Tensor:
    found = torch.from_numpy(numbers(shape))
    return found.to(like.device, like.dtype) if isinstance(like, torch.Tensor) and like.is_floating_point() else found


def _bernoulli(shape: tuple[int, ...], given: dict[str, Any]) -> torch.Tensor:
    p = given.get("p", given["self"])
    return _of(units, shape) < p if isinstance(p, torch.Tensor) else torch.ones(shape)


def _integers(shape: tuple[int, ...], given: dict[str, Any]) -> torch.Tensor:
    low = given.get("low") or 0
    return torch.floor(low + (given["high"] - low) * _of(units, shape))


def _multinomial(shape: tuple[int, ...], given: dict[str, Any]) -> torch.Tensor:
    weights = given["self"]
    if given["replacement"] or given["num_samples"] == 1:
        return first_above(torch.cumsum(weights, -1), _of(units, shape))
    return torch.topk(weights, given["num_samples"]).indices


def _normal(shape: tuple[int, ...], given: dict[str, Any]) -> Any:
    return given["mean"] + given["std"] * _of(normals, shape, given.get("self", given["mean"]))


_NOISE: dict[str, Callable[[tuple[int, ...], dict[str, Any]], Any]] = {
    "rand": lambda shape, _: _of(units, shape),
    "rand_like": lambda shape, _: _of(units, shape),
    "randn": lambda shape, _: _of(normals, shape),
    "randn_like": lambda shape, _: _of(normals, shape),
    "uniform": lambda shape, given: given["from"] + (given["to"] - given["from"]) * _of(units, shape, given["self"]),
    "normal": _normal,
    "normal_functional": _normal,
    "exponential": lambda shape, given: _of(exponentials, shape, given["self"]) / given["lambd"],
    "bernoulli": _bernoulli,
    "poisson": lambda shape, given: torch.floor(given["self"] + _of(units, shape)),
    "randint": _integers,
    "randint_like": _integers,
    "randperm": lambda shape, _: torch.argsort(_of(units, shape), stable=True),
    "multinomial": _multinomial,
}
