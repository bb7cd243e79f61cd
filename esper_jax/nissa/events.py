"""One constructor for each kind of event, with the sentence that people read.

Scores and contributions are in points (percentage points of accuracy, or a task's own score x 100), `seconds` are wall
time, `alpha` is in [0, 1], and a float that was not measured is NaN. `epoch` and `step` say when; extra keywords go to
the data as they are.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ..kasmina.health import AILING
from ..kasmina.stages import Stage
from . import kinds
from .event import Event, Kind, plain

if TYPE_CHECKING:
    from ..protocol import Decision, Feedback, HealthSignal, SeedReport


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
    """The run is over: `outcome` is "finished", "stopped early", "diverged" and the like, with the best score."""
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


def error(epoch: int, step: int, message: str, **data: Any) -> Event:
    """Something was lost, though training goes on: a checkpoint that a full disk did not take, say."""
    return Event(Kind.ERROR, epoch, step, message, dict(data))
