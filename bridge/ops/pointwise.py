"""Operators that act at each place alone."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .registry import dtype_of, floating, full_float, is_array, number, op, result_dtype, together

pointwise = {"elementwise": True}


def _unary(name: str, fn: Any, real: bool = True) -> None:
    def apply(self: Any) -> Any:
        return fn(floating(self) if real else jnp.asarray(self))

    op(f"{name}.default", **pointwise)(apply)


for _name, _fn in {
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "log": jnp.log,
    "log2": jnp.log2,
    "log10": jnp.log10,
    "log1p": jnp.log1p,
    "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tan": jnp.tan,
    "asin": jnp.arcsin,
    "acos": jnp.arccos,
    "atan": jnp.arctan,
    "sinh": jnp.sinh,
    "cosh": jnp.cosh,
    "tanh": jnp.tanh,
    "asinh": jnp.arcsinh,
    "acosh": jnp.arccosh,
    "atanh": jnp.arctanh,
    "erf": jax.scipy.special.erf,
    "erfc": jax.scipy.special.erfc,
    "erfinv": jax.scipy.special.erfinv,
    "lgamma": jax.scipy.special.gammaln,
    "digamma": jax.scipy.special.digamma,
    "sigmoid": jax.nn.sigmoid,
    "reciprocal": lambda x: 1 / x,
    "sinc": jnp.sinc,
    "log_sigmoid": jax.nn.log_sigmoid,
    "deg2rad": jnp.deg2rad,
    "rad2deg": jnp.rad2deg,
}.items():
    _unary(_name, _fn)


def absolute(x: Any) -> Any:
    """Without a slope at 0, as torch has it; JAX's own has 1 there."""
    return x * lax.stop_gradient(jnp.sign(x)) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.abs(x)


for _name, _fn in {
    "neg": jnp.negative,
    "abs": absolute,
    "sign": jnp.sign,
    "sgn": jnp.sign,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": jnp.round,
    "trunc": jnp.trunc,
    "frac": lambda x: x - jnp.trunc(x),
    "square": jnp.square,
    "positive": lambda x: x,
    "isnan": jnp.isnan,
    "isinf": jnp.isinf,
    "isfinite": jnp.isfinite,
    "logical_not": jnp.logical_not,
    "bitwise_not": jnp.bitwise_not,
    "conj": jnp.conj,
    "conj_physical": jnp.conj,
    "real": jnp.real,
    "imag": jnp.imag,
    "resolve_conj": lambda x: x,
    "resolve_neg": lambda x: x,
    "detach": lax.stop_gradient,
    "detach_copy": lax.stop_gradient,
    "alias": lambda x: x,
    "lift_fresh_copy": lambda x: x,
    "lift_fresh": lambda x: x,
}.items():
    _unary(_name, _fn, real=False)


@op("relu.default", **pointwise)
def relu(self: Any) -> Any:
    return jax.nn.relu(self)


@op("clone.default", "contiguous.default", **pointwise)
def clone(self: Any) -> Any:
    return self


def _binary(names: tuple[str, ...], fn: Any, real: bool = False) -> None:
    def apply(self: Any, other: Any) -> Any:
        a, b = together(number(self), number(other))
        return fn(floating(a), floating(b)) if real else fn(a, b)

    op(*names, **pointwise)(apply)


_ALSO = {"maximum": ("max.other",), "minimum": ("min.other",)}


def _both(name: str) -> tuple[str, str]:
    return f"{name}.Tensor", f"{name}.Scalar"


for _name, _fn in {
    "mul": jnp.multiply,
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
    "remainder": jnp.remainder,
    "fmod": jnp.fmod,
    "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
    "bitwise_xor": jnp.bitwise_xor,
}.items():
    _binary(_both(_name), _fn)
op("floor_divide.default", "floor_divide.Scalar", **pointwise)(
    lambda self, other: jnp.floor_divide(*together(self, other))
)
op("__and__.Tensor", "__and__.Scalar", **pointwise)(lambda self, other: jnp.bitwise_and(*together(self, other)))
op("__or__.Tensor", "__or__.Scalar", **pointwise)(lambda self, other: jnp.bitwise_or(*together(self, other)))
op("__xor__.Tensor", "__xor__.Scalar", **pointwise)(lambda self, other: jnp.bitwise_xor(*together(self, other)))
for _name, _fn in {
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "fmax": jnp.fmax,
    "fmin": jnp.fmin,
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
}.items():
    _binary((f"{_name}.default", *_ALSO.get(_name, ())), _fn)
_binary(("atan2.default",), jnp.arctan2, real=True)
_binary(("hypot.default",), jnp.hypot, real=True)
_binary(("logaddexp.default",), jnp.logaddexp, real=True)


@op("xlogy.Tensor", "xlogy.Scalar_Self", "xlogy.Scalar_Other", **pointwise)
def xlogy(self: Any, other: Any) -> Any:
    """0 wherever the first is 0, but NaN for NaN."""
    a, b = (floating(x) for x in together(number(self), number(other)))
    nothing = (a == 0) & ((b <= 0) | jnp.isinf(b))
    return jnp.where(nothing, 0, a) * jnp.log(jnp.where(nothing, 1, b))


