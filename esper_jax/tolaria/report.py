"""From arrays to the `Report` a controller reads; the one place where a tick's measurements are fetched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ..kasmina.blueprints import registered
from ..kasmina.gates import PASSED, REASONS
from ..kasmina.health import AILING, site_health
from ..kasmina.lifecycle import Ticked
from ..kasmina.morph import Morph, count
from ..kasmina.probe import Probe
from ..kasmina.spec import Plant, Spec
from ..kasmina.stages import Stage
from ..protocol import HealthSignal, Report, SeedReport, SiteReport
from .state import Meters, TrainState

NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One tick's numbers before they become a report."""

    train_loss: float
    loss: float
    score: float
    interactions: Mapping[Any, float]


def make_report(state: TrainState, measured: Measured, ticked: Mapping[str, Ticked]) -> Report:
    """The report of a tick from the state after it; everything the controller may know, as plain numbers."""
    morph, spec = state.morph, state.morph.spec
    life, meters, moved, step, ticks = jax.device_get(
        (morph.state, state.meters, dict(ticked), state.step, state.ticks)
    )
    life, moved, stats, gradients = map(spec.by_layer, (life, moved, meters.stats, meters.gradients))
    spec = spec.unrolled
    return Report(
        epoch=int(ticks),
        step=int(step),
        train_loss=measured.train_loss,
        loss=measured.loss,
        score=measured.score,
        sites=tuple(_site_report(spec, path, stats[path], gradients[path], life) for path in spec.by_path),
        seeds=tuple(
            _seed_report(seed_size(morph, plant), plant, life[plant.site], moved.get(plant.site))
            for plant in spec.plants
            if life[plant.site].stage[plant.slot] != Stage.DORMANT
        ),
        interactions=measured.interactions,
    )


def changed_health(report: Report, last: Mapping[str, Any] | None) -> tuple[HealthSignal, ...]:
    """The signals of sites and seeds that fell below `AILING` since the last tick's record, or rose above it again.

    What was never measured counts as well; what is not measured now gives no signal.
    """
    before: dict[tuple[str, int | None], float] = {}
    if last is not None:
        before = {(path, None): site.get("health", NAN) for path, site in last.get("sites", {}).items()}
        before |= {(seed["site"], seed["slot"]): seed["health"] for seed in last.get("seeds", ())}
    ailing = lambda health: health < AILING  # noqa: E731  (NaN is not)
    return tuple(
        signal
        for signal in report.signals()
        if not np.isnan(signal.health) and ailing(signal.health) != ailing(before.get((signal.site, signal.slot), NAN))
    )


def mean_loss(meters: Meters) -> float:
    """The mean training loss since the last tick over the batches that counted; NaN where none did."""
    loss, batches, skipped = jax.device_get((meters.loss, meters.batches, meters.skipped))
    return float(loss / (batches - skipped)) if batches > skipped else NAN


def seed_size(morph: Morph, plant: Plant) -> int:
    """The parameters of a seed; in a stack, those of one layer's."""
    path, layer = morph.spec.locate(plant.site)
    whole = count(morph.seeds[path][plant.key])
    return whole if layer is None else whole // morph.spec.by_path[path].layers


def _site_report(spec: Spec, path: str, stats: Any, gradient: Any, life: Mapping[str, Any]) -> SiteReport:
    site = spec.by_path[path]
    probe = Probe(*np.asarray(stats, np.float64))
    calls = float(probe.calls)
    mean = lambda value: float(value) / calls if calls else NAN  # noqa: E731
    dormant = [
        plant
        for plant in spec.planted_at.get(path, ())
        if plant.resident and life[path].stage[plant.slot] == Stage.DORMANT
    ]
    empty = spec.free_slots(path)
    fitting = {b.name for b in registered() if b.fits(site)} if empty else {plant.blueprint for plant in dormant}
    measured = {
        "variance": mean(probe.variance),
        "dead": mean(probe.dead),
        "silent": mean(probe.silent),
        "correlation": mean(probe.correlation),
        "gradient": mean(gradient),
    }
    faults = [(int(life[path].faults[p.slot]), int(life[path].age[p.slot])) for p in spec.planted_at.get(path, ())]
    return SiteReport(
        path=path,
        kind=site.kind,
        free_slots=tuple(sorted((*empty, *(plant.slot for plant in dormant)))),
        fitting=tuple(sorted(fitting)),
        **measured,
        signal=mean(probe.gradient),
        gain=mean(probe.gain),
        calls=int(calls),
        health=site_health(**measured, faults=faults).score,
    )


def _seed_report(parameters: int, plant: Plant, life: Any, ticked: Any) -> SeedReport:
    slot = plant.slot
    reason = PASSED if ticked is None else int(ticked.reason[slot])
    moved = ticked is not None and int(ticked.before[slot]) != int(ticked.after[slot])
    return SeedReport(
        site=plant.site,
        slot=slot,
        blueprint=plant.blueprint,
        stage=Stage(int(life.stage[slot])),
        alpha=float(life.alpha[slot]),
        age=int(life.age[slot]),
        steps=int(life.steps[slot]),
        faults=int(life.faults[slot]),
        health=float(life.health[slot]),
        ratio=float(life.ratio[slot]),
        contribution=float(life.contribution[slot]),
        stage_score=float(life.stage_score[slot]),
        parameters=parameters,
        pruning=bool(life.pruning[slot]),
        ramping=bool(life.ramp_done[slot] < life.ramp_steps[slot]),
        waits_for="" if reason == PASSED or moved else REASONS[reason],
    )
