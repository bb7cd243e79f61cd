"""Pooling, padding and resampling along spatial axes; arrays may have their channels last."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..graph import BridgeError
from .conv import each
from .registry import Last, op


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
        """The largest of each window, from one slice for each of its places; its gradient goes to the first."""
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
    if any(d > 1 for d in window.dilation):  # XLA has no gradient for a dilated window
        result = window.largest(self)
    else:
        result = window.reduce(self, _lowest(self.dtype), lax.max)
    return Last(result) if last else result


@op("max_pool1d_with_indices.default", "max_pool2d_with_indices.default", "max_pool3d_with_indices.default")
def max_pool_with_indices(
    self: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Any:
    window = _Window(self, False, kernel_size, stride, padding, dilation, ceil_mode)
    value = window.reduce(self, _lowest(self.dtype), lax.max)
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


def _adaptive(x: Any, output_size: Any, last: bool, average: bool) -> Any:
    n = len(output_size)
    axes = range(x.ndim - n - 1, x.ndim - 1) if last else range(x.ndim - n, x.ndim)
    for axis, out in zip(axes, output_size, strict=True):
        size = x.shape[axis]
        out = size if out is None else out
        if out == size:
            continue
        if size % out == 0:
            split = x.reshape(*x.shape[:axis], out, size // out, *x.shape[axis + 1 :])
            x = split.mean(axis + 1) if average else split.max(axis + 1)
            continue
        parts = [lax.slice_in_dim(x, a, b, axis=axis) for a, b in _bounds(size, out)]
        parts = [p.mean(axis, keepdims=True) if average else p.max(axis, keepdims=True) for p in parts]
        x = jnp.concatenate(parts, axis)
    return Last(x) if last else x


@op("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default", channels=True)
@op("_adaptive_avg_pool2d.default", "_adaptive_avg_pool3d.default", channels=True)
def adaptive_avg_pool(self: Any, output_size: Any, last: bool = False) -> Any:
    return _adaptive(self, output_size, last, True)


@op("adaptive_max_pool1d.default", "adaptive_max_pool2d.default", "adaptive_max_pool3d.default")
def adaptive_max_pool(self: Any, output_size: Any) -> Any:
    return _adaptive(self, output_size, False, False), None


# --- padding ---

_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@op("pad.default", channels=True)
def pad(input: Any, pad: Any, mode: str = "constant", value: Any = None, last: bool = False) -> Any:
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
    return globals()["pad"](self, pad, "constant", value, last)


@op("reflection_pad1d.default", "reflection_pad2d.default", "reflection_pad3d.default", channels=True)
def reflection_pad(self: Any, padding: Any, last: bool = False) -> Any:
    return pad(self, padding, "reflect", None, last)


@op("replication_pad1d.default", "replication_pad2d.default", "replication_pad3d.default", channels=True)
def replication_pad(self: Any, padding: Any, last: bool = False) -> Any:
    return pad(self, padding, "replicate", None, last)


# --- resampling ---


def _targets(x: Any, last: bool, output_size: Any, scales: Any, spatial: int) -> list[tuple[int, int, int, Any]]:
    """`(axis, size, size after, given factor)` of each spatial axis."""
    axes = range(x.ndim - spatial - 1, x.ndim - 1) if last else range(x.ndim - spatial, x.ndim)
    found = []
    for i, axis in enumerate(axes):
        factor = scales[i] if scales is not None else None
        out = output_size[i] if output_size is not None else math.floor(x.shape[axis] * factor)
        found.append((axis, x.shape[axis], out, factor))
    return found


def _interpolate(x: Any, targets: Any, form: str, align: bool) -> Any:
    for axis, size, out, factor in targets:
        if out == size and form != "nearest-exact" and (factor is None or factor == 1):
            continue
        places = np.arange(out, dtype=np.float64)
        if form.startswith("nearest"):
            step = 1 / factor if factor else size / out
            at = np.floor((places + (0.5 if form == "nearest-exact" else 0)) * np.float32(step))
            x = jnp.take(x, np.minimum(at, size - 1).astype(np.int32), axis=axis)
            continue
        step = ((size - 1) / (out - 1) if out > 1 else 0.0) if align else (1 / factor if factor else size / out)
        at = places * step if align else (places + 0.5) * step - 0.5
        if form == "linear":
            at = np.maximum(at, 0)
        low = np.floor(at)
        share = at - low
        shape = [1] * x.ndim
        shape[axis] = out
        if form == "linear":
            taps = [(0, 1 - share), (1, share)]
        else:
            taps = [(k, _cubic(share, k)) for k in (-1, 0, 1, 2)]
        total = None
        for offset, weight in taps:
            index = np.clip(low + offset, 0, size - 1).astype(np.int32)
            term = jnp.take(x, index, axis=axis) * jnp.asarray(weight.reshape(shape), x.dtype)
            total = term if total is None else total + term
        x = total
    return x


def _cubic(share: Any, offset: int, a: float = -0.75) -> Any:
    """Keys' cubic kernel (1981) at the distance of one tap."""
    d = np.abs(share - offset)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, far)


