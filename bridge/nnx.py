"""An imported model as an nnx module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .graph import BridgeError
from .module import Imported


def to_nnx(model: Imported, variables: Mapping[str, Any], *, rngs: Any = None) -> Any:
    """An imported model as an nnx module that holds its variables.

    Its call is the model's (`module(x)`, or `module(x, train=True, mutable=["batch_stats", "buffers"])`), its
    parameters are `nnx.Param`s at torch's own paths, and `esper_jax.morph(module, example=x)` finds the same sites as
    in the Linen form. `to_torch` sends such a morph back.

    Args:
      model: from `from_torch` or `load_imported`.
      variables: what came with it, or was trained since.
      rngs: an `nnx.Rngs` with a `dropout` stream, where the model has dropout and is to be trained, or draws other
        random numbers.

    Returns:
      An `nnx.bridge.ToNNX`.

    Raises:
      BridgeError: `model` is no imported model, `variables` are not of the form that came with it, or a part has the
      name of a method of nnx modules.
    """
    from flax import nnx

    if not isinstance(model, Imported):
        raise BridgeError(f"to_nnx: model must be what from_torch() gave, got {type(model).__name__}")
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        raise BridgeError("to_nnx: variables must be those that came with the model, {'params': ..., ...}")
    module = nnx.bridge.ToNNX(model, rngs=rngs)
    for name, value in nnx.bridge.variables.linen_vars_to_nnx_attrs(dict(variables)).items():
        if hasattr(type(module), name):
            raise BridgeError(
                f"to_nnx: {model.graph.name} has a part named {name!r}, which nnx modules have a method of"
            )
        setattr(module, name, nnx.data(value))
    return module
