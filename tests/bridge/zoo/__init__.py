"""Torch models as their users write them, with random weights; `MODELS` by name."""

from __future__ import annotations

from typing import Any

import torch

from . import convs, hands, hf, sequence
from .entry import Entry

MODELS: dict[str, Entry] = {**hands.MODELS, **convs.MODELS, **sequence.MODELS, **hf.MODELS}


def fresh(name: str, seed: int = 0) -> torch.nn.Module:
    """A model in which nothing is trivially zero or one: norms, biases and statistics are drawn anew."""
    torch.manual_seed(seed)
    return redrawn(MODELS[name].make())


def redrawn(module: torch.nn.Module) -> torch.nn.Module:
    """The module itself, its norms, biases and statistics drawn anew."""
    with torch.no_grad():
        for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
            leaf = path.rpartition(".")[2]
            if not tensor.is_floating_point():
                continue
            if leaf == "running_var":
                tensor.uniform_(0.5, 1.5)
            elif leaf == "running_mean" or leaf == "bias" or leaf.startswith("bias_"):
                tensor.normal_(0, 0.2)
            elif leaf == "weight" and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
    return module


def inputs(name: str, batch: int, seed: int = 1) -> Any:
    """A model's inputs: a tuple of positional ones, or a dict."""
    return MODELS[name].inputs(batch, torch.Generator().manual_seed(seed))
