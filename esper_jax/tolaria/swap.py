"""Changes of structure that wait for their program: which seeds are parked, and when the grown program takes over.

A decision that germinates a lean seed, or a rest that ends, changes the spec. The state has the new seed at once, in
GERMINATED, but steps go on in the old program, on a view of the state without it. A GERMINATED seed is part of no
computation, so nothing is missed. At a boundary fixed by data the parked seeds come in and dormant ones leave.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..kasmina import operate
from ..kasmina.morph import Morph, with_spec
from ..kasmina.spec import Plant, Spec
from ..kasmina.state import SeedState, layers_of, slot_of, with_slot
from .optim import Growable, GrowState
from .state import TrainState

Slot = tuple[str, int]
Swap = str | int


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A change of structure under way: seeds `parked` outside the program since tick `tick`, and its boundary.

    `at` is the step at or after which the program is changed; None: at the next tick. Dormant seeds leave then
    too.
    """

    parked: tuple[Slot, ...]
    tick: int
    at: int | None

    @staticmethod
    def from_json(data: dict[str, Any] | None) -> Waiting | None:
        """What `dataclasses.asdict` gave, after a way through JSON."""
        if data is None:
            return None
        return Waiting(tuple((site, slot) for site, slot in data["parked"]), data["tick"], data["at"])


@dataclasses.dataclass(frozen=True)
class Held:
    """The parts of a state that are outside the program: the whole spec, and the parked seeds' arrays."""

    spec: Spec
    seeds: dict[Slot, Any]
    life: dict[str, Any]
    optimizer: dict[Slot, Any]


def check_swap(swap: Any) -> Swap:
    """`swap` itself if it names a boundary: "epoch" (the next tick), a number of steps, "asap" or "now"."""
    if isinstance(swap, str) and swap in ("epoch", "asap", "now"):
        return swap
    if isinstance(swap, int) and not isinstance(swap, bool) and swap >= 1:
        return swap
    raise ValueError(f"swap must be 'epoch', a number of steps of 1 or more, 'asap' or 'now', got {swap!r}")


def plan(before: Spec, state: TrainState, tick: int, step: int, swap: Swap) -> Waiting | None:
    """What must wait after a tick that began with the structure `before`; None where the program stays as it is."""
    old = set(before.plants)
    parked = tuple((p.site, p.slot) for p in state.morph.spec.plants if p not in old and not p.resident)
    if not parked and target_spec(state.morph) is state.morph.spec:
        return None
    return Waiting(parked, tick, step + swap if isinstance(swap, int) else None)


def park(state: TrainState, waiting: Waiting | None) -> tuple[TrainState, Held | None]:
    """The view of a state that its program knows, and what is held back."""
    if waiting is None or not waiting.parked:
        return state, None
    morph, optimizer = state.morph, state.opt_state
    spec = morph.spec
    for site, slot in waiting.parked:
        spec = spec.without(site, slot)
    keys = {(p.site, p.slot): p.key for p in morph.spec.plants}
    held = Held(
        morph.spec,
        {place: morph.seeds[place[0]][keys[place]] for place in waiting.parked},
        {site: morph.state[site] for site, _ in waiting.parked},
        {place: optimizer.seeds[place[0]][keys[place]] for place in waiting.parked},
    )
    view = with_spec(morph, spec)
    life = dict(view.state)
    for site, slot in waiting.parked:  # where others live too, the parked seed's slot sleeps: no tick moves it
        if site in life:
            life[site] = with_slot(life[site], slot, slot_of(SeedState.empty(1, layers_of(life[site])), 0))
    view = view.replace(state=life)
    return state.replace(morph=view, opt_state=_only(optimizer, view)), held


def unpark(view: TrainState, held: Held | None) -> TrainState:
    """The whole state again: the view's, with the parked seeds as they were."""
    if held is None:
        return view
    seeds = {site: dict(slots) for site, slots in view.morph.seeds.items()}
    life = {**held.life, **view.morph.state}
    optimizer = {site: dict(slots) for site, slots in view.opt_state.seeds.items()}
    for plant in held.spec.plants:
        place = (plant.site, plant.slot)
        if place in held.seeds:
            if plant.site in view.morph.state:  # others live there too
                as_it_was = slot_of(held.life[plant.site], plant.slot)
                life[plant.site] = with_slot(life[plant.site], plant.slot, as_it_was)
            seeds.setdefault(plant.site, {})[plant.key] = held.seeds[place]
            optimizer.setdefault(plant.site, {})[plant.key] = held.optimizer[place]
    order = held.spec.planted_at
    morph = view.morph.replace(
        seeds={site: {p.key: seeds[site][p.key] for p in plants} for site, plants in order.items()},
        state={site: life[site] for site in order},
        spec=held.spec,
    )
    grown = {site: {p.key: optimizer[site][p.key] for p in plants} for site, plants in order.items()}
    return view.replace(morph=morph, opt_state=GrowState(view.opt_state.host, grown))


def target_spec(morph: Morph) -> Spec:
    """The structure without the dormant lean seeds; the morph's own spec object where there is none."""
    return operate.shed(morph).spec


def lean(state: TrainState, tx: Growable) -> TrainState:
    """The state without the dormant seeds that were not planted ahead."""
    morph = operate.shed(state.morph)
    if morph is state.morph:
        return state
    return state.replace(morph=morph, opt_state=tx.grow(state.opt_state, morph))


def grown(state: TrainState, plant: Plant, tx: Growable) -> TrainState:
    """A state of the structure with one more plant, its seed blank: for its shapes."""
    morph = with_spec(state.morph, state.morph.spec.with_plant(plant))
    return state.replace(morph=morph, opt_state=tx.grow(state.opt_state, morph))


def abandon(state: TrainState, waiting: Waiting) -> TrainState:
    """The state without the parked seeds: their program could not be built."""
    return park(state, waiting)[0]


def _only(optimizer: GrowState, morph: Morph) -> GrowState:
    kept = {
        site: {plant.key: optimizer.seeds[site][plant.key] for plant in plants}
        for site, plants in morph.spec.planted_at.items()
    }
    return GrowState(optimizer.host, kept)
