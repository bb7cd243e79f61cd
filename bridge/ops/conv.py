"""Convolutions. Inside, channels come last; torch's layout is at the border."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...kasmina.convolutions import conv_general_dilated, dimension_numbers
from .registry import Last, op


def pads(padding: Any, kernel: Any, dilation: Any) -> tuple[tuple[int, int], ...]:
    """Torch's padding as a pair for each axis; `same` has the odd one behind."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((n // 2, n - n // 2) for n in totals)
    return tuple((p, p) for p in each(padding, len(kernel)))


def transposed_pads(padding: Any, output_padding: Any, kernel: Any, dilation: Any) -> tuple[tuple[int, int], ...]:
    """The padding of the stretched input that gives torch's transposed convolution."""
    n = len(kernel)
    parts = zip(each(padding, n), each(output_padding, n), kernel, dilation, strict=True)
    return tuple((d * (k - 1) - p, d * (k - 1) - p + more) for p, more, k, d in parts)


def each(value: Any, n: int) -> tuple[int, ...]:
    value = tuple(value) if isinstance(value, tuple | list) else (value,)
    return value * n if len(value) == 1 else value


def to_last(x: Any, spatial: int) -> Any:
    """`[N, C, *spatial]` (or without N) with its channels last."""
    return jnp.moveaxis(x, x.ndim - spatial - 1, -1)


def from_last(x: Any, spatial: int) -> Any:
    """Back to torch's layout."""
    return jnp.moveaxis(x, -1, x.ndim - spatial - 1)


@op(
    "conv1d.default",
    "conv1d.padding",
    "conv2d.default",
    "conv2d.padding",
    "conv3d.default",
    "conv3d.padding",
    channels=True,
)
def conv(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    last: bool = False,
) -> Any:
    spatial = weight.ndim - 2
    kernel = jnp.transpose(weight, (*range(2, weight.ndim), 1, 0))
    batched = input.ndim == spatial + 2
    x = input if last else to_last(input, spatial)
    x = x if batched else x[None]
    dilation = each(dilation, spatial)
    result = conv_general_dilated(
        x,
        kernel,
        each(stride, spatial),
        pads(padding, weight.shape[2:], dilation),
        None,
        dilation,
        dimension_numbers(spatial),
        groups,
    )
    result = result if bias is None else result + bias
    return Last(result) if batched else from_last(result[0], spatial)


@op("convolution.default")
def convolution(
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    if transposed:
        return conv_transpose(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(input, weight, bias, stride, padding, dilation, groups)


@op("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input", channels=True)
def conv_transpose(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    last: bool = False,
) -> Any:
    spatial = weight.ndim - 2
    inputs, each_out = weight.shape[0], weight.shape[1]
    # [in, out / groups, *k] to [*k, in / groups, out], flipped: the transpose of the forward convolution
    kernel = weight.reshape(groups, inputs // groups, each_out, *weight.shape[2:])
    kernel = jnp.moveaxis(kernel, (1, 0, 2), (-3, -2, -1)).reshape(*weight.shape[2:], inputs // groups, -1)
    kernel = jnp.flip(kernel, tuple(range(spatial)))
    batched = input.ndim == spatial + 2
    x = input if last else to_last(input, spatial)
    x = x if batched else x[None]
    dilation = each(dilation, spatial)
    result = lax.conv_general_dilated(
        x,
        kernel,
        (1,) * spatial,
        transposed_pads(padding, output_padding, weight.shape[2:], dilation),
        each(stride, spatial),
        dilation,
        dimension_numbers(spatial),
        groups,
    )
    result = result if bias is None else result + bias
    return Last(result) if batched else from_last(result[0], spatial)


@op("im2col.default")
def im2col(self: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    """`F.unfold`: patches `[N, C * taps, places]`."""
    batched = self.ndim == 4
    x = self if batched else self[None]
    found = lax.conv_general_dilated_patches(
        x, each(kernel_size, 2), each(stride, 2), [(p, p) for p in each(padding, 2)], rhs_dilation=each(dilation, 2)
    )
    found = found.reshape(*found.shape[:2], -1)
    return found if batched else found[0]


@op("col2im.default")
def col2im(self: Any, output_size: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    """`F.fold`: the transpose of `im2col`."""
    batched = self.ndim == 3
    x = self if batched else self[None]
    channels = x.shape[1] // math.prod(each(kernel_size, 2))
    shape = jax.ShapeDtypeStruct((x.shape[0], channels, *output_size), x.dtype)
    transpose = jax.linear_transpose(lambda y: im2col(y, kernel_size, dilation, padding, stride), shape)
    (result,) = transpose(x)
    return result if batched else result[0]
