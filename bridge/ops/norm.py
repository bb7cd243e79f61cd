"""Normalisation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .registry import Last, floating, full_float, op


@op("layer_norm.default")
def layer_norm(
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    return by_row(floating(input), weight, bias, len(normalized_shape), eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def by_row(x: Any, weight: Any, bias: Any, axes: int, eps: float) -> Any:
    """`x` standardised over each row of its last `axes` axes, in float32 (J. Ba et al., Layer Normalization, 2016).

    The derivative is written out. Its sums over rows weighted by `weight` are products with it: for a sum XLA's CPU
    backend first spreads the weight to an array of x's size.
    """
    standard, _ = _standard(_wide(x), _last(x, axes), eps)
    return _affine(standard, weight, bias).astype(jnp.result_type(x, *(v for v in (weight, bias) if v is not None)))


@by_row.defjvp
def _by_row_jvp(axes: int, eps: float, primals: Any, tangents: Any) -> Any:
    (x, weight, _), (dx, dweight, dbias) = primals, tangents
    y, last = by_row(*primals, axes, eps), _last(x, axes)
    standard, scale = _standard(_wide(x), last, eps)
    dx = dx.astype(standard.dtype)
    along, level = (scale * jnp.mean(part, last, keepdims=True) for part in (standard * dx, dx))
    straight = scale * dx
    if weight is None:
        dy = straight - level - standard * along
    else:
        dy = straight * weight - _spread(level, weight) - standard * _spread(along, weight)
    dy = dy if dweight is None else dy + standard * dweight
    dy = dy if dbias is None else dy + dbias
    return y, dy.astype(y.dtype)


def _last(x: Any, axes: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - axes, x.ndim))


def _wide(x: Any) -> Any:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _spread(of_rows: Any, weight: Any) -> Any:
    """`of_rows * weight` as a product, so that its transpose is one: `[..., 1, 1]` and `[A, B]` give `[..., A, B]`."""
    rows = of_rows.reshape(*of_rows.shape[: of_rows.ndim - weight.ndim], 1)
    row = weight.astype(rows.dtype).reshape(1, -1)
    product = lax.dot_general(rows, row, (((rows.ndim - 1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    return product.reshape(*rows.shape[:-1], *weight.shape)


@op("rms_norm.default")
def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    axes = _last(input, len(normalized_shape))
    eps = float(jnp.finfo(input.dtype).eps) if eps is None else eps
    scaled = full_float(lambda x: x * lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + eps))(input)
    return _affine(scaled, weight, None)


def _standard(x: Any, axes: tuple[int, ...], eps: float) -> tuple[Any, Any]:
    """`x` standardised over these axes, and one over the deviation along them."""
    centred = x - jnp.mean(x, axes, keepdims=True)
    scale = lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + eps)
    return centred * scale, scale


def _affine(x: Any, weight: Any, bias: Any) -> Any:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _of_channels(vector: Any, x: Any, last: bool) -> Any:
    if vector is None or last:
        return vector
    return vector.reshape((1, -1) + (1,) * (x.ndim - 2))


@op("group_norm.default")
def group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    n, channels = input.shape[:2]
    grouped = input.reshape(n, num_groups, channels // num_groups, *input.shape[2:])
    result = full_float(lambda x: _standard(x, tuple(range(2, x.ndim)), eps)[0])(grouped).reshape(input.shape)
    return _affine(result, _of_channels(weight, input, False), _of_channels(bias, input, False))


@op("instance_norm.default")
def instance_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    if use_input_stats:
        result = full_float(lambda x: _standard(x, tuple(range(2, x.ndim)), eps)[0])(input)
        return _affine(result, _of_channels(weight, input, False), _of_channels(bias, input, False))
    return normalised(input, weight, bias, running_mean, running_var, eps, False)


def _not_channels(x: Any, last: bool) -> tuple[int, ...]:
    """The axes of batch and space."""
    channel = x.ndim - 1 if last else 1
    return tuple(a for a in range(x.ndim) if a != channel)


def _statistics(x: Any, last: bool) -> tuple[Any, Any]:
    """Mean and biased variance of each channel over batch and space, in float32."""
    axes = _not_channels(x, last)
    wide = _wide(x)
    mean = jnp.mean(wide, axes)
    centred = wide - (mean if last else _of_channels(mean, x, False))
    return mean, jnp.mean(centred * centred, axes)


def normalised(x: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float, last: bool) -> Any:
    """`x` standardised by given statistics of its channels, in x's dtype."""
    scale = lax.rsqrt(var + eps)
    mean, scale, weight, bias = (_of_channels(v, x, last) for v in (mean, scale, weight, bias))
    return _affine((x.astype(scale.dtype) - mean) * scale, weight, bias).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def standardised(x: Any, weight: Any, bias: Any, eps: float, last: bool) -> tuple[Any, Any, Any]:
    """`x` standardised by the statistics of its own channels, and these: mean and biased variance, in float32.

    The derivative is written out (S. Ioffe and C. Szegedy, Batch Normalization, 2015): what JAX derives by itself keeps
    three arrays of x's size for the way back and takes five sums over such arrays there; one array and two sums do, and
    one on the way forward.
    """
    mean, var = _statistics(x, last)
    return normalised(x, weight, bias, mean, var, eps, last), mean, var


