"""What happens in a run, as plain records: one frozen, JSON-able `Event`, its kinds, and its written form.

An event is one line of JSON: `{"v", "kind", "epoch", "step", "time", "message", "data"}`. JSON has no NaN, so the three
non-finite floats are written as the strings "NaN", "Infinity" and "-Infinity" and read back as floats; a genuine string
that looks like one of them is written with a "~" before it, so that every event is read back as it was written.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import re
import time as clock
from collections.abc import Iterable, Mapping
from typing import Any

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
    ERROR = "error"


ENDINGS = (Kind.EARLY_STOP, Kind.RUN_ENDED)
"""Kinds that say a run is over: `JsonlSink.rewind` drops them, since the run goes on."""

SERVICES = (Kind.OUTAGE, Kind.RECOVERY, Kind.DROPPED)
BOOKKEEPING = (Kind.RUN_STARTED, Kind.CHECKPOINT, Kind.RESUMED, Kind.SWAP, Kind.WARNING, Kind.ERROR, *SERVICES)
"""Kinds that tell of files, sessions, programs and services rather than of the training itself: `course` leaves them
out."""

ALARMS = (Kind.WARNING, Kind.ERROR)
"""Kinds whose sentence is shown with the kind before it."""

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
