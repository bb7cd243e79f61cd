"""What the data of each kind of event hold, as types: the one definition behind the JSON Schema and the metrics.

A field that says `Measure` is a number to plot. Keys that are not named here may be added to any event; readers leave
them alone. Changing or removing a named one is a new version of the schema (`events.SCHEMA`).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, NotRequired, TypedDict

StageName = Literal[
    "DORMANT", "GERMINATED", "TRAINING", "BLENDING", "HOLDING", "FOSSILIZED", "PRUNED", "EMBARGOED", "RESETTING"
]
Slot = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measured number: what it is, and its unit. NaN where nothing was measured."""

    about: str
    unit: str = ""


Score = Annotated[float, Measure("score, higher is better", "points")]
Loss = Annotated[float, Measure("loss, lower is better")]
Alpha = Annotated[float, Measure("how much of the seed enters the forward pass", "0 to 1")]
Contribution = Annotated[float, Measure("score with the seed minus the score at its alpha 0", "points")]
Health = Annotated[float, Measure("health", "0 to 1")]
Share = Annotated[float, Measure("share of units", "0 to 1")]


class Where(TypedDict):
    """One slot and what is planted there."""

    site: str
    slot: int
    blueprint: str


class SeedRow(Where):
    """An occupied slot as it stands at the end of an epoch."""

    stage: StageName
    alpha: Alpha
    pruning: NotRequired[bool]
    ramping: NotRequired[bool]
    age: NotRequired[int]
    steps: NotRequired[int]
    faults: NotRequired[Annotated[int, Measure("steps on which the seed was not finite")]]
    health: NotRequired[Health]
    ratio: NotRequired[Annotated[float, Measure("the seed's gradient norm over the host's, per root of parameters")]]
    contribution: NotRequired[Contribution]
    stage_score: NotRequired[float]
    parameters: NotRequired[int]
    waits_for: NotRequired[str]


class SiteRow(TypedDict):
    """A site as measured since the last tick."""

    gain: NotRequired[Annotated[float, Measure("first-order decrease of the loss by growing here", "loss per rate")]]
    dead: NotRequired[Annotated[float, Measure("units that never change", "0 to 1")]]
    silent: NotRequired[Annotated[float, Measure("units never above 0", "0 to 1")]]
    variance: NotRequired[Annotated[float, Measure("variance of the activations")]]
    correlation: NotRequired[Annotated[float, Measure("mean absolute correlation between units", "0 to 1")]]
    gradient: NotRequired[Annotated[float, Measure("norm of the gradient of the site's parameters")]]
    signal: NotRequired[Annotated[float, Measure("norm of the gradient at the site's output")]]
    health: NotRequired[Health]


class RunStarted(TypedDict):
    """A run begins; its configuration may follow as further keys."""

    epochs: int
    morph: NotRequired[str]


class Epoch(TypedDict):
    """An epoch was validated."""

    train_loss: Annotated[float, Measure("mean training loss")]
    loss: Annotated[float, Measure("validation loss")]
    score: Annotated[float, Measure("validation score, higher is better", "points")]
    seconds: Annotated[float, Measure("wall time of the epoch", "seconds")]
    learning_rate: Annotated[float, Measure("learning rate of the host")]
    tick_seconds: NotRequired[Annotated[float, Measure("wall time of validation and control", "seconds")]]
    seeds: list[SeedRow]
    sites: NotRequired[dict[str, SiteRow]]


class Stage(Where):
    """A seed went from one stage to the next."""

    before: StageName
    after: StageName
    reason: str
    alpha: float


class Answer(TypedDict):
    """A remote controller's answer is used: what it was asked about, and all that it decided, before the veto."""

    service: str
    controller: str
    mock: bool
    asked_epoch: int
    asked_step: int
    decisions: list[dict[str, Any]]
    seconds: float


class Decision(TypedDict):
    """A controller's decision, carried out or refused; `why` names the rule that refused it."""

    action: str
    site: str
    slot: int | None
    blueprint: str | None
    config: dict[str, Any]
    alpha: float | None
    steps: int
    confidence: float
    urgency: float
    reason: str
    stored: NotRequired[str | None]
    outcome: Literal["applied", "refused"]
    why: str
    seconds: NotRequired[float]


class Feedback(TypedDict):
    """The measured answer to a decision."""

    action: str
    site: str
    slot: int | None
    blueprint: str | None
    outcome: Literal["applied", "refused"]
    reason: str
    score_before: float
    score_after: float
    contribution: float
    seconds: float


class Germinated(Where):
    """A blueprint was planted."""

    reason: str
    parameters: int
    config: NotRequired[dict[str, Any]]


class Contributed(Where):
    """A seed's contribution was measured, in points."""

    value: float


class Interaction(TypedDict):
    """Two slots were measured together, in points."""

    first: Slot
    second: Slot
    value: float


class Fault(Where):
    """A seed gave values that are not finite."""

    faults: int


class Swap(TypedDict):
    """The program of the next structure took over; `where` it was built, and how long that took and was waited for."""

    grown: list[Slot]
    left: list[Slot]
    where: NotRequired[str]
    programs: NotRequired[int]
    waited_seconds: float
    trace_seconds: NotRequired[float]
    compile_seconds: NotRequired[float]
    swap_seconds: NotRequired[float]


class CompileFailed(TypedDict):
    """The program of the next structure could not be built; `seeds` are left out of it."""

    seeds: list[Slot]
    reason: str


class Rollback(TypedDict):
    """The last good snapshot was restored."""

    reason: str
    to_step: int
    rule: NotRequired[str]
    pruned: NotRequired[list[Slot]]


class Reason(TypedDict):
    """Something happened, for a reason in words."""

    reason: str


class Checkpoint(TypedDict):
    """A checkpoint was written."""

    path: str
    best: bool


class Resumed(TypedDict):
    """A run goes on from a checkpoint; newer ones were skipped for the reasons given."""

    path: str
    skipped: list[str]


class EarlyStop(Reason):
    """Training stops before its last epoch."""

    patience: NotRequired[int]


class RunEnded(TypedDict):
    """The run is over."""

    outcome: str
    score: float
    seconds: NotRequired[float]


class HealthTold(TypedDict):
    """A site (slot null) or a seed fell below half its health, or rose above it again."""

    site: str
    slot: int | None
    health: Health
    ailing: bool
    terms: Annotated[dict[str, float], Measure("what makes up a site's health, each 0 to 1")]


class Outage(TypedDict):
    """Something outside went away: a bus, a sink, a service. Told once for each outage."""

    service: str
    error: str
    asked_epoch: NotRequired[int]
    asked_step: NotRequired[int]


class Recovery(TypedDict):
    """It came back, `seconds` after it was missed; `replayed` events waited on disk, `missed` answers never came."""

    service: str
    seconds: float
    replayed: NotRequired[int]
    missed: NotRequired[int]


class Dropped(TypedDict):
    """Metrics did not reach a sink that was too slow: how many since the last report, and in all."""

    service: str
    dropped: int
    total: int


class Warned(TypedDict):
    """Something that the user should see."""

    skipped: NotRequired[int]


class Failed(TypedDict):
    """Something was lost, though training goes on; `unsaved` is the step of a checkpoint that could not be written."""

    unsaved: NotRequired[int]