@op("type_as.default", **pointwise)
def type_as(self: Any, other: Any) -> Any:
    return self.astype(other.dtype)


@op("add.Tensor", "add.Scalar", **pointwise)
def add(self: Any, other: Any, alpha: Any = 1) -> Any:
    a, b = together(number(self), number(other))
    if a.dtype == jnp.bool_:
        return jnp.logical_or(a, b)
    return a + b if alpha == 1 else a + jnp.asarray(alpha, b.dtype) * b


@op("sub.Tensor", "sub.Scalar", **pointwise)
def sub(self: Any, other: Any, alpha: Any = 1) -> Any:
    a, b = together(number(self), number(other))
    return a - b if alpha == 1 else a - jnp.asarray(alpha, b.dtype) * b


@op("rsub.Scalar", "rsub.Tensor", **pointwise)
def rsub(self: Any, other: Any, alpha: Any = 1) -> Any:
    return sub(other, self, alpha)


@op("div.Tensor", "div.Scalar", "true_divide.Tensor", **pointwise)
def div(self: Any, other: Any) -> Any:
    a, b = together(number(self), number(other))
    return floating(a) / floating(b)


@op("div.Tensor_mode", "div.Scalar_mode", **pointwise)
def div_mode(self: Any, other: Any, rounding_mode: str | None = None) -> Any:
    a, b = together(self, other)
    if rounding_mode is None:
        return div(self, other)
    if rounding_mode == "floor":
        return jnp.floor_divide(a, b)
    return lax.div(*jnp.broadcast_arrays(a, b)) if jnp.issubdtype(a.dtype, jnp.integer) else jnp.trunc(a / b)


@op("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", **pointwise)
def power(self: Any, exponent: Any) -> Any:
    self, exponent = number(self), number(exponent)
    dtype = result_dtype(self, exponent)
    if not is_array(exponent) and isinstance(exponent, int | float) and float(exponent).is_integer():
        return lax.integer_pow(jnp.asarray(self, dtype), int(exponent))
    if not is_array(exponent) and exponent == 0.5:
        return jnp.sqrt(jnp.asarray(self, dtype))
    if not is_array(exponent) and exponent == -0.5:
        return lax.rsqrt(jnp.asarray(self, dtype))
    return jnp.power(jnp.asarray(self, dtype), jnp.asarray(exponent, dtype))


