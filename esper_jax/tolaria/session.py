"""What a run remembers between ticks beside its arrays: pending feedback, history and the last good snapshot."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from ..protocol import Decision, Feedback
from . import snapshot as _snapshot
from .swap import Waiting

NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Pending:
    """An applied decision that waits for the next tick's measurements, or a refused one that waits to be told."""

    decision: Decision
    outcome: str
    reason: str
    score_before: float
    seconds: float
    slot: int | None = None

    def answer(self, score: float, contribution: float) -> Feedback:
        """The feedback, now that the score after it is known."""
        return Feedback(self.decision, self.outcome, self.reason, self.score_before, score, contribution, self.seconds)


@dataclasses.dataclass
class Session:
    """One run's memory on the host. `snapshot` is a host copy of arrays, all else is JSON-able."""

    snapshot: _snapshot.Snapshot
    pending: list[Pending] = dataclasses.field(default_factory=list)
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best_score: float = -float("inf")
    best_tick: int = 0
    last_growth: int | None = None
    rollbacks: int = 0
    waiting: Waiting | None = None
    tick_began: float = dataclasses.field(default_factory=time.perf_counter)

    def to_json(self) -> dict[str, Any]:
        """All but the snapshot, and of the records only the last, which the next tick looks at (see `tolaria.records`).

        Seconds are left out of pending feedback: nothing decides by the clock.
        """
        kept = [f.name for f in dataclasses.fields(self) if f.name not in ("snapshot", "pending", "tick_began")]
        data = {name: getattr(self, name) for name in kept} | {"records": self.records[-1:]}
        pending = [{**dataclasses.asdict(p), "seconds": NAN} for p in self.pending]
        waiting = None if self.waiting is None else dataclasses.asdict(self.waiting)
        return {**data, "pending": pending, "waiting": waiting}

    @staticmethod
    def from_json(data: dict[str, Any], snapshot: _snapshot.Snapshot) -> Session:
        """The session that `to_json` wrote, with its snapshot."""
        pending = [Pending(**{**p, "decision": Decision(**p["decision"])}) for p in data["pending"]]
        waiting = Waiting.from_json(data.get("waiting"))
        return Session(snapshot, **{**data, "pending": pending, "waiting": waiting})


class History:
    """What `fit` returns beside the state: one record a tick, and the events of the run in order.

    `records` are dicts with `epoch`, `step`, `train_loss`, `loss`, `score`, `seeds`. `history["score"]` is a column.
    """

    def __init__(self, records: list[dict[str, Any]], events: list[Any]) -> None:
        self.records, self.events = records, events

    def __getitem__(self, name: str) -> list[Any]:
        known = sorted(set().union(*self.records)) if self.records else []
        if name not in known:
            raise KeyError(f"no column {name!r}; the history has {', '.join(known) or 'no records'}")
        return [record.get(name) for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def best_score(self) -> float:
        """The highest validation score in points; NaN before the first tick."""
        return max((record["score"] for record in self.records), default=NAN)

    def of_kind(self, kind: str) -> list[Any]:
        """The events of one kind, e.g. "stage" or "decision"."""
        return [event for event in self.events if event.kind == kind]

    def __repr__(self) -> str:
        if not self.records:
            return "History(no ticks)"
        last = self.records[-1]
        return (
            f"History({len(self.records)} ticks, score {last['score']:.2f} (best {self.best_score:.2f}), "
            f"loss {last['loss']:.4f}, {len(self.of_kind('stage'))} stage changes)"
        )
