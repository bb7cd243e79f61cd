"""Dropout, and the other random numbers that a model draws.

All come from fresh keys of the `dropout` stream. In a comparison with torch there is no key: then dropout keeps every
unit, and both sides are given the numbers of `units` and its like in the place of random ones, others for each draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .pointwise import leaky_relu
from .registry import dtype_of, floating, is_array, op

_STEP, _COUNT = 5184443, 1 << 23  # the step is near the golden section of the count, and odd
_SMALLEST = 2.0**-24  # as far from 0 as float32's uniform numbers are from 1


class Draws:
    """What an operator draws from: fresh keys, or in a comparison none.

    Args:
      key: gives a fresh key; None in a comparison.
    """

    def __init__(self, key: Callable[[], Any] | None) -> None:
        self._key, self._count = key, 0

    def __call__(self) -> Any:
        """A fresh key, or None."""
        return None if self._key is None else self._key()

    def number(self) -> int:
        """How many times noise was drawn in this comparison before."""
        self._count += 1
        return self._count - 1


def units(shape: tuple[int, ...], number: int = 0) -> np.ndarray:
    """Float32 numbers spread over (0, 1), exact, the same for the same shape and number of the draw."""
    places = np.arange(math.prod(shape), dtype=np.int64) * _STEP + (number + 1) * (_STEP // 3)
    return ((places % _COUNT + 0.5) / _COUNT).astype(np.float32).reshape(shape)


def normals(shape: tuple[int, ...], number: int = 0) -> np.ndarray:
    """Float32 numbers of mean 0 and variance 1."""
    return (units(shape, number) - np.float32(0.5)) * np.float32(math.sqrt(12))


def exponentials(shape: tuple[int, ...], number: int = 0) -> np.ndarray:
    """Float32 numbers spread as those of the standard exponential distribution."""
    return -np.log(units(shape, number))


def _drawn(draw: Any, shape: Any, dtype: Any, fresh: Callable[..., Any], instead: Callable[..., Any]) -> Any:
    """Numbers of a distribution, drawn in 32 bits at least as torch draws them, then rounded."""
    key = draw()
    if key is None:
        return lax.optimization_barrier(jnp.asarray(instead(shape, draw.number()))).astype(dtype)
    return fresh(key, shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)


def _uniform(draw: Any, shape: Any, dtype: Any) -> Any:
    return _drawn(draw, shape, dtype, jax.random.uniform, units)


def _normal(draw: Any, shape: Any, dtype: Any) -> Any:
    return _drawn(draw, shape, dtype, jax.random.normal, normals)


# --- dropout ---


def keeps(draw: Any, rate: float, shape: tuple[int, ...]) -> Any:
    """What dropout keeps; `draw` gives a fresh key, or None where every unit is kept."""
    key = draw()
    return jnp.ones(shape, bool) if key is None else jax.random.bernoulli(key, 1 - rate, shape)


def dropped(x: Any, rate: float, draw: Any, shape: Any = None) -> Any:
    """`x` after dropout: kept units are divided by `1 - rate`."""
    if not rate:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    kept = keeps(draw, rate, x.shape if shape is None else shape)
    return jnp.where(kept, x / (1 - rate), 0)


@op("native_dropout.default", random=True)
def native_dropout(input: Any, p: float, train: Any, *, draw: Any = None) -> Any:
    if not train or not p:
        return input, jnp.ones(input.shape, bool)
    if p == 1:
        return jnp.zeros_like(input), jnp.zeros(input.shape, bool)
    kept = keeps(draw, p, input.shape)
    return jnp.where(kept, input / (1 - p), 0), kept


@op("dropout.default", random=True)
def dropout(input: Any, p: float, train: bool, *, draw: Any = None) -> Any:
    return native_dropout(input, p, train, draw=draw)[0]


@op("feature_dropout.default", random=True)
def feature_dropout(input: Any, p: float, train: bool, *, draw: Any = None) -> Any:
    """Whole channels are dropped."""
    shape = input.shape[:2] + (1,) * (input.ndim - 2)
    return dropped(input, p if train else 0, draw, shape)


@op("bernoulli.p", random=True)
def bernoulli_p(self: Any, p: float = 0.5, generator: Any = None, *, draw: Any = None) -> Any:
    """The mask that dropout of whole channels or paths draws; with every unit kept it is one."""
    return keeps(draw, 1 - p, self.shape).astype(self.dtype)


@op("alpha_dropout.default", random=True)
def alpha_dropout(input: Any, p: float, train: bool, *, draw: Any = None) -> Any:
    """Self-normalising dropout (Klambauer et al. 2017)."""
    if not train or not p:
        return input
    alpha = -1.7580993408473766
    a = ((1 - p) * (1 + p * alpha**2)) ** -0.5
    kept = keeps(draw, p, input.shape)
    return jnp.where(kept, input, alpha) * a - a * alpha * p


@op("rrelu.default", random=True)
def rrelu(
    self: Any,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
    *,
    draw: Any = None,
) -> Any:
    """Slopes below zero: drawn in training, their mean in evaluation."""
    if not training:
        return leaky_relu(self, (lower + upper) / 2)
    slopes = lower + (upper - lower) * _uniform(draw, self.shape, self.dtype)
    return jnp.where(self > 0, self, self * slopes)


@op("rrelu_with_noise_functional.default", random=True)
def rrelu_with_noise(self: Any, noise: Any, *options: Any, draw: Any = None, **named: Any) -> tuple[Any, Any]:
    """What torch writes in place; its second output are the slopes, which its own way back alone reads."""
    return rrelu(self, *options, draw=draw, **named), noise


# --- noise; torch lets no gradient through what it is drawn by ---

NOISE: set[str] = set()
"""The operators that draw other random numbers than dropout's."""


