"""Convolutions with channels last, on a CPU as what XLA computes faster there.

`conv_general_dilated` is what imported models compute with, and what Flax's layers may be given:
`nn.Conv(64, (3, 3), conv_general_dilated=esper_jax.kasmina.conv_general_dilated)`.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .products import by_ways, product

_MOST_TAPS = 49
_FEW = 32  # output channels
_PLACES, _CHANNELS, _IMAGES, _WORK = 1024, 32, 16, 1 << 24  # at least, for `_stretched`; the last: multiply-adds
_PATCHES = 16, 9, 32, 16 << 20  # for `_patches`: at most taps, and of the way back; at least channels; at most bytes
_COLOURS = 3
_CACHE = 4 << 20  # bytes
_TOGETHER, _PRODUCTS = ((2, 8), (2, 4), (2, 2), (2, 1), (1, 4), (1, 2)), 144  # images and blocks; at most


def dimension_numbers(spatial: int) -> tuple[str, str, str]:
    """Those of channels last, `NXYC, XYIO, NXYC`, for a number of spatial axes."""
    axes = "XYZ"[:spatial]
    return f"N{axes}C", f"{axes}IO", f"N{axes}C"


def conv_general_dilated(
    lhs: Any,
    rhs: Any,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    **options: Any,
) -> Any:
    """`lax.conv_general_dilated`, whose arguments it takes; with channels last some on a CPU as what is faster there.

    XLA:CPU has no kernel of its own for a convolution with as many groups as channels and computes each group alone:
    those are shifted multiply-adds. One with a kernel of one tap is a product of matrices, whose weight gradient it
    takes for a convolution with a kernel of the image's size: written as a product, it is one. Large ones leave YNNPACK
    (`_stretched`); strided ones over many channels, and those of an image's colours, are products with the patches that
    each output sees (`_patches`): which, is chosen for each way by itself (`_ways`). And an odd number of input
    channels under few output channels takes it several times as long as the next multiple of four.

    Args:
      lhs: `[N, *space, I]`.
      rhs: the kernel, `[*taps, I / feature_group_count, O]`.
      window_strides: a stride for each spatial axis.
      padding: a pair for each spatial axis, or a name that `lax.conv_general_dilated` knows.
      lhs_dilation: of the input; with another than 1 all goes to `lax.conv_general_dilated` as it is.
      rhs_dilation: of the kernel.
      dimension_numbers: those of the two shapes above; with others all goes to `lax.conv_general_dilated` as it is.
      feature_group_count: groups of features.
      batch_group_count: with another than 1 all goes to `lax.conv_general_dilated` as it is.
      precision: as `lax.conv_general_dilated` takes it.
      **options: all else that it takes; with `preferred_element_type` or another all goes to it as it is.

    Returns:
      `[N, *space, O]`, equal to rounding with what `lax.conv_general_dilated` gives, and so are its derivatives. Those
      of as many groups as channels have no forward mode on a CPU (`jax.jvp`, `jax.linearize`) and no transpose.

    Raises:
      TypeError, ValueError: as `lax.conv_general_dilated` raises them.
    """
    x, kernel = lhs, rhs
    plain: Any = functools.partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        **options,
    )
    asked = batch_group_count != 1 or any(option is not None for option in options.values())
    if asked or not _is_last(x, kernel, dimension_numbers):
        return plain(x, kernel)
    found = jax.eval_shape(plain, x, kernel)  # raises what is wrong in its words
    taps, undilated = math.prod(kernel.shape[:-2]), (1,) * (kernel.ndim - 2)
    strides, dilation = tuple(window_strides), undilated if rhs_dilation is None else tuple(rhs_dilation)
    spread = lhs_dilation is not None and tuple(lhs_dilation) != undilated
    if spread or min((*strides, *dilation), default=1) < 1 or not _is_static(kernel.shape) or not _is_whole(x):
        return plain(x, kernel)
    is_open = not _is_static(x.shape[1:-1])
    if isinstance(padding, str):
        if is_open:
            return plain(x, kernel)
        reach = [d * (k - 1) + 1 for k, d in zip(kernel.shape, dilation, strict=False)]
        padding = lax.padtype_to_pads(x.shape[1:-1], reach, strides, padding)
    padding = tuple(map(tuple, padding))
    if any(min(pair) < 0 for pair in padding):  # XLA:CPU computes some wrongly that are padded on the other side
        x, padding = _padded(x, padding), ((0, 0),) * len(padding)
        plain = functools.partial(plain, padding=padding)
    if _is_static(found.shape) and 0 in (*found.shape, *x.shape):
        return plain(x, kernel)
    if feature_group_count == 1:
        inputs, outputs = kernel.shape[-2:]
        if taps == 1 and not np.any(padding) and not (is_open and set(strides) != {1}):
            ours: Any = functools.partial(_pointwise, strides, precision)
        elif dilation == undilated and (ways := _ways(plain, x, kernel, strides, padding, precision)):
            ours = by_ways(*ways)
        elif inputs > 1 and inputs % 2 == 1 and outputs <= _FEW:
            ours = functools.partial(_rounded, plain)
        else:
            return plain(x, kernel)
    elif kernel.shape[-2] == 1 and taps <= _MOST_TAPS and not is_open and x.dtype != jnp.float16:
        ours = functools.partial(_depthwise, (strides, padding, dilation))
    else:
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=ours, default=plain)


def _is_last(x: Any, kernel: Any, given: Any) -> bool:
    """Whether dimension numbers, in any form, are those of channels last."""
    last = (0, x.ndim - 1, *range(1, x.ndim - 1))
    found = lax.conv_dimension_numbers(x.shape, kernel.shape, given)
    return found == lax.ConvDimensionNumbers(last, (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)), last)


def _is_whole(x: Any) -> bool:
    """Whether no axis is known to be divided among devices, nor `x` to differ between those of a `shard_map`."""
    known = jax.typeof(x)
    spec = getattr(getattr(known, "sharding", None), "spec", ())
    varying = getattr(getattr(known, "manual_axis_type", None), "varying", None) or getattr(known, "vma", None)
    return all(part is None for part in spec) and not varying


def _pointwise(strides: Any, precision: Any, x: Any, kernel: Any) -> Any:
    """A convolution whose kernel has one tap, as a product of matrices."""
    seen = x[(slice(None), *(slice(None, None, stride) for stride in strides))]
    return product(seen, kernel.reshape(kernel.shape[-2:]), precision)


def _ways(plain: Any, x: Any, kernel: Any, strides: Any, padding: Any, precision: Any) -> tuple[Any, Any, Any] | None:
    """What computes a convolution, what its linear part in the input, and what that in the kernel, if not all `plain`.

    The thresholds are where one began to be faster than the other for kernels of two to seven taps, 3 to 256 channels,
    1 to 32 images of 4 to 64 rows, on a CPU with AVX-512.
    """
    if not _is_static(x.shape[1:-1]) or min(out := _outputs(x.shape[1:-1], kernel.shape[:-2], strides, padding)) < 1:
        return None
    most, most_back, channels, most_bytes = _PATCHES
    (inputs, outputs), taps = kernel.shape[-2:], math.prod(kernel.shape[:-2])
    images = x.shape[0] if _is_static(x.shape[:1]) else _IMAGES
    places, strided = images * math.prod(out), max(strides) > 1
    fits = _is_static(x.shape[:1]) and places * taps * inputs * x.dtype.itemsize <= most_bytes
    patches = functools.partial(_patches, strides, padding, precision)
    if fits and taps <= most and inputs == _COLOURS and outputs <= _FEW:
        return patches, patches, patches
    stretched = functools.partial(_stretched, plain, strides, padding)
    # YNNPACK has a kernel of its own only for these, in two dimensions
    heavy = x.ndim == len("NHWC") and x.dtype == jnp.float32 and places * taps * inputs * outputs >= _WORK
    many = heavy and min(inputs, outputs) >= _CHANNELS and places >= _PLACES * (1 if strided else 2)
    together = heavy and max(inputs, outputs) >= _CHANNELS and images >= _IMAGES
    few = fits and strided and taps <= most and inputs >= channels
    # the gradient to the input of a kernel larger than the output is a convolution that XLA turns around and no library
    # takes; that of many taps adds up as many arrays
    outside = any(k > n for k, n in zip(kernel.shape, out, strict=False))
    back = patches if strided and fits and (outside or few and taps <= most_back) else plain
    ways = (
        stretched if many else patches if few else plain,
        stretched if many and not strided else back,
        stretched if together else patches if few else plain,
    )
    return None if set(ways) == {plain} else ways


def _stretched(convolution: Any, strides: Any, padding: Any, x: Any, kernel: Any) -> Any:
    """The same convolution with input and kernel stretched along the last axis, in twice the stride.

    YNNPACK takes none whose input is stretched, so that XLA:CPU gives it to Eigen, which steps over the zeros. A
    convolution that was given twice the stride and a kernel with zeros between its taps sees no zero of the input.
    """
    twice = [*(1 for _ in strides[1:]), 2]
    return convolution(
        x,
        kernel,
        window_strides=[s * t for s, t in zip(strides, twice, strict=True)],
        padding=[(low * t, high * t) for (low, high), t in zip(padding, twice, strict=True)],
        lhs_dilation=twice,
        rhs_dilation=twice,
    )


def _patches(strides: Any, padding: Any, precision: Any, x: Any, kernel: Any) -> Any:
    """A convolution as the product of all that each output sees with the whole kernel."""
    sizes = kernel.shape[:-2]
    out, x = _outputs(x.shape[1:-1], sizes, strides, padding), _padded(x, padding)
    seen = jnp.concatenate([_window(x, at, out, strides, (1,) * len(sizes)) for at in _taps(sizes)], -1)
    return product(seen, kernel.reshape(-1, kernel.shape[-1]), precision)


def _is_static(shape: Any) -> bool:
    """Whether all sizes are numbers: an exported program may leave some open."""
    return all(isinstance(size, int) for size in shape)


def _outputs(space: Any, sizes: Any, strides: Any, padding: Any, dilation: Any = None) -> list[int]:
    """The size of the output along each axis; without `dilation` the kernel's taps are neighbours."""
    axes = zip(space, sizes, strides, padding, dilation or (1,) * len(sizes), strict=True)
    return [(n + low + high - d * (k - 1) - 1) // s + 1 for n, k, s, (low, high), d in axes]


def _padded(x: Any, padding: Any) -> Any:
    """`[N, *space, C]` with zeros around; less than none are cut off."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])


def _rounded(convolution: Any, x: Any, kernel: Any) -> Any:
    """A convolution with input channels of zeros up to a multiple of four."""
    more = -x.shape[-1] % 4
    spatial = ((0, 0),) * (kernel.ndim - 2)
    return convolution(jnp.pad(x, ((0, 0), *spatial, (0, more))), jnp.pad(kernel, (*spatial, (0, more), (0, 0))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _depthwise(moves: Any, x: Any, kernel: Any) -> Any:
    """A depthwise convolution as a sum over the kernel's taps, whose gradients are such sums, too."""
    return _shifted(x, kernel, *moves)


def _depthwise_fwd(moves: Any, x: Any, kernel: Any) -> tuple[Any, tuple[Any, Any]]:
    return _shifted(x, kernel, *moves), (x, kernel)


def _depthwise_bwd(moves: Any, residuals: tuple[Any, Any], cotangent: Any) -> tuple[Any, Any]:
    strides, padding, dilation = moves
    x, kernel = residuals
    spatial = kernel.ndim - 2
    # to the input: the cotangent stretched by the strides, under the kernel turned around
    stretched = lax.pad(
        cotangent, jnp.zeros((), cotangent.dtype), [(0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)]
    )
    turned = []
    for size, n, k, d, (low, _) in zip(
        x.shape[1:-1], stretched.shape[1:-1], kernel.shape[:spatial], dilation, padding, strict=True
    ):
        reach = d * (k - 1)
        turned.append((reach - low, size + low - n))
    to_x = _shifted(stretched, jnp.flip(kernel, tuple(range(spatial))), (1,) * spatial, turned, dilation)
    to_x = to_x.reshape(*x.shape, -1).sum(-1) if to_x.shape[-1] != x.shape[-1] else to_x
    return to_x, _to_kernel(x, kernel, cotangent, moves)


def _to_kernel(x: Any, kernel: Any, cotangent: Any, moves: Any) -> Any:
    """Each tap's products summed over batch and space.

    XLA:CPU sums over all axes but the last slowly: the sum over images is a scan where its partial sums stay in cache,
    a few images at a time and in each a few blocks of rows, which are added before anything is written.
    """
    strides, padding, dilation = moves
    spatial, sizes = kernel.ndim - 2, kernel.shape[: kernel.ndim - 2]
    x = jnp.repeat(x, kernel.shape[-1] // x.shape[-1], axis=-1) if kernel.shape[-1] != x.shape[-1] else x
    x, out = _padded(x, padding), cotangent.shape[1:-1]
    taps = math.prod(sizes)
    if taps * math.prod(cotangent.shape[1:]) * cotangent.dtype.itemsize > _CACHE:
        axes = tuple(range(cotangent.ndim - 1))
        seen = (_window(x, at, out, strides, dilation) for at in _taps(sizes))
        return jnp.stack([jnp.sum(each * cotangent, axes) for each in seen]).reshape(kernel.shape)
    batch = x.shape[0] if isinstance(x.shape[0], int) else 1
    images, blocks = next(
        (
            (n, b)
            for n, b in _TOGETHER
            if n * b * taps <= _PRODUCTS and b * strides[0] <= 8 and not batch % n + out[0] % b
        ),
        (1, 1),
    )
    rows = out[0] // blocks

    def step(totals: Any, first: Any) -> tuple[Any, None]:
        # taken here by their number, so that the padded input is the very array of the way forward
        some, cotangents = (lax.dynamic_slice_in_dim(each, first, images) for each in (x, cotangent))
        parts = [(n, slice(b * rows, (b + 1) * rows)) for n in range(images) for b in range(blocks)]
        seen = (_window(some, at, out, strides, dilation) for at in _taps(sizes))
        sums = [functools.reduce(operator.add, [each[part] * cotangents[part] for part in parts]) for each in seen]
        return [total + more for total, more in zip(totals, sums, strict=True)], None

    start = [jnp.zeros((rows, *cotangent.shape[2:]), cotangent.dtype)] * taps
    totals, _ = lax.scan(step, start, jnp.arange(0, x.shape[0], images))
    return jnp.stack(totals).sum(tuple(range(1, spatial + 1))).reshape(kernel.shape)


_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)


def _taps(sizes: Any) -> Any:
    return itertools.product(*(range(size) for size in sizes))


def _window(x: Any, at: Any, out: Any, strides: Any, dilation: Any) -> Any:
    """What one tap sees of a padded input `[N, *space, C]`."""
    starts = [i * d for i, d in zip(at, dilation, strict=True)]
    ends = [a + (n - 1) * s + 1 for a, n, s in zip(starts, out, strides, strict=True)]
    return lax.slice(x, (0, *starts, 0), (x.shape[0], *ends, x.shape[-1]), (1, *strides, 1))


def _shifted(x: Any, kernel: Any, strides: Any, padding: Any, dilation: Any) -> Any:
    sizes = kernel.shape[: kernel.ndim - 2]
    repeats = kernel.shape[-1] // x.shape[-1]
    x = jnp.repeat(x, repeats, axis=-1) if repeats > 1 else x
    out, x = _outputs(x.shape[1:-1], sizes, strides, padding, dilation), _padded(x, padding)
    terms = [_window(x, at, out, strides, dilation) * kernel[(*at, 0)] for at in _taps(sizes)]
    return functools.reduce(operator.add, terms)
