"""The gates a seed must pass to reach the next stage (contract 7 to 10). What was not measured does not pass."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._checks import INT32, flag, real, whole
from .stages import Stage
from .state import SeedState

REASONS = (
    "passed",
    "is in another stage",
    "its program is not ready",
    "its parameters are not finite",
    "has not trained for enough ticks",
    "its gradient health is not measured",
    "its gradient health is too low",
    "its gradient is exploding",
    "the score has not improved enough since the stage began (or is not measured)",
    "its gradient ratio to the host is too low (or not measured)",
    "its alpha ramp has not ended",
    "its alpha ramp does not end at 1",
    "its contribution is not measured",
    "its contribution is too low",
)
PASSED, STAGE, NOT_READY, NOT_FINITE, TOO_EARLY, NO_HEALTH, SICK, EXPLODING = range(8)
NO_GAIN, LOW_RATIO, RAMPING, NOT_FULL, NO_CONTRIBUTION, LOW_CONTRIBUTION = range(8, 14)

Verdict = tuple[Bool[Array, " S"], Int[Array, " S"]]


@dataclasses.dataclass(frozen=True)
class Gates:
    """Thresholds of the gates. `strict` adds the score and ratio checks of G2 and the full point of G5."""

    strict: bool = False
    min_training_ticks: int = 10
    min_health: float = 0.7
    max_exploding: float = 0.01
    min_improvement: float = 0.5
    min_ratio: float = 0.10
    min_contribution: float = 1.0

    def __post_init__(self) -> None:
        flag("strict", self.strict)
        whole("min_training_ticks", self.min_training_ticks, 0, INT32)
        real("min_health", self.min_health, least=0, most=1)
        for name in ("min_health", "max_exploding", "min_improvement", "min_ratio", "min_contribution"):
            if not (isinstance(getattr(self, name), float) and math.isinf(getattr(self, name))):  # for what never holds
                real(name, getattr(self, name))
            object.__setattr__(self, name, float(getattr(self, name)))


def g1(state: SeedState, ready: Bool[Array, " S"], finite: Bool[Array, " S"]) -> Verdict:
    """GERMINATED to TRAINING: the program is ready and the parameters are finite."""
    return _verdict(
        (state.stage != Stage.GERMINATED, STAGE),
        (~ready, NOT_READY),
        (~finite, NOT_FINITE),
    )


def g2(state: SeedState, score: Float[Array, ""], gates: Gates) -> Verdict:
    """TRAINING to BLENDING: enough ticks, a healthy gradient; when strict also a gain and a gradient of some size."""
    checks = [
        (state.stage != Stage.TRAINING, STAGE),
        (state.steps < gates.min_training_ticks, TOO_EARLY),
        (jnp.isnan(state.health) | jnp.isnan(state.exploding), NO_HEALTH),
        (~(state.health >= gates.min_health), SICK),
        (~(state.exploding <= gates.max_exploding), EXPLODING),
    ]
    if gates.strict:
        checks += [
            (~(score - state.stage_score >= gates.min_improvement), NO_GAIN),
            (~(state.ratio >= gates.min_ratio), LOW_RATIO),
        ]
    return _verdict(*checks)


def g3(state: SeedState) -> Verdict:
    """BLENDING to HOLDING: the ramp has ended and it ended at alpha 1."""
    return _verdict(
        (state.stage != Stage.BLENDING, STAGE),
        (state.ramp_done < state.ramp_steps, RAMPING),
        ((state.ramp_target != 1) | (state.alpha != 1), NOT_FULL),
    )


def g5(state: SeedState, gates: Gates) -> Verdict:
    """HOLDING to FOSSILIZED: a measured contribution (>= `min_contribution` when strict, else > 0), a healthy seed."""
    enough = state.contribution >= gates.min_contribution if gates.strict else state.contribution > 0
    return _verdict(
        (state.stage != Stage.HOLDING, STAGE),
        (jnp.isnan(state.contribution), NO_CONTRIBUTION),
        (~enough, LOW_CONTRIBUTION),
        (jnp.isnan(state.health), NO_HEALTH),
        (~(state.health >= gates.min_health), SICK),
    )


def g5_code(stage: int, contribution: float, health: float, gates: Gates) -> int:
    """G5's answer for one seed's numbers, an index into `REASONS`: the gate itself, for those who hold no arrays."""
    values = (np.array([value], np.float32) for value in (contribution, health))
    return int(_g5_reason(np.array([stage], np.int32), *values, gates)[0])


@functools.partial(jax.jit, static_argnums=3)
def _g5_reason(stage: Array, contribution: Array, health: Array, gates: Gates) -> Array:
    return g5(SeedState.empty(1).replace(stage=stage, contribution=contribution, health=health), gates)[1]


def _verdict(*checks: tuple[Bool[Array, " S"], int]) -> Verdict:
    """The first check that holds gives the reason; none: passed."""
    reason = jnp.zeros(checks[0][0].shape, jnp.int32)
    for failed, code in reversed(checks):
        reason = jnp.where(failed, code, reason)
    return reason == PASSED, reason
