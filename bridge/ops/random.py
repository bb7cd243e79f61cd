"""Dropout, and the other random numbers that a model draws.

All come from fresh keys of the `dropout` stream. In a comparison with torch there is no key: then dropout keeps every
unit, and both sides are given the numbers of `units` and its like in the place of random ones, others for each draw.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .pointwise import leaky_relu
from .registry import dtype_of, dtype_or_default, dtype_or_own, floating, is_array, op

_COUNT = 1 << 23  # numbers of 23 bits and a half are exact in float32
_SMALLEST = 2.0**-24  # as far from 0 as float32's uniform numbers are from 1


class Draw(NamedTuple):
    """What one operator of noise draws from.

    Attributes:
      key: gives a fresh key, or None in a comparison.
      number: which draw of its program it is; torch's side counts alike.
    """

    key: Callable[[], Any]
    number: int

    def __call__(self) -> Any:
        """A fresh key, or None."""
        return self.key()


def units(shape: tuple[int, ...], number: int = 0) -> np.ndarray:
    """Float32 numbers in (0, 1), the same for a shape and number of the draw: splitmix64 (Steele et al. 2014)."""
    places = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) + np.uint64(number << 40)
    z = places * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (((z >> np.uint64(41)) + 0.5) / _COUNT).astype(np.float32).reshape(shape)


def normals(shape: tuple[int, ...], number: int = 0) -> np.ndarray:
    """Float32 numbers of mean 0 and variance 1."""
    return (units(shape, number) - np.float32(0.5)) * np.float32(math.sqrt(12))


def exponentials(shape: tuple[int, ...], number: int = 0) -> np.ndarray:
    """Float32 numbers spread as those of the standard exponential distribution."""
    return -np.log(units(shape, number))


def cauchys(shape: tuple[int, ...], number: int = 0) -> np.ndarray:
    """Float32 numbers spread as those of the standard Cauchy distribution, but no farther than 10 from 0."""
    return np.clip(np.tan(np.pi * (units(shape, number).astype(np.float64) - 0.5)), -10, 10).astype(np.float32)


def _drawn(draw: Any, shape: Any, dtype: Any, fresh: Callable[..., Any], instead: Callable[..., Any]) -> Any:
    """Numbers of a distribution, drawn in 32 bits at least as torch draws them, then rounded."""
    key = draw()
    if key is None:
        return lax.optimization_barrier(jnp.asarray(instead(shape, draw.number))).astype(dtype)
    return fresh(key, shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)


def _uniform(draw: Any, shape: Any, dtype: Any) -> Any:
    return _drawn(draw, shape, dtype, jax.random.uniform, units)


def _normal(draw: Any, shape: Any, dtype: Any) -> Any:
    return _drawn(draw, shape, dtype, jax.random.normal, normals)


NOISE: set[str] = set()
"""The operators that draw other random numbers than dropout's; the reader gives each of their nodes its `number`."""


