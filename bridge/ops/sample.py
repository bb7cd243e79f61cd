"""Resampling along spatial axes: to other sizes (arrays may have their channels last), and at given places."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .pointwise import hardtanh
from .registry import Last, op


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
        antialias, plain = form.endswith("antialias"), factor is None or factor == 1
        if out == size and (antialias or plain and form != "nearest-exact"):
            continue
        places = np.arange(out, dtype=np.float64)
        if form.startswith("nearest"):
            step = np.float32(1 / factor if factor else size / out)
            shift = np.float32(0.5 if form == "nearest-exact" else 0)
            at = np.floor((places.astype(np.float32) + shift) * step)  # rounded as torch's, which decides at the edges
            x = jnp.take(x, np.minimum(at, size - 1).astype(np.int32), axis=axis)
            continue
        step = ((size - 1) / (out - 1) if out > 1 else 0.0) if align else (1 / factor if factor else size / out)
        if antialias:
            weights = jnp.asarray(_antialiased(size, out, step, form.startswith("cubic")), x.dtype)
            x = jnp.moveaxis(jnp.tensordot(x, weights, (axis, 1), precision=lax.Precision.HIGHEST), -1, axis)
            continue
        at = places * step if align else (places + 0.5) * step - 0.5
        if form == "linear":
            at = np.maximum(at, 0)
        low = np.floor(at)
        share = at - low
        shape = [1] * x.ndim
        shape[axis] = out
        taps = [(0, 1 - share), (1, share)] if form == "linear" else zip(range(-1, 3), _cubic_taps(share), strict=True)
        total = None
        for offset, weight in taps:
            index = np.clip(low + offset, 0, size - 1).astype(np.int32)
            term = jnp.take(x, index, axis=axis) * jnp.asarray(weight.reshape(shape), x.dtype)
            total = term if total is None else total + term
        x = total
    return x


def _near(d: Any, a: float) -> Any:
    """Keys' cubic kernel (1981) at a distance of at most 1."""
    return ((a + 2) * d - (a + 3)) * d * d + 1


def _far(d: Any, a: float) -> Any:
    """Keys' cubic kernel at a distance of 1 to 2."""
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a


def _cubic_taps(share: Any, a: float = -0.75) -> tuple[Any, Any, Any, Any]:
    """What the two places on either side weigh, `share` being the way from the second to the third."""
    return _far(share + 1, a), _near(share, a), _near(1 - share, a), _far(2 - share, a)


def _antialiased(size: int, out: int, step: float, cubic: bool) -> Any:
    """What each place of the input weighs at each of the output: a kernel as wide as the step, which adds up to 1."""
    stretch = max(step, 1.0)
    centre, reach = step * (np.arange(out) + 0.5), (2 if cubic else 1) * stretch
    low = np.maximum((centre - reach + 0.5).astype(np.int64), 0)[:, None]
    high = np.minimum((centre + reach + 0.5).astype(np.int64), size)[:, None]
    places = np.arange(size)
    d = np.abs(places + 0.5 - centre[:, None]) / stretch
    if cubic:
        weights = np.where(d < 1, _near(d, -0.5), np.where(d < 2, _far(d, -0.5), 0))
    else:
        weights = np.maximum(1 - d, 0)
    weights = np.where((places >= low) & (places < high), weights, 0)
    total = weights.sum(1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


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
_resample("_upsample_bilinear2d_aa", "linear-antialias", 2, True)
_resample("_upsample_bicubic2d_aa", "cubic-antialias", 2, True)


# --- at given places ---

_NEAREST, _BICUBIC = 1, 2  # of interpolation; else bilinear
_ZEROS, _REFLECTION = 0, 2  # of padding; else the border


@op("grid_sampler.default", "grid_sampler_2d.default", "grid_sampler_3d.default")
def grid_sampler(input: Any, grid: Any, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Any:
    """Samples of `[N, C, *sizes]` at `grid` `[N, *places, axes]`, whose last axis begins with the last of the sizes."""
    sizes = input.shape[2:]
    batch = jnp.arange(len(input)).reshape((-1,) + (1,) * len(sizes))
    values = jnp.moveaxis(input, 1, -1)

    def bounded(at: Any) -> list[Any]:
        return [_bounded(p, n, padding_mode, align_corners) for p, n in zip(at, sizes, strict=True)]

    def pick(at: Any) -> Any:
        inside = [(p >= 0) & (p < n) for p, n in zip(at, sizes, strict=True)]
        index = (jnp.clip(p, 0, n - 1).astype(jnp.int32) for p, n in zip(at, sizes, strict=True))
        return jnp.where(jnp.stack(inside).all(0)[..., None], values[(batch, *index)], 0)

    at = [_unscaled(grid[..., -1 - axis], n, align_corners) for axis, n in enumerate(sizes)]
    if interpolation_mode == _NEAREST:
        return jnp.moveaxis(pick([jnp.round(p) for p in bounded(at)]), -1, 1)
    cubic = interpolation_mode == _BICUBIC
    total: Any = 0
    for taps in itertools.product(*(_taps(p, cubic) for p in (at if cubic else bounded(at)))):
        places = [place for place, _ in taps]
        weight = math.prod(weight for _, weight in taps)
        total += pick(bounded(places) if cubic else places) * weight[..., None]
    return jnp.moveaxis(total, -1, 1)


def _taps(at: Any, cubic: bool) -> list[tuple[Any, Any]]:
    """The whole places about each of `at`, and what they weigh."""
    low = jnp.floor(at)
    share = at - low
    weights = _cubic_taps(share) if cubic else (1 - share, share)
    return [(low + i - (1 if cubic else 0), weight) for i, weight in enumerate(weights)]


def _unscaled(at: Any, size: int, align: bool) -> Any:
    """Places from -1 to 1 as those from 0 to `size - 1`; these are the centres of the first and last, or their ends."""
    return (at + 1) / 2 * (size - 1) if align else ((at + 1) * size - 1) / 2


def _bounded(at: Any, size: int, padding_mode: int, align: bool) -> Any:
    """Places of the input that stand for those beyond it; no gradient passes at the border."""
    if padding_mode == _ZEROS:
        return at
    if padding_mode == _REFLECTION:
        low, span = (0.0, size - 1) if align else (-0.5, size)
        if span == 0:
            return jnp.zeros_like(at)
        away = jnp.where(at < low, low - at, at - low)
        over = jnp.fmod(away, span)
        at = jnp.where(jnp.floor(away / span) % 2 == 0, over, span - over) + low
    return hardtanh(at, 0, size - 1)


@op("affine_grid_generator.default")
def affine_grid(theta: Any, size: Any, align_corners: bool) -> Any:
    """Where `theta` `[N, axes, axes + 1]` moves each place of an image or volume."""

    def line(n: int) -> Any:
        full = jnp.linspace(-1, 1, n, dtype=theta.dtype) if n > 1 else jnp.zeros(n, theta.dtype)
        return full if align_corners else full * (n - 1) / n

    along = jnp.meshgrid(*(line(n) for n in size[2:]), indexing="ij")
    base = jnp.stack([*along[::-1], jnp.ones_like(along[0])], -1)
    return jnp.einsum("...k,nik->n...i", base, theta)
