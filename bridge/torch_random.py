"""Torch's random numbers: the same as JAX is given while both are compared; refused where they cannot come over."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .graph import BridgeError
from .ops.random import exponentials, first_above, normals, units


class EveryUnit(TorchDispatchMode):
    """Meanwhile dropout in torch keeps every unit, still divided by 1 - rate, and other noise is the same each time.

    One is for one pass: the first draw of noise has number 0. A draw that is computed again on the way back has its
    number again, since torch has its generator's state of then again. In the end the generator is as it was.
    """

    def __enter__(self) -> Any:
        self._numbers: dict[bytes, int] = {}
        self._state = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_rng_state(self._state)

    def _number(self) -> int:
        number = self._numbers.setdefault(torch.get_rng_state().numpy().tobytes(), len(self._numbers))
        torch.rand(1)  # moves that state on, whatever the draw itself takes its numbers from
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.native_dropout.default:
            scaled = args[0] / (1 - args[1]) if args[2] else args[0]
            return scaled, torch.ones_like(args[0], dtype=torch.bool)
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        given = _given(func, args, kwargs)
        if name == "bernoulli" and not isinstance(given.get("p", given["self"]), torch.Tensor):  # dropout's
            return args[0].fill_(1.0) if func._schema.is_mutable else torch.ones_like(args[0])
        if name not in _NOISE or given.get("training") is False:
            return func(*args, **kwargs)
        number = self._number()
        if name == "rrelu_with_noise":
            return _rrelu(func, given, number)
        found = func(*args, **kwargs)
        found.copy_(_NOISE[name](tuple(found.shape), given, number))
        return found


def _given(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, with the defaults of the rest."""
    named = {}
    for place, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        named[argument.name] = args[place] if place < len(args) else kwargs.get(argument.name, default)
    return named


def _rrelu(func: Any, given: dict[str, Any], number: int) -> torch.Tensor:
    x, noise = given["self"], given["noise"]
    slopes = given["lower"] + (given["upper"] - given["lower"]) * _of(units, tuple(x.shape), number, x)
    noise.copy_(torch.where(x > 0, torch.ones_like(x), slopes))
    return x.mul_(noise) if func._schema.name.endswith("_") else x * noise


def _of(numbers: Any, shape: tuple[int, ...], number: int, like: Any = None) -> torch.Tensor:
    found = torch.from_numpy(numbers(shape, number))
    return found.to(like.device, like.dtype) if isinstance(like, torch.Tensor) and like.is_floating_point() else found


def _bernoulli(shape: tuple[int, ...], given: dict[str, Any], number: int) -> torch.Tensor:
    return _of(units, shape, number) < given.get("p", given["self"])


def _integers(shape: tuple[int, ...], given: dict[str, Any], number: int) -> torch.Tensor:
    low = given.get("low") or 0
    return torch.floor(low + (given["high"] - low) * _of(units, shape, number))


def _multinomial(shape: tuple[int, ...], given: dict[str, Any], number: int) -> torch.Tensor:
    weights = given["self"].to(torch.promote_types(given["self"].dtype, torch.float32))
    if given["replacement"] or given["num_samples"] == 1:
        return first_above(torch.cumsum(weights, -1), _of(units, shape, number))
    return torch.topk(weights, given["num_samples"]).indices


def _normal(shape: tuple[int, ...], given: dict[str, Any], number: int) -> Any:
    return given["mean"] + given["std"] * _of(normals, shape, number, given.get("self", given["mean"]))


_NOISE: dict[str, Any] = {
    "rand": lambda shape, _, number: _of(units, shape, number),
    "rand_like": lambda shape, _, number: _of(units, shape, number),
    "randn": lambda shape, _, number: _of(normals, shape, number),
    "randn_like": lambda shape, _, number: _of(normals, shape, number),
    "uniform": lambda shape, given, number: (
        given["from"] + (given["to"] - given["from"]) * _of(units, shape, number, given["self"])
    ),
    "normal": _normal,
    "normal_functional": _normal,
    "exponential": lambda shape, given, number: _of(exponentials, shape, number, given["self"]) / given["lambd"],
    "bernoulli": _bernoulli,
    "poisson": lambda shape, given, number: torch.floor(given["self"] + _of(units, shape, number)),
    "randint": _integers,
    "randint_like": _integers,
    "randperm": lambda shape, _, number: torch.argsort(_of(units, shape, number), stable=True),
    "multinomial": _multinomial,
    "rrelu_with_noise": None,
}


@contextlib.contextmanager
def unvalidated_distributions() -> Iterator[None]:
    """Meanwhile torch.distributions do not look at the values of their parameters, as by default they do."""
    kind = torch.distributions.Distribution
    validates = kind._validate_args
    kind.set_default_validate_args(False)
    try:
        yield
    finally:
        kind.set_default_validate_args(validates)


@contextlib.contextmanager
def refused_sources(name: str) -> Iterator[None]:
    """BridgeError if meanwhile random numbers are drawn where a captured graph would hold one of them for ever."""
    seeding, before = torch.manual_seed, (random.getstate(), _numpy_state())

    def refuse(*_: Any) -> Any:
        raise BridgeError(
            f"{name} calls torch.manual_seed in its forward: numbers that are the same each time are a buffer; "
            "register them as one"
        )

    torch.manual_seed = torch.random.manual_seed = refuse
    try:
        yield
    finally:
        torch.manual_seed = torch.random.manual_seed = seeding
        after = (random.getstate(), _numpy_state())
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
    if after != before:
        raise BridgeError(
            f"{name} draws numbers by Python's or numpy's random module in its forward, of which the captured graph "
            "would hold one for ever: draw by torch (torch.rand), and choose by torch.where"
        )


def _numpy_state() -> Any:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return (kind, tuple(keys.tolist()), *rest)
