"""What to do with a seed once it lives: keep it, drop it or wait (contract 26). Shared by all controllers here.

Every decision carries two measured numbers. Both rules below are functions of `x`, how many times over a rule's own
limit a value is, so a rule that is just met gives 0.75 and 0.67, and one that is met twice over 0.94 and 0.8:

- confidence `1 - 4**-x` where one value speaks, and where several were averaged the probability, under a normal
  error, that the mean lies on the side of the limit on which it was seen;
- urgency `x / (x + 0.5)`.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .._checks import finite, one_of, real
from ..kasmina._pytree import Struct, pytree
from ..kasmina.gates import PASSED, REASONS, Gates, g5_code
from ..kasmina.ramp import TEMPOS
from ..kasmina.spec import Spec
from ..kasmina.stages import LIVE, Stage
from ..protocol import Decision, Report, SeedReport

ABSENT = -1
_REST = (Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING)


@pytree
class Watch(Struct):
    """What a controller remembers of every slot: numpy arrays over `S` sites and `L` slots, -1 or NaN for unknown.

    `sites` and `blueprint` are CRC-32 of names, so that no string is needed. `started` is the score when the seed
    germinated; `held` counts the measurements made in HOLDING, with running mean and sum of squared deviations of
    contribution and score over them. `score` is the last report's.
    """

    sites: Any
    stage: Any
    blueprint: Any
    started: Any
    held: Any
    contribution: Any
    contribution_spread: Any
    holding_score: Any
    holding_spread: Any
    score: Any


@dataclasses.dataclass(frozen=True)
class Changes:
    """What happened since the last report: seeds germinated, fossilised and (by blueprint, CRC-32) pruned."""

    germinated: int = 0
    fossilised: int = 0
    pruned: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keeper:
    """When a seed is kept, pruned or left alone. A tick is one call of `decide`; scores are in points.

    Args:
      keep: "contribution" judges seeds by what follows; "always" prunes none and fossilises each as soon as gate G5
        opens (a seed that G5 never lets through stays in HOLDING).
      gates: the run's own thresholds of the gates, of which G5 is used.
      tempo: ticks over which a seed with alpha > 0 is ramped down before it is pruned (3, 5 or 8).
      min_stage: ticks in a stage before a fall of the score counts against the seed.
      max_fall: points the score may fall since the stage began.
      min_holding: measurements of the contribution in HOLDING before it is judged, so that noise does not decide.
      max_holding: ticks in HOLDING after which the mean decides however noisy it is.
      patience: ticks a seed may wait in a stage before HOLDING for a gate that does not open.
      dependency: a contribution above it with a score below that at germination is a dependency, not a gain.
      resolution: differences in points below this are not told apart: the error assumed where measurements agree.
    """

    keep: str = "contribution"
    gates: Gates = Gates()
    tempo: int = 5
    min_stage: int = 5
    max_fall: float = 2.0
    min_holding: int = 3
    max_holding: int = 12
    patience: int = 40
    dependency: float = 0.1
    resolution: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.keep, str) or self.keep not in ("contribution", "always"):
            raise ValueError(f"keep must be 'contribution' or 'always', got {self.keep!r}")
        one_of("gates", self.gates, Gates, "Gates()")
        if not isinstance(self.tempo, int | np.integer) or self.tempo not in TEMPOS:
            raise ValueError(f"tempo must be one of {', '.join(map(str, TEMPOS))} ticks, got {self.tempo!r}")
        positive(self, "min_stage", "min_holding", "max_holding", "patience", whole=True)
        positive(self, "max_fall", "resolution")
        if self.max_holding < self.min_holding:
            raise ValueError(f"max_holding must be min_holding={self.min_holding} or more, got {self.max_holding}")
        real("dependency", self.dependency, least=0)

    def watch(self, spec: Spec) -> Watch:
        """The memory before the first report."""
        shape = (len(spec.sites), spec.slots)
        codes = [code(site.path) for site in spec.sites]
        if len(set(codes)) < len(codes):
            raise ValueError("two sites of this morph have the same CRC-32; rename one of the host's layers")
        return Watch(
            sites=np.array(codes, np.uint32),
            stage=np.full(shape, ABSENT, np.int32),
            blueprint=np.zeros(shape, np.uint32),
            started=np.full(shape, np.nan, np.float32),
            held=np.zeros(shape, np.int32),
            contribution=np.zeros(shape, np.float32),
            contribution_spread=np.zeros(shape, np.float32),
            holding_score=np.zeros(shape, np.float32),
            holding_spread=np.zeros(shape, np.float32),
            score=np.array(np.nan, np.float32),
        )

    def observe(self, watch: Watch, report: Report) -> tuple[Watch, Changes]:
        """The memory with this report in it, and what happened since the last one."""
        before = np.asarray(watch.stage)
        new = Watch(**{field.name: np.array(getattr(watch, field.name)) for field in dataclasses.fields(Watch)})
        new.stage[...] = ABSENT
        for row, slot, seed in self._located(watch, report):
            new.stage[row, slot] = seed.stage
            if seed.stage != Stage.DORMANT:
                new.blueprint[row, slot] = code(seed.blueprint)
            _note(new, (row, slot), seed, report, fresh=int(before[row, slot]) not in (*LIVE, Stage.FOSSILIZED))
        new.score[...] = report.score
        was_live, is_live = np.isin(before, LIVE), np.isin(new.stage, LIVE)
        rests = np.isin(new.stage, _REST)
        gone = (was_live & ((new.stage == ABSENT) | (new.stage == Stage.DORMANT))) | (rests & ~np.isin(before, _REST))
        changes = Changes(
            germinated=int(np.sum(is_live & ~was_live)),
            fossilised=int(np.sum((new.stage == Stage.FOSSILIZED) & (before != Stage.FOSSILIZED))),
            pruned=tuple(int(name) for name in new.blueprint[gone]),
        )
        return new, changes

    def judge(self, watch: Watch, report: Report) -> tuple[Decision, ...]:
        """Decisions about the seeds that live, from a memory that has observed this report.

        A seed whose contribution is never measured in HOLDING is neither kept nor pruned for it.
        """
        judged = (self._judge(watch, (row, slot), seed, report) for row, slot, seed in self._located(watch, report))
        return tuple(decision for decision in judged if decision is not None)

    def _located(self, watch: Watch, report: Report) -> Iterator[tuple[int, int, SeedReport]]:
        rows = {int(name): row for row, name in enumerate(np.asarray(watch.sites))}
        for seed in report.seeds:
            row = rows.get(code(seed.site))
            if row is None or not 0 <= seed.slot < np.shape(watch.stage)[1]:
                raise ValueError(f"{seed.site} slot {seed.slot} is reported, but the controller was started without it")
            yield row, seed.slot, seed

    def _judge(self, watch: Watch, at: tuple[int, int], seed: SeedReport, report: Report) -> Decision | None:
        if seed.stage not in LIVE or seed.pruning:
            return None
        if self.keep == "always":
            gate = gate5(seed, self.gates)
            if gate or seed.steps < 1 or not math.isfinite(report.score):
                return None
            reason = f"every seed is kept, and this one contributes {seed.contribution:.2f} points"
            return Decision("fossilize", seed.site, seed.slot, seed.blueprint, reason=reason)
        return self._harm(seed, report) or self._stuck(seed) or self._verdict(watch, at, seed, report)

    def _harm(self, seed: SeedReport, report: Report) -> Decision | None:
        fall = seed.stage_score - report.score
        if not (fall > self.max_fall and seed.steps >= self.min_stage):
            return None
        reason = (
            f"the score fell {fall:.2f} points, from {seed.stage_score:.2f} to {report.score:.2f}, in {seed.steps} "
            f"ticks of {seed.stage.name} (limit {self.max_fall:g})"
        )
        return self._prune(seed, sure(fall / self.max_fall), pressing(fall / self.max_fall), reason)

    def _stuck(self, seed: SeedReport) -> Decision | None:
        if seed.stage == Stage.HOLDING or seed.ramping or seed.steps <= self.patience:
            return None
        x = seed.steps / self.patience
        why = f": it {seed.waits_for}" if seed.waits_for else ""
        reason = f"{seed.steps} ticks in {seed.stage.name} (limit {self.patience}) and the gate has not opened{why}"
        return self._prune(seed, sure(x), pressing(x), reason)

    def _verdict(self, watch: Watch, at: tuple[int, int], seed: SeedReport, report: Report) -> Decision | None:
        """A HOLDING seed that was measured often enough: fossilise, prune, or None to wait."""
        held = int(watch.held[at])
        if seed.stage != Stage.HOLDING or held < self.min_holding or seed.steps < self.min_holding:
            return None
        if not math.isfinite(report.score):
            return None
        contribution = float(watch.contribution[at])
        error = self._error(held, float(watch.contribution_spread[at]))
        late = sure(seed.steps / self.max_holding) if seed.steps >= self.max_holding else 0.0
        urgency = pressing(seed.steps / self.min_holding)
        measured = f"contribution {contribution:.2f} +- {error:.2f} points over {held} measurements"
        total = float(watch.holding_score[at]) - float(watch.started[at])
        if contribution > self.dependency and total < 0:
            confidence = max(normal(-total / self._error(held, float(watch.holding_spread[at]))), late)
            reason = f"{measured}, but the score is {total:+.2f} points since germination: a dependency, not a gain"
            return self._prune(seed, confidence, urgency, reason)
        needed = self.gates.min_contribution if self.gates.strict else 0.0
        enough = contribution >= needed if self.gates.strict else contribution > needed
        sign = ">=" if self.gates.strict else ">"
        if not enough:
            confidence = max(normal((needed - contribution) / error), late)
            return self._prune(seed, confidence, urgency, f"{measured} is not {sign} {needed:g}")
        gate = gate5(seed, self.gates)
        if not gate:
            confidence = max(normal((contribution - needed) / error), late)
            reason = f"{measured} is {sign} {needed:g}, health {seed.health:.2f}"
            return _decision("fossilize", seed, confidence, urgency, reason)
        if late:
            limit = f"{seed.steps} ticks in HOLDING (limit {self.max_holding})"
            return self._prune(seed, late, urgency, f"{limit} and gate G5 has not opened: {gate}; {measured}")
        return None

    def _error(self, count: int, spread: float) -> float:
        """The standard error of a mean of `count` values, with `resolution` as one more deviation seen."""
        return math.sqrt((spread + self.resolution**2) / count) / math.sqrt(count)

    def _prune(self, seed: SeedReport, confidence: float, urgency: float, reason: str) -> Decision:
        """Scheduled where the seed has a share of the output and no ramp is under way; else at once (contract 13)."""
        steps = self.tempo if seed.alpha > 0 and not seed.ramping else 0
        if seed.alpha > 0 and seed.ramping:
            reason += f"; at once, since a ramp is under way at alpha {seed.alpha:.2f}"
        return _decision("prune", seed, confidence, urgency, reason, steps)


def gate5(seed: SeedReport, gates: Gates) -> str:
    """Why gate G5 does not let the seed through, with the value; empty where it does. It is the gate's own code."""
    reason = g5_code(seed.stage, seed.contribution, seed.health, gates)
    if reason == PASSED:
        return ""
    return f"it {REASONS[reason]} (contribution {seed.contribution:.2f}, health {seed.health:.2f}, {seed.stage.name})"


