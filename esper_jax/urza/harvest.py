"""From a slot of a morph to a seed at rest."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ..kasmina.blueprints import get_blueprint
from ..kasmina.morph import Morph
from ..kasmina.operate import planted_state
from ..kasmina.stages import Stage
from ..kasmina.state import blends
from .encode import structure
from .program import stored_forward
from .record import StoredSeed
from .tensors import describe


def seed_of(morph: Morph, site: str, slot: int = 0) -> StoredSeed:
    """The seed in a slot, ready for `Urza.put`: its parameters now, and what was measured of it.

    Args:
      morph: a morph with concrete arrays; it is not changed.
      site: the site's path.
      slot: the seed's slot.

    Returns:
      The seed, not stored yet. Its contribution is that of its `SeedState`, NaN where it was not measured; site, slot,
      stage, age and gradient health are in its provenance.

    Raises:
      KeyError: unknown site. ValueError: the slot is empty, its seed is no part of the output (another stage than
      BLENDING, HOLDING or FOSSILIZED), or is being pruned.
    """
    life = jax.device_get(planted_state(morph, site, slot))
    plant = morph.spec.plant(site, slot)
    assert plant is not None
    stage = Stage(int(life.stage[slot]))
    if not bool(blends(life.stage)[slot]) or bool(life.pruning[slot]):
        why = "is being pruned" if bool(life.pruning[slot]) else f"is {stage.name}"
        raise ValueError(
            f"{site} slot {slot} {why}; a seed is worth keeping once it is part of the output: BLENDING, HOLDING or "
            "FOSSILIZED"
        )
    blueprint = get_blueprint(plant.blueprint)
    params = jax.tree.map(np.array, morph.seeds[site][plant.key])
    layout, arrays = structure(params)
    forward = stored_forward(blueprint.apply)
    provenance: dict[str, Any] = {
        "site": site,
        "slot": slot,
        "stage": stage.name,
        "age": int(life.age[slot]),
        "faults": int(life.faults[slot]),
        "health": float(life.health[slot]),
    }
    return StoredSeed(
        blueprint=plant.blueprint if forward is None else forward.blueprint,
        config=dict(plant.config),
        blend=plant.blend,
        reads=blueprint.reads,
        site=morph.spec.by_path[site],
        arrays=describe(arrays),
        contribution=float(life.contribution[slot]),
        provenance=provenance,
        layout=layout,
        params=params,
        programs={} if forward is None else forward.programs,
    )
