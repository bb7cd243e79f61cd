"""Which decisions are carried out: limits, and the checks before anything changes (contract 23 and 27)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .._checks import real, whole
from ..kasmina.blend import check_blend
from ..kasmina.blueprints import make_plant, seed_shapes
from ..kasmina.gates import PASSED, REASONS, Gates, g5_code
from ..kasmina.spec import Plant, Site, Spec, freeze_config
from ..kasmina.stages import EDGES, LIVE, NEXT, Stage
from ..protocol import ACTIONS, Decision, Report, SeedReport, SiteReport


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a controller may do (contract 27).

    Args:
      confidence, urgency: a decision is applied only above both.
      per_epoch: decisions applied at one tick, at most.
      cooldown: epochs from one growth epoch to the next; 0 or 1 allows each.
      max_parameters: parameters of all seeds together, those at rest included; None sets no budget.
    """

    confidence: float = 0.7
    urgency: float = 0.6
    per_epoch: int = 3
    cooldown: int = 2
    max_parameters: int | None = None

    def __post_init__(self) -> None:
        for name in ("confidence", "urgency"):
            real(name, getattr(self, name), least=0, below=1)
        for name in ("per_epoch", "cooldown"):
            whole(name, getattr(self, name), 0)
        if self.max_parameters is not None:
            whole("max_parameters", self.max_parameters, 0)


def veto(
    decision: Decision,
    report: Report,
    spec: Spec,
    *,
    applied: Sequence[Decision] = (),
    last_growth: int | None = None,
    limits: Limits = Limits(),
    gates: Gates = Gates(),
) -> str | None:
    """Why a decision must not be carried out, or None; nothing is changed by asking (contract 23 and 27).

    A seed may be pruned even where the score is not finite: pruning is what helps then.

    Args:
      decision: what a controller proposes.
      report: the report it was made for.
      spec: the structure as it stands now, decisions already applied at this tick included.
      applied: those decisions.
      last_growth: the epoch of the last applied germination; None if there was none.
      limits: thresholds.
      gates: the run's gates; fossilising needs G5.

    Returns:
      One sentence that names the rule and the values, or None where nothing stands against it.
    """
    if decision.action not in ACTIONS:
        return f"action: {decision.action!r} is not one of {', '.join(ACTIONS)}"
    if decision.site not in spec.by_path:
        return f"site: there is no {decision.site!r}; known: {', '.join(spec.by_path)}"
    for rule in ("confidence", "urgency"):
        value, limit = getattr(decision, rule), getattr(limits, rule)
        if not _finite(value) or not value > limit:
            return f"{rule}: {_show(value)} is not above {limit:g}"
    if not _finite(report.score) and decision.action != "prune":
        return f"finite score: the validation score is {report.score}, and only a prune goes without one"
    if len(applied) >= limits.per_epoch:
        return f"actions per epoch: {len(applied)} were applied already, the limit is {limits.per_epoch}"
    if decision.action == "germinate":
        return _veto_germinate(decision, report, spec, applied, last_growth, limits)
    return _veto_move(decision, report, applied, gates)


def _veto_germinate(
    decision: Decision,
    report: Report,
    spec: Spec,
    applied: Sequence[Decision],
    last_growth: int | None,
    limits: Limits,
) -> str | None:
    site, place = spec.by_path[decision.site], next((s for s in report.sites if s.path == decision.site), None)
    if place is None:
        return f"site: {decision.site!r} is not in the report of epoch {report.epoch}"
    if last_growth is not None and 0 < report.epoch - last_growth < limits.cooldown:
        since = report.epoch - last_growth
        return f"cooldown: growth at epoch {last_growth}, {since} epoch(s) ago; the limit is {limits.cooldown}"
    try:
        planned = _planned(decision, site, place, spec, applied)
        if isinstance(planned, str):
            return planned
        if decision.blueprint not in place.fitting and decision.stored is None:  # its program is newer than the report
            fitting = ", ".join(place.fitting) or "none"
            return f"fit: {decision.blueprint!r} cannot germinate at {site.path!r} now; those that can: {fitting}"
        size = _size(planned, site)
        others = sum(seed.parameters for seed in report.seeds if seed.stage != Stage.DORMANT)
        others += sum(
            _size(lean_plant(d, spec.by_path[d.site]), spec.by_path[d.site]) for d in applied if d.action == "germinate"
        )
    except (KeyError, TypeError, ValueError) as error:
        return f"blueprint: {error}"
    if limits.max_parameters is not None and others + size > limits.max_parameters:
        return (
            f"parameter budget: {size} for {decision.blueprint} and {others} of other seeds exceed the "
            f"limit of {limits.max_parameters}"
        )
    return None


def _planned(decision: Decision, site: Site, place: SiteReport, spec: Spec, applied: Sequence[Decision]) -> Plant | str:
    """The plant that germinating would make or use, found as `germinate` finds it; or why there is none."""
    plant = lean_plant(decision, site)
    taken: set[int] = set()
    for other in applied:
        if other.action == "germinate" and other.site == site.path:
            match = other.slot if other.slot is not None else next(iter(_residents(other, place, spec, taken)), None)
            taken |= set() if match is None else {match}
    residents = _residents(decision, place, spec, taken)
    empty = [slot for slot in place.free_slots if spec.plant(site.path, slot) is None]
    usable = [slot for slot in (*residents, *empty) if decision.slot in (None, slot)]
    if not usable:
        asked = "no slot" if decision.slot is None else f"slot {decision.slot} is not"
        free = ", ".join(map(str, (*residents, *empty))) or "none"
        return f"free slot: {asked} free at {site.path!r} for {decision.blueprint}; free ones: {free}"
    resident = spec.plant(site.path, usable[0])
    return resident or dataclasses.replace(plant, slot=usable[0])


