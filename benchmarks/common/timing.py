"""Interleaved timing: all variants take turns in one process, in an order drawn anew for each round.

Load on the machine then falls on every variant alike, and the ratio of two variants is taken within a round, where
they met the same load. How small a difference can be told at all is measured too: a second, identical copy of the
base is one more variant, and what its ratio shows is noise.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Variant = Callable[[int], Any]
"""`variant(i)` runs once on input set `i` and returns what is to be waited for."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call of one variant, one sample a round, each the mean of `calls` calls in a row."""

    name: str
    samples: np.ndarray
    calls: int = 1

    @property
    def median(self) -> float:
        """The median sample, seconds."""
        return float(np.median(self.samples))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Time of a variant over time of another, round by round.

    `median` of the rounds' ratios; `low` and `high` bound it with 95% confidence (order statistics, so nothing is
    assumed of the distribution); `q25` and `q75` are quartiles of single rounds, the spread.
    """

    median: float
    low: float
    high: float
    q25: float
    q75: float

    @property
    def spread(self) -> float:
        """The distance between the quartiles."""
        return self.q75 - self.q25


def interleave(
    variants: Mapping[str, Variant],
    *,
    rounds: int = 60,
    sets: int = 4,
    warmup: int = 3,
    min_sample: float = 2e-3,
    budget: float = math.inf,
    least: int = 10,
    lead: int = 0,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time variants side by side.

    Args:
      variants: by name; each is called with the number of an input set.
      rounds: samples of each variant, at most.
      sets: how many input sets there are; a sample goes through them in turn.
      warmup: calls of each variant before anything is timed (the first compiles).
      min_sample: seconds; a sample makes as many calls in a row as the fastest variant needs for this, the same
        number for all, and waits for the last (`block_until_ready`).
      budget: seconds after which no further round begins, once `least` rounds are done.
      least: rounds made whatever the budget.
      lead: calls of a variant before each of its samples, not timed. Threads of another library spin for some
        milliseconds after its last call, on the cores that the next call needs.
      seed: of the order in which variants take turns.

    Returns:
      A `Timing` for each variant, all with equally many samples.

    Raises:
      ValueError: no variants, or fewer than one round.
    """
    if not variants or rounds < 1 or sets < 1:
        raise ValueError(f"give variants, rounds and input sets: got {len(variants)}, {rounds} and {sets}")
    quickest = math.inf
    for variant in variants.values():
        for i in range(max(warmup, 1)):
            jax.block_until_ready(variant(i % sets))
        began = time.perf_counter()
        jax.block_until_ready(variant(0))
        quickest = min(quickest, time.perf_counter() - began)
    calls = max(1, min(math.ceil(min_sample / max(quickest, 1e-9)), 10_000))
    names, order = list(variants), np.random.default_rng(seed)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for done in range(rounds):
            if done >= min(least, rounds) and time.perf_counter() - started > budget:
                break
            for at in order.permutation(len(names)):
                samples[names[at]].append(_sample(variants[names[at]], calls, sets, done, lead))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(name, np.asarray(taken), calls) for name, taken in samples.items()}


def _sample(variant: Variant, calls: int, sets: int, first: int, lead: int) -> float:
    result = None
    for i in range(first - lead, first):
        jax.block_until_ready(variant(i % sets))
    began = time.perf_counter()
    for i in range(first, first + calls):
        result = variant(i % sets)
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / calls


def summarise(samples: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, mean, 5th, 95th and 99th percentile, quartile distance and extremes of samples, in their own unit.

    Raises:
      ValueError: no samples.
    """
    taken = np.asarray(samples, np.float64)
    if taken.size == 0:
        raise ValueError("no samples to summarise")
    p5, q25, median, q75, p95, p99 = np.percentile(taken, [5, 25, 50, 75, 95, 99])
    return {
        "median": float(median),
        "mean": float(taken.mean()),
        "p5": float(p5),
        "p95": float(p95),
        "p99": float(p99),
        "iqr": float(q75 - q25),
        "least": float(taken.min()),
        "worst": float(taken.max()),
        "count": int(taken.size),
    }


def ratio(timing: Timing, base: Timing) -> Ratio:
    """`timing` over `base`, round by round.

    Raises:
      ValueError: the two were not timed in the same rounds.
    """
    if timing.samples.shape != base.samples.shape or timing.samples.size == 0:
        raise ValueError(
            f"{timing.name} has {timing.samples.size} samples and {base.name} {base.samples.size}: time them together"
        )
    each = timing.samples / base.samples
    low, high = median_interval(each)
    q25, median, q75 = np.percentile(each, [25, 50, 75])
    return Ratio(float(median), low, high, float(q25), float(q75))


def median_interval(samples: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """A 95% confidence interval of the median, from order statistics; the extremes where samples are few."""
    ordered = np.sort(np.asarray(samples, np.float64))
    n = ordered.size
    half = 1.96 * math.sqrt(n) / 2
    low = max(math.floor(n / 2 - half), 0)
    high = min(math.ceil(n / 2 + half), n - 1)
    return float(ordered[low]), float(ordered[high])


def noise_floor(copies: Sequence[Ratio]) -> float:
    """The largest distance from 1 that the interval of an identical copy's ratio reaches: less cannot be told.

    Raises:
      ValueError: no copies.
    """
    if not copies:
        raise ValueError("a noise floor needs the ratio of one identical copy or more")
    return max(max(abs(copy.low - 1), abs(copy.high - 1)) for copy in copies)


def within(measured: Ratio, floor: float) -> bool:
    """Whether a ratio cannot be told from 1: its median is no farther from 1 than the noise floor."""
    return abs(measured.median - 1) <= floor
