"""Losses that torch cannot export as they are, in forms that it can. Imports torch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .torch_patches import instead

_ctc_loss = functional.ctc_loss
_Adaptive = nn.AdaptiveLogSoftmaxWithLoss


def losses_for_export() -> AbstractContextManager[None]:
    """Meanwhile these losses look at no values, and CTC is one operator."""
    return instead(
        (functional, "ctc_loss", _ctc),
        (functional, "gaussian_nll_loss", _gaussian),
        (functional, "margin_ranking_loss", _margin_ranking),
        (functional, "hinge_embedding_loss", _hinge_embedding),
        (_Adaptive, "forward", _adaptive),
        (_Adaptive, "predict", _predict),
        (_Adaptive, "_get_full_log_prob", _full_log_prob),
    )


def _compute(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    reduction: str,
    zero_infinity: bool,
) -> Tensor:
    return _ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity).clone()


def _shaped(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    reduction: str,
    zero_infinity: bool,
) -> Tensor:
    each = reduction == "none" and log_probs.dim() == 3
    return log_probs.new_empty(log_probs.shape[1:2] if each else ())


_op: Any = torch.library.custom_op("esper_jax::ctc_loss", _compute, mutates_args=())
_op.register_fake(_shaped)


def _ctc(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[Any],
    target_lengths: Tensor | Sequence[Any],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    lengths = (
        given if isinstance(given, Tensor) else torch.stack([torch.as_tensor(n, device=targets.device) for n in given])
        for given in (input_lengths, target_lengths)
    )
    return _op(log_probs, targets, *lengths, blank, reduction, zero_infinity)  # type: ignore[no-any-return]


def _gaussian(
    input: Tensor, target: Tensor, var: Tensor | float, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """As torch has it, but for the error where an entry of `var` is negative; such an entry counts as `eps`."""
    if isinstance(var, float):
        var = var * torch.ones_like(input)
    if var.size() != input.size() and input.size()[:-1] == var.size():
        var = var.unsqueeze(-1)
    var = torch.where(var < eps, eps + (var - var.detach()), var)  # a gradient goes to what was lifted too
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return _reduced(loss, reduction)


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def _with_sums(theirs: Any, each: Any) -> Any:
    """A loss of which torch's export knows the mean alone; its other reductions are those of what `each` gives."""
    signature = inspect.signature(theirs)

    def ours(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        old, way = [given.arguments.pop(name) for name in ("size_average", "reduce")], given.arguments.pop("reduction")
        if old != [None, None]:
            way = nn._reduction.legacy_get_string(*old, emit_warning=False)
        return theirs(**given.arguments) if way == "mean" else _reduced(each(**given.arguments), way)

    return ours


def _margins(input1: Tensor, input2: Tensor, target: Tensor, margin: float) -> Tensor:
    return (-target * (input1 - input2) + margin).clamp_min(0)


def _hinges(input: Tensor, target: Tensor, margin: float) -> Tensor:
    apart = torch.where(target != 1, (margin - input).clamp_min(0), 0)
    return apart + torch.where(target != -1, input, 0)


_margin_ranking = _with_sums(functional.margin_ranking_loss, _margins)
_hinge_embedding = _with_sums(functional.hinge_embedding_loss, _hinges)


def _adaptive(softmax: Any, input_: Tensor, target_: Tensor) -> Any:
    """Every cluster for every row, where torch computes a cluster for the rows whose targets are in it."""
    one = target_.dim() == 0
    input, target = (input_[None], target_[None]) if one else (input_, target_)
    output = softmax.log_prob(input).gather(1, target.unsqueeze(1)).squeeze(1)
    return nn.modules.adaptive._ASMoutput(output.squeeze(0) if one else output, -output.mean())


def _full_log_prob(softmax: Any, input: Tensor, head_output: Tensor) -> Tensor:
    """In one array made of its parts, where torch writes them into an empty one, which fixes more sizes."""
    head = functional.log_softmax(head_output, dim=1)
    parts = [head[:, : softmax.shortlist_size]]
    for i, cluster in enumerate(softmax.tail):
        shared = head[:, softmax.shortlist_size + i].unsqueeze(1)
        parts.append(functional.log_softmax(cluster(input), dim=1) + shared)
    return torch.cat(parts, dim=1)


def _predict(softmax: Any, input: Tensor) -> Tensor:
    return torch.argmax(softmax.log_prob(input), dim=1)
