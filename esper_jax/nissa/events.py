"""What happens in a run, as plain records: one frozen, JSON-able `Event` and one constructor for each kind.

An event is one line of JSON: `{"v", "kind", "epoch", "step", "time", "message", "data"}`. JSON has no NaN, so the three
non-finite floats are written as the strings "NaN", "Infinity" and "-Infinity" and read back as floats; a genuine string
that looks like one of them is written with a "~" before it, so that every event is read back as it was written.

Scores and contributions are in points (percentage points of accuracy, or a task's own score x 100), `seconds` are wall
time, `alpha` is in [0, 1], and a float that was not measured is NaN.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import re
import time as clock
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ..kasmina.health import AILING
from ..kasmina.stages import Stage

if TYPE_CHECKING:
    from ..protocol import Decision, Feedback, HealthSignal, SeedReport
    from . import kinds

SCHEMA = 1
"""The version of the written form; a reader refuses a later one."""

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_MARKED = re.compile(r"~*(NaN|-?Infinity)")


class Kind(enum.StrEnum):
    """The kinds of event that the library emits; a user's sink or loop may add its own strings."""

    RUN_STARTED = "run_started"
    EPOCH = "epoch"
    STAGE = "stage"
    ANSWER = "answer"
    DECISION = "decision"
    FEEDBACK = "feedback"
    GERMINATED = "germinated"
    CONTRIBUTION = "contribution"
    INTERACTION = "interaction"
    FAULT = "fault"
    SWAP = "swap"
    COMPILE_FAILED = "compile_failed"
    HEALTH = "health"
    ROLLBACK = "rollback"
    SNAPSHOT = "snapshot"
    CHECKPOINT = "checkpoint"
    RESUMED = "resumed"
    EARLY_STOP = "early_stop"
    RUN_ENDED = "run_ended"
    OUTAGE = "outage"
    RECOVERY = "recovery"
    DROPPED = "dropped"
    WARNING = "warning"


ENDINGS = (Kind.EARLY_STOP, Kind.RUN_ENDED)
"""Kinds that say a run is over: `JsonlSink.rewind` drops them, since the run goes on."""

SERVICES = (Kind.OUTAGE, Kind.RECOVERY, Kind.DROPPED)
BOOKKEEPING = (Kind.RUN_STARTED, Kind.CHECKPOINT, Kind.RESUMED, Kind.SWAP, Kind.WARNING, *SERVICES)
"""Kinds that tell of files, sessions, programs and services rather than of the training itself: `course` leaves them
out."""

DROPPABLE = (Kind.EPOCH, Kind.CONTRIBUTION, Kind.INTERACTION)
"""Kinds that are measurements: a sink that is too slow may miss some, counted. All others reach it, sooner or later."""


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that happened: `kind`, when (`epoch`, `step`, `time` in seconds since 1970), a sentence, and data.

    `data` is copied into plain JSON-able values: numpy and JAX scalars become Python numbers, arrays and tuples lists,
    enum members their names, dataclasses and mappings dicts with string keys. Anything else is a `TypeError`.
    """

    kind: str
    epoch: int
    step: int
    message: str = ""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    time: float = dataclasses.field(default_factory=clock.time)

    def __post_init__(self) -> None:
        plain_fields = {
            "kind": str(self.kind),
            "epoch": int(self.epoch),
            "step": int(self.step),
            "message": str(self.message),
            "data": plain(self.data, f"data of the event '{self.kind}'"),
            "time": float(self.time),
        }
        for name, value in plain_fields.items():
            object.__setattr__(self, name, value)

    def to_json(self) -> str:
        """One line of valid JSON, without the line end. It is made once: every sink is given the same."""
        known = self.__dict__.get("_json")
        if known is not None:
            return known
        record = {"v": SCHEMA} | {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        line = json.dumps(_mark(record), ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
        object.__setattr__(self, "_json", line)
        return line

    @staticmethod
    def from_json(line: str | bytes) -> Event:
        """The event of one line. `ValueError` when it is not one, or is of a later version than this library's."""
        record = json.loads(line)
        if not isinstance(record, dict) or "v" not in record:
            raise ValueError("not an event: a JSON object with a version 'v' is needed")
        version = record.pop("v")
        if not isinstance(version, int) or version > SCHEMA:
            raise ValueError(
                f"an event of schema {version!r}, but this esper_jax reads up to {SCHEMA}: update esper_jax"
            )
        names = [field.name for field in dataclasses.fields(Event)]
        lacking = [name for name in names if name not in record]
        if lacking:
            raise ValueError(f"not an event: it lacks {', '.join(lacking)}")
        return Event(**_unmark({name: record[name] for name in names}))