def _noise(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    NOISE.update(f"aten.{name}" for name in names)
    return op(*names, random=True)


@_noise("rand.default")
def rand(size: Any, dtype: Any = None, generator: Any = None, *, draw: Any = None) -> Any:
    return _uniform(draw, tuple(size), _float(dtype))


@_noise("randn.default")
def randn(size: Any, dtype: Any = None, generator: Any = None, *, draw: Any = None) -> Any:
    return _normal(draw, tuple(size), _float(dtype))


def _float(dtype: Any) -> Any:
    return jnp.float32 if dtype is None else dtype_of(dtype)


@_noise("rand_like.default")
def rand_like(self: Any, dtype: Any = None, *, draw: Any = None) -> Any:
    return _uniform(draw, self.shape, self.dtype if dtype is None else dtype_of(dtype))


@_noise("randn_like.default")
def randn_like(self: Any, dtype: Any = None, *, draw: Any = None) -> Any:
    return _normal(draw, self.shape, self.dtype if dtype is None else dtype_of(dtype))


@_noise("uniform.default")
def uniform(self: Any, *bounds: float, generator: Any = None, draw: Any = None, **named: float) -> Any:
    low, high = (*bounds, *(0.0, 1.0)[len(bounds) :])
    low, high = named.get("from", low), named.get("to", high)
    return low + (high - low) * _uniform(draw, self.shape, self.dtype)


@_noise("normal_functional.default")
def normal_functional(self: Any, mean: float = 0, std: float = 1, generator: Any = None, *, draw: Any = None) -> Any:
    return mean + std * _normal(draw, self.shape, self.dtype)


@_noise("normal.Tensor_Tensor", "normal.Tensor_float", "normal.float_Tensor")
def normal(mean: Any, std: Any = 1, generator: Any = None, *, draw: Any = None) -> Any:
    shape = jnp.broadcast_shapes(jnp.shape(mean), jnp.shape(std))
    dtype = next(x.dtype for x in (mean, std) if is_array(x))
    return lax.stop_gradient(mean + std * _normal(draw, shape, dtype))


@_noise("normal.float_float")
def normal_sized(
    mean: float, std: float, size: Any, dtype: Any = None, generator: Any = None, *, draw: Any = None
) -> Any:
    return mean + std * _normal(draw, tuple(size), _float(dtype))


@_noise("exponential.default")
def exponential(self: Any, lambd: float = 1, generator: Any = None, *, draw: Any = None) -> Any:
    return _drawn(draw, self.shape, self.dtype, _exponential, exponentials) / lambd


def _exponential(key: Any, shape: Any, dtype: Any) -> Any:
    """Never 0, as torch's: its logarithm makes Gumbel noise."""
    return jnp.maximum(jax.random.exponential(key, shape, dtype), _SMALLEST)


@_noise("bernoulli.default")
def bernoulli(self: Any, generator: Any = None, *, draw: Any = None) -> Any:
    return (_uniform(draw, self.shape, jnp.float32) < lax.stop_gradient(self)).astype(self.dtype)


@_noise("bernoulli.Tensor")
def bernoulli_tensor(self: Any, p: Any, generator: Any = None, *, draw: Any = None) -> Any:
    return (_uniform(draw, self.shape, jnp.float32) < lax.stop_gradient(p)).astype(self.dtype)


@_noise("poisson.default")
def poisson(self: Any, generator: Any = None, *, draw: Any = None) -> Any:
    key, rate = draw(), lax.stop_gradient(floating(self))
    if key is None:
        return jnp.floor(rate + units(self.shape, draw.number())).astype(self.dtype)
    threefry = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
    return jax.random.poisson(threefry, rate).astype(self.dtype)


@_noise("randint.default")
def randint(high: Any, size: Any, dtype: Any = None, generator: Any = None, *, draw: Any = None) -> Any:
    return _integers(draw, 0, high, tuple(size), dtype_of("int64" if dtype is None else dtype))


@_noise("randint.low")
def randint_low(low: Any, high: Any, size: Any, dtype: Any = None, generator: Any = None, *, draw: Any = None) -> Any:
    return _integers(draw, low, high, tuple(size), dtype_of("int64" if dtype is None else dtype))


@_noise("randint_like.default")
def randint_like(self: Any, high: Any, dtype: Any = None, *, draw: Any = None) -> Any:
    return _integers(draw, 0, high, self.shape, self.dtype if dtype is None else dtype_of(dtype))


@_noise("randint_like.low_dtype")
def randint_like_low(self: Any, low: Any, high: Any, dtype: Any = None, *, draw: Any = None) -> Any:
    return _integers(draw, low, high, self.shape, self.dtype if dtype is None else dtype_of(dtype))


def _integers(draw: Any, low: Any, high: Any, shape: Any, dtype: Any) -> Any:
    key = draw()
    if key is None:
        return jnp.floor(low + (high - low) * units(shape, draw.number())).astype(dtype)
    return jax.random.randint(key, shape, low, high).astype(dtype)


@_noise("randperm.default")
def randperm(n: Any, dtype: Any = None, generator: Any = None, *, draw: Any = None) -> Any:
    key, dtype = draw(), dtype_of("int64" if dtype is None else dtype)
    if key is None:
        return jnp.asarray(np.argsort(units((n,), draw.number()), kind="stable"), dtype)
    found = jax.random.permutation(key, n)
    return jnp.asarray(found, dtype)


@_noise("multinomial.default")
def multinomial(
    self: Any, num_samples: int, replacement: bool = False, generator: Any = None, *, draw: Any = None
) -> Any:
    """Places drawn by weights `[..., C]`; without replacement by the largest of weights with Gumbel noise."""
    key, weights = draw(), lax.stop_gradient(self).astype(jnp.promote_types(self.dtype, jnp.float32))
    shape = (*weights.shape[:-1], num_samples)
    number = draw.number() if key is None else 0
    if replacement or num_samples == 1:
        if key is None:
            found = first_above(jnp.cumsum(weights, -1), units(shape, number))
        else:
            found = jax.random.categorical(key, jnp.log(weights)[..., None, :], shape=shape)
    else:
        logits = weights if key is None else jnp.log(weights) + jax.random.gumbel(key, weights.shape)
        found = lax.top_k(logits, num_samples)[1]
    return found.astype(dtype_of("int64"))


def first_above(sums: Any, shares: Any) -> Any:
    """The first place at which running sums `[..., C]` exceed each of the shares `[..., n]` of their total."""
    return (sums[..., None, :] <= shares[..., None] * sums[..., None, -1:]).sum(-1)