def _resample(names: str, form: str, spatial: int, aligned: bool) -> None:
    def vec(input: Any, output_size: Any, *rest: Any, last: bool = False, **named: Any) -> Any:
        align, scales = _rest(rest, named, aligned)
        scales = scales[0] if len(scales) == 1 and (scales[0] is None or isinstance(scales[0], tuple)) else scales
        scales = None if scales in ((), None) or all(s is None for s in scales) else scales
        result = _interpolate(input, _targets(input, last, output_size, scales, spatial), form, align)
        return Last(result) if last else result

    op(f"{names}.vec", f"{names}.default", channels=True)(vec)


def _rest(rest: Any, named: dict[str, Any], aligned: bool) -> tuple[bool, tuple[Any, ...]]:
    align = bool(rest[0]) if aligned and rest else bool(named.get("align_corners", False))
    scales = tuple(rest[1:] if aligned else rest)
    scales += tuple(v for k, v in named.items() if k.startswith("scale"))
    return align, scales


for _n, _name in ((1, "linear1d"), (2, "bilinear2d"), (3, "trilinear3d")):
    _resample(f"upsample_{_name}", "linear", _n, True)
    _resample(f"upsample_nearest{_n}d", "nearest", _n, False)
    _resample(f"_upsample_nearest_exact{_n}d", "nearest-exact", _n, False)
_resample("upsample_bicubic2d", "cubic", 2, True)


@op("grid_sampler.default", "grid_sampler_2d.default")
def grid_sampler(input: Any, grid: Any, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Any:
    """Bilinear (0) or nearest (1) samples `[N, C, H, W]` at `grid` `[N, h, w, 2]`; outside 0 or the border."""
    if input.ndim != 4 or interpolation_mode > 1 or padding_mode > 1:
        raise BridgeError(
            "grid_sample: bilinear or nearest, with zeros or border padding, over two axes is what is there"
        )
    height, width = input.shape[2:]

    def place(g: Any, n: int) -> Any:
        at = (g + 1) / 2 * (n - 1) if align_corners else ((g + 1) * n - 1) / 2
        return jnp.clip(at, 0, n - 1) if padding_mode == 1 else at

    x, y = place(grid[..., 0], width), place(grid[..., 1], height)

    def pick(row: Any, column: Any) -> Any:
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        r, c = (jnp.clip(v, 0, n - 1).astype(jnp.int32) for v, n in ((row, height), (column, width)))
        found = jnp.moveaxis(input, 1, -1)[jnp.arange(len(input))[:, None, None], r, c]
        return jnp.where(inside[..., None], found, 0)

    if interpolation_mode == 1:
        return jnp.moveaxis(pick(jnp.round(y), jnp.round(x)), -1, 1)
    x0, y0 = jnp.floor(x), jnp.floor(y)
    dx, dy = (x - x0)[..., None], (y - y0)[..., None]
    top = pick(y0, x0) * (1 - dx) + pick(y0, x0 + 1) * dx
    bottom = pick(y0 + 1, x0) * (1 - dx) + pick(y0 + 1, x0 + 1) * dx
    return jnp.moveaxis(top * (1 - dy) + bottom * dy, -1, 1)


@op("affine_grid_generator.default")
def affine_grid(theta: Any, size: Any, align_corners: bool) -> Any:
    height, width = size[2:]

    def line(n: int) -> Any:
        full = jnp.linspace(-1, 1, n, dtype=theta.dtype)
        return full if align_corners else full * (n - 1) / n

    y, x = jnp.meshgrid(line(height), line(width), indexing="ij")
    base = jnp.stack([x, y, jnp.ones_like(x)], -1)
    return jnp.einsum("hwk,nik->nhwi", base, theta)
