"""Running statistics that torch's export loses, or reads a number for, as operations that it keeps. Imports torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from .recognise import WRITTEN_OUT
from .torch_patches import instead

_instance_norm = torch.nn.functional.instance_norm
_FORWARD = {kind: kind.forward for kind in (_BatchNorm, SyncBatchNorm)}


def written_out_statistics() -> AbstractContextManager[None]:
    """Meanwhile a BatchNorm that averages over all batches, and instance norms, keep their statistics in the open."""
    forwards = [(kind, "forward", _averaging) for kind in _FORWARD]
    return instead(*forwards, (torch.nn.functional, "instance_norm", _instances))


def _averaging(norm: Any, input: Tensor) -> Tensor:
    """`momentum=None`: every batch has the same share; torch divides by the count of batches as a number."""
    tracked = norm.track_running_stats and norm.num_batches_tracked is not None
    if norm.momentum is not None or not norm.training or not tracked:
        return _FORWARD[SyncBatchNorm if isinstance(norm, SyncBatchNorm) else _BatchNorm](norm, input)
    norm._check_input_dim(input)
    result = torch.nn.functional.batch_norm(input, None, None, norm.weight, norm.bias, True, WRITTEN_OUT, norm.eps)
    norm.num_batches_tracked.add_(1)
    axes = [axis for axis in range(input.dim()) if axis != 1]
    share = 1 / norm.num_batches_tracked.to(norm.running_mean.dtype)
    _update(norm.running_mean, norm.running_var, input, axes, share)
    return result


def _instances(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The mean over a batch of what each of its instances has enters; the export keeps the output alone."""
    if running_mean is None or running_var is None or not use_input_stats:
        return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    result = _instance_norm(input, None, None, weight, bias, True, WRITTEN_OUT, eps)
    _update(running_mean, running_var, input, list(range(2, input.dim())), momentum)
    return result


def _update(running_mean: Tensor, running_var: Tensor, input: Tensor, axes: list[int], share: Any) -> None:
    """Statistics over axes, and their means over the batch where it is none of them, enter by their share."""
    with torch.no_grad():
        var, mean = torch.var_mean(input.detach().to(running_mean.dtype), axes, correction=1)
        for running, found in ((running_mean, mean), (running_var, var)):
            found = found if found.dim() == 1 else found.mean(0)
            running.copy_((1 - share) * running + share * found)