def plain(value: Any, place: str = "value") -> Any:
    """`value` as dicts with string keys, lists, strings, bools, ints, floats and None; `place` names it in errors."""
    if isinstance(value, enum.Enum):
        return value.value if isinstance(value, str) else value.name
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{place}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_key(key, place): plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [plain(item, f"{place}[{index}]") for index, item in enumerate(items)]
    if hasattr(value, "tolist"):  # numpy and JAX scalars and arrays
        return plain(value.tolist(), place)
    raise TypeError(
        f"{place} is a {type(value).__name__}, which cannot be written as JSON: give numbers, strings or lists"
    )


def _key(key: Any, place: str) -> str:
    if isinstance(key, enum.Enum):
        return key.name
    if isinstance(key, (str, int)):
        return str(key)
    raise TypeError(f"{place} has the key {key!r}, which cannot be written as JSON: use strings as keys")


def _mark(value: Any) -> Any:
    """Non-finite floats as strings, and strings that could be taken for one with a "~" before them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        return f"~{value}" if _MARKED.fullmatch(value) else value
    if isinstance(value, dict):
        return {key: _mark(item) for key, item in value.items()}
    return [_mark(item) for item in value] if isinstance(value, list) else value


def _unmark(value: Any) -> Any:
    if isinstance(value, str):
        return _NONFINITE.get(value, value[1:] if value[:1] == "~" and _MARKED.fullmatch(value) else value)
    if isinstance(value, dict):
        return {key: _unmark(item) for key, item in value.items()}
    return [_unmark(item) for item in value] if isinstance(value, list) else value


def course(events: Iterable[Event]) -> list[str]:
    """What the run did, without clocks: a line per event, so that two runs (or a resumed one) compare with `==`.

    Left out are `BOOKKEEPING` kinds, `time`, messages, and data whose name is or ends in "seconds" or "per_second".
    """

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            clocks = ("seconds", "per_second")
            return {key: timeless(item) for key, item in value.items() if not key.endswith(clocks)}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    return [
        dataclasses.replace(event, message="", time=0.0, data=timeless(event.data)).to_json()
        for event in events
        if event.kind not in BOOKKEEPING
    ]


def stage_name(stage: Stage | int | str) -> kinds.StageName:
    """The name of a stage given as a `Stage`, its integer (any integer scalar) or its name."""
    return cast("kinds.StageName", stage.upper() if isinstance(stage, str) else Stage(int(stage)).name)


def place(site: str, slot: int | None) -> str:
    """How a slot is named to people: `block_0/Dense_1 slot 0`."""
    return site if slot is None else f"{site} slot {slot}"


def points(value: float) -> str:
    """A score or contribution for people: two decimals, or `not measured`."""
    return f"{value:.2f}" if math.isfinite(value) else "not measured" if math.isnan(value) else str(value)


def because(reason: str) -> str:
    """`: reason`, or nothing where there is none."""
    return f": {reason}" if reason else ""


# One constructor for each kind, typed by `kinds`. `epoch` and `step` say when; extra keywords go to the data.


def run_started(epochs: int, *, epoch: int = 0, step: int = 0, **data: Any) -> Event:
    """A run of `epochs` epochs begins; give its configuration as keywords (`task`, `seed`, `parameters` ...)."""
    fields: kinds.RunStarted = {"epochs": epochs}
    return Event(Kind.RUN_STARTED, epoch, step, f"run of {epochs} epochs", {**fields, **data})


def epoch(
    epoch: int,
    step: int,
    *,
    train_loss: float,
    loss: float,
    score: float,
    seconds: float = math.nan,
    learning_rate: float = math.nan,
    seeds: Sequence[SeedReport | Mapping[str, Any]] = (),
    **metrics: Any,
) -> Event:
    """An epoch was validated: losses, score in points, and every occupied slot as it stands.

    A seed is a `SeedReport` or a mapping with at least site, slot, blueprint, stage and alpha; figures read them.
    """
    rows = [plain(seed, "seed") for seed in seeds]
    rows = [row | {"stage": stage_name(row["stage"])} for row in rows]
    data: kinds.Epoch = {
        "train_loss": train_loss,
        "loss": loss,
        "score": score,
        "seconds": seconds,
        "learning_rate": learning_rate,
        "seeds": rows,
    }
    message = f"train loss {train_loss:.4f}, loss {loss:.4f}, score {points(score)}"
    return Event(Kind.EPOCH, epoch, step, message, {**data, **metrics})


def stage(
    epoch: int,
    step: int,
    *,
    site: str,
    slot: int,
    blueprint: str,
    before: Stage | int | str,
    after: Stage | int | str,
    reason: str,
    alpha: float = math.nan,
    **data: Any,
) -> Event:
    """A seed went from the stage `before` to `after`, for a `reason` in words."""
    fields: kinds.Stage = {
        "site": site,
        "slot": slot,
        "blueprint": blueprint,
        "before": stage_name(before),
        "after": stage_name(after),
        "reason": reason,
        "alpha": alpha,
    }
    message = f"{blueprint} at {place(site, slot)}: {fields['before']} > {fields['after']}{because(reason)}"
    return Event(Kind.STAGE, epoch, step, message, {**fields, **data})


def answer(
    epoch: int,
    step: int,
    *,
    service: str,
    controller: str,
    asked_epoch: int,
    asked_step: int,
    decisions: Sequence[Decision | Mapping[str, Any]],
    mock: bool = False,
    seconds: float = math.nan,
) -> Event:
    """A remote controller's answer to what it was asked at an earlier tick is used, with all that it decided."""
    fields: kinds.Answer = {
        "service": service,
        "controller": controller,
        "mock": mock,
        "asked_epoch": asked_epoch,
        "asked_step": asked_step,
        "decisions": [plain(decision) for decision in decisions],
        "seconds": seconds,
    }
    what = f"{len(decisions)} decision(s)" if decisions else "no decisions"
    return Event(Kind.ANSWER, epoch, step, f"{service} answered: {what}", {**fields})


