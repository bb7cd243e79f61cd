"""Pooling and padding along spatial axes; arrays may have their channels last."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .conv import each
from .registry import Last, dtype_of, op


class _Window:
    """Where the windows of a pooling lie, an axis at a time."""

    def __init__(self, x: Any, last: bool, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool):
        kernel = tuple(kernel) if isinstance(kernel, tuple | list) else (kernel,)
        n = {1: 1, 2: 2, 3: 3}[len(kernel)]
        self.spatial = n
        self.axes = tuple(range(x.ndim - n - 1, x.ndim - 1)) if last else tuple(range(x.ndim - n, x.ndim))
        self.kernel = kernel
        self.stride = each(stride, n) if stride not in ((), [], None) else self.kernel
        self.padding, self.dilation = each(padding, n), each(dilation, n)
        self.sizes = [x.shape[a] for a in self.axes]
        self.out, self.pads = [], []
        for i, k, s, p, d in zip(self.sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True):
            reach = d * (k - 1) + 1
            free = i + 2 * p - reach
            out = (-(-free // s) if ceil_mode else free // s) + 1
            if ceil_mode and (out - 1) * s >= i + p:  # a window must start inside the input or its left padding
                out -= 1
            self.out.append(out)
            self.pads.append((p, max((out - 1) * s + reach - i - p, 0)))

    def reduce(self, x: Any, start: Any, combine: Any) -> Any:
        def full(values: Any, rest: Any) -> list[Any]:
            found = [rest] * x.ndim
            for axis, value in zip(self.axes, values, strict=True):
                found[axis] = value
            return found

        reduced = lax.reduce_window(
            x,
            jnp.asarray(start, x.dtype) if not isinstance(start, int | float) else np.asarray(start, x.dtype),
            combine,
            tuple(full(self.kernel, 1)),
            tuple(full(self.stride, 1)),
            tuple(full(self.pads, (0, 0))),
            window_dilation=tuple(full(self.dilation, 1)),
        )
        cut = full([slice(0, n) for n in self.out], slice(None))
        return reduced[tuple(cut)]

    def largest(self, x: Any) -> Any:
        """The largest of each window."""
        if any(d > 1 for d in self.dilation):  # XLA has no gradient for a dilated window
            return self._largest_of_slices(x)
        return self.reduce(x, _lowest(x.dtype), lax.max)

    def _largest_of_slices(self, x: Any) -> Any:
        """From one slice for each place of a window; the gradient goes to the first of the largest."""
        widths = [(0, 0, 0)] * x.ndim
        for axis, (low, high) in zip(self.axes, self.pads, strict=True):
            widths[axis] = (low, high, 0)
        x = lax.pad(x, jnp.asarray(_lowest(x.dtype), x.dtype), widths)
        slices = []
        for place in itertools.product(*(range(k) for k in self.kernel)):
            at = [slice(None)] * x.ndim
            for axis, i, d, s, n in zip(self.axes, place, self.dilation, self.stride, self.out, strict=True):
                at[axis] = slice(i * d, i * d + (n - 1) * s + 1, s)
            slices.append(x[tuple(at)])
        stacked = jnp.stack(slices)
        first = jnp.argmax(lax.stop_gradient(stacked), axis=0, keepdims=True)
        return jnp.take_along_axis(stacked, first, axis=0)[0]

    def divisors(self, x: Any, count_include_pad: bool) -> Any:
        """How many places each window averages over, broadcast against the output."""
        counts = np.ones((), np.float32)
        shape = [1] * x.ndim
        for i, k, s, p, out, axis in zip(
            self.sizes, self.kernel, self.stride, self.padding, self.out, self.axes, strict=True
        ):
            starts = np.arange(out) * s - p
            ends = np.minimum(starts + k, i + p)
            if not count_include_pad:
                starts, ends = np.maximum(starts, 0), np.minimum(ends, i)
            one = list(shape)
            one[axis] = out
            counts = counts * (ends - starts).astype(np.float32).reshape(one)
        return jnp.asarray(counts, x.dtype)


def _lowest(dtype: Any) -> Any:
    return -np.inf if jnp.issubdtype(dtype, jnp.floating) else np.iinfo(dtype).min


@op("max_pool1d.default", "max_pool2d.default", "max_pool3d.default", channels=True)
def max_pool(
    self: Any,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    last: bool = False,
) -> Any:
    window = _Window(self, last, kernel_size, stride, padding, dilation, ceil_mode)
    result = window.largest(self)
    return Last(result) if last else result


@op("max_pool1d_with_indices.default", "max_pool2d_with_indices.default", "max_pool3d_with_indices.default")
def max_pool_with_indices(
    self: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Any:
    window = _Window(self, False, kernel_size, stride, padding, dilation, ceil_mode)
    value = window.largest(self)
    flat = jnp.arange(math.prod(window.sizes), dtype=jnp.int32).reshape(window.sizes)
    flat = jnp.broadcast_to(flat, self.shape)

    def first(a: Any, b: Any) -> Any:
        better = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1]))
        return jnp.where(better, b[0], a[0]), jnp.where(better, b[1], a[1])

    def full(values: Any, rest: Any) -> Any:
        return tuple([rest] * (self.ndim - window.spatial) + list(values))

    _, index = lax.reduce_window(
        (lax.stop_gradient(self), flat),
        (jnp.asarray(_lowest(self.dtype), self.dtype), jnp.asarray(np.iinfo(np.int32).max, jnp.int32)),
        first,
        full(window.kernel, 1),
        full(window.stride, 1),
        full(window.pads, (0, 0)),
        window_dilation=full(window.dilation, 1),
    )
    return value, index[tuple(full([slice(0, n) for n in window.out], slice(None)))]


@op("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default", channels=True)
def avg_pool(
    self: Any,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
    last: bool = False,
) -> Any:
    window = _Window(self, last, kernel_size, stride, padding, 1, ceil_mode)
    summed = window.reduce(self, 0.0, lax.add)
    over = divisor_override if divisor_override else window.divisors(self, count_include_pad)
    result = summed / over
    return Last(result) if last else result


def _bounds(size: int, out: int) -> list[tuple[int, int]]:
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


@op("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default", channels=True)
@op("_adaptive_avg_pool2d.default", "_adaptive_avg_pool3d.default", channels=True)
def adaptive_avg_pool(self: Any, output_size: Any, last: bool = False) -> Any:
    x, n = self, len(output_size)
    axes = range(x.ndim - n - 1, x.ndim - 1) if last else range(x.ndim - n, x.ndim)
    for axis, out in zip(axes, output_size, strict=True):
        size = x.shape[axis]
        if out == size:
            continue
        if size % out == 0:
            x = x.reshape(*x.shape[:axis], out, size // out, *x.shape[axis + 1 :]).mean(axis + 1)
            continue
        parts = [lax.slice_in_dim(x, a, b, axis=axis).mean(axis, keepdims=True) for a, b in _bounds(size, out)]
        x = jnp.concatenate(parts, axis)
    return Last(x) if last else x


@op("adaptive_max_pool1d.default", "adaptive_max_pool2d.default", "adaptive_max_pool3d.default")
def adaptive_max_pool(self: Any, output_size: Any) -> Any:
    """The first of the largest in each window, and where it lies in the input's spatial axes laid flat."""
    n = len(output_size)
    sizes = self.shape[-n:]
    places = jnp.arange(math.prod(sizes), dtype=dtype_of("int64")).reshape(sizes)
    value, index = self, jnp.broadcast_to(places, self.shape)
    for axis in range(self.ndim - 1, self.ndim - n - 1, -1):
        bounds = np.asarray(_bounds(self.shape[axis], output_size[axis - self.ndim]))
        width = int(np.max(bounds[:, 1] - bounds[:, 0]))
        window = np.minimum(bounds[:, :1] + np.arange(width), bounds[:, 1:] - 1)  # short ones repeat their last place
        value, index = jnp.take(value, window, axis=axis), jnp.take(index, window, axis=axis)
        best = jnp.argmax(value, axis=axis + 1, keepdims=True)
        value, index = (jnp.take_along_axis(x, best, axis=axis + 1).squeeze(axis + 1) for x in (value, index))
    return value, index


