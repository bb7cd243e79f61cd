"""Last-known-good states (contract 22): all of a run but its experimental seeds, and the way back to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kasmina._pytree import is_key
from ..kasmina.morph import Morph
from ..kasmina.spec import Plant, layer_path
from ..kasmina.stages import Stage
from ..kasmina.state import SeedState, slot_of, with_slot
from .peers import on_host
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
    return jax.tree.map(_held, tree)


def _held(leaf: Any) -> Any:
    """A copy of an array on the host; of a PRNG key, on the device."""
    return jnp.array(leaf) if is_key(leaf) else on_host(leaf)


def roll_back(state: TrainState, snapshot: Snapshot) -> tuple[TrainState, tuple[Plant, ...]]:
    """The state with host, optimizer and fossils as in the snapshot and every live seed pruned.

    The step count, the key and the controllers go on, so the same batches are not met with the same luck again.

    Returns:
      The state, and the plants that were pruned (of a stack, each layer's: see `Spec.unrolled`).
    """
    saved = jax.tree.map(jnp.asarray, snapshot)
    morph, optimizer = state.morph, state.opt_state
    seeds = {path: dict(slots) for path, slots in morph.seeds.items()}
    opt_seeds = {path: dict(slots) for path, slots in optimizer.seeds.items()}
    life = dict(morph.state)
    fallen: set[tuple[str, int]] = set()
    for plant in morph.spec.plants:
        site, slot, key = plant.site, plant.slot, plant.key
        fossil = saved["fossils"].get(site, {}).get(key)
        now = slot_of(life[site], slot)
        kept = jnp.zeros_like(now.stage, bool) if fossil is None else fossil["life"].stage == Stage.FOSSILIZED
        goes = ~kept & (now.stage >= Stage.GERMINATED) & (now.stage <= Stage.FOSSILIZED)
        gone = _choose(goes, _pruned(now), now)
        blank = jax.tree.map(jnp.zeros_like, seeds[site][key])
        if fossil is not None:
            gone = _choose(kept, fossil["life"], gone)
            blank = _choose(kept, fossil["seed"], blank)
            opt_seeds[site][key] = _choose(kept, fossil["optimizer"], opt_seeds[site][key])
        seeds[site][key] = blank
        life[site] = with_slot(life[site], slot, gone)
        names = [site] if goes.ndim == 0 else [layer_path(site, n) for n in range(goes.size)]
        fallen |= {(name, slot) for name, falls in zip(names, np.atleast_1d(goes), strict=True) if falls}
    pruned = [plant for plant in morph.spec.unrolled.plants if (plant.site, plant.slot) in fallen]
    restored = state.replace(
        morph=morph.replace(host=saved["host"], seeds=seeds, state=life),
        opt_state=optimizer.replace(host=saved["optimizer"], seeds=opt_seeds),
        meters=Meters.zero(morph),
    )
    return restored, tuple(pruned)


def fossil_plants(morph: Morph) -> tuple[Plant, ...]:
    """The plants that are FOSSILIZED, in any layer; needs concrete arrays."""
    fossil = {path: np.asarray(state.stage) == Stage.FOSSILIZED for path, state in morph.state.items()}
    return tuple(plant for plant in morph.spec.plants if np.any(fossil[plant.site][..., plant.slot]))


def template(state: TrainState, fossils: Mapping[str, list[str]]) -> Snapshot:
    """The structure of a snapshot with those fossils (`{site: [slot names]}`), for restoring one."""
    nodes = {
        path: {
            key: {
                "seed": state.morph.seeds[path][key],
                "optimizer": state.opt_state.seeds[path][key],
                "life": jax.eval_shape(lambda life: slot_of(life, 0), state.morph.state[path]),
            }
            for key in keys
        }
        for path, keys in fossils.items()
    }
    tree = {"step": state.step, "host": state.morph.host, "optimizer": state.opt_state.host, "fossils": nodes}
    return jax.tree.map(lambda leaf: leaf if is_key(leaf) else np.zeros(leaf.shape, leaf.dtype), tree)


def fossil_names(snapshot: Snapshot) -> dict[str, list[str]]:
    """The fossils a snapshot holds, as JSON-able names."""
    return {path: sorted(slots) for path, slots in snapshot["fossils"].items()}


def _pruned(now: SeedState) -> SeedState:
    """A slot PRUNED with nothing of its seed left but the count of generations."""
    blank = slot_of(SeedState.empty(1, now.stage.size if now.stage.ndim else 0), 0)
    return blank.replace(stage=jnp.full_like(now.stage, Stage.PRUNED), generation=now.generation)


def _choose(mask: Any, new: Any, old: Any) -> Any:
    """The leaves of `new` where `mask` (one flag, or one for each leading row), else those of `old`."""
    pick = lambda a, b: jnp.where(mask.reshape(mask.shape + (1,) * (b.ndim - mask.ndim)), a, b)  # noqa: E731
    return jax.tree.map(pick, new, old)
