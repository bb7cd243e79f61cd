"""Values between torch's state and Flax's variables. Imports torch only to read or make tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .graph import BridgeError, Dtype, Graph
from .layout import from_flax, get, put
from .ops.registry import check_fits, dtype_of
from .plan import plan_of


def to_variables(graph: Graph, values: Mapping[str, Any]) -> dict[str, Any]:
    """Flax variables from numpy arrays by torch's names (all of them)."""
    variables: dict[str, Any] = {"params": {}}
    for tensor in graph.tensors:
        value = np.asarray(values[tensor.name])
        wanted = dtype_of(Dtype(tensor.dtype))
        check_fits(f"{graph.name}: {tensor.name}", value, wanted)
        for place in plan_of(graph).places[tensor.name]:
            put(variables.setdefault(place.collection, {}), place.path, jnp.asarray(place.to_flax(value), wanted))
    return variables


def to_state(graph: Graph, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Numpy arrays by torch's names from Flax variables."""
    found = {}
    for tensor in graph.tensors:
        places = plan_of(graph).places[tensor.name]
        try:
            leaves = [np.asarray(get(variables[place.collection], place.path)) for place in places]
        except KeyError as error:
            paths = ", ".join("/".join((place.collection, *place.path)) for place in places)
            raise BridgeError(f"{graph.name}: the variables lack {paths} (torch's {tensor.name})") from error
        shape = tensor.shape
        if leaves[0].shape != places[0].shape:
            shape = places[0].torch_shape(leaves[0].shape)  # a folded span has made the layer wider
        if shape is None or any(leaf.shape != leaves[0].shape for leaf in leaves):
            raise BridgeError(
                f"{graph.name}: {'/'.join(places[0].path)} has shape {leaves[0].shape}, expected {places[0].shape} "
                f"(torch's {tensor.name} {tensor.shape})"
            )
        found[tensor.name] = from_flax(places, shape, leaves, np)
    return found


def numpy_of(tensor: Any) -> np.ndarray:
    """A torch tensor as numpy, copied: torch writes in place; bfloat16 by way of its bits."""
    import torch

    tensor = tensor.detach().cpu().resolve_conj().contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.array(tensor.view(torch.int16).numpy()).view(jnp.bfloat16)
    return np.array(tensor.numpy())


def tensor_of(value: Any) -> Any:
    """A numpy or JAX array as a torch tensor; bfloat16 by way of its bits."""
    import torch

    array = np.array(value)  # a copy: torch would write into JAX's own memory
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
