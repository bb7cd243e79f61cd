"""`from_torch`: a torch module in, a Flax model and its variables out. Imports torch."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch.utils import _pytree as pytree

from .capture import capture
from .comparison import Report, refuse, report_of
from .comparison import verify as compare
from .convert import numpy_of, tensor_of, to_variables
from .graph import BridgeError, Graph
from .module import Imported, check_runs
from .recent import remember

_ONE_AT_A_TIME = threading.RLock()
"""What torch's export, and the comparison, change of torch meanwhile is the whole process's."""


class Import(tuple[Imported, dict[str, Any]]):
    """`(model, variables)`, with the `report` of what was compared."""

    report: Report

    def __new__(cls, model: Imported, variables: dict[str, Any], report: Report) -> Import:
        """A pair that unpacks into model and variables."""
        made = super().__new__(cls, (model, variables))
        made.report = report
        return made

    @property
    def model(self) -> Imported:
        """The Flax model."""
        return self[0]

    @property
    def variables(self) -> dict[str, Any]:
        """Its variables: `params`, and where torch has buffers `batch_stats` and `buffers`."""
        return self[1]

    def __repr__(self) -> str:
        return f"Import({self.model!r}; {'verified' if self.report.checks else 'not verified'}; print(_.report))"


def from_torch(module: Any, example_inputs: Any, *, verify: bool = True, train: bool = True) -> Import:
    """A torch module as a Flax model whose parameters sit at torch's module paths and whose layers are sites.

    The module is captured in evaluation and in training mode with torch.export, from the example's shapes; the first
    axis of every input as long as the first input's is the batch, and free. Linear, Conv, ConvTranspose, Embedding,
    MultiheadAttention, LayerNorm, RMSNorm, GroupNorm and BatchNorm become Flax layers (`kernel` in Flax's layout,
    `bias`, `scale`, `embedding`; `batch_stats` with torch's momentum); everything else keeps torch's names and layout
    (`report.bare` says why it is no site). The model needs no torch to run:

        model, variables = esper_jax.from_torch(torch_model, torch.zeros(2, 3, 32, 32))
        morph = esper_jax.morph(variables, model=model, example=x)
        logits = model.apply(variables, x)
        collections = ["batch_stats", "buffers"]
        logits, updated = model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=collections)

    All random numbers, noise as well as dropout's, come from the `dropout` stream.

    Args:
      module: the torch module, on any device, float32 (or bfloat16, float16; float64 with x64). It is not changed.
      example_inputs: one tensor or array, a tuple of positional inputs, or a dict of named ones; at least one of the
        shapes that the model will see. Constants among them (None, booleans, numbers) stay fixed.
      verify: compare forward, gradients and buffers after a training step with torch, on the example and on a batch
        two larger, and refuse the import where they differ. For that dropout keeps every unit in both, and other random
        numbers are the same in both (`report.noise` names what draws them).
      train: whether the model can be called with `train=True`. Without, only evaluation is captured and its outputs
        compared: one capture, and a way in for modules whose forward cannot be captured in training mode.

    Returns:
      `(model, variables)`, a pair with the further attribute `report`.

    Raises:
      BridgeError: for what cannot become one pure program (control flow on values, `.item()`, lost custom gradients,
        unknown operators, ...), with module, cause and remedy; and where the comparison fails.
    """
    if not isinstance(module, torch.nn.Module):
        raise BridgeError(f"from_torch takes a torch.nn.Module, got {type(module).__name__}")
    args, kwargs = _inputs(example_inputs)
    with _ONE_AT_A_TIME:
        return _from_torch(module, args, kwargs, verify, train)


def _from_torch(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], verify: bool, train: bool
) -> Import:
    graph, constants = capture(module, args, kwargs, train=train)
    check_runs(graph)
    remember(graph)
    variables = to_variables(graph, values_of(graph, module, constants))
    model = Imported(graph)
    report = report_of(graph)
    if verify:
        report = compare(model, variables, module, args, kwargs)
        refuse(report)
    return Import(model, variables, report)


def values_of(graph: Graph, module: torch.nn.Module, constants: Mapping[str, Any]) -> dict[str, Any]:
    """All tensors of a graph as numpy, by torch's names."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers()), **constants}
    return {tensor.name: numpy_of(state[tensor.name]) for tensor in graph.tensors}


def _inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def tensor(leaf: Any) -> Any:
        return tensor_of(leaf) if isinstance(leaf, np.ndarray | jax.Array) else leaf

    example = pytree.tree_map(tensor, example)
    if isinstance(example, Mapping):
        return (), dict(example)
    args = example if isinstance(example, tuple) else tuple(example) if isinstance(example, list) else (example,)
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(args)):
        raise BridgeError("example_inputs hold no tensor: give a tensor, a tuple of inputs, or a dict of named inputs")
    return args, {}
