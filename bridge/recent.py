"""The layouts of models imported in this process, so that `to_torch` and `load_weights` need no more than is named."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import jax

from .graph import Graph
from .plan import plan_of

_KEPT = 512
_RECENT: OrderedDict[Any, Graph] = OrderedDict()


def signature(name: str, tensors: Any, modules: Any) -> Any:
    """What tells one architecture from another: its class, names and shapes of its tensors, and its modules."""
    return name, tuple(sorted((path, tuple(shape)) for path, shape in tensors)), modules


def remember(graph: Graph) -> None:
    """Keep a graph (the last 512); graphs hold no parameters."""
    own = [(t.name, t.shape) for t in graph.tensors if not t.name.startswith("constants.")]
    _RECENT[signature(graph.name, own, graph.modules)] = graph
    while len(_RECENT) > _KEPT:
        _RECENT.popitem(last=False)


def recall(module: Any, modules: tuple[tuple[str, str, bool], ...]) -> Graph | None:
    """The graph of a torch module like this one, with these modules in it, if one was captured here."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return _RECENT.get(signature(type(module).__name__, [(path, t.shape) for path, t in named.items()], modules))


def recall_variables(variables: Any) -> Graph | None:
    """The graph whose tensors lie where these variables have leaves of their shapes, if one was imported here."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    found = {(tuple(entry.key for entry in path), tuple(leaf.shape)) for path, leaf in leaves}
    for graph in reversed(_RECENT.values()):
        places = [place for each in plan_of(graph).places.values() for place in each]
        if {((place.collection, *place.path), place.shape) for place in places} == found:
            return graph
    return None
