"""A run repeated from its log: the decisions of every tick as they were, outages and all, without any service."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..kasmina.spec import Spec
from ..protocol import NOTICES, REMOTE, Decision, Feedback, Notice, Report

_FIELDS = tuple(field.name for field in dataclasses.fields(Decision))


class ReplayController:
    """Decides what a log says was decided, at the same ticks, whoever decided it then.

    With the same model, data, key and settings the repeated run equals the first one to the bit: parameters, optimizer
    and events (the controller's own state aside). A run that departs from its log, because something else differs, is
    told so once, in a notice.

    Args:
      events: the run's events in order, e.g. `esper_jax.nissa.read_events("RUN/events.jsonl")`.

    Raises:
      ValueError: no events, or a decision that cannot be read. TypeError: what `events` holds are none.

    >>> ReplayController([])
    Traceback (most recent call last):
    ValueError: a log without ticks cannot be replayed: give the events of a run
    """

    def __init__(self, events: Iterable[Any]) -> None:
        self._decisions: dict[tuple[int, int], list[Decision]] = {}
        self._said: dict[tuple[int, int], list[Notice]] = {}
        self._scores: dict[tuple[int, int], tuple[float, float]] = {}
        if not isinstance(events, Iterable):
            raise TypeError(f"events must be those of read_events(path), got {events!r}")
        for event in events:
            if not all(hasattr(event, name) for name in ("kind", "epoch", "step", "data")):
                raise TypeError(f"ReplayController() needs events such as those of read_events(path), got {event!r}")
            when = (event.epoch, event.step)
            if event.kind == "decision":
                self._decisions.setdefault(when, []).append(_decision(event))
            elif event.kind in NOTICES and str(event.data.get("service", "")).startswith(REMOTE):
                self._said.setdefault(when, []).append(Notice(event.kind, event.message, dict(event.data)))
            elif event.kind == "epoch":
                self._scores[when] = (event.data["loss"], event.data["score"])
        if not self._scores:
            raise ValueError("a log without ticks cannot be replayed: give the events of a run")
        self._notices: list[Notice] = []

    def init(self, spec: Spec, key: Any = None) -> dict[str, Any]:
        """The first state: whether the run has departed from its log. Neither `spec` nor `key` is used."""
        return {"departed": np.array(False)}

    def decide(
        self, state: dict[str, Any], report: Report, feedback: tuple[Feedback, ...] = ()
    ) -> tuple[tuple[Decision, ...], dict[str, Any]]:
        """The decisions of this tick in the log.

        Raises:
          ValueError: the log ends before this tick (or has none at this step), so what was decided is not known.
        """
        when = (report.epoch, report.step)
        if when not in self._scores:
            last = max(self._scores)
            raise ValueError(
                f"the log knows no tick {when[0]} at step {when[1]}, its last is {last[0]} at step {last[1]}: replay "
                "with the same batches and ticks, and no longer than the log"
            )
        departed = bool(state["departed"])
        if not departed and not all(map(_same, (report.loss, report.score), self._scores[when])):
            departed = True
            then, now = self._scores[when][1], report.score
            text = f"the replay departs from its log: the score was {then} and is {now}; something else has changed"
            self._notices.append(Notice("warning", text, {"score": now, "logged": then}))
        self._notices += self._said.get(when, [])
        return tuple(self._decisions.get(when, ())), {"departed": np.array(departed)}

    def notices(self) -> tuple[Notice, ...]:
        """What the controller of the log had to say at this tick."""
        told, self._notices = tuple(self._notices), []
        return told

    def __repr__(self) -> str:
        return f"ReplayController({len(self._scores)} ticks, {sum(map(len, self._decisions.values()))} decisions)"


def _decision(event: Any) -> Decision:
    try:
        return Decision(**{name: event.data[name] for name in _FIELDS if name in event.data})
    except TypeError as error:
        raise ValueError(f"the decision at step {event.step} cannot be replayed: {error}") from None


def _same(now: float, then: float) -> bool:
    return now == then or math.isnan(now) and math.isnan(then)
