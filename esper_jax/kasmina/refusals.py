"""What is said where a hand-held lifecycle call is refused."""

from __future__ import annotations

import jax

from .morph import Morph
from .stages import EDGES, LIVE, Stage
from .state import SeedState, stages_text


def taken(morph: Morph, site: str, blueprint: str, slot: int | None) -> str:
    """Why no seed can germinate there: what sits in its slots."""
    state = morph.state.get(site)
    used = ", ".join(
        f"slot {p.slot}: {p.blueprint} {dict(p.config)}"
        + (
            f" {stages_text(state, p.slot)}"
            if state is not None and not isinstance(state.stage, jax.core.Tracer)
            else ""
        )
        for p in morph.spec.planted_at.get(site, ())
    )
    asked = "no slot is free" if slot is None else f"slot {slot} is taken"
    free = ", ".join(map(str, morph.spec.free_slots(site))) or "none"
    hint = ". shed() frees the slots of DORMANT seeds" if "DORMANT" in used else ""
    return f"cannot germinate {blueprint!r} at {site!r}: {asked}. Taken: {used}. Empty slots: {free}{hint}"


def illegal(state: SeedState, site: str, slot: int, call: str) -> str:
    """Why a call is refused in the seed's present stage; every field of `state` is a scalar."""
    stage = Stage(int(state.stage))
    legal = ", ".join(target.name for target in EDGES[stage]) or "nothing"
    target = {"prune": "PRUNED", "fossilize": "FOSSILIZED"}.get(call)
    ramp = f"{int(state.ramp_done)} of {int(state.ramp_steps)} ticks"
    if target is not None and Stage[target] not in EDGES[stage]:
        return f"{site} slot {slot}: {stage.name} > {target} is not a legal edge; {stage.name} may go to {legal}"
    if bool(state.pruning):
        return (
            f"{site} slot {slot}: {call}() is not possible, a scheduled prune is taking the seed out (ramp at {ramp})"
        )
    return (
        f"{site} slot {slot}: {call}() is not possible in {stage.name} with alpha {float(state.alpha):g} and a "
        f"ramp at {ramp}; alpha moves in BLENDING and HOLDING only, when the last ramp has ended; "
        "prune() without steps goes at once"
    )


def not_live(state: SeedState, site: str, slot: int) -> str:
    """Why a seed cannot be taken out; every field of `state` is a scalar."""
    stage = Stage(int(state.stage))
    why = {
        Stage.DORMANT: "there is no seed to take out",
        Stage.FOSSILIZED: "a fossil is for good",
    }.get(stage, "it rests after a prune and comes out by itself")
    legal = ", ".join(s.name for s in LIVE)
    return f"{site} slot {slot}: unload() is not possible in {stage.name}, {why}; it is in {legal}"
