"""Losses that a model computes in its own forward."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .registry import op

_REDUCE = {0: lambda x: x, 1: jnp.mean, 2: jnp.sum}


@op("mse_loss.default")
def mse_loss(self: Any, target: Any, reduction: int = 1) -> Any:
    return _REDUCE[reduction](jnp.square(self - target))


@op("l1_loss.default")
def l1_loss(self: Any, target: Any, reduction: int = 1) -> Any:
    return _REDUCE[reduction](jnp.abs(self - target))


@op("smooth_l1_loss.default")
def smooth_l1_loss(self: Any, target: Any, reduction: int = 1, beta: float = 1.0) -> Any:
    away = jnp.abs(self - target)
    return _REDUCE[reduction](jnp.where(away < beta, 0.5 * away**2 / beta, away - 0.5 * beta))


@op("huber_loss.default")
def huber_loss(self: Any, target: Any, reduction: int = 1, delta: float = 1.0) -> Any:
    away = jnp.abs(self - target)
    return _REDUCE[reduction](jnp.where(away < delta, 0.5 * away**2, delta * (away - 0.5 * delta)))


@op("binary_cross_entropy_with_logits.default")
def bce_with_logits(self: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = 1) -> Any:
    positive = jax.nn.log_sigmoid(self) * (1 if pos_weight is None else pos_weight)
    found = -(target * positive + (1 - target) * jax.nn.log_sigmoid(-self))
    return _REDUCE[reduction](found if weight is None else found * weight)


@op("nll_loss.default", "nll_loss_nd.default")
def nll_loss(self: Any, target: Any, weight: Any = None, reduction: int = 1, ignore_index: int = -100) -> Any:
    return _nll(self, target, weight, reduction, ignore_index)


def _nll(log_p: Any, target: Any, weight: Any, reduction: int, ignore_index: int) -> Any:
    axis = 0 if log_p.ndim == 1 else 1
    counted = target != ignore_index
    safe = jnp.where(counted, target, 0)
    found = -jnp.squeeze(jnp.take_along_axis(log_p, jnp.expand_dims(safe, axis), axis), axis)
    weights = jnp.where(counted, 1.0 if weight is None else weight[safe], 0.0).astype(log_p.dtype)
    found = found * weights
    if reduction == 1:
        return jnp.sum(found) / jnp.sum(weights)
    return _REDUCE[reduction](found)


@op("cross_entropy_loss.default")
def cross_entropy_loss(
    self: Any,
    target: Any,
    weight: Any = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    axis = 0 if self.ndim == 1 else 1
    log_p = jax.nn.log_softmax(self, axis=axis)
    if jnp.issubdtype(target.dtype, jnp.floating):
        return (
            _REDUCE[reduction](-jnp.sum(target * log_p, axis=axis))
            if reduction != 1
            else (-jnp.sum(target * log_p) / (self.size // self.shape[axis]))
        )
    plain = _nll(log_p, target, weight, reduction, ignore_index)
    if not label_smoothing:
        return plain
    spread = _nll(
        jnp.broadcast_to(jnp.mean(log_p, axis, keepdims=True), log_p.shape), target, weight, reduction, ignore_index
    )
    return (1 - label_smoothing) * plain + label_smoothing * spread


@op("kl_div.default")
def kl_div(self: Any, target: Any, reduction: int = 1, log_target: bool = False) -> Any:
    if log_target:
        return _REDUCE[reduction](jnp.exp(target) * (target - self))
    safe = jnp.where(target > 0, target, 1)
    return _REDUCE[reduction](jnp.where(target > 0, target * (jnp.log(safe) - self), 0))
