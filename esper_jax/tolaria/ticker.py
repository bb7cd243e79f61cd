"""One tick of a run: validate, govern, move the seeds, measure contributions, ask the controller, act."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..kasmina import operate
from ..kasmina.lifecycle import Lifecycle, Ticked
from ..kasmina.morph import Morph
from ..kasmina.spec import Plant
from ..kasmina.stages import Stage
from ..kasmina.state import slot_of
from ..kasmina.stored import Stored
from ..nissa import events
from ..nissa.event import Event, plain
from ..protocol import Controller, Decision, Report
from . import peers
from . import snapshot as _snapshot
from . import swap as _swap
from .apply import apply_decision, resolve
from .asking import Asking, ControllerError
from .data import Data
from .evaluate import Contributions, Evaluator, Pause, measured_plants, nothing
from .governor import Governor, check
from .leaves import one_line
from .optim import Growable
from .programs import Program
from .report import NAN, Measured, changed_health, make_report, mean_loss, seed_size
from .session import Pending, Session
from .state import Meters, TrainState
from .veto import Limits, lean_plant, veto

Sink = Callable[[Event], None]
_GERMINATION = 0x5EED
_MEASURED = ("health", "gain", "dead", "silent", "variance", "correlation", "gradient", "signal")
_SHOWN = ("alpha", "pruning", "age", "steps", "faults", "health", "ratio", "contribution")


class TrainingDiverged(RuntimeError):
    """Training kept diverging: more rollbacks than `max_rollbacks`.

    `state` is the last good one, `directory` the run's, or None where nothing is saved.
    """

    state: TrainState | None = None
    directory: pathlib.Path | None = None


@dataclasses.dataclass
class Ticker:
    """Everything a tick needs that does not change during a run. Calling it gives the state after the tick."""

    evaluator: Evaluator
    tx: Growable
    controller: Controller | None
    lifecycle: Lifecycle
    governor: Governor
    limits: Limits
    classes: int | None
    max_rollbacks: int
    swap: _swap.Swap = "epoch"
    prefetch: int = 0
    library: Any = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        self.ask = Asking(self.deadline)
        self.candidates: tuple[Plant, ...] = ()
        self._unmeasured: set[Any] = set()
        self._complaint = ""
        self.move = Program("tick", functools.partial(_move, self.lifecycle))

    def __call__(
        self, state: TrainState, session: Session, validation: Data, sink: Sink, pause: Pause = nothing
    ) -> TrainState:
        """The state after one tick; the session's record and pending feedback are brought up to date.

        `pause()` is called after each batch of the validation while the tick has changed nothing yet: it may raise.
        """
        began = time.perf_counter()
        state = state.replace(ticks=state.ticks + 1)
        peers.soon((state.ticks, state.step, state.meters, state.morph.state))
        view, held = _swap.park(state, session.waiting)
        loss, score = self.evaluator(view.morph, validation, pause)
        self._now = now = (int(state.ticks), int(state.step))
        train_loss, skipped = mean_loss(state.meters), int(state.meters.skipped)
        if skipped:
            text = f"{skipped} batch(es) with a non-finite loss or gradient were skipped"
            sink(events.warning(*now, text, skipped=skipped))
        state, rolled = self._govern(state, session, train_loss, loss, sink)
        if rolled:
            view, held = _swap.park(state, session.waiting)
            loss, score = self.evaluator(view.morph, validation)
        contributions = self._contributions(view.morph, validation, sink, nothing if rolled else pause)
        view = _with_contributions(view, contributions)
        morph, ticked = self.move(view.morph, np.float32(score))
        state = _swap.unpark(view.replace(morph=morph), held)
        peers.soon((morph.state, dict(ticked)))
        before = state.morph.spec
        report = make_report(state, Measured(train_loss, loss, score, contributions.pairs), ticked)
        self._tell(report, state, ticked, contributions, session, sink)
        state, fossilised = self._control(state, session, report, sink)
        if self._due or fossilised:
            session.snapshot = _snapshot.take(state)
            sink(events.snapshot(*now, reason="a seed was fossilised" if fossilised else "a healthy check"))
        if self.swap == "now":
            state = _swap.lean(state, self.tx)
        elif session.waiting is None:
            session.waiting = _swap.plan(before, state, *now, self.swap)
        event = events.epoch(
            *now,
            train_loss=train_loss,
            loss=loss,
            score=score,
            seconds=time.perf_counter() - session.tick_began,
            seeds=_rows(state),
            sites={site.path: {name: getattr(site, name) for name in _MEASURED} for site in report.sites},
            tick_seconds=time.perf_counter() - began,
        )
        sink(event)
        session.tick_began = time.perf_counter()
        session.records.append({"epoch": now[0], "step": now[1], **event.data})
        if score > session.best_score:
            session.best_score, session.best_tick = score, now[0]
        return state.replace(meters=Meters.zero(state.morph))

    def _contributions(self, morph: Morph, validation: Data, sink: Sink, pause: Pause) -> Contributions:
        """What the seeds add to the score; nothing, and an event for each structure, where that cannot be compiled."""
        plants = measured_plants(morph)
        try:
            return self.evaluator.contributions(morph, validation, plants, pause)
        except Exception as error:
            if morph.spec not in self._unmeasured:
                self._unmeasured.add(morph.spec)
                reason = f"contributions cannot be measured: {type(error).__name__}: {error}"
                seeds = [[plant.site, plant.slot] for plant in plants]
                sink(events.compile_failed(*self._now, seeds=seeds, reason=reason))
            return Contributions({}, {})

    def _tell(
        self,
        report: Report,
        state: TrainState,
        ticked: Mapping[str, Ticked],
        measured: Contributions,
        session: Session,
        sink: Sink,
    ) -> None:
        """Events for what was measured, and for the seeds that moved by themselves."""
        spec = state.morph.spec
        moved, life = map(spec.by_layer, jax.device_get((dict(ticked), state.morph.state)))
        last = {(row["site"], row["slot"]): row for row in session.records[-1]["seeds"]} if session.records else {}
        parked = () if session.waiting is None else session.waiting.parked
        for plant in spec.unrolled.plants:
            site, slot = plant.site, plant.slot
            if (spec.locate(site)[0], slot) in parked:  # its program is not there yet: nothing happens to it
                continue
            at: dict[str, Any] = {"site": site, "slot": slot, "blueprint": plant.blueprint}
            if (site, slot) in measured.single:
                sink(events.contribution(*self._now, **at, value=measured.single[site, slot]))
            faults = int(life[site].faults[slot])
            row = last.get((site, slot))
            if row is not None and faults > row["faults"]:
                sink(events.fault(*self._now, **at, faults=faults))
            before, after = (Stage(int(stages[slot])) for stages in (moved[site].before, moved[site].after))
            if row is not None and row["stage"] != before.name:  # pruned since the last tick
                sink(_stage(self._now, plant, row["stage"], before, self._dropped or _moved_because(before, faults)))
            if before != after:
                sink(_stage(self._now, plant, before, after, _moved_because(after, faults), life[site].alpha[slot]))
        for signal in changed_health(report, session.records[-1] if session.records else None):
            sink(events.health(signal))
        for (first, second), value in report.interactions.items():
            sink(events.interaction(*self._now, first, second, value))

    def _govern(
        self, state: TrainState, session: Session, train_loss: float, loss: float, sink: Sink
    ) -> tuple[TrainState, bool]:
        governor, verdict = check(self.governor, state.governor, train_loss, loss, self.classes)
        state = state.replace(governor=governor)
        self._due, self._dropped = verdict.snapshot, ""
        if not verdict.rollback:
            return state, False
        session.rollbacks += 1
        step = int(session.snapshot["step"])
        state, pruned = _snapshot.roll_back(state, session.snapshot)
        gone = [[plant.site, plant.slot] for plant in pruned]
        sink(events.rollback(*self._now, reason=verdict.reason, to_step=step, rule=verdict.rule, pruned=gone))
        self._dropped = f"rollback: {verdict.reason}"
        waiting = session.waiting
        place = lambda plant: (state.morph.spec.locate(plant.site)[0], plant.slot)  # noqa: E731
        if waiting is not None and any(place(plant) in waiting.parked for plant in pruned):
            for plant in pruned:
                if place(plant) in waiting.parked:  # no program knows it yet: it goes, and nothing waits
                    sink(_stage(self._now, plant, Stage.GERMINATED, Stage.PRUNED, self._dropped))
            state, session.waiting = _swap.abandon(state, waiting), None
        if session.rollbacks > self.max_rollbacks:
            error = TrainingDiverged(
                f"training was rolled back {session.rollbacks} times (max_rollbacks={self.max_rollbacks}); the last "
                f"reason was: {verdict.reason}. Lower the learning rate or look at the data"
            )
            error.state = state
            raise error
        return state, True

    def _control(self, state: TrainState, session: Session, report: Report, sink: Sink) -> tuple[TrainState, bool]:
        """Ask the controller, check and apply what it decides; whether a seed was fossilised."""
        if self.controller is None:
            return state, False
        seeds = {(seed.site, seed.slot): seed for seed in report.seeds}
        feedback = []
        for pending in session.pending:
            seed = None if pending.slot is None else seeds.get((pending.decision.site, pending.slot))
            feedback.append(pending.answer(report.score, NAN if seed is None else seed.contribution))
            sink(events.feedback(*self._now, feedback[-1]))
        decisions: Sequence[Decision] = ()
        if peers.first():
            try:
                decisions, control = self.ask(self.controller, state.control, report, tuple(feedback))
                state = state.replace(control=control)
                for text in self.ask.complaints:
                    sink(events.warning(*self._now, text, controller=type(self.controller).__name__))
            except ControllerError as error:
                sink(events.warning(*self._now, str(error), controller=type(self.controller).__name__))
        if not peers.alone():
            decisions = [Decision(**decided) for decided in peers.told([plain(one) for one in decisions])]
        for notice in getattr(self.controller, "notices", tuple)():
            sink(Event(notice.kind, *self._now, notice.message, dict(notice.data)))
        self.candidates = self._candidates(state, report, sink)
        session.pending = []
        applied: list[Decision] = []
        for index, decision in enumerate(decisions):
            decision, stored, reason = resolve(decision, self.library)
            reason = reason or self._refusal(decision, report, state, session, applied)
            began = time.perf_counter()
            slot = decision.slot
            if reason is None:
                state, slot, reason = self._apply(state, decision, stored, index, report, seeds, sink)
            seconds = time.perf_counter() - began
            outcome = "applied" if reason is None else "refused"
            sink(events.decision(*self._now, decision, outcome=outcome, why=reason or "", seconds=seconds))
            session.pending.append(Pending(decision, outcome, reason or "", report.score, seconds, slot))
            if reason is None:
                applied.append(decision)
                if decision.action == "germinate":
                    session.last_growth = report.epoch
        return state, any(decision.action == "fossilize" for decision in applied)

    def _candidates(self, state: TrainState, report: Report, sink: Sink) -> tuple[Plant, ...]:
        """The seeds that the controller may grow next, likeliest first, if it says so and somebody wants to know."""
        ask = getattr(self.controller, "candidates", None)
        spec, plants = state.morph.spec, []
        try:
            for decision in ask(state.control, report) if ask is not None and self.prefetch else ():
                site = spec.locate(decision.site)[0]
                free = spec.free_slots(site)
                if free:
                    plants.append(dataclasses.replace(lean_plant(decision, spec.by_path[site]), slot=free[0]))
        except Exception as error:  # the controller's own code, or what it names: only a guess is lost
            text = f"the controller's candidates cannot be used, so nothing is compiled ahead: {one_line(error)}"
            if text != self._complaint:
                self._complaint = text
                sink(events.warning(*self._now, text, controller=type(self.controller).__name__))
            return ()
        return tuple(plants)

    def _refusal(
        self, decision: Decision, report: Report, state: TrainState, session: Session, applied: list[Decision]
    ) -> str | None:
        if session.waiting is not None and decision.action == "germinate":
            return f"one change at a time: the program changes for a decision of tick {session.waiting.tick} first"
        return veto(
            decision,
            report,
            state.morph.spec.unrolled,
            applied=tuple(applied),
            last_growth=session.last_growth,
            limits=self.limits,
            gates=self.lifecycle.gates,
        )

    def _apply(
        self,
        state: TrainState,
        decision: Decision,
        stored: Stored | None,
        index: int,
        report: Report,
        seeds: Mapping[Any, Any],
        sink: Sink,
    ) -> tuple[TrainState, int | None, str | None]:
        """The state with the decision carried out; on an error the state is unchanged and the error is the reason."""
        key = jax.random.fold_in(jax.random.fold_in(state.key, _GERMINATION), state.ticks)
        try:
            key = jax.random.fold_in(key, index)
            morph, slot = apply_decision(state.morph, decision, key=key, score=report.score, seed=stored)
        except (ValueError, KeyError, TypeError) as error:
            return state, decision.slot, f"{type(error).__name__}: {error}"
        state = state.replace(morph=morph, opt_state=self.tx.grow(state.opt_state, morph))
        plant = morph.spec.unrolled.plant(decision.site, slot)
        assert plant is not None
        seed = seeds.get((plant.site, slot))
        before = Stage.DORMANT if seed is None else seed.stage
        if decision.action == "germinate":
            size = seed_size(morph, plant)
            at: dict[str, Any] = {"site": plant.site, "slot": slot, "blueprint": plant.blueprint}
            sink(
                events.germinated(*self._now, **at, reason=decision.reason, parameters=size, config=dict(plant.config))
            )
        site, layer = morph.spec.locate(plant.site)
        life = slot_of(morph.state[site], slot)
        after, alpha = (
            int(life.stage[... if layer is None else layer]),
            float(life.alpha[... if layer is None else layer]),
        )
        if before != after:
            sink(_stage(self._now, plant, before, after, decision.reason, alpha))
        return state, slot, None


def _move(lifecycle: Lifecycle, morph: Morph, score: Any) -> Any:
    return operate.tick(morph, score=score, config=lifecycle)


def _with_contributions(state: TrainState, measured: Contributions) -> TrainState:
    life = dict(state.morph.state)
    for (name, slot), value in measured.single.items():
        site, layer = state.morph.spec.locate(name)
        at = (slot,) if layer is None else (layer, slot)
        life[site] = life[site].replace(contribution=life[site].contribution.at[at].set(np.float32(value)))
    return state.replace(morph=state.morph.replace(state=life))


def _stage(
    now: tuple[int, int], plant: Plant, before: Stage | str, after: Stage | int, reason: str, alpha: Any = 0.0
) -> Event:
    at: dict[str, Any] = {"site": plant.site, "slot": plant.slot, "blueprint": plant.blueprint}
    return events.stage(*now, **at, before=before, after=after, reason=reason, alpha=float(alpha))


def _moved_because(stage: Stage, faults: int) -> str:
    """Why a seed entered a stage by itself at a tick."""
    if stage == Stage.PRUNED:
        return f"it was not finite on {faults} steps" if faults else "its scheduled ramp to 0 has ended"
    return {
        Stage.TRAINING: "its program is ready and its parameters are finite (G1)",
        Stage.BLENDING: "it trained long enough with a healthy gradient (G2)",
        Stage.HOLDING: "its alpha has reached 1 (G3)",
    }.get(stage, "rest after a prune")


def _rows(state: TrainState) -> list[dict[str, Any]]:
    """The occupied slots as they stand, for the log and the figure."""
    life = state.morph.spec.by_layer(jax.device_get(state.morph.state))
    rows = []
    for plant in state.morph.spec.unrolled.plants:
        now, slot = life[plant.site], plant.slot
        if now.stage[slot] == Stage.DORMANT:
            continue
        measured = {name: getattr(now, name)[slot].item() for name in _SHOWN}
        stage = Stage(int(now.stage[slot])).name
        rows.append({"site": plant.site, "slot": slot, "blueprint": plant.blueprint, "stage": stage, **measured})
    return rows
