"""The forward rule at a slot: how a seed meets the host's output, exactly and without harm (contract 15 to 19).

Two `custom_vjp`s do it. `open_input` lets a gradient pass from the seed back to the host only once the seed is part
of the output. `join` returns the host's own value and its own cotangent until then, and the blend from then on.
Neither branches on the way forward; a seed that is not finite changes nothing in either direction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

BlendFn = Callable[[Array, Array, Array, Array], Array]


def _add(h: Array, f: Array, gate: Array, alpha: Array) -> Array:
    return h + alpha * f


def _lerp(h: Array, f: Array, gate: Array, alpha: Array) -> Array:
    return jnp.where(alpha == 1, f, h + alpha * (f - h))


def _multiply(h: Array, f: Array, gate: Array, alpha: Array) -> Array:
    return h * (1 + alpha * jnp.tanh(f))


def _gate(h: Array, f: Array, gate: Array, alpha: Array) -> Array:
    return h + alpha * gate * f


BLENDS: dict[str, BlendFn] = {"add": _add, "lerp": _lerp, "multiply": _multiply, "gate": _gate}

LEASH = 0.1
"""How large an isolated seed's output may grow, as a share of the host's (root mean square over the batch)."""
LEASHED = ("add", "gate")


def check_blend(blend: str) -> str:
    """`blend` itself if it is known; ValueError otherwise."""
    if not isinstance(blend, str) or blend not in BLENDS:
        raise ValueError(f"unknown blend {blend!r}; choose one of {', '.join(BLENDS)}")
    return blend


@jax.custom_vjp
def open_input(u: Float[Array, "..."], is_open: Bool[Array, ""]) -> Float[Array, "..."]:
    """`u` itself; its cotangent passes only where `is_open` and only if it is finite throughout."""
    return u


def _open_fwd(u: Array, is_open: Array) -> tuple[Array, Array]:
    return u, is_open


def _open_bwd(is_open: Array, cotangent: Array) -> tuple[Array, Any]:
    passes = is_open & jnp.all(jnp.isfinite(cotangent))
    return jax.lax.platform_dependent(passes, cotangent, cpu=_by_cond, default=_by_where), no_gradient(is_open)


def _by_cond(passes: Array, cotangent: Array) -> Array:
    """`cotangent` or 0, in memory of its own.

    The CPU compiler fuses a `where` here into the host's own sums and then writes one loop for each value of the
    seed's flags; those loops add in different orders, and the host's gradient moved by a rounding error.
    """
    return apart(passes, jax.lax.cond(passes, lambda c: c, jnp.zeros_like, cotangent), jnp.zeros_like(cotangent))


@jax.custom_jvp
def apart(flag: Bool[Array, ""], chosen: Float[Array, "..."], otherwise: Float[Array, "..."]) -> Float[Array, "..."]:
    """`chosen`, which is `otherwise` where the flag is not set, in memory of its own under `vmap` too.

    A batch of flags makes a select of a `cond`; one `cond` more, on whether any is set, keeps it out of the host's
    sums (and, with a rule for tangents of its own, out of the way of second derivatives).
    """
    return _apart(flag, chosen, otherwise)


@apart.defjvp
def _apart_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    return apart(*primals), tangents[1]


@jax.custom_batching.custom_vmap
def _apart(flag: Array, chosen: Array, otherwise: Array) -> Array:
    return chosen


@_apart.def_vmap
def _apart_in_a_batch(
    size: int, batched: list[bool], flag: Array, chosen: Array, otherwise: Array
) -> tuple[Array, bool]:
    given = zip(batched[1:], (chosen, otherwise), strict=True)
    rows = [x if has else jnp.broadcast_to(x, (size, *x.shape)) for has, x in given]
    any_set = jnp.any(flag)
    return _apart(any_set, jax.lax.cond(any_set, lambda c, o: c, lambda c, o: o, *rows), rows[1]), True


def _by_where(passes: Array, cotangent: Array) -> Array:
    return jax.lax.optimization_barrier(jnp.where(passes, cotangent, 0))


open_input.defvjp(_open_fwd, _open_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def join(
    blend: str,
    h: Float[Array, "..."],
    f: Float[Array, "..."],
    gate: Float[Array, "..."],
    alpha: Float[Array, ""],
    enters: Bool[Array, ""],
    computes: Bool[Array, ""],
    pulse: Float[Array, ""],
) -> Float[Array, "..."]:
    """The output of a slot.

    Args:
      blend: one of `BLENDS`.
      h: the host's output (after the slots before this one).
      f: the seed's output, of `h`'s shape and dtype.
      gate: the learnt gate of "gate", broadcastable to `h`; ignored by the other blends.
      alpha: scheduled, never learnt: its own gradient is 0.
      enters: whether the seed is in BLENDING, HOLDING or FOSSILIZED; it enters only where also alpha > 0.
      computes: whether the seed is in TRAINING or later; until it enters, its gradient is that of alpha = 1.
      pulse: an unused zero whose *gradient* is 1.0 when the seed faulted, so that a step learns of it from any depth
        of `nn.remat` or `nn.scan`.
    """
    return _join_fwd(blend, h, f, gate, alpha, enters, computes, pulse)[0]


def _join_fwd(
    blend: str, h: Array, f: Array, gate: Array, alpha: Array, enters: Array, computes: Array, pulse: Array
) -> tuple[Array, tuple[Array, ...]]:
    y, entered, sound = blended(blend, h, f, gate, alpha, enters)
    fault = (computes & ~sound).astype(jnp.float32)
    return y, (h, f, gate, alpha, entered, computes & sound, fault, enters)


def _join_bwd(blend: str, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Any, ...]:
    h, f, gate, alpha, entered, learns, fault, flag = residuals
    weight = sum_of_squares(h) if blend in LEASHED else jnp.zeros(())
    to_host, to_seed, to_gate = parted(blend, h, weight, f, gate, alpha, entered, learns, cotangent)
    alpha_gradient = jnp.zeros((), jnp.float32)
    return to_host, to_seed, to_gate, alpha_gradient, no_gradient(flag), no_gradient(flag), fault


join.defvjp(_join_fwd, _join_bwd)


def blended(
    blend: str, h: Array, f: Array, gate: Array, alpha: Array, enters: Array
) -> tuple[Array, Bool[Array, ""], Bool[Array, ""]]:
    """The forward half of `join`: the output, whether the seed entered it, and whether it was finite."""
    mixed = BLENDS[blend](h, f, gate, alpha.astype(h.dtype))
    sound = jnp.all(jnp.isfinite(f) & (jnp.isfinite(mixed) | ~jnp.isfinite(h)))
    entered = enters & (alpha > 0) & sound
    return jnp.where(entered, mixed, h), entered, sound


def parted(
    blend: str,
    h: Array,
    weight: Array,
    f: Array,
    gate: Array,
    alpha: Array,
    entered: Array,
    learns: Array,
    cotangent: Array,
) -> tuple[Array, Array, Array]:
    """The backward half of `join`: the output's cotangent as the host's, the seed's and the gate's.

    `weight` is `sum_of_squares(h)`. `h` itself matters for "multiply" only; for the others its shape does.
    """
    effective = jnp.where(entered, alpha.astype(h.dtype), jnp.ones((), h.dtype))
    _, vjp = jax.vjp(lambda x, y, z: BLENDS[blend](x, y, z, effective), h, f, gate)
    to_host, to_seed, to_gate = vjp(cotangent)
    if blend in LEASHED:
        to_seed = jnp.where(entered, to_seed, _leash(to_seed, f, weight))
    passes = entered | learns
    return (
        jnp.where(entered, to_host, cotangent),
        jnp.where(passes, to_seed, 0),
        jnp.where(passes, to_gate, 0),
    )


def sum_of_squares(h: Array) -> Float[Array, ""]:
    """The sum of the squares of all entries, float32."""
    return jnp.sum(jnp.square(h.astype(jnp.float32)))


def _leash(cotangent: Array, f: Array, weight: Array) -> Array:
    """The cotangent of an isolated seed, without what would make an output that is large enough grow further.

    In isolation the gradient is that at the host's own output, whatever the seed has learnt: nothing tells it when it
    has gone far enough. So once |f| exceeds `LEASH` |h| (over the whole batch), the outward component is turned inward.
    """
    f32, g32 = f.astype(jnp.float32), cotangent.astype(jnp.float32)
    size = sum_of_squares(f)
    along = jnp.sum(g32 * f32)
    pulls_out = (size > LEASH**2 * weight) & (along < 0)
    held = g32 - 2 * along / jnp.maximum(size, 1e-30) * f32
    return jnp.where(pulls_out, held.astype(cotangent.dtype), cotangent)


def no_gradient(flag: Array) -> np.ndarray:
    """The cotangent of a flag."""
    return np.zeros(np.shape(flag), jax.dtypes.float0)
