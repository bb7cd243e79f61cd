"""Torch's random numbers: the same as JAX is given while both are compared; refused where they cannot come over."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .graph import BridgeError
from .ops.random import cauchys, exponentials, first_above, normals, units
from .torch_patches import instead

NUMBER = "esper_number"


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
        number = self._numbers.setdefault(_state(), len(self._numbers))
        torch.rand(1)  # moves that state on, whatever the draw itself takes its numbers from
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.native_dropout.default:
            scaled = args[0] / (1 - args[1]) if args[2] else args[0]
            return scaled, torch.ones_like(args[0], dtype=torch.bool)
        kind = _kind(func, args, kwargs)
        if kind == "mask":
            return args[0].fill_(1.0) if func._schema.is_mutable else torch.ones_like(args[0])
        if kind != "noise":
            return func(*args, **kwargs)
        name, given, number = _name(func), _given(func, args, kwargs), self._number()
        if name == "rrelu_with_noise":
            return _rrelu(func, given, number)
        found = func(*args, **kwargs)
        found.copy_(_NOISE[name](tuple(found.shape), given, number))
        return found


def _state() -> bytes:
    return torch.get_rng_state().numpy().tobytes()


def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::").rstrip("_")


def _kind(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """`noise`, the `mask` of dropout, or neither."""
    name = _name(func)
    if name not in _NOISE and name != "rrelu":
        return ""
    given = _given(func, args, kwargs)
    if name == "bernoulli" and isinstance(given.get("p", given["self"]), float | int):
        return "mask"
    return "" if given.get("training") is False else "noise"


def number_noise(graph_module: torch.fx.GraphModule, count: int = 0) -> int:
    """Note at each node that draws noise how often it was drawn before; what nothing reads is dropped after this.

    Args:
      graph_module: as `torch.export.export` gives it; the numbers are in its nodes' `meta["custom"]`.
      count: how often noise was drawn before it.

    Returns:
      How often it was drawn after it.
    """
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        for arg in node.args:
            body = getattr(graph_module, arg.target, None) if getattr(arg, "op", "") == "get_attr" else None
            if isinstance(body, torch.fx.GraphModule):
                count = number_noise(body, count)
        operator = isinstance(node.target, torch._ops.OpOverload)
        if operator and _kind(node.target, node.args, node.kwargs) == "noise":
            node.meta["custom"] = {**(node.meta.get("custom") or {}), NUMBER: count}
            count += 1
    return count


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
    return torch.topk(weights * _of(units, tuple(weights.shape), number), given["num_samples"]).indices


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
    "log_normal": lambda *given: torch.exp(_normal(*given)),
    "cauchy": lambda shape, given, number: (
        given["median"] + given["sigma"] * _of(cauchys, shape, number, given["self"])
    ),
    "geometric": lambda shape, given, number: torch.ceil(_of(exponentials, shape, number) / -math.log1p(-given["p"])),
    "_standard_gamma": lambda shape, given, number: given["self"] * (_of(units, shape, number, given["self"]) + 0.5),
    "bernoulli": _bernoulli,
    "poisson": lambda shape, given, number: torch.floor(given["self"] + _of(units, shape, number)),
    "randint": _integers,
    "randint_like": _integers,
    "randperm": lambda shape, _, number: torch.argsort(_of(units, shape, number), stable=True),
    "multinomial": _multinomial,
    "rrelu_with_noise": None,
}


@contextlib.contextmanager
def distributions_for_export() -> Iterator[None]:
    """Meanwhile torch.distributions do not look at the values of their parameters, as by default they do.

    A gamma distribution clamps what it drew behind autograd's back, with which export loses the gradient: not now.
    """
    kind = torch.distributions.Distribution
    with instead((torch.distributions.Gamma, "rsample", _gamma)):
        validates = kind._validate_args
        kind.set_default_validate_args(False)
        try:
            yield
        finally:
            kind.set_default_validate_args(validates)


def _gamma(gamma: Any, sample_shape: Any = ()) -> torch.Tensor:
    shape = gamma._extended_shape(torch.Size(sample_shape))
    drawn = torch._standard_gamma(gamma.concentration.expand(shape)) / gamma.rate.expand(shape)
    return drawn + (drawn.clamp(min=torch.finfo(drawn.dtype).tiny) - drawn).detach()


def refuse_fixed_numbers(call: Callable[[], Any], name: str) -> Any:
    """What a forward gives; BridgeError if it draws numbers that a captured graph would hold, or make anew, wrongly.

    It is called a second time, from other states of the generators, where it drew noise or numbers beside torch's:
    noise that begins at the same state again is seeded in the forward, and numbers of Python's or numpy's random
    module that are not seeded there would be constants of the graph.
    """
    outputs, watch, before, after = _watched(call, 0)
    if watch.refused:
        raise BridgeError(f"{name} {watch.refused}")
    if not watch.states and before == after:
        return outputs
    _, again, _, afterwards = _watched(call, 1)
    if watch.states & again.states:
        raise BridgeError(
            f"{name} seeds torch's generator in its forward and draws from it: numbers that are the same each time "
            "are a buffer; register them as one"
        )
    if any(was != once and once != twice for was, once, twice in zip(before, after, afterwards, strict=True)):
        raise BridgeError(
            f"{name} draws numbers by Python's or numpy's random module in its forward, of which the captured graph "
            "would hold one for ever: draw by torch (torch.rand), and choose by torch.where"
        )
    return outputs


def _watched(call: Callable[[], Any], seed: int) -> tuple[Any, _Watch, Any, Any]:
    """A call's outputs, what was seen of torch's draws in it, and the states of the others before and after."""
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        before = _others()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            with _Watch() as watch:
                outputs = call()
        after = _others()
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
    return outputs, watch, before, after


class _Watch(TorchDispatchMode):
    """Notes torch's state before each draw of noise, and what is wrong with the first draw that cannot come over."""

    def __init__(self) -> None:
        super().__init__()
        self.states: set[bytes] = set()
        self.refused = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = _kind(func, args, kwargs) == "noise"
        state = _state() if draws else b""
        found = func(*args, **kwargs)
        own = draws and _given(func, args, kwargs).get("generator") is not None
        if own or (draws and state != _state()):  # of one number, randperm draws none
            self._note(func, own, state)
        elif _name(func) == "random":
            self._refuse("draws by Tensor.random_, which torch cannot export: draw by torch.randint")
        return found

    def _note(self, func: Any, own: bool, state: bytes) -> None:
        if own:
            self._refuse(
                f"draws by torch.{_name(func)} from a torch.Generator of its own, of which a captured graph knows "
                "nothing: draw from torch's default one (leave generator= away)"
            )
        elif state in self.states:
            self._refuse(
                "draws the same numbers twice, by torch.random.fork_rng or torch.set_rng_state: draw them once and use "
                "them in both places"
            )
        self.states.add(state)

    def _refuse(self, why: str) -> None:
        self.refused = self.refused or why


def _others() -> Any:
    """The states of Python's and numpy's generators."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), (kind, keys.tobytes(), *rest)
