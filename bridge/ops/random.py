"""Dropout: the only random numbers that an imported model draws."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .registry import op


def keeps(draw: Any, rate: float, shape: tuple[int, ...]) -> Any:
    """What dropout keeps; `draw` gives a fresh key, or None where every unit is kept."""
    key = draw()
    return jnp.ones(shape, bool) if key is None else jax.random.bernoulli(key, 1 - rate, shape)


def dropped(x: Any, rate: float, draw: Any, shape: Any = None) -> Any:
    """`x` after dropout: kept units are divided by `1 - rate`."""
    if not rate:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    kept = keeps(draw, rate, x.shape if shape is None else shape)
    return jnp.where(kept, x / (1 - rate), 0)


@op("native_dropout.default", random=True)
def native_dropout(input: Any, p: float, train: Any, *, draw: Any = None) -> Any:
    if not train or not p:
        return input, jnp.ones(input.shape, bool)
    if p == 1:
        return jnp.zeros_like(input), jnp.zeros(input.shape, bool)
    kept = keeps(draw, p, input.shape)
    return jnp.where(kept, input / (1 - p), 0), kept


@op("dropout.default", random=True)
def dropout(input: Any, p: float, train: bool, *, draw: Any = None) -> Any:
    return native_dropout(input, p, train, draw=draw)[0]


@op("feature_dropout.default", random=True)
def feature_dropout(input: Any, p: float, train: bool, *, draw: Any = None) -> Any:
    """Whole channels are dropped."""
    shape = input.shape[:2] + (1,) * (input.ndim - 2)
    return dropped(input, p if train else 0, draw, shape)


@op("bernoulli.p", random=True)
def bernoulli(self: Any, p: float, generator: Any = None, *, draw: Any = None) -> Any:
    """The mask that dropout of whole channels draws; with every unit kept it is one."""
    return keeps(draw, 1 - p, self.shape).astype(self.dtype)


@op("alpha_dropout.default", random=True)
def alpha_dropout(input: Any, p: float, train: bool, *, draw: Any = None) -> Any:
    """Self-normalising dropout (Klambauer et al. 2017)."""
    if not train or not p:
        return input
    alpha = -1.7580993408473766
    a = ((1 - p) * (1 + p * alpha**2)) ** -0.5
    kept = keeps(draw, p, input.shape)
    return jnp.where(kept, input, alpha) * a - a * alpha * p
