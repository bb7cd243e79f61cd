"""Which of a graph's operations are Flax layers, which tensor each owns, and the programs rewritten to call them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from .graph import HIDING, Graph, Node, Program, Ref, Tensor
from .layout import Place, bare, module_path
from .recognise import AVERAGES, Call, Layer, recognise

LAYER = "layer"
_LAYER_CLASSES = {
    "Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Embedding",
    "LayerNorm", "GroupNorm", "RMSNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d",
    "InstanceNorm2d", "MultiheadAttention", "NonDynamicallyQuantizableLinear",
}  # fmt: skip


_FUNCTIONS = {"linear", "embedding", "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"} | {
    f"conv{form}{n}d" for form in ("", "_transpose") for n in (1, 2, 3)
}
_NO_SITES = {"EmbeddingBag", "Bilinear", "LSTM", "GRU", "RNN"}
_COPIES = {"aten._to_copy.default", "aten.copy.default", "aten.clone.default"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a graph is executed.

    Attributes:
      layers: by module path.
      places: the leaves of each torch tensor, by its name.
      programs: evaluation, and training if it was captured, with layers called.
      bare: the torch modules that hold parameters and are no site, with the reason.
      homes: the torch modules in whose forward each layer is called (several where they share its weights), for
        evaluation and for training.
      functions: of torch.nn.functional, that compute each layer.
      others: the layers whose weight that function reads for something else, too.
      forks: the values that a norm over rows reads, and something else too, as those of a residual stream.
    """

    layers: dict[tuple[str, ...], Layer]
    places: dict[str, tuple[Place, ...]]
    programs: tuple[Program, ...]
    bare: tuple[tuple[str, str], ...]
    homes: tuple[dict[tuple[str, ...], tuple[str, ...]], ...]
    functions: dict[tuple[str, ...], str]
    others: frozenset[tuple[str, ...]]
    forks: frozenset[str]

    def hooked(self, graph: Graph, site: str) -> tuple[list[str], list[str]]:
        """The modules whose forward is a site's layer and no more, and those that compute it and do more."""
        plain = {path for path, _, is_plain in graph.modules if is_plain}
        path = tuple(site.split("/"))
        homes = dict.fromkeys(home for program in self.homes for home in program.get(path, ()))
        return [home for home in homes if home in plain], [home for home in homes if home not in plain]

    def called(self, site: str) -> list[str]:
        """In which modes a site is computed at all."""
        return [m for m, homes in zip(("eval", "train"), self.homes, strict=False) if tuple(site.split("/")) in homes]

    def unreachable(self, graph: Graph, site: str) -> str:
        """Why a site's seeds have no place in torch, if so: it is computed beside other things by no known function."""
        hooks, inside = self.hooked(graph, site)
        path = tuple(site.split("/"))
        if not inside:
            return ""
        known = self.functions[path] in _FUNCTIONS and path not in self.others and HIDING not in inside[0]
        if known and not hooks and len(inside) == 1:
            return ""
        kind = {p: cls for p, cls, _ in graph.modules}.get(inside[0], "function")
        others = f" and by {', '.join([*inside[1:], *hooks])}" if hooks or inside[1:] else ""
        return f"it is computed inside {inside[0] or 'the model'} ({kind}), whose forward does more than that{others}"


