"""From a slot of a morph to a seed at rest."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from .._checks import whole
from ..kasmina.blueprints import get_blueprint
from ..kasmina.morph import Morph
from ..kasmina.operate import chosen, planted_state
from ..kasmina.spec import slot_name
from ..kasmina.stages import Stage
from ..kasmina.state import blends, slot_of
from .encode import structure
from .program import stored_forward
from .record import StoredSeed
from .tensors import describe


def seed_of(morph: Morph, site: str, slot: int = 0, *, layer: int | None = None) -> StoredSeed:
    """The seed in a slot, ready for `Urza.put`: its parameters now, and what was measured of it.

    Args:
      morph: a morph with concrete arrays; it is not changed.
      site: the site's path.
      slot: the seed's slot.
      layer: which layer's seed, at a site of stacked layers; it can germinate in any layer, or where there is no stack.

    Returns:
      The seed, not stored yet. Its contribution is that of its `SeedState`, NaN where it was not measured; site, slot,
      stage, age and gradient health are in its provenance.

    Raises:
      KeyError: unknown site. ValueError: the slot is empty, its seed is no part of the output (another stage than
      BLENDING, HOLDING or FOSSILIZED), or is being pruned; `layer` is missing at a stack, or there is no such one.
    """
    life = jax.device_get(slot_of(planted_state(morph, site, slot), slot))
    if layer is not None:
        whole("layer", layer, 0)
    chosen(morph, site, slot, layer)
    place = morph.spec.by_path[site]
    params = jax.tree.map(np.array, morph.seeds[site][slot_name(slot)])
    if place.layers:
        if layer is None:
            raise ValueError(f"site {site!r} is a stack of {place.layers} layers; say which one with layer=")
        life, params = jax.tree.map(lambda leaf: leaf[layer], (life, params))
        place = dataclasses.replace(place, layers=0)
    plant = morph.spec.plant(site, slot)
    assert plant is not None
    stage = Stage(int(life.stage))
    if not bool(blends(life.stage)) or bool(life.pruning):
        why = "is being pruned" if bool(life.pruning) else f"is {stage.name}"
        raise ValueError(
            f"{site} slot {slot} {why}; a seed is worth keeping once it is part of the output: BLENDING, HOLDING or "
            "FOSSILIZED"
        )
    blueprint = get_blueprint(plant.blueprint)
    layout, arrays = structure(params)
    forward = stored_forward(blueprint.apply)
    provenance: dict[str, Any] = {
        "site": site,
        "slot": slot,
        "stage": stage.name,
        "age": int(life.age),
        "faults": int(life.faults),
        "health": float(life.health),
    }
    if layer is not None:
        provenance["layer"] = layer
    return StoredSeed(
        blueprint=plant.blueprint if forward is None else forward.blueprint,
        config=dict(plant.config),
        blend=plant.blend,
        reads=blueprint.reads,
        site=place,
        arrays=describe(arrays),
        contribution=float(life.contribution),
        provenance=provenance,
        layout=layout,
        params=params,
        programs={} if forward is None else forward.programs,
    )
