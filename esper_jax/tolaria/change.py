"""The moment a run changes its program: parked seeds come in, dormant ones leave, or a program that failed is told."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from ..kasmina.spec import Plant
from ..kasmina.stages import Stage
from ..nissa import events
from ..nissa.event import Event
from ..protocol import Decision
from . import swap
from .optim import Growable
from .peers import any_of
from .programs import Programs
from .session import Pending, Session
from .sharding import Layout
from .state import TrainState
from .swap import Held, Swap, Waiting

Sink = Callable[[Event], None]


class Changes:
    """Keeps a run's state in two parts, the view its program works on and what waits outside, and joins them.

    Args:
      programs: where the programs of the next structure come from.
      tx: the optimizer, whose state grows with the morph.
      when: the boundary, as for `Tolaria(swap=...)`.
      prefetch: how many of the controller's candidates are compiled ahead.
      layout: where the state lives on a mesh; None is one device.
      session, sink: the run's memory, whose `waiting` is the change under way, and the receiver of events.
    """

    def __init__(
        self,
        programs: Programs,
        tx: Growable,
        when: Swap,
        prefetch: int,
        session: Session,
        sink: Sink,
        layout: Layout | None = None,
    ) -> None:
        self.programs, self.tx, self.session, self.sink = programs, tx, session, sink
        self.when, self.prefetch, self.layout = when, prefetch, layout
        self.held: Held | None = None
        self.asked = False

    def enter(self, state: TrainState) -> TrainState:
        """The view of a whole state that its program knows; the programs of the next structure are asked for."""
        morph = state.morph.replace(spec=self.programs.same(state.morph.spec))
        view, self.held = swap.park(state.replace(morph=morph), self.session.waiting)
        view = view.replace(morph=view.morph.replace(spec=self.programs.same(view.morph.spec)))
        view = view if self.layout is None else self.layout.place(view)
        self.asked = False
        self.ask(view)
        return view

    def whole(self, view: TrainState) -> TrainState:
        """The whole state of a view."""
        return swap.unpark(view, self.held)

    def ask(self, view: TrainState) -> None:
        """See to it that the programs of the next structure are being built, as far as their shapes are known."""
        if self.session.waiting is not None:
            self.programs.request(swap.lean(self.whole(view), self.tx))
            self.asked = self.programs.known()

    def guess(self, view: TrainState, candidates: tuple[Plant, ...]) -> None:
        """Have the programs built that would be needed if one of these seeds were grown next."""
        spec = view.morph.spec
        free = [plant for plant in candidates[: self.prefetch] if spec.plant(plant.site, plant.slot) is None]
        self.programs.outlive([spec.with_plant(plant) for plant in free])
        for plant in free if self.session.waiting is None else ():
            self.programs.prefetch(jax.eval_shape(lambda s, p=plant: swap.grown(s, p, self.tx), view))

    def tell(self, now: tuple[int, int]) -> None:
        """Emit what the programs have to say."""
        for notice in self.programs.notices():
            self.sink(events.warning(*now, notice))

    def steps_left(self, step: int) -> int | None:
        """Train steps until the program changes, if that hangs on their number."""
        waiting = self.session.waiting
        return None if waiting is None or waiting.at is None else max(1, waiting.at - step)

    def due(self, view: TrainState, step: int, *, at_tick: bool) -> bool:
        """Whether the program changes now. Only "asap" asks what is built; all else follows from the data."""
        waiting = self.session.waiting
        if waiting is None:
            return False
        if not self.asked:  # a resumed run: the shapes of its batches are known from its first step on
            self.ask(view)
        if self.when == "asap":
            return self.programs.ready(swap.target_spec(self.whole(view).morph))
        return at_tick if waiting.at is None else step >= waiting.at

    def make(self, view: TrainState, step: int, stop: Callable[[], int]) -> tuple[TrainState, int]:
        """The state in its next program; or in the one it has, without the parked seeds, where the next one failed.

        And 0; or the number of the signal that `stop()` told of while the run waited, with the view itself, and all
        waits as before.
        """
        state = self.whole(view)
        now = (int(state.ticks), step)
        target = swap.lean(state, self.tx)
        outcome = self.programs.wait(target.morph.spec, stop)
        if isinstance(outcome, int):
            return view, outcome
        outcome = dataclasses.replace(outcome, error=any_of(outcome.error))
        waiting, self.session.waiting, self.held = self.session.waiting, None, None
        assert waiting is not None
        began = time.perf_counter()
        self.tell(now)
        if outcome.error:
            self._failed(state, waiting, now, outcome.error)
            return self.enter(swap.abandon(state, waiting)), 0
        grown = [list(place) for place in waiting.parked]
        left = [[p.site, p.slot] for p in state.morph.spec.plants if target.morph.spec.plant(p.site, p.slot) is None]
        target = self.enter(target)
        self.programs.retire(target.morph.spec)
        self.sink(
            events.swap(
                *now,
                grown=grown,
                left=left,
                where=outcome.where,
                programs=outcome.programs,
                waited_seconds=outcome.waited,
                trace_seconds=outcome.trace,
                compile_seconds=outcome.compile,
                swap_seconds=time.perf_counter() - began,
            )
        )
        return target, 0

    def _failed(self, state: TrainState, waiting: Waiting, now: tuple[int, int], error: str) -> None:
        """Tell that a program could not be built: to the log, and to the controller as the answer to its decision."""
        reason = f"its program could not be compiled: {error}"
        self.sink(events.compile_failed(*now, seeds=[list(place) for place in waiting.parked], reason=error))
        for site, slot in waiting.parked:
            plant = state.morph.spec.plant(site, slot)
            assert plant is not None
            at: dict[str, Any] = {"site": site, "slot": slot, "blueprint": plant.blueprint}
            self.sink(events.stage(*now, **at, before=Stage.GERMINATED, after="PRUNED", reason=reason, alpha=0.0))
        place = lambda one: (state.morph.spec.locate(one.decision.site)[0], one.slot)  # noqa: E731
        told = {place(one) for one in self.session.pending if one.decision.action == "germinate"}
        self.session.pending = [
            dataclasses.replace(pending, outcome="refused", reason=reason)
            if place(pending) in waiting.parked and pending.decision.action == "germinate"
            else pending
            for pending in self.session.pending
        ]
        score = self.session.records[-1]["score"] if self.session.records else math.nan
        for site, slot in waiting.parked:  # a decision that was answered as applied, before this was known
            plant = state.morph.spec.plant(site, slot)
            if (site, slot) not in told and plant is not None:
                decision = Decision("germinate", site, None, plant.blueprint, dict(plant.config))
                self.session.pending.append(Pending(decision, "refused", reason, score, math.nan, slot))