@functools.lru_cache(maxsize=64)
def plan_of(graph: Graph) -> Plan:
    """The plan of a graph (once for equal graphs)."""
    tensors = {tensor.name: tensor for tensor in graph.tensors}
    chosen: dict[tuple[str, ...], Layer] = {}
    refused: dict[str, str] = {}
    calls: list[tuple[Node, Call]] = []
    for program in graph.programs():
        for node in program.nodes:
            found = recognise(node, tensors)
            if isinstance(found, Call):
                calls.append((node, found))
            elif isinstance(found, tuple):
                refused.setdefault(*found)
    averaging = {module_path(path) for path, reason in refused.items() if reason == AVERAGES}
    owned: dict[str, tuple[str, ...]] = {}
    for at_home in (True, False):
        for node, call in calls:
            layer = call.layer
            if (module_path(node.path) == layer.path) != at_home or layer.path in chosen or layer.path in averaging:
                continue
            names = {leaf[2] for leaf in layer.leaves}
            if any(owned.get(name, layer.path) != layer.path for name in names):
                continue
            chosen[layer.path] = layer
            owned.update(dict.fromkeys(names, layer.path))
    places = {tensor.name: (_bare_place(tensor),) for tensor in graph.tensors}
    for layer in chosen.values():
        found_places: dict[str, list[Place]] = {}
        for leaf, collection, name, part, parts, perm, shape, flip in layer.leaves:
            found_places.setdefault(name, []).append(
                Place(name, collection, (*layer.path, *leaf), shape, perm, part, parts, flip)
            )
        places.update({name: tuple(each) for name, each in found_places.items()})
    programs = tuple(_rewritten(program, tensors, chosen) for program in graph.programs())
    functions = {c.layer.path: _function(node.op) for node, c in calls if chosen.get(c.layer.path) == c.layer}
    reads = {(ref.name, _function(n.op)) for p in programs for n in p.nodes if n.op != LAYER for ref in n.refs()}
    others = {
        path
        for path, layer in chosen.items()
        if any((f"torch:{leaf[2]}", functions[path]) in reads for leaf in layer.leaves)
    }
    homes, bare = tuple(_homes(program) for program in programs), tuple(_bare_modules(graph, chosen, refused))
    forks = frozenset(name for program in programs for name in _forks(program, chosen))
    return Plan(chosen, places, programs, bare, homes, functions, frozenset(others), forks)


def _forks(program: Program, chosen: dict[tuple[str, ...], Layer]) -> Iterator[str]:
    readers: dict[str, list[str]] = {}
    for node in program.nodes:
        kind = chosen[tuple(node.args[0].split("/"))].kind if node.op == LAYER else _function(node.op)
        for ref in node.refs():
            readers.setdefault(ref.name, []).append(kind)
    for name, kinds in readers.items():
        if len(kinds) > 1 and any(kind in ("layer_norm", "rms_norm") for kind in kinds):
            yield name


def _homes(program: Program) -> dict[tuple[str, ...], tuple[str, ...]]:
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for node in program.nodes:
        if node.op == LAYER:
            found.setdefault(tuple(node.args[0].split("/")), {})[node.path] = None
    return {path: tuple(homes) for path, homes in found.items()}


def _function(op: str) -> str:
    """`layer_norm` of `aten.layer_norm.default`."""
    name = op.split(".")[-2] if "." in op else op
    return "batch_norm" if name.startswith("_native_batch_norm") else name


def _bare_place(tensor: Tensor) -> Place:
    return bare(tensor.name, tensor.shape, "params" if tensor.kind == "parameter" else "buffers")


def _bare_modules(graph: Graph, chosen: dict[Any, Layer], refused: dict[str, str]) -> Iterator[tuple[str, str]]:
    classes = {path: cls for path, cls, _ in graph.modules}
    owners: dict[str, list[str]] = {}
    for tensor in graph.tensors:
        owner, _, leaf = tensor.name.rpartition(".")
        if tensor.kind == "parameter":
            owners.setdefault(owner, []).append(leaf)
    for other, name in graph.aliases:
        owner, first = other.rpartition(".")[0], name.rpartition(".")[0]
        if module_path(owner) not in chosen and classes.get(owner) in _LAYER_CLASSES and owner != first:
            yield owner, f"{classes[owner]} whose {other.rpartition('.')[2]} is that of {first or 'the module'}"
    inside = tuple(layer.path for layer in chosen.values() if layer.kind == "attention")
    for owner, leaves in owners.items():
        path = module_path(owner)
        if path in chosen or any(path[: len(outer)] == outer for outer in inside):
            continue
        kind = classes.get(owner, "module")
        if owner in refused:
            reason = refused[owner]
        elif kind in _NO_SITES:
            reason = f"{kind}: Flax has no layer of this kind that can be a site"
        elif kind not in _LAYER_CLASSES:
            reason = f"{kind} with parameters " + ", ".join(leaves) + " of its own"
        elif not owner:
            reason = f"the module itself is the layer ({kind}); wrap it, e.g. in nn.Sequential, to make it a site"
        else:
            reason = f"{kind} that the forward never calls as one layer"
        yield owner or ".", reason


