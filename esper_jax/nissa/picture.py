"""A run as it stands, folded from its events as they come: what `esper-jax watch` shows."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

from .clean import clean as _clean
from .event import Event, Kind

_TOLD = (
    Kind.STAGE,
    Kind.FAULT,
    Kind.ROLLBACK,
    Kind.OUTAGE,
    Kind.RECOVERY,
    Kind.DROPPED,
    Kind.WARNING,
    Kind.RESUMED,
    Kind.EARLY_STOP,
)


class Point(NamedTuple):
    """One validation."""

    epoch: int
    step: int
    score: float


class Told(NamedTuple):
    """Something worth a line: a decision, or what happened."""

    epoch: int
    step: int
    kind: str
    outcome: str
    text: str


class Picture:
    """Give it every event in order with `add`, and read the attributes.

    Events may come from another program: what cannot be understood is counted in `unread` and changes nothing, and no
    text carries control characters.

    Attributes:
      planned: epochs that the run wants, None where unknown.
      points: every validation's score.
      metrics, seeds, sites: of the last validation.
      decisions, told: the newest of each, oldest first.
      ended: how the run ended, or an empty string.
      seen: seconds since 1970 of the last event.
    """

    def __init__(self, keep: int = 50) -> None:
        self.planned: int | None = None
        self.points: list[Point] = []
        self.decisions: deque[Told] = deque(maxlen=keep)
        self.told: deque[Told] = deque(maxlen=keep)
        self.faults = self.rollbacks = self.events = self.unread = 0
        self.ended = ""
        self.seen = math.nan
        self._epochs: deque[Event] = deque(maxlen=keep)
        self.epoch = self.step = 0

    @property
    def metrics(self) -> dict[str, Any]:
        """The data of the last validation."""
        return self._epochs[-1].data if self._epochs else {}

    @property
    def seeds(self) -> list[dict[str, Any]]:
        """The occupied slots at the last validation."""
        return list(self.metrics.get("seeds", []))

    @property
    def sites(self) -> dict[str, dict[str, Any]]:
        """What was measured at the sites at the last validation."""
        return dict(self.metrics.get("sites", {}))

    @property
    def best(self) -> float:
        """The highest score so far; NaN before the first."""
        return max((point.score for point in self.points if math.isfinite(point.score)), default=math.nan)

    def add(self, event: Event) -> None:
        """Take the next event into the picture."""
        self.events += 1
        try:
            self._add(event)
        except (KeyError, TypeError, ValueError, AttributeError):
            self.unread += 1
        else:
            self.seen = event.time

    def _add(self, event: Event) -> None:
        data, kind = event.data, event.kind
        if kind == Kind.RUN_STARTED:
            self.planned = int(data["epochs"])
            self.ended = ""
        elif kind == Kind.RESUMED:
            self._rewind(event.step, event.epoch)
        elif kind == Kind.EPOCH:
            clean, score = _clean(data), float(data["score"])
            _check(clean)
            self._epochs.append(Event(kind, event.epoch, event.step, "", clean, event.time))
            self.points.append(Point(event.epoch, event.step, score))
        elif kind == Kind.RUN_ENDED:
            self.ended = _clean(str(data["outcome"]))
        elif kind == Kind.DECISION:
            outcome = _clean(str(data["outcome"]))
            text = _clean(event.message).removeprefix(f"{outcome}: ")
            self.decisions.append(Told(event.epoch, event.step, kind, outcome, text))
        self.faults += kind == Kind.FAULT
        self.rollbacks += kind == Kind.ROLLBACK
        if kind in _TOLD:
            self.told.append(
                Told(event.epoch, event.step, kind, _clean(str(data.get("after", ""))), _clean(event.message))
            )
        self.epoch, self.step = event.epoch, event.step

    def _rewind(self, step: int, epoch: int) -> None:
        """The run went on from a checkpoint: what came after it did not happen."""
        self.points = [point for point in self.points if point.step <= step and point.epoch <= epoch]
        for kept in (self.decisions, self.told):
            old = [one for one in kept if one.step <= step and one.epoch <= epoch]
            kept.clear()
            kept.extend(old)
        epochs = [event for event in self._epochs if event.step <= step and event.epoch <= epoch]
        self._epochs.clear()
        self._epochs.extend(epochs)
        self.ended = ""


def _check(data: dict[str, Any]) -> None:
    """Raise where an epoch's data could not be shown."""
    for seed in data.get("seeds", []):
        str(seed["site"]), str(seed["slot"]), str(seed["blueprint"]), seed["stage"].lower()
        for name in ("alpha", "contribution"):
            float(seed.get(name, math.nan))
    for site in data.get("sites", {}).values():
        for value in site.values():
            float(value)
