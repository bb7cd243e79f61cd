"""Operators that reduce, scan or sort along axes."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .pointwise import absolute
from .registry import Last, axes_of, dtype_of, floating, full_float, op


def _sum_dtype(x: Any, dtype: Any) -> Any:
    if dtype is not None:
        return dtype_of(dtype)
    return x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else dtype_of("int64")


@op("sum.dim_IntList", "sum.default")
def total(self: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return jnp.sum(self, axis=axes_of(dim, self.ndim), keepdims=keepdim, dtype=_sum_dtype(self, dtype))


@op("mean.dim", channels=True)
def mean(self: Any, dim: Any, keepdim: bool = False, dtype: Any = None, last: bool = False) -> Any:
    x = self if dtype is None else self.astype(dtype_of(dtype))
    axes = axes_of(dim, x.ndim)
    if not last:
        return jnp.mean(x, axis=axes, keepdims=keepdim)
    if 1 in axes:
        return mean(jnp.moveaxis(x, -1, 1), dim, keepdim)
    result = jnp.mean(x, axis=tuple(a - 1 if a > 1 else a for a in axes), keepdims=keepdim)
    return Last(result) if keepdim else jnp.moveaxis(result, -1, 0 if 0 in axes else 1) if result.ndim > 2 else result


@op("mean.default")
def mean_all(self: Any, dtype: Any = None) -> Any:
    return jnp.mean(self if dtype is None else self.astype(dtype_of(dtype)))


@op("prod.default")
def product_all(self: Any, dtype: Any = None) -> Any:
    return jnp.prod(self, dtype=_sum_dtype(self, dtype))


@op("prod.dim_int")
def product(self: Any, dim: int, keepdim: bool = False, dtype: Any = None) -> Any:
    return jnp.prod(self, axis=dim, keepdims=keepdim, dtype=_sum_dtype(self, dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 2, 3))
def _reduced(reduce: Any, x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    """`jnp.max` or `jnp.min`."""
    return reduce(x, axis=axes, keepdims=keepdims)


@_reduced.defjvp
def _reduced_jvp(reduce: Any, axes: tuple[int, ...], keepdims: bool, primals: Any, tangents: Any) -> Any:
    """The mean over the places of the extreme, one of which is known: XLA may compute the values twice, with other
    roundings, and JAX's own rule then finds none that equals it."""
    last = tuple(range(-len(axes), 0))
    x, tangent = (jnp.moveaxis(given, axes, last) for given in (primals[0], tangents[0]))
    kept = x.shape[: x.ndim - len(axes)]
    x, tangent = (given.reshape(*kept, math.prod(x.shape[len(kept) :])) for given in (x, tangent))
    first = jnp.expand_dims((jnp.argmax if reduce is jnp.max else jnp.argmin)(x, axis=-1), -1)
    places = (x == jnp.take_along_axis(x, first, axis=-1)) | (jnp.arange(x.shape[-1]) == first)
    result = _reduced(reduce, primals[0], axes, keepdims)
    slope = jnp.sum(jnp.where(places, tangent, 0), axis=-1) / jnp.sum(places, axis=-1).astype(tangent.dtype)
    return result, slope.reshape(result.shape)


@op("amax.default")
def amax(self: Any, dim: Any = (), keepdim: bool = False) -> Any:
    return _reduced(jnp.max, self, axes_of(dim, self.ndim), keepdim)


@op("amin.default")
def amin(self: Any, dim: Any = (), keepdim: bool = False) -> Any:
    return _reduced(jnp.min, self, axes_of(dim, self.ndim), keepdim)


def _extreme(x: Any, dim: int, keepdim: bool, pick: Any) -> tuple[Any, Any]:
    """The value (its gradient goes to one place, as torch's does) and where it is."""
    index = pick(x, axis=dim, keepdims=True)
    value = jnp.take_along_axis(x, index, axis=dim) if x.ndim else x
    index = index.astype(dtype_of("int64"))
    return (value, index) if keepdim or not x.ndim else (jnp.squeeze(value, dim), jnp.squeeze(index, dim))