def sure(x: float) -> float:
    """Confidence of one value that is `x` times its limit: 0.75 at the limit, 0.94 at twice."""
    return 1.0 - 4.0 ** -max(x, 0.0)


def pressing(x: float) -> float:
    """Urgency of a value that is `x` times its limit: 0.67 at the limit, 0.8 at twice."""
    return max(x, 0.0) / (max(x, 0.0) + 0.5)


def normal(z: float) -> float:
    """The standard normal distribution function."""
    return 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))


def code(name: str) -> int:
    """CRC-32 of a name: what a state of arrays holds in its place."""
    return zlib.crc32(name.encode())


def positive(config: Any, *names: str, whole: bool = False) -> None:
    """Raise ValueError, naming the field, unless all are finite numbers above 0 (whole ones if `whole`)."""
    for name in names:
        value = getattr(config, name)
        if not finite(value) or value <= 0 or (whole and not isinstance(value, int | np.integer)):
            raise ValueError(f"{name} must be a {'whole ' if whole else ''}number above 0, got {value!r}")


def _note(watch: Watch, at: tuple[int, int], seed: SeedReport, report: Report, *, fresh: bool) -> None:
    """Fold one report of one seed into a writable memory; `fresh`: the slot was empty or at rest before."""
    if fresh and seed.stage in LIVE:
        known = seed.stage_score if seed.stage in (Stage.GERMINATED, Stage.TRAINING) else math.nan
        watch.started[at] = watch.score if np.isfinite(watch.score) else known
    if seed.stage != Stage.HOLDING or seed.steps == 0:
        watch.held[at] = 0
        watch.contribution[at] = watch.contribution_spread[at] = 0
        watch.holding_score[at] = watch.holding_spread[at] = 0
    elif math.isfinite(seed.contribution) and math.isfinite(report.score):
        watch.held[at] += 1
        _fold(watch.contribution, watch.contribution_spread, watch.held, at, seed.contribution)
        _fold(watch.holding_score, watch.holding_spread, watch.held, at, report.score)


def _fold(mean: Any, spread: Any, count: Any, at: tuple[int, int], value: float) -> None:
    """Welford's running mean and sum of squared deviations (1962)."""
    old = float(mean[at])
    mean[at] = old + (value - old) / float(count[at])
    spread[at] += (value - old) * (value - float(mean[at]))


def _decision(
    action: str, seed: SeedReport, confidence: float, urgency: float, reason: str, steps: int = 0
) -> Decision:
    return Decision(
        action, seed.site, seed.slot, seed.blueprint, steps=steps, confidence=confidence, urgency=urgency, reason=reason
    )
