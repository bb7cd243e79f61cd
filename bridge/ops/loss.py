"""Losses that a model computes in its own forward."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .pointwise import absolute, clamp_min
from .reduce import pairwise_distance
from .registry import op

_REDUCE = {0: lambda x: x, 1: jnp.mean, 2: jnp.sum}


@op("mse_loss.default")
def mse_loss(self: Any, target: Any, reduction: int = 1) -> Any:
    return _REDUCE[reduction](jnp.square(self - target))


@op("l1_loss.default")
def l1_loss(self: Any, target: Any, reduction: int = 1) -> Any:
    return _REDUCE[reduction](absolute(self - target))


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
    counted, safe, weights = _counts(target, weight, ignore_index, log_p.dtype)
    found = -jnp.squeeze(jnp.take_along_axis(log_p, jnp.expand_dims(safe, axis), axis), axis)
    return _averaged(jnp.where(counted, found * weights, 0), weights, reduction)


def _counts(target: Any, weight: Any, ignore_index: int, dtype: Any) -> tuple[Any, Any, Any]:
    """Which targets count, the targets with 0 for those that do not, and what each counts for."""
    counted = target != ignore_index
    safe = jnp.where(counted, target, 0)
    return counted, safe, jnp.where(counted, 1.0 if weight is None else weight[safe], 0.0).astype(dtype)


def _averaged(found: Any, weights: Any, reduction: int) -> Any:
    """Reduced; a mean is over what the targets count for."""
    return jnp.sum(found) / jnp.sum(weights) if reduction == 1 else _REDUCE[reduction](found)


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
    classes = self.shape[axis]
    weighted = log_p if weight is None else log_p * weight.reshape((-1,) + (1,) * (self.ndim - 1 - axis))
    if jnp.issubdtype(target.dtype, jnp.floating):
        target = target * (1 - label_smoothing) + label_smoothing / classes
        return _REDUCE[reduction](-jnp.sum(target * weighted, axis=axis))
    plain = _nll(log_p, target, weight, reduction, ignore_index)
    if not label_smoothing:
        return plain
    counted, _, weights = _counts(target, weight, ignore_index, log_p.dtype)
    spread = _averaged(jnp.where(counted, -jnp.mean(weighted, axis=axis), 0), weights, reduction)
    return (1 - label_smoothing) * plain + label_smoothing * spread


@op("kl_div.default")
def kl_div(self: Any, target: Any, reduction: int = 1, log_target: bool = False) -> Any:
    if log_target:
        return _REDUCE[reduction](jnp.exp(target) * (target - self))
    safe = jnp.where(target > 0, target, 1)
    return _REDUCE[reduction](jnp.where(target > 0, target * (jnp.log(safe) - self), 0))


@op("binary_cross_entropy.default")
def binary_cross_entropy(self: Any, target: Any, weight: Any = None, reduction: int = 1) -> Any:
    found = _entropy(*jnp.broadcast_arrays(self, target))
    return _REDUCE[reduction](found if weight is None else found * weight)


@jax.custom_jvp
def _entropy(p: Any, target: Any) -> Any:
    return -(target * _log(p) + (1 - target) * _log(1 - p))


def _log(p: Any) -> Any:
    return jnp.maximum(jnp.log(p), -100)


@_entropy.defjvp
def _entropy_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Finite where a probability is 0 or 1, as torch has it."""
    (p, target), (dp, dtarget) = primals, tangents
    slope = (p - target) / jnp.maximum((1 - p) * p, 1e-12)
    return _entropy(p, target), slope * dp + (_log(1 - p) - _log(p)) * dtarget


@op("poisson_nll_loss.default")
def poisson_nll_loss(input: Any, target: Any, log_input: bool, full: bool, eps: float, reduction: int) -> Any:
    found = jnp.exp(input) - target * input if log_input else input - target * jnp.log(input + eps)
    if full:  # Stirling's approximation of log(target!)
        large = jnp.where(target > 1, target, 1).astype(found.dtype)
        factorial = large * jnp.log(large) - large + 0.5 * jnp.log(2 * math.pi * large)
        found = found + jnp.where(target > 1, factorial, 0)
    return _REDUCE[reduction](found)


@op("margin_ranking_loss.default")
def margin_ranking_loss(input1: Any, input2: Any, target: Any, margin: float = 0.0, reduction: int = 1) -> Any:
    return _REDUCE[reduction](clamp_min(-target * (input1 - input2) + margin, 0))


@op("hinge_embedding_loss.default")
def hinge_embedding_loss(self: Any, target: Any, margin: float = 1.0, reduction: int = 1) -> Any:
    apart = jnp.where(target != 1, clamp_min(margin - self, 0), 0)
    return _REDUCE[reduction](apart + jnp.where(target != -1, self, 0))


@op("cosine_embedding_loss.default")
def cosine_embedding_loss(input1: Any, input2: Any, target: Any, margin: float = 0.0, reduction: int = 1) -> Any:
    axis = target.ndim
    squares = (jnp.sum(x * x, axis) + 1e-12 for x in (input1, input2))
    cosine = jnp.sum(input1 * input2, axis) / jnp.sqrt(math.prod(squares))
    apart = jnp.where(target == -1, clamp_min(cosine - margin, 0), 0)
    return _REDUCE[reduction](jnp.where(target == 1, 1 - cosine, 0) + apart)


