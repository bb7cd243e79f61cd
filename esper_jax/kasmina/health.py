"""How well a site does, in one number: the product of what its activations, its gradient and its faults say.

Everything it is made of was measured by the compiled step (see `probe` and `observe`); here it is only weighed. A layer
without seeds is judged by its own measurements alone, so its health does not hang on how many seeds live elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

AILING = 0.5
"""Below this a site or a seed is ailing, and a signal says so."""
QUIET, LOUD = 1e-6, 1e6
FAINT, STEEP = 1e-6, 1e2
DECADES = 3.0
ALIKE = 0.75


class Health(NamedTuple):
    """A site's health and its terms, each in [0, 1]; NaN where nothing was measured."""

    score: float
    activity: float
    spread: float
    diversity: float
    flow: float
    trust: float

    @property
    def terms(self) -> dict[str, float]:
        """The terms by name."""
        return {name: value for name, value in self._asdict().items() if name != "score"}

    @property
    def weakest(self) -> str:
        """The name of the lowest term."""
        return min(self.terms, key=lambda name: (math.isnan(self.terms[name]), self.terms[name]))


def site_health(
    *,
    variance: float,
    dead: float,
    silent: float,
    correlation: float,
    gradient: float,
    faults: Iterable[tuple[int, int]] = (),
) -> Health:
    """The health of a site: activity x spread x diversity x flow x trust.

    Args:
      variance: mean variance of the layer's outputs.
      dead: share of outputs that never change.
      silent: share of outputs that are never above 0.
      correlation: mean absolute correlation between outputs.
      gradient: norm of the gradient of the layer's own parameters.
      faults: `(faults, age)` of each seed at the site: steps on which it was not finite, and its age in ticks.

    Returns:
      `activity` = 1 - dead - (silent - dead) / 2: dead units count whole, units that a rectifier would silence half.
      `spread` = 1 while the variance is between 1e-6 and 1e6; from there to 0 in three decades, by the logarithm.
      `diversity` = 1 while the correlation is at most 0.75; 1 - ((correlation - 0.75) / 0.25)^2 above.
      `flow` = 1 while the gradient norm is between 1e-6 and 100; from there to 0 in three decades.
      `trust` = 1 - the most faults a tick of any seed here, at least 0.
      A measurement that is infinite makes its term 0; one that is NaN makes term and score NaN: not measured.
    """
    activity = _clip(1 - dead - max(silent - dead, 0.0) / 2)
    diversity = 1 - min(max(correlation - ALIKE, 0.0) / (1 - ALIKE), 1.0) ** 2
    trust = 1 - min(1.0, max((count / max(age, 1) for count, age in faults), default=0.0))
    spread, flow = _between(variance, QUIET, LOUD), _between(gradient, FAINT, STEEP)
    terms = (activity, spread, diversity, flow, trust)
    return Health(math.prod(terms), *terms)


def _between(value: float, low: float, high: float) -> float:
    """1 between two bounds, and 0 three decades outside, linear in the logarithm."""
    if math.isnan(value):
        return value
    if value <= 0 or math.isinf(value):
        return 0.0
    decade = math.log10(value)
    outside = max(math.log10(low) - decade, decade - math.log10(high), 0.0)
    return _clip(1 - outside / DECADES)


def _clip(value: float) -> float:
    return value if math.isnan(value) else min(max(value, 0.0), 1.0)
