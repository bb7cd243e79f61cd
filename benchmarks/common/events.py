"""What an event cost a training loop, from the wall-clock seconds of each of its steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .timing import summarise


@dataclasses.dataclass(frozen=True)
class Event:
    """The steps of a loop around an event, each from the end of the one before to its own end.

    Attributes:
      seconds: wall time of each step; what the event itself took in the foreground is part of its step.
      decided: the step before which the event was decided; all before it are idle ones.
      swapped: the step with which what came of it took over; the same as `decided` where all is done at once.
    """

    seconds: Sequence[float]
    decided: int
    swapped: int


def run(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batches: Sequence[Any],
    *,
    steps: int,
    at: int,
    event: Callable[[Any], tuple[Callable[[Any, Any], tuple[Any, Any]], Any]],
) -> tuple[Event, Any]:
    """Run `steps` steps, waiting for each, and before step `at` the event, which gives step and state to go on with.

    Returns:
      The event and the last state.
    """
    seconds = []
    before = time.perf_counter()
    for i in range(steps):
        if i == at:
            step, state = event(state)
        state, found = step(state, batches[i % len(batches)])
        jax.block_until_ready(found)
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return Event(seconds, at, at), state


def measure(event: Event, *, warm: int = 5, settle: int = 3) -> dict[str, float | None]:
    """The cost of an event, in seconds and in idle steps.

    Args:
      event: the loop's steps.
      warm: first steps that are left out.
      settle: steps after the swap that still belong to it (buffers are made, caches filled).

    Returns:
      `idle_median`, `idle_p95`, `idle_p99`: seconds a step before the event. `during_median`, `during_p95`,
      `during_p99`, `during_worst`: the same of the steps after that of the decision and before that of the swap, over
      the idle median; None where nothing lies between. `decision_steps`: what the decision's own step took above an
      idle one, in idle steps, where it is another than the swap's. `worst`: the slowest step of the event, seconds,
      and `worst_steps`, in idle medians. `extra`: all time from the decision to the settled swap above what as many
      undisturbed steps take, seconds, and `extra_steps`. `noise_steps`: how much an idle window of that length differs
      from its own median, in idle steps (the median of its absolute value over all windows). `swap_steps`: the part of
      `extra_steps` that falls on the swap and the steps in which it settles, `swap_grown_steps`: the same in steps of
      the grown network. `waited`: steps from decision to swap.

    Raises:
      ValueError: too few steps before the event or after the swap.
    """
    taken = np.asarray(event.seconds, np.float64)
    idle = taken[warm : event.decided]
    settled = event.swapped + 1 + settle
    if idle.size < 10 or taken.size - settled < 5 or event.swapped < event.decided:
        raise ValueError(
            f"an event needs 10 idle steps after {warm} warm ones and 5 after the swap has settled; got "
            f"{taken.size} steps, decided {event.decided}, swapped {event.swapped}"
        )
    median, grown = float(np.median(idle)), float(np.median(taken[settled:]))
    before, swap = taken[event.decided : event.swapped], taken[event.swapped : settled]
    swap_extra = float(np.sum(swap - grown))
    extra = float(np.sum(before - median)) + swap_extra
    quiet, during = summarise(idle), (summarise(before[1:] / median) if before.size > 1 else {})
    worst = float(np.max(taken[event.decided : settled]))
    return {
        "idle_median": median,
        "idle_p95": quiet["p95"],
        "idle_p99": quiet["p99"],
        **{f"during_{key}": during.get(key) for key in ("median", "p95", "p99", "worst")},
        "decision_steps": float(before[0] / median - 1) if before.size else None,
        "worst": worst,
        "worst_steps": worst / median,
        "extra": extra,
        "extra_steps": extra / median,
        "noise_steps": _noise(idle, before.size + swap.size) / median,
        "swap_steps": swap_extra / median,
        "swap_grown_steps": swap_extra / grown,
        "waited": int(before.size),
    }


def middle(found: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Several measurements of one kind of event as one: medians, but of all `worst` and p99 the worst."""
    joined: dict[str, float | None] = {}
    for key in found[0]:
        values = [one[key] for one in found if one[key] is not None]
        pick = max if "worst" in key or "p99" in key else np.median
        joined[key] = float(pick(values)) if values else None
    return joined


def _noise(idle: np.ndarray, length: int) -> float:
    """How far the sum of a window of idle steps is from its own median step times its length, typically."""
    length = min(length, idle.size)
    windows = np.lib.stride_tricks.sliding_window_view(idle, length)
    return float(np.median(np.abs(windows.sum(1) - length * np.median(idle))))