def decision(epoch: int, step: int, decision: Decision, *, outcome: str, why: str = "", **data: Any) -> Event:
    """A controller's decision was "applied" or "refused"; `why` names the rule that refused it and the values."""
    message = f"{outcome}: {decision}{because(why or decision.reason)}"
    return Event(Kind.DECISION, epoch, step, message, {**plain(decision), "outcome": outcome, "why": why, **data})


def feedback(epoch: int, step: int, feedback: Feedback, **data: Any) -> Event:
    """The measured answer to a decision; its data name the action, site, slot and blueprint it answers."""
    act = feedback.decision
    fields = {"action": act.action, "site": act.site, "slot": act.slot, "blueprint": act.blueprint}
    measured = {field.name: getattr(feedback, field.name) for field in dataclasses.fields(feedback)[1:]}
    score = f"score {points(feedback.score_before)} > {points(feedback.score_after)}"
    message = f"{feedback.outcome} {act}: {score}, contribution {points(feedback.contribution)}"
    return Event(Kind.FEEDBACK, epoch, step, message, {**fields, **measured, **data})


def germinated(
    epoch: int, step: int, *, site: str, slot: int, blueprint: str, reason: str = "", parameters: int = 0, **data: Any
) -> Event:
    """A blueprint was planted in a slot; `parameters` counts its weights."""
    fields: kinds.Germinated = {
        "site": site,
        "slot": slot,
        "blueprint": blueprint,
        "reason": reason,
        "parameters": parameters,
    }
    message = f"{blueprint} germinated at {place(site, slot)}{because(reason)}"
    return Event(Kind.GERMINATED, epoch, step, message, {**fields, **data})


