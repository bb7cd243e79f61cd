"""What training and control say to each other: reports, decisions and feedback. Plain host data, no arrays.

Tolaria makes a `Report` at each tick and applies `Decision`s; any controller (Tamiyo's or a user's) is an object with
`init` and `decide`. Scores are in points: percentage points of accuracy, or a task's own score x 100.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from .kasmina.health import site_health
from .kasmina.spec import Spec
from .kasmina.stages import Stage
from .kasmina.stored import Stored

ACTIONS = ("germinate", "fossilize", "prune", "set_alpha", "advance")
NOTICES = ("answer", "outage", "recovery")
"""Kinds of notice that a remote controller gives: an answer was used, answers stay away, they come again."""
REMOTE = "the controller at "
"""How the `service` in the data of such a notice begins; its URL follows."""


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One site as measured since the last tick; a float is NaN where nothing was measured.

    `health` weighs the others in one number in [0, 1] (see `kasmina.health`).
    `gain` is the first-order decrease of the loss per unit of learning rate of a new zero linear layer there;
    `gradient` the norm of the site's own parameter gradient, `signal` that of the gradient at its output.
    """

    path: str
    kind: str
    free_slots: tuple[int, ...]
    fitting: tuple[str, ...]
    variance: float
    dead: float
    silent: float
    correlation: float
    gradient: float
    signal: float
    gain: float
    calls: int
    health: float = math.nan


@dataclasses.dataclass(frozen=True)
class SeedReport:
    """One occupied slot. `waits_for` says in words which gate it failed at the last tick, or is empty."""

    site: str
    slot: int
    blueprint: str
    stage: Stage
    alpha: float
    age: int
    steps: int
    faults: int
    health: float
    ratio: float
    contribution: float
    stage_score: float
    parameters: int
    pruning: bool
    ramping: bool
    waits_for: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What is known at a tick. `interactions` maps pairs of `(site, slot)` to f(ij) - f(i) - f(j) + f(0)."""

    epoch: int
    step: int
    train_loss: float
    loss: float
    score: float
    sites: tuple[SiteReport, ...]
    seeds: tuple[SeedReport, ...]
    interactions: Mapping[tuple[tuple[str, int], tuple[str, int]], float] = dataclasses.field(default_factory=dict)

    def signals(self) -> tuple[HealthSignal, ...]:
        """The health of every site and of every seed that computes, each with where and when."""
        at = {"epoch": self.epoch, "step": self.step}
        sites = tuple(
            HealthSignal(site.path, None, health=site.health, terms=terms(site, self.seeds), **at)
            for site in self.sites
        )
        seeds = tuple(
            HealthSignal(seed.site, seed.slot, health=seed.health, terms={}, **at)
            for seed in self.seeds
            if Stage.TRAINING <= seed.stage <= Stage.FOSSILIZED
        )
        return sites + seeds


@dataclasses.dataclass(frozen=True)
class HealthSignal:
    """The health of a layer (`slot` None) or of the seed in a slot, in [0, 1] and NaN where it was not measured.

    `terms` are those of `kasmina.health.site_health`, for a layer; a seed's health is that of its gradient.
    """

    site: str
    slot: int | None
    epoch: int
    step: int
    health: float
    terms: Mapping[str, float]


def terms(site: SiteReport, seeds: tuple[SeedReport, ...]) -> Mapping[str, float]:
    """The terms of a site's health, from its report and those of the seeds there."""
    return site_health(
        variance=site.variance,
        dead=site.dead,
        silent=site.silent,
        correlation=site.correlation,
        gradient=site.gradient,
        faults=[(seed.faults, seed.age) for seed in seeds if seed.site == site.path],
    ).terms


@dataclasses.dataclass(frozen=True)
class Decision:
    """One proposed action. Tolaria applies it only when confidence > 0.7 and urgency > 0.6 and nothing vetoes it.

    `stored` is the id of a seed in the run's library (`Tolaria(urza=...)`): it is germinated with its own parameters,
    and `blueprint` and `config` may be left out.
    """

    action: str
    site: str
    slot: int | None = None
    blueprint: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alpha: float | None = None
    steps: int = 0
    confidence: float = 1.0
    urgency: float = 1.0
    reason: str = ""
    stored: str | None = None

    def __str__(self) -> str:
        what = f" {self.blueprint}" if self.blueprint else ""
        what += f" (stored {self.stored[:12]})" if self.stored else ""
        slot = "" if self.slot is None else f" slot {self.slot}"
        return f"{self.action}{what} at {self.site}{slot}"


@dataclasses.dataclass(frozen=True)
class Feedback:
    """The measured answer to a decision, given at the tick after it was applied (at once when refused).

    `outcome` is "applied" or "refused"; `reason` names the rule that refused it and the values. `seconds` is the wall
    time that carrying it out took; it is for people and the log, and no shipped controller decides by it.
    """

    decision: Decision
    outcome: str
    reason: str
    score_before: float
    score_after: float
    contribution: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Notice:
    """Something a controller has to say for the run's log: an event's kind, a sentence and JSON-able data.

    A controller with a method `notices()` is asked for them after each `decide`; they become events of that tick,
    before the decisions are applied.
    """

    kind: str
    message: str
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Library(Protocol):
    """Gives stored seeds by their ids, as `Urza` does."""

    def get(self, seed: str, /, *, program: bool = False) -> Stored:
        """The seed of that id, ready to germinate. Whatever it raises refuses the decision that named it.

        `program` asks for its stored forward pass, registered as a blueprint of its own.
        """
        ...


@runtime_checkable
class Controller(Protocol):
    """Decides when, where and what to grow. Its state is a pytree of numpy arrays, kept in the TrainState."""

    def init(self, spec: Spec, key: Any) -> Any:
        """The controller's first state: a pytree of numpy arrays (`key` a uint32 array for its own random choices)."""
        ...

    def decide(self, state: Any, report: Report, feedback: tuple[Feedback, ...]) -> tuple[tuple[Decision, ...], Any]:
        """Decisions for this report and the next state. The same state, report and feedback give the same answer.

        `Feedback.seconds` may be NaN after a resume and must not steer decisions.
        """
        ...