@op("triplet_margin_loss.default")
def triplet_margin_loss(
    anchor: Any,
    positive: Any,
    negative: Any,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: int = 1,
) -> Any:
    near, far = (pairwise_distance(anchor, x, p, eps) for x in (positive, negative))
    if swap:
        far = jnp.minimum(far, pairwise_distance(positive, negative, p, eps))
    return _REDUCE[reduction](clamp_min(margin + near - far, 0))


@op("soft_margin_loss.default")
def soft_margin_loss(self: Any, target: Any, reduction: int = 1) -> Any:
    return _REDUCE[reduction](jax.nn.softplus(-target * self))


@op("multi_margin_loss.default")
def multi_margin_loss(
    self: Any, target: Any, p: Any = 1, margin: Any = 1, weight: Any = None, reduction: int = 1
) -> Any:
    places = target.reshape(self.shape[:-1])[..., None]
    over = margin - jnp.take_along_axis(self, places, axis=-1) + self
    above = (over > 0) & (jnp.arange(self.shape[-1]) != places)
    found = jnp.where(above, jnp.where(above, over, 1) ** p, 0)
    return _REDUCE[reduction](jnp.mean(found if weight is None else found * weight[places], axis=-1))


@op("multilabel_margin_loss.default")
def multilabel_margin_loss(self: Any, target: Any, reduction: int = 1) -> Any:
    """Targets are the classes before the first -1."""
    classes = self.shape[-1]
    listed = jnp.cumsum(target < 0, axis=-1) == 0
    labels = jnp.where(listed, target, 0)
    wanted = jnp.any((labels[..., None] == jnp.arange(classes)) & listed[..., None], axis=-2)
    over = 1 - jnp.take_along_axis(self, labels, axis=-1)[..., None] + self[..., None, :]
    counted = listed[..., None] & ~wanted[..., None, :] & (over > 0)
    return _REDUCE[reduction](jnp.sum(jnp.where(counted, over, 0), axis=(-2, -1)) / classes)


_NEVER = -1e30  # the logarithm of 0 in sums that are differentiated


@op("esper_jax.ctc_loss.default")
def ctc_loss(
    log_probs: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    blank: int,
    reduction: str,
    zero_infinity: bool,
) -> Any:
    """Connectionist temporal classification (Graves et al. 2006); `log_probs` [T, N, C] or [T, C], targets in any form.

    The gradient is torch's, which takes the probabilities to sum to 1.
    """
    batched = log_probs.ndim == 3
    dtype, log_probs = log_probs.dtype, log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32))
    input_lengths, target_lengths = (n.astype(jnp.int32) for n in (input_lengths, target_lengths))
    if not batched:
        log_probs, targets = log_probs[:, None], targets.reshape(1, -1)
        input_lengths, target_lengths = input_lengths.reshape(1), target_lengths.reshape(1)
    if not targets.shape[-1]:
        targets = jnp.full((*targets.shape[:-1], 1), blank, targets.dtype)
    if targets.ndim == 1:  # one after another; what is longer than the input does not fit
        starts = jnp.cumsum(target_lengths) - target_lengths
        places = starts[:, None] + jnp.arange(min(targets.shape[0], log_probs.shape[0]))
        targets = jnp.take(targets, places, mode="clip")
    found = -_alignments(log_probs, targets, input_lengths, target_lengths, blank)
    there = jnp.arange(log_probs.shape[0])[:, None] < input_lengths
    total = jnp.sum(jnp.where(there[..., None], jnp.exp(log_probs), 0), (0, 2))
    found = jnp.where(found > -_NEVER / 2, jnp.inf, found + (total - lax.stop_gradient(total)))
    if zero_infinity:
        found = jnp.where(jnp.isinf(found), 0, found)
    if reduction == "mean":
        return jnp.mean(found / jnp.maximum(target_lengths, 1)).astype(dtype)
    return (jnp.sum(found) if reduction == "sum" else found if batched else found[0]).astype(dtype)


def _alignments(log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, blank: int) -> Any:
    """The logarithm of the summed probabilities of all alignments of each target: [N]."""
    rows, length = targets.shape
    targets = jnp.where(jnp.arange(length) < target_lengths[:, None], targets, blank)  # padding may be any number
    labels = jnp.full((rows, 2 * length + 1), blank, targets.dtype).at[:, 1::2].set(targets)
    emitted = jnp.maximum(jnp.take_along_axis(log_probs, labels[None], axis=2), _NEVER)
    skips = jnp.zeros(labels.shape, bool).at[:, 3::2].set(targets[:, 1:] != targets[:, :-1])

    def before(sums: Any, by: int) -> Any:
        return jnp.pad(sums, ((0, 0), (by, 0)), constant_values=_NEVER)[:, : labels.shape[1]]

    def step(sums: Any, now: Any) -> tuple[Any, None]:
        t, here = now
        ways = jnp.stack([sums, before(sums, 1), jnp.where(skips, before(sums, 2), _NEVER)])
        after = jnp.maximum(jax.nn.logsumexp(ways, axis=0) + here, _NEVER)
        return jnp.where((t < input_lengths)[:, None], after, sums), None

    begun = jnp.arange(labels.shape[1]) == 0
    sums = jnp.broadcast_to(jnp.where(begun, 0.0, _NEVER).astype(log_probs.dtype), labels.shape)
    sums, _ = lax.scan(step, sums, (jnp.arange(log_probs.shape[0]), emitted))
    ends = 2 * target_lengths[:, None] - jnp.arange(2)
    last = jnp.take_along_axis(sums, jnp.clip(ends, 0, 2 * length), axis=1)
    return jax.nn.logsumexp(jnp.where((ends >= 0) & (ends <= 2 * length), last, _NEVER), axis=1)