@op("max_unpool2d.default", "max_unpool3d.default")
def max_unpool(self: Any, indices: Any, output_size: Any, stride: Any = None, padding: Any = None) -> Any:
    """Values put back where a max pool took them from, zeros elsewhere."""
    lead = self.shape[: self.ndim - len(output_size)]
    values, places = (x.reshape(math.prod(lead), -1) for x in (self, indices))
    return _put(values, places, math.prod(output_size)).reshape(*lead, *output_size)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _put(values: Any, places: Any, size: int) -> Any:
    return jnp.zeros((len(values), size), values.dtype).at[jnp.arange(len(values))[:, None], places].set(values)


@_put.defjvp
def _put_jvp(size: int, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Of values at one place, each gets the whole gradient, as torch has it."""
    (values, places), (tangent, _) = primals, tangents
    rows = jnp.arange(len(values))[:, None]
    return _put(values, places, size), jnp.zeros((len(values), size), tangent.dtype).at[rows, places].add(tangent)


# --- padding ---

_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@op("pad.default", channels=True)
def padded(input: Any, pad: Any, mode: str = "constant", value: Any = None, last: bool = False) -> Any:
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)][::-1]  # torch begins with the last axis
    widths = [(0, 0)] * (input.ndim - len(pairs)) + pairs
    if last:
        if widths[1] != (0, 0):
            return _padded(jnp.moveaxis(input, -1, 1), widths, mode, value)
        widths = [widths[0], *widths[2:], (0, 0)]
    result = _padded(input, widths, mode, value)
    return Last(result) if last else result


def _padded(x: Any, widths: list[tuple[int, int]], mode: str, value: Any) -> Any:
    if mode == "constant":
        fill = jnp.asarray(0 if value is None else value, x.dtype)
        return lax.pad(x, fill, [(low, high, 0) for low, high in widths])
    kept = tuple(slice(max(-low, 0), n - max(-high, 0)) for n, (low, high) in zip(x.shape, widths, strict=True))
    return jnp.pad(x[kept], [(max(low, 0), max(high, 0)) for low, high in widths], mode=_MODES[mode])


@op("constant_pad_nd.default", channels=True)
def constant_pad(self: Any, pad: Any, value: Any = 0, last: bool = False) -> Any:
    return padded(self, pad, "constant", value, last)


@op("reflection_pad1d.default", "reflection_pad2d.default", "reflection_pad3d.default", channels=True)
def reflection_pad(self: Any, padding: Any, last: bool = False) -> Any:
    return padded(self, padding, "reflect", None, last)


@op("replication_pad1d.default", "replication_pad2d.default", "replication_pad3d.default", channels=True)
def replication_pad(self: Any, padding: Any, last: bool = False) -> Any:
    return padded(self, padding, "replicate", None, last)
