"""Operators that read or write at places, and those that make arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .registry import dtype_of, dtype_or_default, dtype_or_own, is_array, number, op


@op("select.int", "select_copy.int")
def select(self: Any, dim: int, index: Any) -> Any:
    return jnp.take(self, index, axis=dim, mode="wrap") if is_array(index) else _at(self, dim, index)


def _at(x: Any, dim: int, index: Any) -> Any:
    places: list[Any] = [slice(None)] * x.ndim
    places[dim % x.ndim] = index
    return x[tuple(places)]


@op("slice.Tensor", "slice_copy.Tensor")
def slice_tensor(self: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    whole = isinstance(end, int) and end >= _FAR  # how torch writes "to the end"
    return _at(self, dim, slice(start or None, None if whole else end, step))


_FAR = 2**31 - 1


@op("narrow.default")
def narrow(self: Any, dim: int, start: int, length: int) -> Any:
    return _at(self, dim, slice(start, start + length))


@op("index.Tensor")
def index(self: Any, indices: Any) -> Any:
    return self[_places(self, indices)]


def _places(x: Any, indices: Any) -> tuple[Any, ...]:
    return tuple(slice(None) if i is None else i for i in indices)


@op("index_put.default", "_unsafe_index_put.default")
def index_put(self: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    if len(indices) == 1 and is_array(indices[0]) and indices[0].dtype == jnp.bool_ and values.ndim == 0:
        mask = indices[0].reshape(indices[0].shape + (1,) * (self.ndim - indices[0].ndim))
        value = values.astype(self.dtype)
        return jnp.where(mask, self + value if accumulate else value, self)
    at = self.at[_places(self, indices)]
    values = values.astype(self.dtype)
    return at.add(values) if accumulate else at.set(values)


@op("index_select.default")
def index_select(self: Any, dim: int, index: Any) -> Any:
    return jnp.take(self, index.reshape(-1), axis=dim)


def _scatter_places(x: Any, dim: int, index: Any) -> tuple[Any, ...]:
    axis = dim % x.ndim
    grids = list(jnp.meshgrid(*(jnp.arange(n) for n in index.shape), indexing="ij"))
    grids[axis] = index
    return tuple(grids)


@op("gather.default")
def gather(self: Any, dim: int, index: Any, sparse_grad: bool = False) -> Any:
    return self[_scatter_places(self, dim, index)] if self.ndim else self


def _source(index: Any, src: Any) -> Any:
    return src[tuple(slice(0, n) for n in index.shape)] if is_array(src) and src.ndim else src


@op("scatter.src", "scatter.value")
def scatter(self: Any, dim: int, index: Any, src: Any = None, value: Any = None) -> Any:
    given = src if value is None else value
    return self.at[_scatter_places(self, dim, index)].set(jnp.asarray(_source(index, given), self.dtype))


@op("scatter_add.default")
def scatter_add(self: Any, dim: int, index: Any, src: Any) -> Any:
    return self.at[_scatter_places(self, dim, index)].add(_source(index, src))


@op("scatter_reduce.two")
def scatter_reduce(self: Any, dim: int, index: Any, src: Any, reduce: str, include_self: bool = True) -> Any:
    places, values = _scatter_places(self, dim, index), _source(index, src)
    starts = {"sum": 0.0, "prod": 1.0, "mean": 0.0, "amax": -jnp.inf, "amin": jnp.inf}
    base = self if include_self else self.at[places].set(jnp.asarray(starts[reduce], self.dtype))
    at = base.at[places]
    if reduce == "sum":
        return at.add(values)
    if reduce == "prod":
        return at.multiply(values)
    if reduce == "mean":
        ones = jnp.ones_like(self) if include_self else jnp.zeros_like(self)
        count = ones.at[places].add(jnp.ones_like(values))
        return at.add(values) / jnp.maximum(count, 1)
    return at.max(values) if reduce == "amax" else at.min(values)


@op("index_add.default")
def index_add(self: Any, dim: int, index: Any, source: Any, alpha: Any = 1) -> Any:
    places: list[Any] = [slice(None)] * self.ndim
    places[dim % self.ndim] = index
    return self.at[tuple(places)].add((source * alpha).astype(self.dtype))


@op("index_copy.default")
def index_copy(self: Any, dim: int, index: Any, source: Any) -> Any:
    places: list[Any] = [slice(None)] * self.ndim
    places[dim % self.ndim] = index
    return self.at[tuple(places)].set(source)


@op("index_fill.int_Scalar", "index_fill.int_Tensor")
def index_fill(self: Any, dim: int, index: Any, value: Any) -> Any:
    places: list[Any] = [slice(None)] * self.ndim
    places[dim % self.ndim] = index
    return self.at[tuple(places)].set(jnp.asarray(value, self.dtype))


@op("select_scatter.default")
def select_scatter(self: Any, src: Any, dim: int, index: int) -> Any:
    places: list[Any] = [slice(None)] * self.ndim
    places[dim % self.ndim] = index
    return self.at[tuple(places)].set(src.astype(self.dtype))


@op("slice_scatter.default")
def slice_scatter(self: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    places: list[Any] = [slice(None)] * self.ndim
    whole = isinstance(end, int) and end >= _FAR
    places[dim % self.ndim] = slice(start, None if whole else end, step)
    return self.at[tuple(places)].set(src.astype(self.dtype))


@op("masked_scatter.default")
def masked_scatter(self: Any, mask: Any, source: Any) -> Any:
    mask = jnp.broadcast_to(mask, self.shape)
    order = jnp.cumsum(mask.reshape(-1)) - 1
    taken = source.reshape(-1)[jnp.clip(order, 0, source.size - 1)].reshape(self.shape)
    return jnp.where(mask, taken, self)


@op("take.default")
def take(self: Any, index: Any) -> Any:
    return jnp.take(self.reshape(-1), index, mode="wrap")


@op("take_along_dim.default")
def take_along_dim(self: Any, indices: Any, dim: Any = None) -> Any:
    return jnp.take_along_axis(self, indices, axis=dim)


@op("copy.default")
def copy(self: Any, src: Any, non_blocking: bool = False) -> Any:
    return jnp.broadcast_to(src.astype(self.dtype), self.shape)


@op("one_hot.default")
def one_hot(self: Any, num_classes: int = -1) -> Any:
    return jax.nn.one_hot(self, num_classes, dtype=dtype_of("int64"))


@op("searchsorted.Tensor")
def searchsorted(sorted_sequence: Any, self: Any, out_int32: bool = False, right: bool = False) -> Any:
    return jnp.searchsorted(sorted_sequence, self, side="right" if right else "left").astype(dtype_of("int64"))


@op("bucketize.Tensor")
def bucketize(self: Any, boundaries: Any, out_int32: bool = False, right: bool = False) -> Any:
    return searchsorted(boundaries, self, out_int32, right)


# --- making arrays ---


@op("zeros.default", "empty.memory_format", "new_zeros.default", "new_empty.default")
def zeros(*args: Any, dtype: Any = None) -> Any:
    return jnp.zeros(args[-1], _like(args, dtype))


@op("ones.default", "new_ones.default")
def ones(*args: Any, dtype: Any = None) -> Any:
    return jnp.ones(args[-1], _like(args, dtype))


def _like(args: Any, dtype: Any) -> Any:
    return args[0].dtype if dtype is None and len(args) > 1 else dtype_or_default(dtype)


@op("full.default")
def full(size: Any, fill_value: Any, dtype: Any = None) -> Any:
    return jnp.full(size, number(fill_value), dtype_or_default(dtype, fill_value))


@op("new_full.default")
def new_full(self: Any, size: Any, fill_value: Any, dtype: Any = None) -> Any:
    return jnp.full(size, number(fill_value), dtype_or_own(dtype, self))


@op("zeros_like.default", "empty_like.default")
def zeros_like(self: Any, dtype: Any = None) -> Any:
    return jnp.zeros(self.shape, dtype_or_own(dtype, self))


@op("ones_like.default")
def ones_like(self: Any, dtype: Any = None) -> Any:
    return jnp.ones(self.shape, dtype_or_own(dtype, self))


@op("full_like.default")
def full_like(self: Any, fill_value: Any, dtype: Any = None) -> Any:
    return jnp.full(self.shape, number(fill_value), dtype_or_own(dtype, self))


@op("fill.Scalar", "fill.Tensor")
def fill(self: Any, value: Any) -> Any:
    return jnp.full(self.shape, value, self.dtype)


@op("arange.default")
def arange(end: Any, dtype: Any = None) -> Any:
    return jnp.arange(end, dtype=dtype_or_default(dtype, end))


@op("arange.start", "arange.start_step")
def arange_start(start: Any, end: Any, step: Any = 1, dtype: Any = None) -> Any:
    whole = all(isinstance(v, int) for v in (start, end, step))
    return jnp.arange(start, end, step, dtype=dtype_or_default(dtype, 0 if whole else 0.0))


@op("linspace.default")
def linspace(start: Any, end: Any, steps: int, dtype: Any = None) -> Any:
    return jnp.linspace(start, end, steps, dtype=dtype_or_default(dtype))


@op("logspace.default")
def logspace(start: Any, end: Any, steps: int, base: float = 10.0, dtype: Any = None) -> Any:
    return jnp.logspace(start, end, steps, base=base, dtype=dtype_or_default(dtype))


@op("eye.default")
def eye(n: int, dtype: Any = None) -> Any:
    return jnp.eye(n, dtype=dtype_or_default(dtype))


@op("eye.m")
def eye_m(n: int, m: int, dtype: Any = None) -> Any:
    return jnp.eye(n, m, dtype=dtype_or_default(dtype))


@op("scalar_tensor.default")
def scalar_tensor(s: Any, dtype: Any = None) -> Any:
    return jnp.asarray(number(s), dtype_or_default(dtype))


@op("tril_indices.default")
def tril_indices(row: int, col: int, offset: int = 0, dtype: Any = None) -> Any:
    return jnp.stack(jnp.tril_indices(row, offset, col)).astype(dtype_of("int64"))


@op("triu_indices.default")
def triu_indices(row: int, col: int, offset: int = 0, dtype: Any = None) -> Any:
    return jnp.stack(jnp.triu_indices(row, offset, col)).astype(dtype_of("int64"))


# --- sizes, as Python numbers while the program is traced ---


@op("sym_size.int")
def sym_size(self: Any, dim: int) -> Any:
    return self.shape[dim]


@op("sym_numel.default")
def sym_numel(self: Any) -> Any:
    return self.size


def _python(name: str, fn: Any) -> None:
    op(f"sym.{name}")(fn)


for _name, _fn in {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "truediv": lambda a, b: a / b,
    "mod": lambda a, b: a % b,
    "pow": lambda a, b: a**b,
    "neg": lambda a: -a,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "and_": lambda a, b: a and b,
    "or_": lambda a, b: a or b,
    "sym_max": lambda a, b: max(a, b),
    "sym_min": lambda a, b: min(a, b),
    "sym_float": float,
    "sym_int": int,
    "sym_not": lambda a: not a,
    "sym_sum": lambda values: sum(values),
    "sym_ite": lambda test, a, b: a if test else b,
    "ceil": lambda a: -(-a // 1),
    "floor": lambda a: a // 1,
    "trunc": int,
    "round": round,
    "_sym_sqrt": lambda a: a**0.5,
}.items():
    _python(_name, _fn)


@op("getitem")
def getitem(value: Any, index: Any) -> Any:
    return value[index]
