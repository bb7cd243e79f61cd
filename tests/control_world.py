"""A small world for tests of control: real lifecycle and veto, scores and measurements given by the test."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.kasmina import lifecycle
from esper_jax.kasmina.blueprints import make_plant, registered
from esper_jax.kasmina.gates import PASSED, REASONS
from esper_jax.kasmina.lifecycle import Lifecycle
from esper_jax.kasmina.spec import Plant, Site, Spec
from esper_jax.kasmina.stages import Stage
from esper_jax.kasmina.state import SeedState, blends, computes
from esper_jax.protocol import Decision, Feedback, Report, SeedReport, SiteReport
from esper_jax.tolaria.veto import Limits, veto

NAN = float("nan")
SITES = tuple(Site(path, "dense", (8,), (8,)) for path in ("a", "b", "c"))


def site_report(site: Site, free=(0, 1), fitting=("lora", "mlp", "norm"), gain=1.0) -> SiteReport:
    return SiteReport(site.path, site.kind, tuple(free), tuple(fitting), 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, gain, 1)


def seed_report(site="a", slot=0, blueprint="lora", stage=Stage.HOLDING, **values) -> SeedReport:
    alpha = 1.0 if Stage.HOLDING <= stage <= Stage.FOSSILIZED else 0.0
    defaults = {"alpha": alpha, "age": 9, "steps": 5, "faults": 0, "health": 1.0, "ratio": 1.0, "contribution": NAN}
    defaults |= {"stage_score": NAN, "parameters": 128, "pruning": False, "ramping": False}
    return SeedReport(site, slot, blueprint, stage, **(defaults | values))


def report(epoch=10, score=50.0, loss=1.0, sites=None, seeds=(), train_loss=1.0) -> Report:
    sites = tuple(site_report(site) for site in SITES) if sites is None else tuple(sites)
    return Report(epoch, 100 * epoch, train_loss, loss, score, sites, tuple(seeds))


def sites_of(spec: Spec, stages: Mapping[tuple[str, int], Stage], gain: Mapping[str, float]) -> tuple[SiteReport, ...]:
    """Site reports as Tolaria makes them: empty slots and dormant residents are free."""
    found = []
    for site in spec.sites:
        plants = spec.planted_at.get(site.path, ())
        dormant = [p for p in plants if p.resident and stages[site.path, p.slot] == Stage.DORMANT]
        empty = spec.free_slots(site.path)
        fitting = {b.name for b in registered() if b.fits(site)} if empty else {p.blueprint for p in dormant}
        free = sorted((*empty, *(p.slot for p in dormant)))
        found.append(site_report(site, free, sorted(fitting), gain.get(site.path, NAN)))
    return tuple(found)


@functools.cache
def _tick(config: Lifecycle):
    """A tick of one site, after what was measured is noted."""

    def tick(state: SeedState, score, contribution, health):
        measured = blends(state.stage) & (state.stage != Stage.FOSSILIZED)
        state = state.replace(
            contribution=jnp.where(measured, contribution, state.contribution),
            health=jnp.where(computes(state.stage), health, state.health),
            exploding=jnp.where(computes(state.stage), 0.0, state.exploding),
        )
        return lifecycle.tick(state, score=score, config=config)

    return jax.jit(tick)


@functools.partial(jax.jit, static_argnames=("action", "steps"))
def _move(state: SeedState, slot, score, action: str, steps: int):
    mask = jnp.arange(state.stage.shape[0]) == slot
    if action == "prune" and steps:
        return lifecycle.schedule_prune(state, mask, steps)
    stage = {"germinate": Stage.GERMINATED, "fossilize": Stage.FOSSILIZED, "prune": Stage.PRUNED}[action]
    return lifecycle.transition(state, mask, stage, score)


class World:
    """Runs a controller on seeds that live by the real lifecycle. `log` holds (epoch, decision, refusal)."""

    def __init__(self, controller, *, slots=2, residents: tuple[Plant, ...] = (), limits=Limits(), key=0, sites=SITES):
        self.controller, self.limits = controller, limits
        gates = dataclasses.replace(controller.gates)
        self.config = Lifecycle(gates=gates)
        self.spec = Spec(tuple(sites), slots, tuple(residents))
        self.life = {site.path: jax.device_get(SeedState.empty(slots)) for site in sites}
        self.control = controller.init(self.spec, np.array([0, key], np.uint32))
        self.epoch, self.pending, self.last_growth = 0, (), None
        self.log: list[tuple[int, Decision, str | None]] = []
        self.report: Report | None = None

    def tick(
        self,
        score=50.0,
        loss=1.0,
        gain: Mapping[str, float] | None = None,
        contribution: float | Callable[[str, int], float] = 1.5,
        health: float = 1.0,
    ) -> list[tuple[Decision, str | None]]:
        self.epoch += 1
        waits = {}
        for path, state in self.life.items():
            values = [contribution(path, s) if callable(contribution) else contribution for s in range(self.spec.slots)]
            ticked = _tick(self.config)(state, np.float32(score), np.float32(values), np.float32(health))
            self.life[path], ticked = jax.device_get(ticked)
            waits[path] = (ticked.reason, ticked.before == ticked.after)
        self.report = self._report(score, loss, gain or {}, waits)
        decisions, self.control = self.controller.decide(self.control, self.report, self.pending)
        answered, applied, feedback = [], [], []
        for decision in decisions:
            refusal = veto(
                decision,
                self.report,
                self.spec,
                applied=applied,
                last_growth=self.last_growth,
                limits=self.limits,
                gates=self.config.gates,
            )
            if refusal is None:
                self._apply(decision, score)
                applied.append(decision)
                self.last_growth = self.epoch if decision.action == "germinate" else self.last_growth
            outcome = "applied" if refusal is None else "refused"
            feedback.append(Feedback(decision, outcome, refusal or "", score, NAN, NAN, NAN))
            answered.append((decision, refusal))
            self.log.append((self.epoch, decision, refusal))
        self.pending = tuple(feedback)
        self._shed()
        return answered

    def until(self, action: str, limit: int = 80, **values) -> Decision:
        """Tick until such a decision is applied; `values` may be functions of the epoch about to come."""
        for _ in range(limit):
            given = {k: v(self.epoch + 1) if k in ("score", "loss") and callable(v) else v for k, v in values.items()}
            for decision, refusal in self.tick(**given):
                if decision.action == action and refusal is None:
                    return decision
        raise AssertionError(f"no {action} in {limit} ticks: {self.log}")

    def stage(self, site: str, slot: int = 0) -> Stage:
        return Stage(int(self.life[site].stage[slot]))

    def _report(self, score, loss, gain, waits) -> Report:
        life = self.life
        stages = {(p.site, p.slot): Stage(int(life[p.site].stage[p.slot])) for p in self.spec.plants}
        seeds = []
        for plant in self.spec.plants:
            now, slot = life[plant.site], plant.slot
            if stages[plant.site, slot] == Stage.DORMANT:
                continue
            reason, stayed = (array[slot] for array in waits[plant.site])
            names = ("alpha", "age", "steps", "faults", "health", "ratio", "contribution", "stage_score")
            seeds.append(
                SeedReport(
                    plant.site,
                    slot,
                    plant.blueprint,
                    stages[plant.site, slot],
                    **{name: getattr(now, name)[slot].item() for name in names},
                    parameters=100,
                    pruning=bool(now.pruning[slot]),
                    ramping=bool(now.ramp_done[slot] < now.ramp_steps[slot]),
                    waits_for=REASONS[reason] if stayed and reason != PASSED else "",
                )
            )
        sites = sites_of(self.spec, stages, {site.path: 1.0 for site in self.spec.sites} | dict(gain))
        return Report(self.epoch, self.epoch, loss, loss, score, sites, tuple(seeds))

    def _apply(self, decision: Decision, score: float) -> None:
        site, slot = decision.site, decision.slot
        if decision.action == "germinate":
            plants = self.spec.planted_at.get(site, ())
            ready = [p.slot for p in plants if p.resident and self.stage(site, p.slot) == Stage.DORMANT]
            ready = [s for s in ready if self.spec.plant(site, s).blueprint == decision.blueprint]
            if ready:
                slot = ready[0]
            else:
                slot = self.spec.free_slots(site)[0]
                plant = make_plant(self.spec.by_path[site], slot, decision.blueprint, decision.config, "add", False)
                self.spec = self.spec.with_plant(plant)
        moved = _move(self.life[site], slot, np.float32(score), decision.action, decision.steps)
        self.life[site], ok = jax.device_get(moved)
        assert bool(ok[slot]), f"veto let {decision} through, the lifecycle did not"

    def _shed(self) -> None:
        for plant in self.spec.plants:
            if not plant.resident and self.stage(plant.site, plant.slot) == Stage.DORMANT:
                self.spec = self.spec.without(plant.site, plant.slot)
