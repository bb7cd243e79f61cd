"""The one convolution that seeds use: SAME padding, stride 1, channels last, any rank, fast where planted seeds run.

Planted seeds sit inside `lax.cond`. There XLA's CPU backend computes a convolution's weight gradient far more slowly
than outside, and grouped convolutions slowly everywhere. On the CPU the gradient is therefore written as one product
a kernel tap; other platforms get the plain convolution and its own gradient.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..convolutions import dimension_numbers

Pads = list[tuple[int, int]]


def convolve(
    x: Float[Array, "N *space I"], kernel: Float[Array, "*taps J O"], groups: int = 1
) -> Float[Array, "N *space O"]:
    """`x` convolved with `kernel`, of one size with `x` in space.

    Args:
      x: `[N, *space, I]` with 1 to 3 spatial dimensions.
      kernel: `[*taps, I / groups, O]`, of any size.
      groups: feature groups; `I` for a depthwise convolution.

    Returns:
      `[N, *space, O]` in the promoted dtype of the two.

    Raises:
      ValueError: at trace time, where ranks or features do not fit.
    """
    if x.ndim != kernel.ndim or not 3 <= x.ndim <= 5:
        raise ValueError(
            f"convolve() takes x [N, *space, I] and a kernel of one rank, 1 to 3; got {x.shape}, {kernel.shape}"
        )
    if x.shape[-1] != kernel.shape[-2] * groups or kernel.shape[-1] % groups:
        raise ValueError(f"{groups} group(s) of {x.shape[-1]} features do not fit a kernel of shape {kernel.shape}")
    dtype = jnp.result_type(x, kernel)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    return lax.platform_dependent(
        x, kernel, cpu=functools.partial(_by_taps, groups), default=functools.partial(plain, groups)
    )


def plain(groups: int, x: Array, kernel: Array) -> Array:
    """XLA's own convolution."""
    return _conv(x, kernel, _same(kernel), groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_taps(groups: int, x: Array, kernel: Array) -> Array:
    return _depthwise(x, kernel) if _is_depthwise(groups, x, kernel) else plain(groups, x, kernel)


def _by_taps_fwd(groups: int, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _by_taps(groups, x, kernel), (x, kernel)


def _by_taps_bwd(groups: int, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    turned, pads = _turned(kernel, groups), [(high, low) for low, high in _same(kernel)]
    if _is_depthwise(groups, x, kernel):
        to_x = _depthwise(cotangent, turned, pads)
    else:
        to_x = _conv(cotangent, turned, pads, groups)
    shifts = _shifts(x, kernel, _same(kernel))
    grouped = cotangent.reshape(*cotangent.shape[:-1], groups, -1)
    taps = [_moment(shift, grouped, groups) for shift in shifts]
    return to_x, jnp.stack(taps).reshape(kernel.shape)


_by_taps.defvjp(_by_taps_fwd, _by_taps_bwd)


def _moment(x: Array, grouped: Array, groups: int) -> Array:
    """One tap's weight gradient `[I / groups, O]`: the inputs against the cotangent, summed over batch and space."""
    inputs = x.reshape(*x.shape[:-1], groups, -1)
    if inputs.shape[-1] == 1 and grouped.shape[-1] == 1:
        product = jnp.sum(inputs * grouped, axis=tuple(range(inputs.ndim - 2)))
        return product.reshape(1, groups)
    product = jnp.einsum("...gi,...go->igo", inputs, grouped)
    return product.reshape(product.shape[0], -1)


def _is_depthwise(groups: int, x: Array, kernel: Array) -> bool:
    return groups > 1 and groups == x.shape[-1] == kernel.shape[-1]


def _depthwise(x: Array, kernel: Array, pads: Pads | None = None) -> Array:
    """One filter a feature, as a sum of shifted products."""
    taps = kernel.reshape(-1, kernel.shape[-1])
    shifts = _shifts(x, kernel, _same(kernel) if pads is None else pads)
    return sum((shift * tap for shift, tap in zip(shifts, taps, strict=True)), jnp.zeros((), x.dtype))


def _shifts(x: Array, kernel: Array, pads: Pads) -> list[Array]:
    """`x` as each kernel tap sees it, in the order of the taps."""
    space, size = x.shape[1:-1], kernel.shape[:-2]
    padded = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    starts = itertools.product(*(range(s) for s in size))
    return [
        lax.slice(padded, (0, *at, 0), (x.shape[0], *map(sum, zip(at, space, strict=True)), x.shape[-1]))
        for at in starts
    ]


def _turned(kernel: Array, groups: int) -> Array:
    """The kernel of the input gradient: flipped in space, inputs and outputs exchanged within each group."""
    flipped = jnp.flip(kernel, tuple(range(kernel.ndim - 2)))
    split = flipped.reshape(*flipped.shape[:-1], groups, -1)
    return split.swapaxes(-1, -3).reshape(*kernel.shape[:-2], split.shape[-1], -1)


def _same(kernel: Array) -> Pads:
    return [((size - 1) // 2, size - 1 - (size - 1) // 2) for size in kernel.shape[:-2]]


def _conv(x: Array, kernel: Array, pads: Pads, groups: int) -> Array:
    spatial = x.ndim - 2
    return lax.conv_general_dilated(
        x, kernel, (1,) * spatial, pads, dimension_numbers=dimension_numbers(spatial), feature_group_count=groups
    )


def like_layer(kind: str, form: Mapping[str, Any], x: Array, kernel: Array) -> Array:
    """`x` convolved as the layer itself does, with another kernel.

    Args:
      kind: "conv" or "conv_transpose".
      form: a traced site's geometry: strides, padding, dilations and groups.
      x: `[N, *space, I]`.
      kernel: `[*taps, I / groups, O]`.

    Raises:
      ValueError: at trace time, for a padding that it does not know.
    """
    dtype = jnp.result_type(x, kernel)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if kind == "conv_transpose":
        if form["padding"] in ("CIRCULAR", "REFLECT", "CAUSAL"):
            raise ValueError(f"a transposed convolution with padding {form['padding']} has no twin here")
        return lax.conv_transpose(x, kernel, form["strides"], form["padding"], rhs_dilation=form["kernel_dilation"])
    pads, mode = _padded(form)
    if mode is not None:
        x, pads = jnp.pad(x, [(0, 0), *pads, (0, 0)], mode=mode), [(0, 0)] * len(pads)
    elif isinstance(pads, str):
        pads = _explicit(pads, x, form)
    moves = tuple(pads), form["strides"], form["kernel_dilation"], form["input_dilation"], form["groups"]
    ours = functools.partial(_moved, moves) if set(form["input_dilation"]) == {1} else functools.partial(_plain, moves)
    return lax.platform_dependent(x, kernel, cpu=ours, default=functools.partial(_plain, moves))


def _padded(form: Mapping[str, Any]) -> tuple[Any, str | None]:
    """The padding as XLA takes it, and how `jnp.pad` does it beforehand where XLA cannot."""
    padding = form["padding"]
    reach = [d * (k - 1) for k, d in zip(form["kernel_size"], form["kernel_dilation"], strict=True)]
    if padding in ("CIRCULAR", "REFLECT"):
        return [(r // 2, r - r // 2) for r in reach], "wrap" if padding == "CIRCULAR" else "reflect"
    return ([(r, 0) for r in reach] if padding == "CAUSAL" else padding), None


def _explicit(padding: str, x: Array, form: Mapping[str, Any]) -> Pads:
    sizes = [d * (k - 1) + 1 for k, d in zip(form["kernel_size"], form["kernel_dilation"], strict=True)]
    space = [i * (n - 1) + 1 for n, i in zip(x.shape[1:-1], form["input_dilation"], strict=True)]
    found: Pads = lax.padtype_to_pads(space, sizes, form["strides"], padding)
    return found


def _plain(moves: Any, x: Array, kernel: Array) -> Array:
    pads, strides, dilation, spread, groups = moves
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        lhs_dilation=spread,
        rhs_dilation=dilation,
        dimension_numbers=dimension_numbers(x.ndim - 2),
        feature_group_count=groups,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _moved(moves: Any, x: Array, kernel: Array) -> Array:
    """`_plain`, with the weight gradient as one product a kernel tap."""
    return _plain(moves, x, kernel)


def _moved_fwd(moves: Any, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _plain(moves, x, kernel), (x, kernel)


def _moved_bwd(moves: Any, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    pads, strides, dilation, _, groups = moves
    x, kernel = residuals
    (to_x,) = jax.vjp(lambda x: _plain(moves, x, kernel), x)[1](cotangent)
    padded = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    grouped = cotangent.reshape(*cotangent.shape[:-1], groups, -1)
    taps = []
    for tap in itertools.product(*(range(size) for size in kernel.shape[:-2])):
        first = [t * d for t, d in zip(tap, dilation, strict=True)]
        last = [f + (n - 1) * s + 1 for f, n, s in zip(first, cotangent.shape[1:-1], strides, strict=True)]
        seen = lax.slice(padded, (0, *first, 0), (x.shape[0], *last, x.shape[-1]), (1, *strides, 1))
        taps.append(_moment(seen, grouped, groups))
    return to_x, jnp.stack(taps).reshape(kernel.shape)


_moved.defvjp(_moved_fwd, _moved_bwd)
