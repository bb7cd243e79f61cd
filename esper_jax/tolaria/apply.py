"""Carrying out a controller's decision on a morph. Every decision was checked by the governor's veto before."""

from __future__ import annotations

import jax

from ..kasmina import operate
from ..kasmina.morph import Morph
from ..protocol import Decision


def apply_decision(morph: Morph, decision: Decision, *, key: jax.Array, score: float) -> tuple[Morph, int]:
    """Do what the decision says.

    Args:
      morph: the morph; it is not changed.
      decision: a decision that `veto` let through.
      key: for a germinated seed's parameters.
      score: the validation score now, in points.

    Returns:
      The new morph, and the slot that was acted on.

    Raises:
      ValueError, KeyError, TypeError: as the operation itself raises them.
    """
    site, slot = decision.site, decision.slot
    if decision.action == "germinate":
        before = morph
        config = dict(decision.config)
        morph = operate.germinate(morph, site, decision.blueprint or "", key=key, slot=slot, score=score, **config)
        return morph, _new_slot(before, morph, site)
    if slot is None:
        raise ValueError(f"decision {decision.action!r} at {site} names no slot")
    if decision.action == "prune":
        return operate.prune(morph, site, slot, steps=decision.steps, score=score), slot
    if decision.action == "fossilize":
        return operate.fossilize(morph, site, slot, score=score), slot
    if decision.action == "advance":
        return operate.advance(morph, site, slot, score=score), slot
    if decision.action == "set_alpha" and decision.alpha is not None:
        return operate.set_alpha(morph, site, slot, decision.alpha, steps=max(decision.steps, 1)), slot
    raise ValueError(f"decision {decision.action!r} at {site} cannot be carried out: {decision}")


def _new_slot(before: Morph, after: Morph, site: str) -> int:
    """The slot whose count of germinations went up."""
    for plant in after.spec.planted_at[site]:
        new = int(after.state[site].generation[plant.slot])
        old = int(before.state[site].generation[plant.slot]) if site in before.state else 0
        if new != old:
            return plant.slot
    raise AssertionError(f"no slot of {site} germinated")
