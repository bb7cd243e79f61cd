"""The layouts of modules captured in this process, so that `to_torch(morph, module)` needs no more than the module."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from .graph import Graph

_KEPT = 512
_RECENT: OrderedDict[Any, Graph] = OrderedDict()


def signature(name: str, tensors: Any) -> Any:
    """What tells one architecture from another: its class, and names and shapes of its tensors."""
    return name, tuple(sorted((path, tuple(shape)) for path, shape in tensors))


def remember(graph: Graph) -> None:
    """Keep a graph (the last 512); graphs hold no parameters."""
    own = [(t.name, t.shape) for t in graph.tensors if not t.name.startswith("constants.")]
    _RECENT[signature(graph.name, own)] = graph
    while len(_RECENT) > _KEPT:
        _RECENT.popitem(last=False)


def recall(module: Any) -> Graph | None:
    """The graph of a module like this one, if one was captured here."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return _RECENT.get(signature(type(module).__name__, [(path, t.shape) for path, t in named.items()]))
