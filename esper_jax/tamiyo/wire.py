"""What a run and a remote controller send each other: JSON, checked against typed schemas before anything uses it.

A `Question` carries all that `decide` needs: the sites, the controller's own state, a report and the feedback that is
owed. An `Answer` carries decisions and the next state, so a service remembers nothing between two questions and may be
restarted or replaced at any moment. JSON has no NaN: the three non-finite floats are the strings "NaN", "Infinity" and
"-Infinity". `Feedback.seconds` is not sent, so that the same run asks the same questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from ..kasmina.stages import Stage

VERSION: Literal[1] = 1
"""Of the wire's schemas; a question or answer of another version is refused."""

MAX_DECISIONS = 16
"""Decisions in one answer."""

Real = float | Literal["NaN", "Infinity", "-Infinity"]
Name = Annotated[str, Meta(min_length=1, max_length=512)]
Text = Annotated[str, Meta(max_length=2000)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Whole = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Id = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
_Short = Annotated[str, Meta(max_length=200)]
Setting = bool | Whole | float | _Short | None | Annotated[list[bool | Whole | float | _Short], Meta(max_length=16)]
Config = Annotated[dict[_Short, Setting], Meta(max_length=32)]
DType = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32"
    , "float64"
]  # fmt: skip


class WireError(ValueError):
    """A question or an answer that cannot be used; one sentence says why."""


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the schemas: these fields, and no others."""


class Leaf(Line, frozen=True):
    """One array of a controller's state: its place in the tree, dtype, shape, and its bytes (little-endian, base64)."""

    path: Annotated[str, Meta(max_length=512)]
    dtype: DType
    shape: Annotated[list[Count], Meta(max_length=8)]
    data: bytes


State = Annotated[list[Leaf], Meta(max_length=4096)]


class SiteLine(Line, frozen=True):
    """A `Site`, without its geometry."""

    path: Name
    kind: Name
    in_shape: Annotated[list[Count], Meta(max_length=16)]
    out_shape: Annotated[list[Count], Meta(max_length=16)]
    dtype: Name
    spatial: Count
    traced: bool
    layers: Count = 0


class SiteReportLine(Line, frozen=True):
    """A `SiteReport`."""

    path: Name
    kind: Name
    free_slots: list[Count]
    fitting: list[Name]
    variance: Real
    dead: Real
    silent: Real
    correlation: Real
    gradient: Real
    signal: Real
    gain: Real
    calls: Count
    health: Real


class SeedReportLine(Line, frozen=True):
    """A `SeedReport`; the stage is its integer."""

    site: Name
    slot: Count
    blueprint: Name
    stage: Annotated[int, Meta(ge=0, lt=len(Stage))]
    alpha: Real
    age: Count
    steps: Count
    faults: Count
    health: Real
    ratio: Real
    contribution: Real
    stage_score: Real
    parameters: Annotated[int, Meta(ge=0, le=2**53)]
    pruning: bool
    ramping: bool
    waits_for: Text


class PairLine(Line, frozen=True):
    """One entry of `Report.interactions`."""

    first: tuple[Name, Count]
    second: tuple[Name, Count]
    value: Real


class ReportLine(Line, frozen=True):
    """A `Report`."""

    epoch: Count
    step: Count
    train_loss: Real
    loss: Real
    score: Real
    sites: list[SiteReportLine]
    seeds: list[SeedReportLine]
    interactions: list[PairLine]


class DecisionLine(Line, frozen=True):
    """A `Decision`: numbers in range, settings that are plain and small."""

    action: Literal["germinate", "fossilize", "prune", "set_alpha", "advance"]
    site: Name
    slot: Annotated[int, Meta(ge=0, le=4095)] | None = None
    blueprint: Name | None = None
    config: Config = {}
    alpha: Share | None = None
    steps: Annotated[int, Meta(ge=0, le=1000)] = 0
    confidence: Share = 1.0
    urgency: Share = 1.0
    reason: Text = ""
    stored: Annotated[str, Meta(pattern="^[0-9a-f]{4,64}$")] | None = None


class FeedbackLine(Line, frozen=True):
    """A `Feedback` without its seconds."""

    decision: DecisionLine
    outcome: Literal["applied", "refused"]
    reason: Annotated[str, Meta(max_length=20_000)]
    score_before: Real
    score_after: Real
    contribution: Real


class Question(Line, frozen=True, kw_only=True):
    """What a run asks at a tick. `state` None lets the controller begin; `id` names the question by its content."""

    v: Literal[1] = VERSION
    id: Id | Literal[""] = ""
    sites: Annotated[list[SiteLine], Meta(max_length=100_000)]
    slots: Annotated[int, Meta(ge=1, le=4096)]
    key: Annotated[list[Annotated[int, Meta(ge=0, lt=2**32)]], Meta(min_length=1, max_length=16)]
    state: State | None
    report: ReportLine
    feedback: list[FeedbackLine]


class Answer(Line, frozen=True):
    """What a service answers. `question` is the id it answers, `controller` who decided, `mock` whether by a script."""

    v: Literal[1]
    question: Id
    decisions: Annotated[list[DecisionLine], Meta(max_length=MAX_DECISIONS)]
    state: State
    controller: Annotated[str, Meta(max_length=2000)]
    mock: bool


L = TypeVar("L", bound=Line)


def encode(line: Line | Sequence[Line]) -> bytes:
    """The JSON of a checked line."""
    return msgspec.json.encode(line)


def decode(data: bytes, kind: type[L]) -> L:
    """The line in `data`; WireError, in one sentence, for anything that is not exactly one."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError, MemoryError) as error:
        raise WireError(f"not {_article(kind)}: {str(error) or type(error).__name__}") from None


def decode_all(data: bytes, kind: type[L]) -> list[L]:
    """The lines in `data`, as `encode` wrote them; none where it is empty."""
    return msgspec.json.decode(data, type=list[kind]) if data else []  # type: ignore[valid-type]


def schemas() -> dict[str, Any]:
    """JSON Schemas of questions and answers."""
    return {"question": msgspec.json.schema(Question), "answer": msgspec.json.schema(Answer)}


def printable(text: str) -> str:
    """`text` on one line and without control characters, so that it cannot steer a terminal."""
    return "".join(mark if mark.isprintable() else " " for mark in text)


def _article(kind: type[Line]) -> str:
    return f"an {kind.__name__.lower()}" if kind is Answer else f"a {kind.__name__.lower()}"
