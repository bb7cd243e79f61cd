"""A training state as a checkpoint: arrays in one tree, structure as JSON beside them, and both back again."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import instance, place, whole
from ..kasmina.blueprints import registered
from ..kasmina.morph import Morph, with_spec
from ..kasmina.spec import Spec
from ..protocol import Library
from . import snapshot as _snapshot
from .checkpoint import CheckpointError, Checkpoints
from .leaves import fitting
from .optim import Growable
from .records import Mark, read_history
from .session import Session
from .sharding import Layout
from .state import TrainState

FOLDER = "checkpoints"
KEYS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}
MakeControl = Callable[[Spec, jax.Array], tuple[Any, Any]]


def described(state: TrainState, session: Session, history: Mark) -> tuple[Any, dict[str, Any]]:
    """What is saved of one step: state and snapshot, and the spec, the host's shapes and the session as JSON.

    `history` says how much of the history file belongs to it.
    """
    meta = {
        "spec": json.loads(state.morph.spec.to_json()),
        "host": _shapes(state.morph.host),
        "fossils": _snapshot.fossil_names(session.snapshot),
        "session": session.to_json(),
        "history": history,
        "control_bytes": _byte_counts(state.control),
    }
    return {"state": state, "snapshot": session.snapshot}, meta


def begun(directory: str | os.PathLike[str]) -> bool:
    """Whether a run directory holds a step, whole or damaged.

    Raises:
      CheckpointError: its log tells of saved steps, and they are gone. OSError: it cannot be read.
    """
    run = pathlib.Path(directory)
    with Checkpoints(run / FOLDER, create=False) as checkpoints:
        if checkpoints.found():
            return True
    log = run / "events.jsonl"
    if log.exists() and b'"kind": "checkpoint"' in log.read_bytes():
        raise CheckpointError(
            f"{log} tells of saved steps, and {run / FOLDER} holds none of them: put them back, or begin another "
            "run in another directory"
        )
    return False


def restore(
    checkpoints: Checkpoints,
    tx: Growable,
    make_control: MakeControl,
    step: int | None,
    library: Library | None = None,
    layout: Layout | None = None,
) -> tuple[TrainState, Session]:
    """The newest whole step (or the named one), rebuilt from its own description, in its place on the layout's mesh.

    Seeds that grew from a stored program find their blueprint in the `library`, where one is given.
    """

    def template(meta: dict[str, Any]) -> Any:
        _known(meta, library)
        key = jax.random.key(0)
        state = jax.eval_shape(lambda: TrainState.create(morph_template(meta), tx, key=key))
        state = state if layout is None else layout.shaped(state)
        governor, control = make_control(state.morph.spec, key)
        control = _with_byte_counts(control, meta.get("control_bytes", {}))
        state = state.replace(governor=governor, control=control)
        return {"state": state, "snapshot": _snapshot.template(state, meta["fossils"])}

    restored = checkpoints.restore(template, step=step)
    with fitting(restored.where):
        session = Session.from_json(restored.meta["session"], restored.tree["snapshot"])
    if (mark := restored.meta.get("history")) is not None:
        session.records = read_history(checkpoints.directory.parent, mark) or session.records
    return restored.tree["state"], session


def restore_morph(directory: str | os.PathLike[str], *, step: int | None = None, urza: Library | None = None) -> Morph:
    """The morph of a checkpoint alone, without the trainer or the model it came from.

    Args:
      directory: a run directory (what `Tolaria(checkpoint_dir=...)` was given).
      step: a step; None takes the newest whole one.
      urza: the library of stored seeds, for a morph with seeds that run a stored program.

    Returns:
      The `Morph`, with the host's variables as nested dicts.

    Raises:
      CheckpointError: no checkpoint, or none that is whole. TypeError: an argument of another kind than the above.
      ValueError: `step` is no whole number of 0 or more.
    """
    place("directory", directory)
    if step is not None:
        whole("step", step, 0)
    if urza is not None:
        instance("urza", urza, "get", example="a library such as Urza(url)")
    with Checkpoints(pathlib.Path(directory) / FOLDER, create=False) as checkpoints:
        found = checkpoints.read(step)
    with fitting(found.where):
        _known(found.meta, urza)
        template = morph_template(found.meta)
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    names = ["['state'].morph" + jax.tree_util.keystr(path) for path, _ in paths]
    missing = [name for name in names if name not in found.tree]
    if missing:
        raise CheckpointError(f"step {found.step} in {directory} has no {missing[0]}; it is no training state's")
    return jax.tree_util.tree_unflatten(structure, [jnp.asarray(found.tree[name]) for name in names])


def morph_template(meta: Mapping[str, Any]) -> Morph:
    """A morph of zeros in the structure that a checkpoint describes."""
    spec = Spec.from_json(json.dumps(meta["spec"]))
    bare = Spec(spec.sites, spec.slots)
    return with_spec(Morph(_zeros(meta["host"]), {}, {}, bare), spec)


def _byte_counts(control: Any) -> dict[str, int]:
    """The lengths of a controller's byte strings (1-D uint8 arrays), by path: they alone may change as it goes on."""
    leaves = jax.tree_util.tree_leaves_with_path(control)
    return {jax.tree_util.keystr(path): leaf.size for path, leaf in leaves if _is_bytes(leaf)}


def _with_byte_counts(control: Any, counts: Mapping[str, int]) -> Any:
    """A controller's first state with its byte strings as long as a checkpoint's."""

    def sized(path: Any, leaf: Any) -> Any:
        known = counts.get(jax.tree_util.keystr(path))
        return np.zeros(known, np.uint8) if known is not None and _is_bytes(leaf) else leaf

    return jax.tree_util.tree_map_with_path(sized, control)


def _is_bytes(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype == np.uint8 and leaf.ndim == 1


def _known(meta: Mapping[str, Any], library: Library | None) -> None:
    """Have the library register the programs that a spec names as `blueprint@id` and this process does not know."""
    have = {blueprint.name for blueprint in registered()}
    for plant in meta["spec"]["plants"]:
        if library is not None and "@" in plant["blueprint"] and plant["blueprint"] not in have:
            library.get(plant["blueprint"].rsplit("@", 1)[1], program=True)


def _shapes(tree: Any) -> Any:
    """A nested dict of arrays as a nested dict of `[dtype, shape]`."""
    if isinstance(tree, Mapping):
        return {name: _shapes(child) for name, child in tree.items()}
    return [str(tree.dtype), list(tree.shape)]


def _zeros(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _zeros(child) for name, child in tree.items()}
    dtype, shape = tree
    if dtype in KEYS:  # a host may hold PRNG keys, as nnx modules with dropout do
        return jnp.broadcast_to(jax.random.key(0, impl=KEYS[dtype]), tuple(shape))
    return jnp.zeros(tuple(shape), dtype)
