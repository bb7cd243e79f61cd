"""Carrying out a controller's decision on a morph. Every decision was checked by the governor's veto before."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from ..kasmina import operate
from ..kasmina.germination import germinate
from ..kasmina.morph import Morph
from ..kasmina.spec import freeze_config
from ..kasmina.stored import Stored
from ..protocol import Decision


def resolve(decision: Decision, library: Any) -> tuple[Decision, Stored | None, str | None]:
    """A decision that names a stored seed with that seed's blueprint and config filled in.

    Returns:
      The decision, the seed (None where it names none), and why it cannot be carried out (None where it can).
    """
    if decision.stored is None:
        return decision, None, None
    if decision.action != "germinate":
        return decision, None, f"stored: only a germination takes a stored seed, not {decision.action!r}"
    if library is None:
        return decision, None, "stored: this run has no library of seeds; give Tolaria(urza=...)"
    try:
        seed = library.get(decision.stored)
    except Exception as error:  # whatever a store raises, the training goes on without the seed
        return decision, None, f"stored: {error}"
    config = {**seed.config, "blend": seed.blend}
    given = set(freeze_config(decision.config)) <= set(freeze_config(config))
    if decision.blueprint not in (None, seed.blueprint) or not given:
        asked = f"{decision.blueprint} {dict(decision.config)}"
        return decision, None, f"stored: seed {decision.stored[:12]} is {seed.blueprint} {config}, not {asked}"
    stored = str(getattr(seed, "id", decision.stored))
    return dataclasses.replace(decision, blueprint=seed.blueprint, config=config, stored=stored), seed, None


def apply_decision(
    morph: Morph, decision: Decision, *, key: jax.Array, score: float, seed: Stored | None = None
) -> tuple[Morph, int]:
    """Do what the decision says.

    Args:
      morph: the morph; it is not changed.
      decision: a decision that `veto` let through.
      key: for a germinated seed's parameters.
      score: the validation score now, in points.
      seed: the stored seed that it germinates, from `resolve`.

    Returns:
      The new morph, and the slot that was acted on.

    Raises:
      ValueError, KeyError, TypeError: as the operation itself raises them.
    """
    slot = decision.slot
    site, layer = morph.spec.locate(decision.site)
    at: dict[str, Any] = {"layer": layer, "score": score}
    if decision.action == "germinate":
        before = morph
        if seed is not None:
            morph = germinate(morph, site, seed, slot=slot, **at)
        else:
            morph = germinate(morph, site, decision.blueprint or "", key=key, slot=slot, **at, **decision.config)
        return morph, _new_slot(before, morph, site)
    if slot is None:
        raise ValueError(f"decision {decision.action!r} at {site} names no slot")
    if decision.action == "prune":
        return operate.prune(morph, site, slot, steps=decision.steps, **at), slot
    if decision.action == "fossilize":
        return operate.fossilize(morph, site, slot, **at), slot
    if decision.action == "advance":
        return operate.advance(morph, site, slot, **at), slot
    if decision.action == "set_alpha" and decision.alpha is not None:
        steps = max(decision.steps, 1)
        return operate.set_alpha(morph, site, slot, decision.alpha, steps=steps, layer=layer), slot
    raise ValueError(f"decision {decision.action!r} at {site} cannot be carried out: {decision}")


def _new_slot(before: Morph, after: Morph, site: str) -> int:
    """The slot whose count of germinations went up."""
    for plant in after.spec.planted_at[site]:
        new = np.asarray(after.state[site].generation)[..., plant.slot]
        old = np.asarray(before.state[site].generation)[..., plant.slot] if site in before.state else 0
        if np.any(new != old):
            return plant.slot
    raise AssertionError(f"no slot of {site} germinated")
