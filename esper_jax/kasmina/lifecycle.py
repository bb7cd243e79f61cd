"""Moving seeds through their life: pure functions on `SeedState`, vectorised over slots (contract 1 to 3, 12 to 14).

Each returns the new state and a bool a slot: whether the move was legal and made. An illegal move changes nothing.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._checks import INT32, one_of, whole
from . import gates as _gates
from ._pytree import Struct, pytree
from .gates import Gates
from .ramp import alpha_at, curve_code
from .stages import LEGAL, Stage
from .state import SeedState, choose, computes, is_in, layers_of, live

MAX_FAULTS = 3
EMA = 0.9
MAX_RATIO = 10.0
Moved = tuple[SeedState, Bool[Array, " S"]]


@dataclasses.dataclass(frozen=True)
class Lifecycle:
    """How seeds move by themselves at a tick: the gates, the default ramp, and the ticks a pruned slot rests."""

    gates: Gates = Gates()
    tempo: int = 5
    curve: str = "sigmoid"
    pruned_ticks: int = 1
    embargo_ticks: int = 5
    reset_ticks: int = 1

    def __post_init__(self) -> None:
        one_of("gates", self.gates, Gates, "Gates()")
        curve_code(self.curve)
        for name in ("tempo", "pruned_ticks", "embargo_ticks", "reset_ticks"):
            whole(name, getattr(self, name), 1, INT32)


@pytree
class Ticked(Struct):
    """What one tick did: the stage before and after, and why a waiting seed did not move (`gates.REASONS`)."""

    before: Int[Array, " S"]
    after: Int[Array, " S"]
    reason: Int[Array, " S"]


def transition(
    state: SeedState,
    mask: Bool[Array, " S"],
    target: Int[Array, " S"] | Stage,
    score: Float[Array, ""] | float = jnp.nan,
) -> Moved:
    """Move the masked slots to `target` where the edge is legal; steps restart at 0, the score is noted (contract 2).

    A seed that a scheduled prune has claimed may go to PRUNED only.
    """
    shape = state.stage.shape
    target = jnp.broadcast_to(jnp.asarray(target, jnp.int32), shape)
    ok = mask & jnp.asarray(LEGAL)[state.stage, target] & (~state.pruning | (target == Stage.PRUNED))
    entered = lambda stage: target == stage  # noqa: E731
    silent = ~computes(target) | entered(Stage.TRAINING)
    full = entered(Stage.HOLDING) | entered(Stage.FOSSILIZED)
    fresh = SeedState.empty(shape[-1], layers_of(state)).replace(generation=state.generation)
    wiped = choose(entered(Stage.GERMINATED) | entered(Stage.DORMANT), fresh, state)
    moved = wiped.replace(
        stage=target,
        steps=jnp.zeros(shape, jnp.int32),
        stage_score=jnp.broadcast_to(jnp.asarray(score, jnp.float32), shape),
        generation=state.generation + entered(Stage.GERMINATED),
        alpha=jnp.where(silent, 0.0, wiped.alpha),
        pruning=wiped.pruning & ~entered(Stage.PRUNED),
        ramp_start=jnp.where(silent, 0.0, wiped.ramp_start),
        ramp_target=jnp.where(silent, 0.0, wiped.ramp_target),
        ramp_steps=jnp.where(silent | full, 0, wiped.ramp_steps),
        ramp_done=jnp.where(silent | full, 0, wiped.ramp_done),
    )
    return choose(ok, moved, state), ok


def start_ramp(state: SeedState, mask: Bool[Array, " S"], target: float, steps: int, curve: str = "sigmoid") -> Moved:
    """Begin a ramp of `steps` ticks to `target`, in BLENDING or HOLDING, when the last ramp has ended (contract 12).

    Lowering alpha in HOLDING returns the seed to BLENDING (contract 14). Legal only for a seed that no scheduled
    prune has claimed.
    """
    _check_ramp(target, steps)
    ended = state.ramp_done >= state.ramp_steps
    ok = mask & is_in(state.stage, Stage.BLENDING, Stage.HOLDING) & ended & ~state.pruning
    ok &= jnp.asarray(target, jnp.float32) != state.alpha
    back = ok & (state.stage == Stage.HOLDING)
    state, _ = _keep_score(state, back)
    ramped = state.replace(
        ramp_start=state.alpha,
        ramp_target=jnp.full_like(state.alpha, target),
        ramp_steps=jnp.full_like(state.ramp_steps, steps),
        ramp_done=jnp.zeros_like(state.ramp_done),
        ramp_curve=jnp.full_like(state.ramp_curve, curve_code(curve)),
    )
    return choose(ok, ramped, state), ok


def blend(state: SeedState, mask: Bool[Array, " S"], score: Float[Array, ""] | float, steps: int, curve: str) -> Moved:
    """TRAINING to BLENDING with a ramp from 0 to 1 over `steps` ticks."""
    state, ok = transition(state, mask, Stage.BLENDING, score)
    state, _ = start_ramp(state, ok, 1.0, steps, curve)
    return state, ok


def schedule_prune(
    state: SeedState,
    mask: Bool[Array, " S"],
    steps: int,
    curve: str = "sigmoid",
    score: Float[Array, ""] | float = jnp.nan,
) -> Moved:
    """Ramp alpha down to 0 with the parameters frozen; `tick` prunes the seed at the end (contract 13).

    A live seed whose alpha is 0 is pruned at once.
    """
    at_once = mask & live(state.stage) & (state.alpha == 0)
    state, pruned = transition(state, at_once, Stage.PRUNED, score)
    state, ramped = start_ramp(state, mask & ~at_once, 0.0, steps, curve)
    return state.replace(pruning=state.pruning | ramped), pruned | ramped


def count_faults(state: SeedState, faulty: Bool[Array, " S"]) -> SeedState:
    """Count one fault for each faulty seed that computes; the third prunes it (contract 18). Fossils stay, bypassed."""
    counted = computes(state.stage) & faulty
    state = state.replace(faults=state.faults + counted)
    state, _ = transition(state, counted & (state.faults >= MAX_FAULTS) & live(state.stage), Stage.PRUNED)
    return state


def observe(
    state: SeedState,
    mask: Bool[Array, " S"],
    health: Float[Array, " S"],
    ratio: Float[Array, " S"],
    exploding: Float[Array, " S"],
) -> SeedState:
    """Fold one step's gradient statistics into the running means of the masked seeds (decay 0.9, contract 8).

    A statistic that is NaN makes its mean unmeasured until the next step that measures it; no gate passes meanwhile.
    """

    def mean(old: Float[Array, " S"], new: Float[Array, " S"]) -> Float[Array, " S"]:
        moved = jnp.where(mask, jnp.where(jnp.isnan(old), new, EMA * old + (1 - EMA) * new), old)
        return moved.astype(old.dtype)

    return state.replace(
        health=mean(state.health, health),
        ratio=mean(state.ratio, jnp.minimum(ratio, MAX_RATIO)),
        exploding=mean(state.exploding, exploding),
    )


def tick(
    state: SeedState,
    *,
    score: Float[Array, ""] | float,
    ready: Bool[Array, " S"] | bool = True,
    finite: Bool[Array, " S"] | bool = True,
    config: Lifecycle = Lifecycle(),
) -> tuple[SeedState, Ticked]:
    """One tick: ramps move, gates G1 to G3 open, scheduled prunes end, pruned slots rest and reset.

    Args:
      state: the site's seeds.
      score: validation score in points; noted at stage starts. NaN where it was not measured.
      ready: whether each seed's program is compiled (G1).
      finite: whether each seed's parameters are finite (G1).
      config: gates, default ramp and rest times.

    Returns:
      The new state, and what moved or why not. A slot makes at most one transition a tick.
    """
    before = state.stage
    score = jnp.asarray(score, jnp.float32)
    ready, finite = (jnp.broadcast_to(jnp.asarray(flag), before.shape) for flag in (ready, finite))
    occupied = state.stage != Stage.DORMANT
    ramping = (state.stage == Stage.BLENDING) & (state.ramp_done < state.ramp_steps)
    done = state.ramp_done + ramping
    moved = alpha_at(state.ramp_start, state.ramp_target, state.ramp_steps, done, state.ramp_curve)
    state = state.replace(
        age=state.age + (occupied & (state.stage <= Stage.FOSSILIZED)),
        steps=state.steps + occupied,
        ramp_done=done,
        alpha=jnp.where(ramping, moved, state.alpha),
    )
    pass1, why1 = _gates.g1(state, ready, finite)
    pass2, why2 = _gates.g2(state, score, config.gates)
    pass3, why3 = _gates.g3(state)
    waiting = [before == Stage.GERMINATED, before == Stage.TRAINING, before == Stage.BLENDING]
    reason = jnp.select(waiting, [why1, why2, why3], _gates.PASSED)
    spent = state.pruning & (state.ramp_done >= state.ramp_steps)
    dead = live(state.stage) & (spent | (state.faults >= MAX_FAULTS))
    rested = (
        ((state.stage == Stage.PRUNED) & (state.steps >= config.pruned_ticks))
        | ((state.stage == Stage.EMBARGOED) & (state.steps >= config.embargo_ticks))
        | ((state.stage == Stage.RESETTING) & (state.steps >= config.reset_ticks))
    )
    target = jnp.select(
        [dead, pass1, pass2, pass3, rested & (state.stage == Stage.RESETTING), rested],
        [
            int(Stage.PRUNED),
            int(Stage.TRAINING),
            int(Stage.BLENDING),
            int(Stage.HOLDING),
            int(Stage.DORMANT),
            state.stage + 1,
        ],
        state.stage,
    )
    state, ok = transition(state, dead | pass1 | pass2 | pass3 | rested, target, score)
    state, _ = start_ramp(state, ok & (target == Stage.BLENDING), 1.0, config.tempo, config.curve)
    return state, Ticked(before, state.stage, reason)


def _keep_score(state: SeedState, back: Bool[Array, " S"]) -> Moved:
    """HOLDING back to BLENDING: the score at the start of the stage is still the last one noted."""
    alpha, noted = state.alpha, state.stage_score
    state, ok = transition(state, back, Stage.BLENDING)
    return state.replace(alpha=alpha, stage_score=noted), ok


def _check_ramp(target: float, steps: int) -> None:
    if not 0 <= target <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {target}")
    if steps < 1:
        raise ValueError(f"a ramp takes 1 tick or more, got {steps}")
