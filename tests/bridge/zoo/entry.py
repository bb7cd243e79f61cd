"""One model of the zoo, and how its inputs are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Entry(NamedTuple):
    """How to make a model and its inputs; `slow` ones take more than a few seconds to capture; `rate` is SGD's."""

    make: Callable[[], torch.nn.Module]
    inputs: Callable[[int, torch.Generator], Any]
    slow: bool = False
    rate: float = 3e-3


def floats(*shape: int) -> Callable[[int, torch.Generator], Any]:
    """One array of standard normal values, batch first."""
    return lambda batch, g: (torch.randn(batch, *shape, generator=g),)


def ids(length: int, vocabulary: int) -> Callable[[int, torch.Generator], Any]:
    """One array of ids."""
    return lambda batch, g: (torch.randint(0, vocabulary, (batch, length), generator=g),)
