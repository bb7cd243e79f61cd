"""Weights and imported models on disk: safetensors first, `.pt` without pickle's risks. No torch except for `.pt`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from .convert import numpy_of, to_state, to_variables
from .graph import BridgeError, Graph, dumps, loads
from .module import Imported, check_runs
from .recent import recall_variables, remember

GRAPH, WEIGHTS = "graph.json", "weights.safetensors"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net")
_OLDEST_TORCH = (2, 10)  # the first whose weights_only loading has no known way around it


def save_imported(model: Imported, variables: Mapping[str, Any], directory: Any) -> None:
    """Write a model's graph and variables into a directory (made if need be), under torch's own names."""
    where = pathlib.Path(directory)
    where.mkdir(parents=True, exist_ok=True)
    state = to_state(model.graph, variables)
    _safetensors("numpy").save_file({k: np.array(v, order="C") for k, v in state.items()}, str(where / WEIGHTS))
    (where / GRAPH).write_text(dumps(model.graph))


def load_imported(directory: Any) -> tuple[Imported, dict[str, Any]]:
    """The model and variables that `model.save(directory, variables)` wrote; torch is not needed.

    Raises:
      BridgeError: what is missing or damaged there, by file; and an operator without a form here (`register_op` first).
    """
    where = pathlib.Path(directory)
    for name in (GRAPH, WEIGHTS):
        if not (where / name).is_file():
            raise BridgeError(
                f"{where} holds no imported model: there is no {name}; model.save(directory, variables) writes one"
            )
    graph = loads((where / GRAPH).read_text(), str(where / GRAPH))
    check_runs(graph)
    remember(graph)
    return Imported(graph), to_variables(graph, _matched(graph, _read(where / WEIGHTS), where / WEIGHTS, {}))


def load_weights(
    variables: Mapping[str, Any], path: Any, model: Imported | None = None, *, strict: bool = True
) -> dict[str, Any]:
    """Variables with the weights of a file: a torch checkpoint of the same architecture.

    Args:
      variables: the model's variables; they are not changed.
      path: a `.safetensors` file, its `.index.json` for one in parts, or a `.pt`, `.pth` or `.bin` file, read by
        `torch.load(weights_only=True)` alone (torch 2.10 or newer): a file that needs pickle is refused.
      model: the model that `from_torch` or `load_imported` gave: it knows torch's names and layouts. Needed only where
        it was imported in another process.
      strict: refuse a file with missing or unexpected keys; else those missing keep their values.

    Returns:
      New variables, in the dtypes of the old ones' model.

    Raises:
      BridgeError: every missing, unexpected and misshapen key, or why the file cannot be read.
    """
    where = pathlib.Path(path)
    if not where.is_file():
        raise BridgeError(f"load_weights: there is no file {where}")
    graph = model.graph if model is not None else recall_variables(variables)
    if graph is None:
        raise BridgeError(
            "load_weights: no model with such variables was imported in this process; give model=, the one that "
            "from_torch() or load_imported() gave with them"
        )
    old = to_state(graph, variables)
    return to_variables(graph, _matched(graph, _read(where), where, old, strict))


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    if path.name.endswith(".index.json"):
        try:
            parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        except (KeyError, TypeError, ValueError) as error:
            raise BridgeError(f"{path} is no index of safetensors files: {error}") from error
        found: dict[str, np.ndarray] = {}
        for part in parts:
            if pathlib.PurePath(part).name != part:
                raise BridgeError(f"{path} names a file outside its directory: {part!r}")
            found.update(_read(path.parent / part))
        return found
    if path.suffix == ".safetensors":
        try:
            return dict(_safetensors("numpy").load_file(str(path)))
        except Exception as error:
            raise BridgeError(f"{path} cannot be read as safetensors: {type(error).__name__}: {error}") from error
    return _read_pickled(path)


def _safetensors(kind: str) -> Any:
    try:
        import importlib

        return importlib.import_module(f"safetensors.{kind}")
    except ImportError as error:
        raise BridgeError("reading and writing weights needs safetensors: pip install 'esper_jax[torch]'") from error


def _read_pickled(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise BridgeError(
            f"{path} is a file of torch's, which needs torch to read: pip install 'esper_jax[torch]'"
        ) from error
    version = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST_TORCH:
        raise BridgeError(
            f"{path}: files of pickles are read with torch 2.10 or newer only, this is {torch.__version__}"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise BridgeError(
            f"{path} holds more than tensors, and is refused (unpickling can run code): save its state_dict(), best as "
            f"safetensors. torch said: {' '.join(first)}"
        ) from error
    for name in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
            break
    if not isinstance(loaded, Mapping) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        found = ", ".join(map(str, list(loaded)[:6])) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise BridgeError(f"{path} holds no state_dict but {found}; give the file of one")
    return {str(name): numpy_of(value) for name, value in loaded.items()}


def _matched(
    graph: Graph, found: Mapping[str, np.ndarray], path: Any, old: Mapping[str, np.ndarray], strict: bool = True
) -> dict[str, np.ndarray]:
    """The file's arrays by the graph's names, tied ones by any of theirs; old values where it need have none."""
    found = dict(found)
    if found and all(name.startswith("module.") for name in found):  # from DataParallel
        found = {name.removeprefix("module."): value for name, value in found.items()}
    others: dict[str, list[str]] = {}
    for other, name in graph.aliases:
        others.setdefault(name, []).append(other)
    matched: dict[str, np.ndarray] = {}
    missing, misshapen = [], []
    for tensor in graph.tensors:
        names = [name for name in (tensor.name, *others.get(tensor.name, ())) if name in found]
        given = [found.pop(name) for name in names]
        if not given:
            if tensor.name in old and (not tensor.persistent or not strict):
                matched[tensor.name] = old[tensor.name]
            else:
                missing.append(tensor.name)
            continue
        if any(value.shape != tensor.shape for value in given):
            misshapen.append(f"{names[0]} {given[0].shape} instead of {tensor.shape}")
        if any(not np.array_equal(given[0], value) for value in given[1:]):
            misshapen.append(f"{' and '.join(names)}, which are one tensor here, differ")
        matched[tensor.name] = given[0]
    unexpected = sorted(found) if strict else []
    problems = [
        f"{len(items)} {what}: {', '.join(items[:12])}{', ...' if len(items) > 12 else ''}"
        for what, items in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if items
    ]
    if problems:
        raise BridgeError(f"{path} does not fit {graph.name}: {'; '.join(problems)}")
    return matched
