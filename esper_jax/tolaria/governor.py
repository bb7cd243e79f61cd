"""The governor: when training is rolled back to its last good state, and which decisions are vetoed (contract 21-23).

Pure functions on numpy arrays and plain numbers; taking snapshots and rolling back is the trainer's part.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .._checks import INT32, real, whole
from ..kasmina._pytree import Struct, pytree


@pytree
class GovernorState(Struct):
    """What the governor remembers, as numpy arrays.

    `losses` [window] float32, the last healthy validation losses, oldest first, NaN where there is none yet;
    `divergences`, anomalous checks in a row; `since_snapshot`, checks since the last snapshot (int32 scalars).
    """

    losses: Any
    divergences: Any
    since_snapshot: Any


@dataclasses.dataclass(frozen=True)
class Governor:
    """Thresholds of the rules (contract 21 and 22). A check is one tick's validation; losses are natural.

    Args:
      window: healthy validation losses remembered; `min_samples` of them are needed to call one divergent.
      sigmas, factor: a loss above mean + `sigmas` deviations and above `factor` x mean is anomalous.
      strikes: anomalous checks in a row that make a divergence.
      collapse_history, collapse_band: the history mean below the first x ln C and the loss within the second x ln C
        of ln C, that of guessing among C classes, make a collapse.
      snapshot_every: checks between snapshots; one that is due waits for a healthy check.
    """

    window: int = 20
    min_samples: int = 10
    sigmas: float = 6.0
    factor: float = 3.0
    strikes: int = 3
    collapse_history: float = 0.6
    collapse_band: float = 0.065
    snapshot_every: int = 5

    def __post_init__(self) -> None:
        for name in ("window", "min_samples", "strikes", "snapshot_every"):
            whole(name, getattr(self, name), 1, INT32)
        if self.min_samples > self.window:
            raise ValueError(f"min_samples={self.min_samples} cannot exceed window={self.window}")
        for name in ("sigmas", "collapse_history", "collapse_band"):
            real(name, getattr(self, name), least=0)
        real("factor", self.factor, least=1)

    def init(self) -> GovernorState:
        """The state before the first check, of a run that took its first snapshot at the start."""
        zero = lambda: np.array(0, np.int32)  # noqa: E731
        return GovernorState(np.full(self.window, np.nan, np.float32), zero(), zero())


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a check found, and what to do.

    `rule` is "", "non-finite", "collapse" or "divergence" (that also while strikes are counted), `reason` a sentence
    with the values; `snapshot` says that the state is good and a snapshot is due.
    """

    rollback: bool = False
    rule: str = ""
    reason: str = ""
    snapshot: bool = False


def check(
    config: Governor, state: GovernorState, train_loss: float | None, loss: float | None, classes: int | None = None
) -> tuple[GovernorState, Verdict]:
    """Judge one tick by its mean training loss and its validation loss; the given state is not changed.

    Args:
      config: thresholds.
      state: from `Governor.init` or the last check.
      train_loss: mean training loss since the last tick; None where none was measured, NaN is non-finite.
      loss: validation loss; the same.
      classes: number of classes, for the collapse rule; None leaves it out.

    Returns:
      The next state (after a rollback too: keep it, the strikes are cleared), and the verdict.
    """
    history = np.array(state.losses, np.float32)
    known = history[np.isfinite(history)].astype(np.float64)
    since = int(state.since_snapshot) + 1
    for what, value in (("training", train_loss), ("validation", loss)):
        if value is not None and not math.isfinite(value):
            return _rolled_back(history, since, "non-finite", f"the {what} loss is {value}")
    if loss is None:
        return _healthy(config, history, int(state.divergences), since)
    if reason := _collapse(config, known, loss, classes):
        return _rolled_back(history, since, "collapse", reason)
    if reason := _divergence(config, known, loss):
        strikes = int(state.divergences) + 1
        reason = f"{reason}, {strikes} check(s) in a row (limit {config.strikes})"
        if strikes >= config.strikes:
            return _rolled_back(history, since, "divergence", reason)
        return _state(history, strikes, since), Verdict(rule="divergence", reason=reason)
    return _healthy(config, np.append(history[1:], np.float32(loss)), 0, since)


def _collapse(config: Governor, known: np.ndarray, loss: float, classes: int | None) -> str:
    if classes is None or classes < 2 or not known.size:
        return ""
    guess, mean = math.log(classes), float(known.mean())
    if mean < config.collapse_history * guess and abs(loss - guess) < config.collapse_band * guess:
        return (
            f"the validation loss {loss:.4g} is that of guessing among {classes} classes ({guess:.4g}), after a mean "
            f"of {mean:.4g} over {known.size} checks"
        )
    return ""


def _divergence(config: Governor, known: np.ndarray, loss: float) -> str:
    if known.size < config.min_samples:
        return ""
    mean, sigma = float(known.mean()), float(known.std())
    # For a mean above 0 the second is loss > factor * mean; written so that it also holds its sense below 0.
    if loss > mean + config.sigmas * sigma and loss - mean > (config.factor - 1) * abs(mean):
        return (
            f"the validation loss {loss:.4g} is above {mean:.4g} + {config.sigmas:g} x {sigma:.3g} and "
            f"{config.factor:g} x {mean:.4g}"
        )
    return ""


def _healthy(config: Governor, history: np.ndarray, strikes: int, since: int) -> tuple[GovernorState, Verdict]:
    due = since >= config.snapshot_every and strikes == 0
    return _state(history, strikes, 0 if due else since), Verdict(snapshot=due)


def _rolled_back(history: np.ndarray, since: int, rule: str, reason: str) -> tuple[GovernorState, Verdict]:
    return _state(history, 0, since), Verdict(True, rule, reason)


def _state(history: np.ndarray, strikes: int, since: int) -> GovernorState:
    return GovernorState(history, np.array(strikes, np.int32), np.array(since, np.int32))
