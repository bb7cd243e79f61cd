"""Last-known-good states (contract 22): all of a run but its experimental seeds, and the way back to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kasmina.morph import Morph
from ..kasmina.spec import Plant
from ..kasmina.stages import Stage
from ..kasmina.state import SeedState, slot_of, with_slot
from .state import Meters, TrainState

Snapshot = dict[str, Any]


def take(state: TrainState) -> Snapshot:
    """A host copy of the host, its optimizer state and the fossils with theirs; live seeds are left out."""
    fossils: dict[str, dict[str, Any]] = {}
    for plant in fossil_plants(state.morph):
        fossils.setdefault(plant.site, {})[plant.key] = {
            "seed": state.morph.seeds[plant.site][plant.key],
            "optimizer": state.opt_state.seeds[plant.site][plant.key],
            "life": slot_of(state.morph.state[plant.site], plant.slot),
        }
    tree = {"step": state.step, "host": state.morph.host, "optimizer": state.opt_state.host, "fossils": fossils}
    return jax.tree.map(np.array, tree)


def roll_back(state: TrainState, snapshot: Snapshot) -> tuple[TrainState, tuple[Plant, ...]]:
    """The state with host, optimizer and fossils as in the snapshot and every live seed pruned.

    The step count, the key and the controllers go on, so the same batches are not met with the same luck again.

    Returns:
      The state, and the plants that were pruned.
    """
    saved = jax.tree.map(jnp.asarray, snapshot)
    morph, optimizer = state.morph, state.opt_state
    seeds = {path: dict(slots) for path, slots in morph.seeds.items()}
    opt_seeds = {path: dict(slots) for path, slots in optimizer.seeds.items()}
    life = dict(morph.state)
    pruned = []
    stages = {path: np.asarray(s.stage) for path, s in morph.state.items()}
    for plant in morph.spec.plants:
        fossil = saved["fossils"].get(plant.site, {}).get(plant.key)
        if fossil is not None:
            seeds[plant.site][plant.key] = fossil["seed"]
            opt_seeds[plant.site][plant.key] = fossil["optimizer"]
            life[plant.site] = with_slot(life[plant.site], plant.slot, fossil["life"])
            continue
        stage = stages[plant.site][plant.slot]
        seeds[plant.site][plant.key] = jax.tree.map(jnp.zeros_like, seeds[plant.site][plant.key])
        if Stage.GERMINATED <= stage <= Stage.FOSSILIZED:
            pruned.append(plant)
            gone = _pruned(life[plant.site], plant.slot)
            life[plant.site] = with_slot(life[plant.site], plant.slot, gone)
    restored = state.replace(
        morph=morph.replace(host=saved["host"], seeds=seeds, state=life),
        opt_state=optimizer.replace(host=saved["optimizer"], seeds=opt_seeds),
        meters=Meters.zero(morph),
    )
    return restored, tuple(pruned)


def fossil_plants(morph: Morph) -> tuple[Plant, ...]:
    """The plants that are FOSSILIZED; needs concrete arrays."""
    stages = {path: np.asarray(state.stage) for path, state in morph.state.items()}
    return tuple(plant for plant in morph.spec.plants if stages[plant.site][plant.slot] == Stage.FOSSILIZED)


def template(state: TrainState, fossils: Mapping[str, list[str]]) -> Snapshot:
    """The structure of a snapshot with those fossils (`{site: [slot names]}`), for restoring one."""
    nodes = {
        path: {
            key: {
                "seed": state.morph.seeds[path][key],
                "optimizer": state.opt_state.seeds[path][key],
                "life": slot_of(state.morph.state[path], 0),
            }
            for key in keys
        }
        for path, keys in fossils.items()
    }
    tree = {"step": state.step, "host": state.morph.host, "optimizer": state.opt_state.host, "fossils": nodes}
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


def fossil_names(snapshot: Snapshot) -> dict[str, list[str]]:
    """The fossils a snapshot holds, as JSON-able names."""
    return {path: sorted(slots) for path, slots in snapshot["fossils"].items()}


def _pruned(state: SeedState, slot: int) -> SeedState:
    """A slot PRUNED with nothing of its seed left but the count of generations."""
    blank = slot_of(SeedState.empty(1), 0)
    return blank.replace(stage=jnp.int32(Stage.PRUNED), generation=state.generation[slot])