@standardised.defjvp
def _standardised_jvp(eps: float, last: bool, primals: Any, tangents: Any) -> Any:
    (x, weight, _), (dx, dweight, dbias) = primals, tangents
    y, mean, var = standardised(*primals, eps, last)
    axes = _not_channels(x, last)
    scale = lax.rsqrt(var + eps)
    of = functools.partial(_of_channels, x=x, last=last)
    centred = x.astype(mean.dtype) - of(mean)
    rest = jnp.mean(centred, axes)  # the mean is rounded, and of two rows little but that is left
    wide = dx.astype(mean.dtype)
    factor = scale if weight is None else scale * weight
    dmean = jnp.mean(wide, axes)
    along = jnp.mean(centred * wide, axes) - rest * dmean
    # what is of each channel is added up before it is spread: on the way back that is one sum for all of it
    slope, offset = -factor * along / (var + eps), -factor * dmean
    slope = slope if dweight is None else slope + scale * dweight
    offset = (offset if dbias is None else offset + dbias) - rest * slope  # here, so that one array is kept
    dy = of(factor) * wide + centred * of(slope) + of(offset)
    return (y, mean, var), (dy.astype(y.dtype), dmean, 2 * along)


def updated(running: Any, batch: Any, momentum: float) -> Any:
    """Torch's momentum: how much of the batch enters."""
    return ((1 - momentum) * running + momentum * batch).astype(running.dtype)


def unbiased(var: Any, count: int) -> Any:
    """The variance that torch keeps of a batch."""
    return var * (count / max(count - 1, 1))


@op("_native_batch_norm_legit_no_training.default", channels=True)
def batch_norm_frozen(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    momentum: float,
    eps: float,
    last: bool = False,
) -> Any:
    result = normalised(input, weight, bias, running_mean, running_var, eps, last)
    return (Last(result) if last else result), None, None


@op("_native_batch_norm_legit_functional.default", channels=True)
def batch_norm_training(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    last: bool = False,
) -> Any:
    if not training:
        return *batch_norm_frozen(input, weight, bias, running_mean, running_var, momentum, eps, last), None, None
    result, mean, var = standardised(input, weight, bias, eps, last)
    count = input.size // mean.size
    frozen_mean, frozen_var = lax.stop_gradient((mean, var))
    means = updated(running_mean, frozen_mean, momentum)
    variances = updated(running_var, unbiased(frozen_var, count), momentum)
    return (Last(result) if last else result), mean, lax.rsqrt(var + eps), means, variances


@op("_native_batch_norm_legit.no_stats", channels=True)
def batch_norm_no_stats(
    input: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float, last: bool = False
) -> Any:
    result, mean, var = standardised(input, weight, bias, eps, last)
    return (Last(result) if last else result), mean, lax.rsqrt(var + eps)
