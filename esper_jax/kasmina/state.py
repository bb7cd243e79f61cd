"""The lifecycle state of the seeds at one site: one pytree of arrays, every field with one entry a slot and layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ._pytree import Struct, pytree
from .stages import LIVE, Stage


@pytree
class SeedState(Struct):
    """What is known of the seeds in a site's `S` slots. NaN stands for "not measured yet" and passes no gate.

    At a site of `L` stacked layers (`Site.layers`) every field is `[L, S]`: each layer's seed has a life of its own.

    Life: `stage` (a `Stage`), `alpha` in [0, 1], the ramp (`ramp_start`, `ramp_target`, `ramp_steps`, `ramp_done` in
    ticks, `ramp_curve` an index into `ramp.CURVES`), `age` and `steps` (ticks since germination and in this stage),
    `generation` (germinations this slot has seen), `pruning` (a scheduled prune is under way: parameters are frozen).
    Measured: `faults` (steps on which the seed was not finite), `contribution` and `stage_score` (points),
    `ratio`, `health`, `exploding` (running means of the seed's gradient statistics, contract 8).
    """

    stage: Int[Array, " S"]
    alpha: Float[Array, " S"]
    ramp_start: Float[Array, " S"]
    ramp_target: Float[Array, " S"]
    ramp_steps: Int[Array, " S"]
    ramp_done: Int[Array, " S"]
    ramp_curve: Int[Array, " S"]
    age: Int[Array, " S"]
    steps: Int[Array, " S"]
    generation: Int[Array, " S"]
    pruning: Bool[Array, " S"]
    faults: Int[Array, " S"]
    contribution: Float[Array, " S"]
    stage_score: Float[Array, " S"]
    ratio: Float[Array, " S"]
    health: Float[Array, " S"]
    exploding: Float[Array, " S"]

    @staticmethod
    def empty(slots: int, layers: int = 0) -> SeedState:
        """`slots` dormant slots, of each of `layers` stacked layers where there are any."""
        shape = (layers, slots) if layers else (slots,)
        whole = lambda: jnp.zeros(shape, jnp.int32)  # noqa: E731
        real = lambda: jnp.zeros(shape, jnp.float32)  # noqa: E731
        unknown = lambda: jnp.full(shape, jnp.nan, jnp.float32)  # noqa: E731
        return SeedState(
            stage=whole(),
            alpha=real(),
            ramp_start=real(),
            ramp_target=real(),
            ramp_steps=whole(),
            ramp_done=whole(),
            ramp_curve=whole(),
            age=whole(),
            steps=whole(),
            generation=whole(),
            pruning=jnp.zeros(shape, bool),
            faults=whole(),
            contribution=unknown(),
            stage_score=unknown(),
            ratio=unknown(),
            health=unknown(),
            exploding=unknown(),
        )


def resized(state: SeedState, slots: int) -> SeedState:
    """`state` with empty slots added up to `slots`."""
    missing = slots - state.stage.shape[-1]
    if missing <= 0:
        return state
    more = SeedState.empty(missing, layers_of(state))
    return jax.tree.map(lambda old, new: jnp.concatenate([old, new], -1), state, more)


def layers_of(state: SeedState) -> int:
    """The stacked layers of a site by its state; 0 where its layer stands alone."""
    return state.stage.shape[0] if state.stage.ndim == 2 else 0


def slot_of(state: SeedState, slot: int) -> SeedState:
    """One slot's values: every field a scalar, or `[L]` at stacked layers."""
    return jax.tree.map(lambda field: field[..., slot], state)


def with_slot(state: SeedState, slot: int, one: SeedState) -> SeedState:
    """`state` with one slot's values as `slot_of` gives them."""
    return jax.tree.map(lambda field, value: field.at[..., slot].set(value), state, one)


def stages_text(state: SeedState, slot: int) -> str:
    """A slot's stage by name; at stacked layers the stages that occur, with how many of them are in it."""
    stages = [Stage(int(stage)).name for stage in np.atleast_1d(np.asarray(state.stage)[..., slot])]
    if not layers_of(state):
        return stages[0]
    return ", ".join(f"{stages.count(name)} {name}" for name in dict.fromkeys(stages))


def is_in(stage: Int[Array, "..."], *stages: Stage) -> Bool[Array, "..."]:
    """Where `stage` is one of `stages`."""
    return jnp.isin(stage, jnp.asarray(stages, jnp.int32))


def computes(stage: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Where the seed's forward pass is needed: TRAINING, BLENDING, HOLDING, FOSSILIZED."""
    return (stage >= Stage.TRAINING) & (stage <= Stage.FOSSILIZED)


def blends(stage: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Where the seed enters the host's output (by its alpha): BLENDING, HOLDING, FOSSILIZED."""
    return (stage >= Stage.BLENDING) & (stage <= Stage.FOSSILIZED)


def learns(state: SeedState) -> Bool[Array, " S"]:
    """Where the seed's parameters are trained: it computes and no scheduled prune has frozen it."""
    return computes(state.stage) & ~state.pruning


def live(stage: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Where a seed is on trial: GERMINATED, TRAINING, BLENDING, HOLDING."""
    return is_in(stage, *LIVE)


def choose(mask: Bool[Array, " S"], new: SeedState, old: SeedState) -> SeedState:
    """Slot by slot: `new` where `mask`, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(mask, a, b), new, old)