@op("max.dim")
def max_dim(self: Any, dim: int, keepdim: bool = False) -> Any:
    return _extreme(self, dim, keepdim, jnp.argmax)


@op("min.dim")
def min_dim(self: Any, dim: int, keepdim: bool = False) -> Any:
    return _extreme(self, dim, keepdim, jnp.argmin)


@op("max.default")
def max_all(self: Any) -> Any:
    return _reduced(jnp.max, self, axes_of(None, self.ndim), False)


@op("min.default")
def min_all(self: Any) -> Any:
    return _reduced(jnp.min, self, axes_of(None, self.ndim), False)


@op("aminmax.default")
def aminmax(self: Any, dim: Any = None, keepdim: bool = False) -> Any:
    low, high = (_reduced(reduce, self, axes_of(dim, self.ndim), keepdim) for reduce in (jnp.min, jnp.max))
    return low, high


@op("argmax.default")
def argmax(self: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return jnp.argmax(self, axis=dim, keepdims=keepdim).astype(dtype_of("int64"))


@op("argmin.default")
def argmin(self: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return jnp.argmin(self, axis=dim, keepdims=keepdim).astype(dtype_of("int64"))


@op("any.default", "any.dim", "any.dims")
def any_of(self: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return jnp.any(self, axis=axes_of(dim, self.ndim), keepdims=keepdim)


@op("all.default", "all.dim", "all.dims")
def all_of(self: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return jnp.all(self, axis=axes_of(dim, self.ndim), keepdims=keepdim)


@op("var.correction")
def var(self: Any, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
    free = 1 if correction is None else correction
    return jnp.var(self, axis=axes_of(dim, self.ndim), ddof=free, keepdims=keepdim)


@op("var.dim")
def var_dim(self: Any, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Any:
    return var(self, dim, int(unbiased), keepdim)


@op("var.default")
def var_all(self: Any, unbiased: bool = True) -> Any:
    return var(self, None, int(unbiased))


@op("std.correction")
def std(self: Any, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
    return jnp.sqrt(var(self, dim, correction, keepdim))


@op("std.dim")
def std_dim(self: Any, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Any:
    return std(self, dim, int(unbiased), keepdim)


@op("std.default")
def std_all(self: Any, unbiased: bool = True) -> Any:
    return std(self, None, int(unbiased))


@op("var_mean.correction")
def var_mean(self: Any, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
    return var(self, dim, correction, keepdim), jnp.mean(self, axis=axes_of(dim, self.ndim), keepdims=keepdim)


@op("std_mean.correction")
def std_mean(self: Any, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
    return std(self, dim, correction, keepdim), jnp.mean(self, axis=axes_of(dim, self.ndim), keepdims=keepdim)


@op("logsumexp.default")
def logsumexp(self: Any, dim: Any, keepdim: bool = False) -> Any:
    return jax.nn.logsumexp(floating(self), axis=axes_of(dim, self.ndim), keepdims=keepdim)


def _norm(x: Any, p: Any, axes: tuple[int, ...], keepdim: bool) -> Any:
    x = absolute(x)
    if p == 2:
        squares = jnp.sum(x * x, axis=axes, keepdims=keepdim)
        safe = jnp.where(squares == 0, 1, squares)  # the norm's gradient at zero is zero, as in torch
        return jnp.where(squares == 0, 0, jnp.sqrt(safe))
    if p == 1:
        return jnp.sum(x, axis=axes, keepdims=keepdim)
    if p == 0:
        return jnp.sum(x != 0, axis=axes, keepdims=keepdim).astype(x.dtype)
    if p == float("inf"):
        return _reduced(jnp.max, x, axes, keepdim)
    if p == float("-inf"):
        return _reduced(jnp.min, x, axes, keepdim)
    nonzero = jnp.where(x == 0, 1, x)  # keeps gradients finite where torch has zero
    powers = jnp.sum(jnp.where(x == 0, 0, nonzero**p), axis=axes, keepdims=keepdim)
    safe = jnp.where(powers == 0, 1, powers)
    return jnp.where(powers == 0, 0, safe ** (1 / p))


@op("linalg_vector_norm.default")
def vector_norm(self: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    x = floating(self) if dtype is None else self.astype(dtype_of(dtype))
    return _norm(x, ord, axes_of(dim, x.ndim), keepdim)


@op("norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype")
def norm(self: Any, p: Any, dim: Any, keepdim: bool = False, dtype: Any = None) -> Any:
    x = floating(self) if dtype is None else self.astype(dtype_of(dtype))
    return _norm(x, 2 if p is None else p, axes_of(dim, x.ndim), keepdim)


@op("norm.Scalar")
def norm_all(self: Any, p: Any = 2) -> Any:
    return norm(self, p, None)


@op("linalg_norm.default")
def linalg_norm(self: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    if ord not in (None, 2, 2.0) or (ord is not None and (dim is None or isinstance(dim, tuple) and len(dim) > 1)):
        return jnp.linalg.norm(self, ord=ord, axis=dim, keepdims=keepdim)
    return norm(self, 2, dim, keepdim, dtype)


# --- along one axis ---


@op("softmax.int", "_softmax.default", "_safe_softmax.default")
def softmax(self: Any, dim: int, dtype: Any = None, half_to_float: bool = False) -> Any:
    x = self if dtype is None or isinstance(dtype, bool) else self.astype(dtype_of(dtype))
    return _softmax(x, dim)


@full_float
def _softmax(x: Any, dim: int) -> Any:
    return jax.nn.softmax(x, axis=dim)


@op("log_softmax.int", "_log_softmax.default")
def log_softmax(self: Any, dim: int, dtype: Any = None, half_to_float: bool = False) -> Any:
    x = self if dtype is None or isinstance(dtype, bool) else self.astype(dtype_of(dtype))
    return full_float(lambda y: jax.nn.log_softmax(y, axis=dim))(x)


@op("cumsum.default")
def cumsum(self: Any, dim: int, dtype: Any = None) -> Any:
    if self.ndim == 0:
        return self.astype(_sum_dtype(self, dtype))
    return jnp.cumsum(self, axis=dim, dtype=_sum_dtype(self, dtype))


@op("cumprod.default")
def cumprod(self: Any, dim: int, dtype: Any = None) -> Any:
    return jnp.cumprod(self, axis=dim, dtype=_sum_dtype(self, dtype))


@op("logcumsumexp.default")
def logcumsumexp(self: Any, dim: int) -> Any:
    return lax.cumlogsumexp(self, axis=dim % self.ndim)


@op("cummax.default")
def cummax(self: Any, dim: int) -> Any:
    return _running(self, dim, lax.cummax)


@op("cummin.default")
def cummin(self: Any, dim: int) -> Any:
    return _running(self, dim, lax.cummin)


def _running(x: Any, dim: int, scan: Any) -> tuple[Any, Any]:
    """The best so far along an axis, and its last place."""
    if x.ndim == 0:
        return x, jnp.zeros((), dtype_of("int64"))
    axis = dim % x.ndim
    best = scan(lax.stop_gradient(x), axis=axis)
    places = lax.broadcasted_iota(dtype_of("int64"), x.shape, axis)
    index = lax.cummax(jnp.where((x == best) | jnp.isnan(x), places, 0), axis=axis)
    return jnp.take_along_axis(x, index, axis=axis), index


@op("sort.default", "sort.stable")
def sort(self: Any, *args: Any, stable: Any = None, dim: Any = None, descending: Any = None) -> Any:
    if args and isinstance(args[0], bool | None.__class__):  # sort.stable passes `stable` first, sort.default `dim`
        args = args[1:]
    dim = args[0] if args else -1 if dim is None else dim
    descending = args[1] if len(args) > 1 else bool(descending)
    if self.ndim == 0:
        return self, jnp.zeros((), dtype_of("int64"))
    index = jnp.argsort(lax.stop_gradient(self), axis=dim, stable=True, descending=descending)
    return jnp.take_along_axis(self, index, axis=dim), index.astype(dtype_of("int64"))


@op("argsort.default", "argsort.stable")
def argsort(self: Any, *args: Any, stable: Any = None, dim: Any = None, descending: Any = None) -> Any:
    return sort(self, *args, stable=stable, dim=dim, descending=descending)[1]


@op("topk.default")
def topk(self: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    x = jnp.moveaxis(self, dim, -1)
    _, index = lax.top_k(lax.stop_gradient(x if largest else -x), k)
    value = jnp.take_along_axis(x, index, axis=-1)
    return jnp.moveaxis(value, -1, dim), jnp.moveaxis(index, -1, dim).astype(dtype_of("int64"))


@op("kthvalue.default")
def kthvalue(self: Any, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    values, index = sort(self, dim, False)
    at = [slice(None)] * self.ndim
    at[dim] = slice(k - 1, k)
    pair = values[tuple(at)], index[tuple(at)]
    return pair if keepdim else tuple(jnp.squeeze(x, dim) for x in pair)


@op("median.dim")
def median(self: Any, dim: int, keepdim: bool = False) -> Any:
    if self.ndim == 0:
        return self, jnp.zeros((), dtype_of("int64"))
    _, middle = kthvalue(self, (self.shape[dim] + 1) // 2, dim, True)
    strange = jnp.isnan(self)  # one that is none comes before all others
    place = jnp.where(jnp.any(strange, dim, keepdims=True), jnp.argmax(strange, dim, keepdims=True), middle)
    pair = jnp.take_along_axis(self, place, axis=dim), place.astype(middle.dtype)
    return pair if keepdim else tuple(jnp.squeeze(x, dim) for x in pair)


@op("diff.default")
def diff(self: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    return jnp.diff(self, n=n, axis=dim, prepend=prepend, append=append)


@op("dist.default")
def dist(self: Any, other: Any, p: Any = 2) -> Any:
    return norm(self - other, p, None)


@op("cosine_similarity.default")
def cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    x1, x2 = jnp.broadcast_arrays(x1, x2)

    def unit(x: Any) -> Any:
        length = _norm(x, 2, (dim % x.ndim,), True)
        raised = eps + (length - lax.stop_gradient(length))  # torch's gradient knows nothing of eps
        return x / jnp.where(length < eps, raised, length)

    return jnp.sum(unit(x1) * unit(x2), axis=dim)


@op("cdist.default", "_cdist_forward.default")
def cdist(x1: Any, x2: Any, p: float = 2, compute_mode: Any = None) -> Any:
    return _norm(x1[..., :, None, :] - x2[..., None, :, :], p, (x1.ndim,), False)


@op("pairwise_distance.default")
def pairwise_distance(x1: Any, x2: Any, p: float = 2, eps: float = 1e-6, keepdim: bool = False) -> Any:
    away = x1 - x2 + eps
    return _norm(away, p, (away.ndim - 1,), keepdim)


@op("pdist.default", "_pdist_forward.default")
def pdist(self: Any, p: float = 2) -> Any:
    first, second = jnp.triu_indices(len(self), 1)
    return _norm(self[first] - self[second], p, (1,), False)


@op("trace.default")
def trace(self: Any) -> Any:
    return jnp.trace(self)


@op("count_nonzero.default", "count_nonzero.dim_IntList")
def count_nonzero(self: Any, dim: Any = None) -> Any:
    return jnp.sum(self != 0, axis=axes_of(dim, self.ndim), dtype=dtype_of("int64"))
