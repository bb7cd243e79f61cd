"""`to_torch`: trained and grown models back in torch, under their original keys. Imports torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch

from ..kasmina import Morph
from ..kasmina.blueprints import get_blueprint
from ..kasmina.spec import Plant, Site
from ..kasmina.stages import LIVE, Stage
from ..kasmina.state import blends
from .capture import modules_of
from .convert import tensor_of, to_state
from .graph import BridgeError, Graph
from .layout import module_path
from .module import Imported
from .plan import plan_of
from .recent import recall
from .torch_seeds import FORMAT, TWINS, Seed, attach


def to_torch(morph: Any, module: Any, model: Imported | None = None) -> Any:
    """The torch module with the parameters, buffers and grown seeds of a morph (or of plain variables).

    Every key of the module's own `state_dict` stays as it was; a parameter that training has not touched comes back
    equal to the bit. Seeds that are part of the output (BLENDING, HOLDING, FOSSILIZED, alpha > 0) become children of
    their layers (`<layer>.esper_seeds.<slot>`) with a forward hook; others are left out. Fold first
    (`esper_jax.fold`) to send back a plain module.

    Args:
      morph: a `Morph` of the model that `from_torch` gave, or its variables; concrete arrays.
      module: the torch module that was imported, or a fresh one of its class; it is copied, not changed.
      model: the Flax model; needed only in a process that has not imported such a module.

    Returns:
      A copy of the module, in evaluation mode where `module` is.

    Raises:
      BridgeError: the layout is not known, the variables are of another model, or a seed has no twin in torch.
    """
    if not isinstance(module, torch.nn.Module):
        raise BridgeError(f"to_torch: module must be a torch.nn.Module, got {type(module).__name__}")
    graph = _graph(module, model)
    try:
        sent: torch.nn.Module = copy.deepcopy(module)
    except RuntimeError as error:
        raise BridgeError(
            f"to_torch: this {type(module).__name__} cannot be copied (torch.nn.utils.weight_norm keeps a computed "
            "weight; torch.nn.utils.parametrizations.weight_norm does not)"
        ) from error
    state = to_state(graph, _variables(morph))
    spec = _spec(morph, graph, state)
    seeds = attach(sent, spec)
    _load(sent, graph, state)
    for seed in seeds:
        _load_seed(seed, morph)
    return sent


def spec_of(morph: Any, model: Imported | Graph) -> dict[str, Any]:
    """What `regrow` needs beside the weights: the seeds that take part and any changed sizes; plain JSON."""
    graph = model.graph if isinstance(model, Imported) else model
    return _spec(morph, graph, to_state(graph, _variables(morph)))


def _spec(morph: Any, graph: Graph, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    sizes = {}
    for tensor in graph.tensors:
        if state[tensor.name].shape != tensor.shape:
            sizes[tensor.name] = list(state[tensor.name].shape)
    if not isinstance(morph, Morph):
        return {"format": FORMAT, "seeds": [], "sizes": sizes}
    seeds = [_entry(morph, graph, plant) for plant in morph.spec.plants if _takes_part(morph, plant)]
    left = [f"{p.site} slot {p.slot} ({Stage(_stage(morph, p)).name})" for p in morph.spec.plants if _waits(morph, p)]
    if left:
        warnings.warn(
            f"{len(left)} seed(s) are not part of the output yet and stay behind: {', '.join(left)}", stacklevel=3
        )
    return {"format": FORMAT, "seeds": seeds, "sizes": sizes}


def _graph(module: torch.nn.Module, model: Imported | None) -> Graph:
    graph = model.graph if model is not None else recall(module, modules_of(module))
    if graph is None:
        raise BridgeError(
            f"to_torch: no module like this {type(module).__name__} was imported in this process; give model=, "
            "the Flax "
            "model that from_torch() or load_imported() gave"
        )
    return graph


def _variables(morph: Any) -> Mapping[str, Any]:
    if isinstance(morph, Morph):
        return morph.variables
    if isinstance(morph, Mapping) and "params" in morph:
        return morph
    raise BridgeError(f"to_torch takes a Morph or a variables dict with 'params', got {type(morph).__name__}")


def _stage(morph: Morph, plant: Plant) -> int:
    stage = np.asarray(morph.state[plant.site].stage)
    return int(stage[..., plant.slot].reshape(-1)[0])


def _alpha(morph: Morph, plant: Plant) -> float:
    return float(np.asarray(morph.state[plant.site].alpha)[..., plant.slot].reshape(-1)[0])


def _takes_part(morph: Morph, plant: Plant) -> bool:
    return bool(blends(np.int32(_stage(morph, plant)))) and _alpha(morph, plant) > 0


def _waits(morph: Morph, plant: Plant) -> bool:
    return _stage(morph, plant) in LIVE and not _takes_part(morph, plant)


def _entry(morph: Morph, graph: Graph, plant: Plant) -> dict[str, Any]:
    site, place = morph.spec.by_path[plant.site], morph.spec.place(plant)
    if plant.blueprint not in TWINS:
        raise BridgeError(
            f"site {plant.site!r} slot {plant.slot}: blueprint {plant.blueprint!r} has no twin in torch (known: "
            f"{', '.join(sorted(TWINS))}); give one with esper_jax.bridge.register_twin(name, fn)"
        )
    shapes = {name: list(np.shape(leaf)) for name, leaf in _flat(morph.seeds[plant.site][plant.key]).items()}
    module, plan = _torch_path(graph, plant.site), plan_of(graph)
    hooks, inside = plan.hooked(graph, plant.site)
    return {
        "module": module,
        "function": plan.functions[tuple(plant.site.split("/"))],
        "hooks": hooks,
        "inside": inside,
        "called": plan.called(plant.site),
        "slot": plant.slot,
        "site": plant.site,
        "blueprint": plant.blueprint,
        "config": _plain(dict(plant.config)),
        "blend": plant.blend,
        "alpha": _alpha(morph, plant),
        "kind": site.kind,
        "reads": get_blueprint(plant.blueprint).reads,
        "form": _form(place),
        "shapes": shapes,
        "dtype": site.dtype,
        "source": _source(graph, plant.source) if plant.source else "",
    }


def _form(site: Site) -> dict[str, Any]:
    return {key: _plain(dict(v) if key in ("first", "second") else v) for key, v in site.geometry}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _torch_path(graph: Graph, site: str) -> str:
    paths = {"/".join(module_path(name)): name for name, _, _ in graph.modules}
    if site in paths:
        if reason := plan_of(graph).unreachable(graph, site):
            raise BridgeError(f"a seed at {site!r} cannot go back to torch: {reason}; fold it first")
        return paths[site]
    outer = site.rpartition("/")[0]
    if outer in paths and outer in {
        "/".join(p) for p, layer in plan_of(graph).layers.items() if layer.kind == "attention"
    }:
        raise BridgeError(
            f"a seed at {site!r} stands inside torch's MultiheadAttention, which calls no layer there: fold "
            "it, or grow at "
            f"{outer!r} (give morph() model= and example=, and the attention is one site)"
        )
    raise BridgeError(f"site {site!r} is no module of torch's {graph.name}")


def _source(graph: Graph, site: str) -> str:
    path, (_, inside) = _torch_path(graph, site), plan_of(graph).hooked(graph, site)
    if inside:
        raise BridgeError(
            f"a seed that reads what {site!r} reads cannot go back to torch: {inside[0] or 'the model'}, which "
            "computes that layer, does more; fold it first"
        )
    return path


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, leaf in tree.items():
        inside = "" if name == "seed" and not prefix else f"{prefix}{name}"
        if isinstance(leaf, Mapping):
            found.update(_flat(leaf, f"{inside}_" if inside else ""))
        else:
            found[inside or name] = leaf
    return found


def _load(module: torch.nn.Module, graph: Graph, state: Mapping[str, np.ndarray]) -> None:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for tensor in graph.tensors:
            if tensor.name in named:
                named[tensor.name].copy_(tensor_of(state[tensor.name]))


def _load_seed(seed: Seed, morph: Morph) -> None:
    plant = morph.spec.plant(seed.entry["site"], seed.entry["slot"])
    assert plant is not None
    leaves = _flat(morph.seeds[plant.site][plant.key])
    with torch.no_grad():
        for name, parameter in seed.named_parameters():
            parameter.copy_(tensor_of(jax.device_get(leaves[name])))