def _rewritten(program: Program, tensors: dict[str, Tensor], chosen: dict[Any, Layer]) -> Program:
    nodes: list[Node] = []
    taken: dict[str, Layer] = {}  # nodes whose outputs were several
    stale: set[str] = set()  # running statistics that a layer keeps itself
    renamed: dict[str, Any] = {}
    used = {(n.args[0].name, n.args[1]) for n in program.nodes if n.op == "getitem"}
    flattened = _flattened(program)
    for node in program.nodes:
        node = node._replace(args=_renamed(node.args, renamed), kwargs=_renamed(node.kwargs, renamed))
        if node.op == "getitem" and node.args[0].name in taken:
            if node.args[1] == 0:
                renamed[node.name] = node.args[0]
                continue
            if taken[node.args[0].name].kind == "batch_norm":
                stale.add(node.name)
                renamed[node.name] = Ref(f"stale:{node.name}")
                continue
            nodes.append(node._replace(args=(Ref(f"{node.args[0].name}:1"),), op="getitem0"))
            continue
        if node.op in _COPIES and isinstance(node.args[0], Ref) and node.args[0].name[:6] == "stale:":
            renamed[node.name] = node.args[0]  # cast to the buffer's dtype
            continue
        call = recognise(node, tensors)
        if not isinstance(call, Call) or chosen.get(call.layer.path) != call.layer:
            nodes.append(node)
            continue
        options, given = call.options, call.inputs
        if node.name in flattened:
            given = (_renamed(flattened[node.name], renamed),)
        if call.layer.kind == "attention":
            options = (*options, ("need_weights", (node.name, 1) in used))
        nodes.append(Node(node.name, LAYER, ("/".join(call.layer.path), *given), options, node.path))
        if call.outputs:
            taken[node.name] = call.layer
    updates = tuple(
        (name, _renamed(ref, renamed)) for name, ref in program.updates if _renamed(ref, renamed).name[:6] != "stale:"
    )
    return dataclasses.replace(program, nodes=tuple(nodes), outputs=_renamed(program.outputs, renamed), updates=updates)


def _flattened(program: Program) -> dict[str, Ref]:
    """Products over rows `[N * T, I]` that were `[N, T, I]` before and are so again after: what they were made of."""
    by_name = {node.name: node for node in program.nodes}
    readers: dict[str, list[Node]] = {}
    for node in program.nodes:
        for ref in node.refs():
            readers.setdefault(ref.name, []).append(node)
    kept = {ref.name for ref in program.outputs if isinstance(ref, Ref)}
    found = {}
    for node in program.nodes:
        if node.op != "aten.addmm.default" or not isinstance(node.args[1], Ref) or node.name in kept:
            continue
        source = by_name.get(node.args[1].name)
        views = readers.get(node.name, [])
        flat = source is not None and source.op == "aten.view.default" and len(source.args[1]) == 2
        whole = all(view.op == "aten.view.default" and len(view.args[1]) > 2 for view in views)
        if source is not None and flat and views and whole:
            found[node.name] = source.args[0]
    return found


def _renamed(value: Any, renamed: dict[str, Any]) -> Any:
    if isinstance(value, Ref):
        return renamed.get(value.name, value)
    if type(value) is tuple:
        return tuple(_renamed(item, renamed) for item in value)
    return value