def _noise(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    NOISE.update(f"aten.{name}" for name in names)

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def numbered(*args: Any, draw: Any, number: int = 0, **kwargs: Any) -> Any:
            return fn(*args, draw=Draw(draw, number), **kwargs)

        op(*names, random=True)(numbered)
        return fn

    return register


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


@_noise("rrelu.default")
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


@_noise("rrelu_with_noise_functional.default")
def rrelu_with_noise(self: Any, noise: Any, *options: Any, draw: Any = None, **named: Any) -> tuple[Any, Any]:
    """What torch writes in place. The array for the slopes, which torch's own way back alone reads, stays as it is."""
    return rrelu(self, *options, draw=draw, **named), noise


# --- noise; torch lets no gradient through what it is drawn by ---


@_noise("rand.default")
def rand(size: Any, dtype: Any = None, generator: Any = None, *, draw: Any = None) -> Any:
    return _uniform(draw, tuple(size), dtype_or_default(dtype))


@_noise("randn.default")
def randn(size: Any, dtype: Any = None, generator: Any = None, *, draw: Any = None) -> Any:
    return _normal(draw, tuple(size), dtype_or_default(dtype))


@_noise("rand_like.default")
def rand_like(self: Any, dtype: Any = None, *, draw: Any = None) -> Any:
    return _uniform(draw, self.shape, dtype_or_own(dtype, self))


@_noise("randn_like.default")
def randn_like(self: Any, dtype: Any = None, *, draw: Any = None) -> Any:
    return _normal(draw, self.shape, dtype_or_own(dtype, self))


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
    return mean + std * _normal(draw, tuple(size), dtype_or_default(dtype))


@_noise("exponential.default")
def exponential(self: Any, lambd: float = 1, generator: Any = None, *, draw: Any = None) -> Any:
    return _drawn(draw, self.shape, self.dtype, _exponential, exponentials) / lambd


@_noise("log_normal.default")
def log_normal(self: Any, mean: float = 1, std: float = 2, generator: Any = None, *, draw: Any = None) -> Any:
    return jnp.exp(mean + std * _normal(draw, self.shape, self.dtype))


@_noise("cauchy.default")
def cauchy(self: Any, median: float = 0, sigma: float = 1, generator: Any = None, *, draw: Any = None) -> Any:
    return median + sigma * _drawn(draw, self.shape, self.dtype, jax.random.cauchy, cauchys)


@_noise("geometric.default")
def geometric(self: Any, p: float, generator: Any = None, *, draw: Any = None) -> Any:
    """How many trials a success takes: 1 or more."""
    drawn = _drawn(draw, self.shape, jnp.promote_types(self.dtype, jnp.float32), _exponential, exponentials)
    return jnp.ceil(drawn / -math.log1p(-p)).astype(self.dtype)


@_noise("_standard_gamma.default")
def standard_gamma(self: Any, generator: Any = None, *, draw: Any = None) -> Any:
    """Shape parameters get their gradient by implicit differentiation (Figurnov et al. 2018), as torch's do."""
    key = draw()
    if key is not None:
        drawn = jax.random.gamma(key, self.astype(jnp.promote_types(self.dtype, jnp.float32)))
        return jnp.maximum(drawn.astype(self.dtype), jnp.finfo(self.dtype).tiny)  # never 0, as torch's
    fixed = lax.stop_gradient(self * (units(self.shape, draw.number) + 0.5))
    slope = lax.stop_gradient(lax.random_gamma_grad(self, fixed))
    return fixed + slope * (self - lax.stop_gradient(self))


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
        return jnp.floor(rate + units(self.shape, draw.number)).astype(self.dtype)
    threefry = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
    return jax.random.poisson(threefry, rate).astype(self.dtype)


@_noise("randint.default")
def randint(high: Any, size: Any, dtype: Any = None, generator: Any = None, *, draw: Any = None) -> Any:
    return _integers(draw, 0, high, tuple(size), dtype_or_default(dtype, 0))


@_noise("randint.low")
def randint_low(low: Any, high: Any, size: Any, dtype: Any = None, generator: Any = None, *, draw: Any = None) -> Any:
    return _integers(draw, low, high, tuple(size), dtype_or_default(dtype, 0))


@_noise("randint_like.default")
def randint_like(self: Any, high: Any, dtype: Any = None, *, draw: Any = None) -> Any:
    return _integers(draw, 0, high, self.shape, dtype_or_own(dtype, self))


@_noise("randint_like.low_dtype")
def randint_like_low(self: Any, low: Any, high: Any, dtype: Any = None, *, draw: Any = None) -> Any:
    return _integers(draw, low, high, self.shape, dtype_or_own(dtype, self))


def _integers(draw: Any, low: Any, high: Any, shape: Any, dtype: Any) -> Any:
    key = draw()
    if key is None:
        return jnp.floor(low + (high - low) * units(shape, draw.number)).astype(dtype)
    return jax.random.randint(key, shape, low, high).astype(dtype)


@_noise("randperm.default")
def randperm(n: Any, dtype: Any = None, generator: Any = None, *, draw: Any = None) -> Any:
    key = draw()
    found = jax.random.permutation(key, n) if key is not None else np.argsort(units((n,), draw.number), kind="stable")
    return jnp.asarray(found, dtype_or_default(dtype, 0))


@_noise("multinomial.default")
def multinomial(
    self: Any, num_samples: int, replacement: bool = False, generator: Any = None, *, draw: Any = None
) -> Any:
    """Places drawn by weights `[..., C]`; without replacement by the largest of weights with Gumbel noise."""
    key, weights = draw(), lax.stop_gradient(self).astype(jnp.promote_types(self.dtype, jnp.float32))
    shape = (*weights.shape[:-1], num_samples)
    if replacement or num_samples == 1:
        if key is None:
            found = first_above(jnp.cumsum(weights, -1), units(shape, draw.number))
        else:
            found = jax.random.categorical(key, jnp.log(weights)[..., None, :], shape=shape)
    elif key is None:
        found = lax.top_k(weights * units(weights.shape, draw.number), num_samples)[1]
    else:
        found = lax.top_k(jnp.log(weights) + jax.random.gumbel(key, weights.shape), num_samples)[1]
    return found.astype(dtype_of("int64"))


def first_above(sums: Any, shares: Any) -> Any:
    """The first place where running sums `[..., C]` exceed each of the shares `[..., n]` of their total."""
    return (sums[..., None, :] <= shares[..., None] * sums[..., None, -1:]).sum(-1)