def contribution(epoch: int, step: int, *, site: str, slot: int, blueprint: str, value: float, **data: Any) -> Event:
    """A seed's contribution was measured: the score with it minus the score at its alpha 0, in points."""
    message = f"{blueprint} at {place(site, slot)} contributes {points(value)}"
    fields: kinds.Contributed = {"site": site, "slot": slot, "blueprint": blueprint, "value": value}
    return Event(Kind.CONTRIBUTION, epoch, step, message, {**fields, **data})


def interaction(epoch: int, step: int, first: tuple[str, int], second: tuple[str, int], value: float) -> Event:
    """Two slots `(site, slot)` were measured together: f(ij) - f(i) - f(j) + f(0), in points."""
    message = f"{place(*first)} and {place(*second)} interact by {points(value)}"
    fields: kinds.Interaction = {"first": first, "second": second, "value": value}
    return Event(Kind.INTERACTION, epoch, step, message, {**fields})


def fault(epoch: int, step: int, *, site: str, slot: int, blueprint: str, faults: int, **data: Any) -> Event:
    """A seed gave values that are not finite; `faults` is its count so far."""
    message = f"{blueprint} at {place(site, slot)} was not finite ({faults} so far); the host's output was used instead"
    fields: kinds.Fault = {"site": site, "slot": slot, "blueprint": blueprint, "faults": faults}
    return Event(Kind.FAULT, epoch, step, message, {**fields, **data})


def health(signal: HealthSignal, **data: Any) -> Event:
    """A site (slot None) or a seed fell below half its health, or rose above it again; `terms` say why."""
    ailing, measured = signal.health < AILING, plain(signal.terms)
    state = "is ailing" if ailing else "is well again"
    worst = min(measured, key=lambda name: measured[name], default=None)
    why = f" (lowest: {worst} {measured[worst]:.2f})" if worst is not None and ailing else ""
    fields: kinds.HealthTold = {
        "site": signal.site,
        "slot": signal.slot,
        "health": signal.health,
        "ailing": ailing,
        "terms": measured,
    }
    message = f"{place(signal.site, signal.slot)} {state}: health {signal.health:.2f}{why}"
    return Event(Kind.HEALTH, signal.epoch, signal.step, message, {**fields, **data})


def swap(
    epoch: int, step: int, *, grown: Sequence[Any], left: Sequence[Any], waited_seconds: float = 0.0, **data: Any
) -> Event:
    """The program of the next structure took over: seeds `grown` came in, others `left`, as `[site, slot]`."""
    came = [f"{place(*seed)} came in" for seed in grown] + [f"{place(*seed)} left" for seed in left]
    waited = f", after waiting {waited_seconds:.2f} s for it" if waited_seconds >= 0.005 else ""
    message = f"the next program took over ({', '.join(came)}){waited}"
    fields: kinds.Swap = {"grown": [*grown], "left": [*left], "waited_seconds": waited_seconds}
    return Event(Kind.SWAP, epoch, step, message, {**fields, **data})


def compile_failed(epoch: int, step: int, *, seeds: Sequence[Any], reason: str, **data: Any) -> Event:
    """The program of the next structure could not be built; training goes on in the one it has, without the seeds."""
    named = ", ".join(place(*seed) for seed in seeds) or "fewer seeds"
    message = f"the program with {named} could not be compiled{because(reason)}; training goes on without"
    fields: kinds.CompileFailed = {"seeds": [*seeds], "reason": reason}
    return Event(Kind.COMPILE_FAILED, epoch, step, message, {**fields, **data})