def _residents(decision: Decision, place: SiteReport, spec: Spec, taken: set[int]) -> list[int]:
    """Free slots with a seed planted ahead that the decision may use: same blueprint, config and blend."""
    config, blend = _split(decision)
    return [
        plant.slot
        for plant in spec.planted_at.get(place.path, ())
        if plant.resident
        and plant.slot in place.free_slots
        and plant.slot not in taken
        and plant.blueprint == decision.blueprint
        and blend in (None, plant.blend)
        and set(freeze_config(config)) <= set(plant.config)
    ]


def _split(decision: Decision) -> tuple[dict[str, Any], str | None]:
    """The blueprint's config, and the blend where the decision asks for one."""
    config = dict(decision.config)
    blend = config.pop("blend", None)
    return config, None if blend is None else check_blend(blend)


def lean_plant(decision: Decision, site: Site) -> Plant:
    """The lean plant of a germination, checked against the site."""
    config, blend = _split(decision)
    return make_plant(site, decision.slot or 0, str(decision.blueprint), config, blend or "add", False)


def _size(plant: Plant, site: Site) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(seed_shapes(plant, site)))


def _veto_move(decision: Decision, report: Report, applied: Sequence[Decision], gates: Gates) -> str | None:
    """Checks of an action on a seed that is there."""
    action, where = decision.action, f"{decision.site} slot {decision.slot}"
    seed = next((s for s in report.seeds if (s.site, s.slot) == (decision.site, decision.slot)), None)
    if seed is None:
        slots = ", ".join(str(s.slot) for s in report.seeds if s.site == decision.site) or "none"
        return f"slot: there is no seed at {where}; slots with one: {slots}"
    if any((other.site, other.slot) == (seed.site, seed.slot) for other in applied):
        return f"one action a seed: {where} was acted on at epoch {report.epoch} already"
    if action == "set_alpha":
        return _veto_alpha(decision, seed, where)
    if action == "prune":
        return _veto_prune(decision, seed, where)
    target = Stage.FOSSILIZED if action == "fossilize" else NEXT.get(seed.stage)
    if seed.stage not in LIVE or target not in EDGES[seed.stage]:
        return _illegal(seed, where, action)
    if target == Stage.FOSSILIZED:
        return _veto_fossil(seed, where, gates)
    return _veto_advance(seed, where)


def _veto_prune(decision: Decision, seed: SeedReport, where: str) -> str | None:
    if Stage.PRUNED not in EDGES[seed.stage]:
        return _illegal(seed, where, "prune")
    if decision.steps < 0:
        return f"steps: a ramp cannot take {decision.steps} ticks"
    if decision.steps > 0 and seed.alpha > 0:
        return _veto_ramp(seed, where)
    return None


def _veto_alpha(decision: Decision, seed: SeedReport, where: str) -> str | None:
    if seed.stage not in (Stage.BLENDING, Stage.HOLDING):
        return f"legal stage: alpha moves in BLENDING and HOLDING only, {where} is {seed.stage.name}"
    alpha = decision.alpha
    if alpha is None or not _finite(alpha) or not 0 <= alpha <= 1:
        return f"alpha: {_show(alpha)} is not between 0 and 1"
    if np.float32(alpha) == np.float32(seed.alpha):
        return f"alpha: {where} is at {seed.alpha:g} already"
    if decision.steps < 0:
        return f"steps: a ramp cannot take {decision.steps} ticks"
    return _veto_ramp(seed, where)


def _veto_ramp(seed: SeedReport, where: str) -> str | None:
    if seed.pruning:
        return f"ramp: a scheduled prune of {where} is under way at alpha {seed.alpha:g}"
    if seed.ramping:
        return f"ramp: one is under way at {where}, at alpha {seed.alpha:g}; it must end first"
    return None


def _veto_fossil(seed: SeedReport, where: str, gates: Gates) -> str | None:
    reason = g5_code(seed.stage, seed.contribution, seed.health, gates)
    if reason == PASSED:
        return None
    needed = f">= {gates.min_contribution:g}" if gates.strict else "> 0"
    return (
        f"gate G5: {where} {REASONS[reason]}; contribution {seed.contribution:.3g} (needs {needed} points), health "
        f"{seed.health:.3g} (needs >= {gates.min_health:g})"
    )


def _veto_advance(seed: SeedReport, where: str) -> str | None:
    """Gates G1 to G3 open by themselves at ticks; `advance` does not go around one that is closed or was not asked."""
    if seed.waits_for:
        return f"gate: {where} is {seed.stage.name} and {seed.waits_for}"
    if seed.steps == 0:
        return f"gate: {where} entered {seed.stage.name} at this tick; the next one asks its gate"
    return None


def _illegal(seed: SeedReport, where: str, action: str) -> str:
    legal = ", ".join(target.name for target in EDGES[seed.stage]) or "nothing"
    return f"legal stage: cannot {action} {where} in {seed.stage.name}, which may go to {legal}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and math.isfinite(value)


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else repr(value)
