"""The layouts of models imported in this process, so that `to_torch` and `load_weights` need no more than is named."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import jax

from .graph import BridgeError, Graph
from .plan import plan_of

_KEPT = 512
_RECENT: OrderedDict[Any, tuple[Graph, ...]] = OrderedDict()


def signature(name: str, tensors: Any, modules: Any) -> Any:
    """What is alike in modules of one architecture: class, names and shapes of tensors, the modules that hold them."""
    holders = {path.rpartition(".")[0] for path, _ in tensors}
    kept = tuple(module for module in modules if module[0] in holders)
    return name, tuple(sorted((path, tuple(shape)) for path, shape in tensors)), kept


def remember(graph: Graph) -> None:
    """Keep a graph (the last 512); graphs hold no parameters."""
    own = [(t.name, t.shape) for t in graph.tensors if not t.name.startswith("constants.")]
    key = signature(graph.name, own, graph.modules)
    others = (other for other in _RECENT.pop(key, ()) if not _alike(graph, other))
    _RECENT[key] = (*others, graph)
    while len(_RECENT) > _KEPT:
        _RECENT.popitem(last=False)


def _alike(graph: Graph, other: Graph) -> bool:
    """Whether tensors lie at the same places and layers are called at the same, whatever else differs."""
    first, second = plan_of(graph), plan_of(other)
    fields = ("places", "homes", "functions", "others")
    return all(getattr(first, field) == getattr(second, field) for field in fields)


def recall(module: Any, modules: tuple[tuple[str, str, bool], ...]) -> Graph | None:
    """The graph of a torch module like this one, with these modules in it, if one was captured here.

    Raises:
      BridgeError: several were, which call their layers in different ways.
    """
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    key = signature(type(module).__name__, [(path, t.shape) for path, t in named.items()], modules)
    found = _RECENT.get(key, ())
    if len(found) > 1:
        raise BridgeError(
            f"{len(found)} modules like this {type(module).__name__} were imported that call their layers in different "
            "ways; give model=, the Flax model that from_torch() gave for this one"
        )
    return found[0] if found else None


def recall_variables(variables: Any) -> Graph | None:
    """The graph whose tensors lie where these variables have leaves of their shapes, if one was imported here."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    found = {(tuple(entry.key for entry in path), tuple(leaf.shape)) for path, leaf in leaves}
    for graph in (graph for graphs in reversed(_RECENT.values()) for graph in reversed(graphs)):
        places = [place for each in plan_of(graph).places.values() for place in each]
        if {((place.collection, *place.path), place.shape) for place in places} == found:
            return graph
    return None
