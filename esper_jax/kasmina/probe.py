"""What is measured at a site inside the train step: activations, units and the gain of growing there.

The measurements leave the program as the *gradient* of an unused zero vector, so they pass through any lifted
transform and cost nothing on the steps that are not sampled.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

ROWS = 256
UNITS = 64


class Probe(NamedTuple):
    """The entries of a probe vector, summed over the sampled calls; divide by `calls`.

    `variance`: mean over units of the activation variance. `dead`: share of units that never change over the rows
    (a unit whose values are all <= 0 counts as dead too where the layer feeds a rectifier: see `silent`).
    `silent`: share of units that are <= 0 on every row. `correlation`: mean absolute correlation between units.
    `gradient`: norm of the loss gradient at the layer's output. `gain`: squared Frobenius norm of (layer input or
    output)^T (output gradient), the first-order decrease of the loss per unit of learning rate that a new zero
    linear layer there would give.
    """

    calls: Any
    variance: Any
    dead: Any
    silent: Any
    correlation: Any
    gradient: Any
    gain: Any


SIZE = len(Probe._fields)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    u: Float[Array, "... I"],
    h: Float[Array, "... O"],
    stats: Float[Array, " P"],
    sample: Bool[Array, ""] | None,
    linear: tuple[Array, Array | None] | None,
) -> Float[Array, "... O"]:
    """`h` itself; where `sample`, the gradient of `stats` is the probe's vector for this call. None always measures.

    `shapes` are the features of the layer's input and output as the layer has them, before they became one axis.
    `linear` is a linear layer's kernel `[I, O]` and bias, None for other layers. By these `h` is found again from `u`
    where the step asks whether to measure, and need not be kept: under `nn.remat` keeping it would run the layer once
    more in every step.
    """
    return h


def _tap_fwd(shapes: Any, u: Array, h: Array, stats: Array, sample: Array | None, linear: Any) -> tuple[Array, Any]:
    return h, (u, h if linear is None or sample is None else None, sample, linear)


def _tap_bwd(shapes: Any, residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    u, h, sample, linear = residuals
    reads_input = u.shape[:-1] == cotangent.shape[:-1]
    # As rows, the form in which XLA gives them to the layer's own products: another would be one more array.
    source = _rows(u) if reads_input or linear is not None else None
    given = source, None if h is None else _rows(h), linear, _rows(cotangent)
    if sample is None:
        stats = _measure(*given) if linear is None else _measure(u, h, None, cotangent, shapes)
    else:
        stats = jax.lax.cond(sample, _measure, _nothing, *given)
    unread = jax.tree.map(_zero, (u, linear))
    unasked = None if sample is None else np.zeros(np.shape(sample), jax.dtypes.float0)
    return unread[0], cotangent, stats, unasked, unread[1]


tap.defvjp(_tap_fwd, _tap_bwd)


def _zero(x: Array) -> Any:
    return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0)


def _linear(u: Array | None, kernel: Array, bias: Array | None) -> Array:
    assert u is not None
    h = u @ kernel.astype(u.dtype)
    return h if bias is None else h + bias.astype(u.dtype)


def _nothing(*_: Any) -> Float[Array, " P"]:
    return jnp.zeros(SIZE, jnp.float32)


@jax.named_scope("measure")
def _measure(
    source: Array | None, h: Array | None, linear: Any, cotangent: Array, shapes: Any = ()
) -> Float[Array, " P"]:
    if h is None:
        h = _linear(source, *linear)
    source = h if source is None else source
    source, h, gradient = (x.astype(jnp.float32) for x in (source, h, cotangent))
    rows = _rows(h)
    variance = jnp.var(rows, axis=0)
    dead = jnp.mean(variance <= 1e-12)
    silent = jnp.mean(jnp.max(rows, axis=0) <= 0)
    return jnp.stack(
        Probe(
            calls=jnp.float32(1),
            variance=jnp.mean(variance),
            dead=dead,
            silent=silent,
            correlation=_correlation(rows),
            gradient=jnp.linalg.norm(gradient),
            gain=jnp.sum(jnp.square(_moment(source, gradient, shapes))),
        )
    )


def _moment(source: Float[Array, "... I"], gradient: Float[Array, "... O"], shapes: Any) -> Float[Array, "..."]:
    """`source^T gradient`; with `shapes` as JAX writes the gradient of a kernel, which XLA then computes only once."""
    over = tuple(range(gradient.ndim - 1))
    if not shapes:  # XLA's CPU backend contracts a matrix along its rows faster than along its columns
        return jax.lax.dot_general(jax.lax.optimization_barrier(gradient.T), source, (((1,), (0,)), ((), ())))
    source, gradient = (x.reshape(*x.shape[:-1], *own) for x, own in zip((source, gradient), shapes, strict=True))
    product = jax.lax.dot_general(gradient, source, ((over, over), ((), ())))
    return jnp.moveaxis(product, range(len(shapes[1])), range(-len(shapes[1]), 0))


def _rows(x: Array) -> Float[Array, "N F"]:
    return x.reshape(-1, x.shape[-1])


def _correlation(rows: Float[Array, "N F"]) -> Float[Array, ""]:
    """Mean absolute correlation between up to 64 evenly spaced units over up to 256 evenly spaced rows."""
    rows = rows[:: -(-rows.shape[0] // ROWS), :: -(-rows.shape[1] // UNITS)]
    units = rows.shape[1]
    if units < 2:
        return jnp.float32(0)
    centred = rows - rows.mean(axis=0)
    centred = centred / jnp.maximum(jnp.max(jnp.abs(centred)), 1e-30)  # so that no square overflows
    moments = centred.T @ centred
    norms = jnp.maximum(jnp.sqrt(jnp.diagonal(moments)), 1e-12)
    matrix = jnp.abs(moments) / (norms[:, None] * norms)
    return jnp.sum(jnp.where(jnp.eye(units, dtype=bool), 0, matrix)) / (units * (units - 1))
