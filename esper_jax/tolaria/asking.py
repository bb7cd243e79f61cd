"""Asking a controller for its decisions, which may raise or never answer, without the run going down with it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..nissa.event import plain
from ..protocol import Controller, Decision


class ControllerError(RuntimeError):
    """The controller gave no decisions; the message says why."""


class Asking:
    """Asks a controller within a deadline.

    Args:
      deadline: seconds that an answer may take; None waits for ever. With a deadline the controller runs in a thread of
        its own, and a run hangs on the clock: one that is late decides nothing at that tick, and is asked again once it
        has come back.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self.complaints: list[str] = []
        """What was wrong with decisions of the last answer, which are left out of it."""
        self._late: threading.Thread | None = None

    def __call__(self, controller: Controller, state: Any, report: Any, feedback: Any) -> tuple[Any, Any]:
        """The controller's decisions and its next state.

        Raises:
          ControllerError: it raised, it is late, or it is still busy with an earlier tick.
        """
        decisions, after = self._within(controller, state, report, feedback)
        wrong = [_malformed(decision) for decision in decisions]
        self.complaints = [f"the controller gave a decision with {what}; it is left out" for what in wrong if what]
        return [decision for decision, what in zip(decisions, wrong, strict=True) if not what], after

    def _within(self, controller: Controller, state: Any, report: Any, feedback: Any) -> tuple[Any, Any]:
        """What the controller gives within the deadline."""
        if self.deadline is None:
            return _answer(controller, state, report, feedback)
        if self._late is not None and self._late.is_alive():
            raise ControllerError("the controller is still busy with an earlier tick; nothing is decided at this one")
        found: list[Any] = []
        raised: list[ControllerError] = []

        def answer() -> None:
            try:
                found.append(_answer(controller, state, report, feedback))
            except ControllerError as error:
                raised.append(error)

        self._late = threading.Thread(target=answer, name="esper_jax controller", daemon=True)
        self._late.start()
        self._late.join(self.deadline)
        if self._late.is_alive():
            raise ControllerError(
                f"the controller did not answer within {self.deadline:g} s; nothing is decided at this tick"
            )
        self._late = None
        if raised:
            raise raised[0]
        return found[0]  # type: ignore[no-any-return]


def _answer(controller: Controller, state: Any, report: Any, feedback: Any) -> tuple[Any, Any]:
    try:
        own = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, state)
        decisions, after = controller.decide(own, report, feedback)  # which may write over its state
    except Exception as error:
        text = f"the controller raised {type(error).__name__}: {error}; nothing is decided at this tick"
        raise ControllerError(text) from error
    if not isinstance(decisions, Sequence) or not all(isinstance(one, Decision) for one in decisions):
        raise ControllerError(
            f"the controller gave {repr(decisions)[:120]} where a sequence of Decision is expected; nothing is decided "
            "at this tick"
        )
    return decisions, after


def _malformed(decision: Decision) -> str:
    """What of a decision is of another kind than it must be, whatever its value; "" where nothing is."""
    whole = lambda value: isinstance(value, int | np.integer) and not isinstance(value, bool)  # noqa: E731
    text = lambda value: isinstance(value, str)  # noqa: E731
    mapping = lambda value: isinstance(value, Mapping)  # noqa: E731
    kinds = {"action": text, "site": text, "slot": whole, "blueprint": text, "steps": whole, "reason": text}
    for name, fits in {**kinds, "stored": text, "config": mapping}.items():
        value = getattr(decision, name)
        if not fits(value) and not (value is None and name in ("slot", "blueprint", "stored")):
            return f"{name}={repr(value)[:80]}"
    try:
        plain(decision, "decision")
    except (TypeError, ValueError) as error:
        return f"what cannot be kept: {error}"
    return ""
