"""Data that cannot be trained on is named before it does harm: where it is, what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kasmina._pytree import is_key
from .step import unpack_batch


def check_arrays(name: str, arrays: Any, classes: int | None) -> None:
    """Check data that is given as arrays, once; what is on the device is looked at there.

    Args:
      name: "training" or "validation", for messages.
      arrays: the arrays, examples along their first axis.
      classes: how many classes targets may name; None leaves them alone.

    Raises:
      ValueError: NaN or infinity among floating values, a label out of range (floating ones too, unless they have one
      number for each class along their last axis; of two classes they may be -1 and 1), or a dtype that is no number.
    """
    if found := _fault(_named(arrays), classes):
        raise ValueError(f"the {name} data: {found}; mend the data, or give check_data=False")


def check_batch(
    name: str,
    batch: Any,
    classes: int | None,
    epoch: int,
    index: int,
    *,
    values: bool,
    like: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Check one batch of an iterable: as `check_arrays`, and that it is not empty, ragged or of other dtypes.

    Args:
      name: as for `check_arrays`.
      batch: what the iterable gave.
      classes: as for `check_arrays`.
      epoch: when it came, for messages.
      index: where in the epoch, for messages.
      values: look at the values too, where they are on the host.
      like: what earlier batches gave; arrays of other dtypes would have the train step compiled anew.

    Returns:
      The dtype of each array that was met so far, as JAX takes it.

    Raises:
      ValueError: naming the batch.
    """
    leaves = jax.tree.leaves(batch)
    sizes = {np.shape(leaf)[:1] for leaf in leaves}
    if not leaves or () in sizes:
        found = "it has no examples along a first axis"
    elif (0,) in sizes:
        found = "it is empty"
    elif len(sizes) > 1:
        found = "its arrays have different numbers of examples, " + ", ".join(str(np.shape(leaf)) for leaf in leaves)
    else:
        named = _named(batch)
        there = {key: leaf for key, leaf in named.items() if not isinstance(leaf, jax.Array)}
        found = _wrong_kind(named) or (_fault(there, classes) if values else "")
        if not found:
            dtypes, before = {key: _dtype(leaf) for key, leaf in named.items()}, dict(like or {})
            if all(before.get(key, dtype) == dtype for key, dtype in dtypes.items()):
                return before | dtypes
            found = f"its arrays are {_listed(dtypes)}, and those of earlier batches {_listed(before)}"
    where = f"batch {index} of epoch {epoch} of the {name} data"
    raise ValueError(f"{where}: {found}; mend the data, or give check_data=False")


def _dtype(leaf: Any) -> str:
    return leaf.dtype.name if is_key(leaf) else jax.dtypes.canonicalize_dtype(leaf.dtype).name  # type: ignore[no-any-return]


def _listed(dtypes: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {dtype}" for key, dtype in dtypes.items())


def _fault(named: Mapping[str, Any], classes: int | None) -> str:
    """What is wrong with the values of a batch or data set, by name; "" where nothing is."""
    if found := _wrong_kind(named):
        return found
    for name, leaf in named.items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(_finite(leaf).all()):
            bad = np.argwhere(~np.asarray(_finite(leaf)))
            first = tuple(int(i) for i in bad[0])
            return f"{name} hold {np.asarray(leaf)[first]} at {list(first)} ({len(bad)} such values)"
    targets = named.get("targets")
    if classes is None or targets is None or not targets.size or not jnp.issubdtype(targets.dtype, jnp.number):
        return ""
    floating = jnp.issubdtype(targets.dtype, jnp.inexact)
    if floating and targets.ndim > 1 and targets.shape[-1] == classes:
        return ""  # one number for each class
    least = -1 if floating and classes == 2 else 0
    low, high = targets.min().item(), targets.max().item()
    if low < least or high > classes - 1:
        wrong = low if low < least else high
        first = tuple(int(i) for i in np.argwhere(np.asarray(targets) == wrong)[0])
        return f"the target at {list(first)} is {wrong}, and with classes={classes} it must be {least} to {classes - 1}"
    return ""


def _named(batch: Any) -> dict[str, Any]:
    """The arrays of a batch: "inputs" and "targets" where it has one of the usual forms, else by their paths."""
    try:
        args, targets = unpack_batch(batch)
        batch = {"inputs": args, "targets": targets}
    except ValueError:
        batch = dict(batch) if isinstance(batch, Mapping) else {"data": batch}
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    names = [str(path[0].key) for path, _ in leaves]
    named = {}
    for (path, leaf), name in zip(leaves, names, strict=True):
        own = name if names.count(name) == 1 else name + jax.tree_util.keystr(path[1:])
        named[own] = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    return named


def _wrong_kind(named: Mapping[str, Any]) -> str:
    for name, leaf in named.items():
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool or is_key(leaf)):
            return f"{name} are of dtype {leaf.dtype}, and must be numbers"
    return ""


def _finite(leaf: Any) -> Any:
    """Where values are finite in the dtype that JAX takes them in: a float64 may be too large for its float32."""
    if isinstance(leaf, jax.Array):
        return jnp.isfinite(leaf)
    with np.errstate(over="ignore"):
        return np.isfinite(leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False))