def rollback(epoch: int, step: int, *, reason: str, to_step: int, **data: Any) -> Event:
    """The governor restored the snapshot of `to_step`."""
    message = f"rolled back to step {to_step}{because(reason)}"
    fields: kinds.Rollback = {"reason": reason, "to_step": to_step}
    return Event(Kind.ROLLBACK, epoch, step, message, {**fields, **data})


def snapshot(epoch: int, step: int, *, reason: str, **data: Any) -> Event:
    """The governor took a last-known-good snapshot."""
    fields: kinds.Reason = {"reason": reason}
    return Event(Kind.SNAPSHOT, epoch, step, f"snapshot{because(reason)}", {**fields, **data})


def checkpoint(epoch: int, step: int, *, path: str | os.PathLike[str], best: bool = False, **data: Any) -> Event:
    """A checkpoint was written to `path`; `best` when it holds the best score so far."""
    message = f"{'best ' if best else ''}checkpoint {os.fspath(path)}"
    fields: kinds.Checkpoint = {"path": os.fspath(path), "best": best}
    return Event(Kind.CHECKPOINT, epoch, step, message, {**fields, **data})


def resumed(epoch: int, step: int, *, path: str | os.PathLike[str], skipped: Sequence[str] = (), **data: Any) -> Event:
    """The run goes on from the checkpoint `path`; `skipped` says of each newer one why it was passed over."""
    message = "; ".join([f"resumed at step {step} from {os.fspath(path)}", *(f"skipped {why}" for why in skipped)])
    fields: kinds.Resumed = {"path": os.fspath(path), "skipped": list(skipped)}
    return Event(Kind.RESUMED, epoch, step, message, {**fields, **data})


def early_stop(epoch: int, step: int, *, reason: str, **data: Any) -> Event:
    """Training stops before its last epoch."""
    fields: kinds.EarlyStop = {"reason": reason}
    return Event(Kind.EARLY_STOP, epoch, step, f"stopped early{because(reason)}", {**fields, **data})


def run_ended(epoch: int, step: int, *, outcome: str = "finished", score: float = math.nan, **data: Any) -> Event:
    """The run is over: `outcome` is "finished", "stopped", "interrupted" or "failed", with the last or best score."""
    message = f"run {outcome} after {epoch} epochs, score {points(score)}"
    fields: kinds.RunEnded = {"outcome": outcome, "score": score}
    return Event(Kind.RUN_ENDED, epoch, step, message, {**fields, **data})


def outage(epoch: int, step: int, *, service: str, error: str, then: str = "training goes on", **data: Any) -> Event:
    """A service went away; told once for each outage. `then` says what happens meanwhile."""
    message = f"{service} fails ({error}); {then}"
    fields: kinds.Outage = {"service": service, "error": error}
    return Event(Kind.OUTAGE, epoch, step, message, {**fields, **data})


def recovery(epoch: int, step: int, *, service: str, seconds: float, **data: Any) -> Event:
    """The service is back, `seconds` after it was missed."""
    waited = f", {data['replayed']} events were waiting" if data.get("replayed") else ""
    message = f"{service} is back after {seconds:.1f} s{waited}"
    fields: kinds.Recovery = {"service": service, "seconds": seconds}
    return Event(Kind.RECOVERY, epoch, step, message, {**fields, **data})


def dropped(epoch: int, step: int, *, service: str, dropped: int, total: int) -> Event:
    """A sink was too slow for `dropped` metrics since the last report, and for `total` in all."""
    message = f"{service} was too slow for {dropped} metrics ({total} in all); they were dropped, nothing else was"
    fields: kinds.Dropped = {"service": service, "dropped": dropped, "total": total}
    return Event(Kind.DROPPED, epoch, step, message, {**fields})


def warning(epoch: int, step: int, message: str, **data: Any) -> Event:
    """Something that the user should see, in one sentence."""
    return Event(Kind.WARNING, epoch, step, message, dict(data))
