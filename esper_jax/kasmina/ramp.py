"""Alpha ramps (contract 11): curves from a start to a target over a number of ticks."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CURVES = ("linear", "cosine", "sigmoid")
TEMPOS = (3, 5, 8)
_STEEPNESS = 12.0


def curve_code(curve: str) -> int:
    """The integer that `SeedState.ramp_curve` holds for a curve's name; raises ValueError for an unknown one."""
    if curve not in CURVES:
        raise ValueError(f"unknown alpha curve {curve!r}; choose one of {', '.join(CURVES)}")
    return CURVES.index(curve)


def shape(t: Float[Array, "..."], curve: Int[Array, "..."]) -> Float[Array, "..."]:
    """The curve's value in [0, 1] at `t` in [0, 1]; exactly 0 at 0 and exactly 1 at 1."""
    cosine = jnp.square(jnp.sin(0.5 * jnp.pi * t))
    low, high = _logistic(jnp.float32(0.0)), _logistic(jnp.float32(1.0))
    sigmoid = (_logistic(t) - low) / (high - low)
    value = jnp.select([curve == 0, curve == 1], [t, cosine], sigmoid)
    return jnp.where(t <= 0, 0.0, jnp.where(t >= 1, 1.0, jnp.clip(value, 0.0, 1.0)))


def alpha_at(
    start: Float[Array, "..."],
    target: Float[Array, "..."],
    steps: Int[Array, "..."],
    done: Int[Array, "..."],
    curve: Int[Array, "..."],
) -> Float[Array, "..."]:
    """Alpha after `done` of `steps` ticks: `start` at 0, exactly `target` at `steps`, monotone between."""
    t = done / jnp.maximum(steps, 1)
    moved = start + (target - start) * shape(t, curve)
    inside = jnp.clip(moved, jnp.minimum(start, target), jnp.maximum(start, target))
    return jnp.where(done >= steps, target, jnp.where(done <= 0, start, inside)).astype(jnp.float32)


def _logistic(t: Float[Array, "..."]) -> Float[Array, "..."]:
    return 1.0 / (1.0 + jnp.exp(-_STEEPNESS * (t - 0.5)))
