"""An imported (and grown) model as StableHLO with a free batch size, for runtimes without Python."""

from __future__ import annotations

from typing import Any

import jax
from jax import export

from .graph import BridgeError


def to_stablehlo(apply: Any, variables: Any, *example: Any, platforms: tuple[str, ...] = ("cpu",)) -> export.Exported:
    """A forward pass exported with a symbolic batch: `.serialize()` it, `.mlir_module()` shows it, `.call()` runs it.

    Args:
      apply: `model.apply`, or the function that `esper_jax.compact` gave for a grown model.
      variables: what it takes first; they become an argument of the exported function, not constants.
      example: the inputs; their first axis, where it is as long as the first input's, becomes the symbol `b`.
      platforms: where the program is to run.

    Raises:
      BridgeError: an operation needs the batch size as a number.
    """
    arrays = [leaf for leaf in jax.tree.leaves(example) if getattr(leaf, "ndim", 0)]
    if not arrays:
        raise BridgeError("to_stablehlo needs an example input with a batch axis")
    size = arrays[0].shape[0]
    (batch,) = export.symbolic_shape("b")

    def free(leaf: Any) -> Any:
        shape = leaf.shape
        lead = (batch,) if shape and shape[0] == size else shape[:1]
        return jax.ShapeDtypeStruct((*lead, *shape[1:]), leaf.dtype)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    try:
        return export.export(jax.jit(apply), platforms=platforms)(shapes, *jax.tree.map(free, example))
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise BridgeError(
            f"the model cannot be exported with a free batch size: {type(error).__name__}: {first}"
        ) from error