@op("addcmul.default", **pointwise)
def addcmul(self: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> Any:
    a, b, c = together(self, tensor1, tensor2)
    return a + jnp.asarray(value, a.dtype) * b * c


@op("addcdiv.default", **pointwise)
def addcdiv(self: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> Any:
    a, b, c = together(self, tensor1, tensor2)
    return a + jnp.asarray(value, a.dtype) * (b / c)


@op("lerp.Scalar", "lerp.Tensor", **pointwise)
def lerp(self: Any, end: Any, weight: Any) -> Any:
    a, b, w = together(self, end, weight)
    return jnp.where(jnp.abs(w) < 0.5, a + w * (b - a), b - (b - a) * (1 - w))


@op("clamp.default", "clamp.Tensor", "clip.default", **pointwise)
def clamp(self: Any, min: Any = None, max: Any = None) -> Any:
    given = [v for v in (self, min, max) if v is not None]
    dtype = result_dtype(*given)
    x = jnp.asarray(self, dtype)
    # torch lets the gradient through where the input lies on a bound; jnp.maximum would halve it
    if min is not None:
        low = jnp.asarray(min, dtype)
        x = jnp.where(x >= low, x, low) if not jnp.issubdtype(dtype, jnp.inexact) else _keep(x >= low, x, low)
    if max is not None:
        high = jnp.asarray(max, dtype)
        x = jnp.where(x <= high, x, high) if not jnp.issubdtype(dtype, jnp.inexact) else _keep(x <= high, x, high)
    return x


def _keep(inside: Any, x: Any, bound: Any) -> Any:
    return jnp.where(inside | jnp.isnan(x), x, bound)


@op("clamp_min.default", "clamp_min.Tensor", **pointwise)
def clamp_min(self: Any, min: Any) -> Any:
    return clamp(self, min=min)


@op("clamp_max.default", "clamp_max.Tensor", **pointwise)
def clamp_max(self: Any, max: Any) -> Any:
    return clamp(self, max=max)


@op("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar", **pointwise)
def where(condition: Any, self: Any, other: Any) -> Any:
    return jnp.where(condition, *together(number(self), number(other)))


@op("masked_fill.Scalar", "masked_fill.Tensor", **pointwise)
def masked_fill(self: Any, mask: Any, value: Any) -> Any:
    return jnp.where(mask, jnp.asarray(number(value), self.dtype), self)


@op("nan_to_num.default", **pointwise)
def nan_to_num(self: Any, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Any:
    return jnp.nan_to_num(self, nan=0.0 if nan is None else nan, posinf=posinf, neginf=neginf)


@op("_to_copy.default", "to.dtype", "to.dtype_layout", "to.other", **pointwise)
def to_copy(self: Any, dtype: Any = None, *args: Any, copy: bool = False) -> Any:
    if is_array(dtype):
        dtype = dtype.dtype
    if dtype is None:
        return self
    target = dtype_of(dtype)
    if self.dtype == target:
        return self
    if jnp.issubdtype(self.dtype, jnp.floating) and jnp.issubdtype(target, jnp.integer):
        return jnp.trunc(self).astype(target)
    return self.astype(target)


# --- activations ---


@op("gelu.default", **pointwise)
@full_float
def gelu(self: Any, approximate: str = "none") -> Any:
    if approximate == "tanh":
        return jax.nn.gelu(self)
    return _gelu(self)


@jax.custom_jvp
def _gelu(x: Any) -> Any:
    """By erf, as torch has it; JAX's own, by erfc, takes an exponential."""
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


@_gelu.defjvp
def _gelu_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    """The slope has an erf of its own, of the other sign, which the compiler cannot share with the value's.

    Shared it is kept for the way back, and on a CPU the value then takes a second pass over memory.
    """
    (x,), (tangent,) = primals, tangents
    slope = 0.5 * (1 - lax.erf(x * -math.sqrt(0.5))) + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return _gelu(x), tangent * slope


@op("silu.default", **pointwise)
def silu(self: Any) -> Any:
    return jax.nn.silu(floating(self))


@op("mish.default", **pointwise)
@full_float
def mish(self: Any) -> Any:
    return self * jnp.tanh(softplus(self))


@op("leaky_relu.default", **pointwise)
def leaky_relu(self: Any, negative_slope: float = 0.01) -> Any:
    return jnp.where(self > 0, self, self * jnp.asarray(negative_slope, self.dtype))


@op("elu.default", **pointwise)
def elu(self: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    x = floating(self)
    below = jnp.where(x > 0, 0, x)  # keeps exp, and its gradient, finite on the side that is not taken
    return scale * jnp.where(x > 0, x, alpha * jnp.expm1(below * input_scale))


@op("celu.default", **pointwise)
def celu(self: Any, alpha: float = 1.0) -> Any:
    return elu(self, alpha, 1.0, 1.0 / alpha)


@op("selu.default", **pointwise)
def selu(self: Any) -> Any:
    return elu(self, 1.6732632423543772, 1.0507009873554805)


@op("softplus.default", **pointwise)
@full_float
def softplus(self: Any, beta: float = 1, threshold: float = 20) -> Any:
    scaled = self * beta
    return jnp.where(scaled > threshold, self, jnp.log1p(jnp.exp(jnp.minimum(scaled, threshold))) / beta)


@op("hardtanh.default", **pointwise)
def hardtanh(self: Any, min_val: float = -1, max_val: float = 1) -> Any:
    inside = (self > min_val) & (self < max_val)  # no gradient at the bounds, unlike clamp
    return jnp.where(inside, self, jnp.clip(lax.stop_gradient(self), min_val, max_val))


@op("relu6.default", **pointwise)
def relu6(self: Any) -> Any:
    return hardtanh(self, 0, 6)


@op("hardsigmoid.default", **pointwise)
def hardsigmoid(self: Any) -> Any:
    low, high = jnp.zeros((), self.dtype), jnp.ones((), self.dtype)
    return jnp.where(self <= -3, low, jnp.where(self >= 3, high, self / 6 + 0.5))


@op("hardswish.default", **pointwise)
def hardswish(self: Any) -> Any:
    return jnp.where(self <= -3, 0, jnp.where(self >= 3, self, self * (self + 3) / 6)).astype(self.dtype)


@op("hardshrink.default", **pointwise)
def hardshrink(self: Any, lambd: float = 0.5) -> Any:
    return jnp.where(jnp.abs(self) > lambd, self, 0)


@op("softshrink.default", **pointwise)
def softshrink(self: Any, lambd: float = 0.5) -> Any:
    return jnp.where(self > lambd, self - lambd, jnp.where(self < -lambd, self + lambd, 0))


@op("threshold.default", **pointwise)
def threshold(self: Any, threshold: float, value: float) -> Any:
    return jnp.where(self <= threshold, jnp.asarray(value, self.dtype), self)


@op("prelu.default", "_prelu_kernel.default")
def prelu(self: Any, weight: Any) -> Any:
    if weight.ndim == 1 and weight.shape[0] > 1 and self.ndim > 1:
        weight = weight.reshape((1, -1) + (1,) * (self.ndim - 2))
    return jnp.where(self > 0, self, weight * self)


@op("glu.default")
def glu(self: Any, dim: int = -1) -> Any:
    first, second = jnp.split(self, 2, axis=dim)
    return first * jax.nn.sigmoid(second)
