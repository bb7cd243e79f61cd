"""Random lives: whatever is done to seeds in whatever order, the rules of the contract hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import esper_jax
from esper_jax import Lifecycle, SeedState, Stage
from esper_jax.kasmina import lifecycle
from esper_jax.kasmina.stages import LEGAL, LIVE

from .hosts import grown, host, poisoned

SLOTS = 3
QUICK = Lifecycle(gates=esper_jax.Gates(min_training_ticks=2), tempo=3, embargo_ticks=2)
masks = st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS)
values = st.sampled_from([float("nan"), -1.0, 0.0, 0.2, 0.9, 50.0, float("inf")])
OPERATIONS = st.one_of(
    st.tuples(st.just("tick"), values, masks),
    st.tuples(st.just("tick"), values, masks),
    st.tuples(st.just("move"), st.sampled_from(Stage), masks),
    st.tuples(st.just("next"), st.none(), masks),
    st.tuples(st.just("ramp"), st.sampled_from([0.0, 0.3, 1.0]), masks),
    st.tuples(st.just("prune"), st.sampled_from([3, 5]), masks),
    st.tuples(st.just("fault"), st.none(), masks),
    st.tuples(st.just("observe"), values, masks),
)


@functools.partial(jax.jit, static_argnums=(1, 3))
def apply_static(state, name, mask, argument):
    if name == "ramp":
        return lifecycle.start_ramp(state, mask, argument, 3)[0]
    if name == "prune":
        return lifecycle.schedule_prune(state, mask, argument)[0]
    if name == "fault":
        return lifecycle.count_faults(state, mask)
    following = jnp.asarray([esper_jax.kasmina.stages.NEXT.get(s, s) for s in Stage], jnp.int32)
    return lifecycle.transition(state, mask, following[state.stage], 1.0)[0]


@functools.partial(jax.jit, static_argnums=(1,))
def apply_dynamic(state, name, mask, value):
    if name == "tick":
        return lifecycle.tick(state, score=value, ready=mask, config=QUICK)[0]
    if name == "move":
        return lifecycle.transition(state, mask, value, 1.0)[0]
    return lifecycle.observe(state, mask, *(jnp.full(SLOTS, value) for _ in range(3)))


def operate(state, operation):
    name, argument, mask = operation
    dynamic = name in ("tick", "move", "observe")
    argument = jnp.asarray(argument, jnp.int32 if name == "move" else jnp.float32) if dynamic else argument
    return (apply_dynamic if dynamic else apply_static)(state, name, jnp.asarray(mask), argument)


def as_numpy(state):
    return jax.tree.map(np.asarray, state)


def check(before, after, operation):
    stage, alpha = after.stage, after.alpha
    hops = LEGAL[before.stage, stage] | (before.stage == stage)
    assert np.all(hops), (operation, before.stage, stage)
    assert np.all((alpha >= 0) & (alpha <= 1)), operation
    entered = (stage >= Stage.BLENDING) & (stage <= Stage.FOSSILIZED)
    assert np.all(alpha[~entered] == 0), operation
    moved = before.stage != stage
    assert np.all(after.steps[moved] == 0), operation
    ticks = int(operation[0] == "tick")
    assert np.all(after.steps[~moved] == before.steps[~moved] + ticks * (stage[~moved] != Stage.DORMANT)), operation
    assert np.all(after.steps[stage <= Stage.FOSSILIZED] <= after.age[stage <= Stage.FOSSILIZED]), operation
    assert np.all((after.ramp_done >= 0) & (after.ramp_done <= after.ramp_steps)), operation
    assert np.all(after.generation - before.generation == (moved & (stage == Stage.GERMINATED))), operation
    assert not np.any(after.pruning & ~np.isin(stage, LIVE)), operation
    claimed = before.pruning & moved
    assert np.all(stage[claimed] == Stage.PRUNED), operation
    faults = after.faults - before.faults
    assert np.all(faults[stage != Stage.GERMINATED] <= 1), operation
    assert not np.any((after.faults >= 3) & np.isin(stage, LIVE)), operation


@settings(max_examples=60)
@given(operations=st.lists(OPERATIONS, min_size=1, max_size=40))
def test_any_sequence_of_operations_keeps_every_rule(operations):
    """Contract 1, 2, 3, 6, 12, 13, 18: edges, alpha, counters, claimed seeds, faults, one transition an operation."""
    state = SeedState.empty(SLOTS).replace(
        stage=jnp.asarray([Stage.GERMINATED, Stage.DORMANT, Stage.HOLDING], jnp.int32)
    )
    state = state.replace(alpha=jnp.asarray([0.0, 0.0, 1.0]))
    for operation in operations:
        after = operate(state, operation)
        check(as_numpy(state), as_numpy(after), operation)
        state = after


@settings(max_examples=25)
@given(operations=st.lists(OPERATIONS, min_size=1, max_size=12), order=st.permutations(range(SLOTS)))
def test_slots_do_not_know_of_each_other(operations, order):
    """Contract 6: the same operations on slots in another order give the same slots in that order."""
    first = SeedState.empty(SLOTS).replace(
        stage=jnp.asarray([Stage.GERMINATED, Stage.TRAINING, Stage.HOLDING], jnp.int32)
    )
    swapped = jax.tree.map(lambda leaf: leaf[np.asarray(order)], first)
    for name, argument, mask in operations:
        first = operate(first, (name, argument, mask))
        swapped = operate(swapped, (name, argument, [mask[i] for i in order]))
    moved = jax.tree.map(lambda leaf: leaf[np.asarray(order)], first)
    for p, q in zip(jax.tree.leaves(moved), jax.tree.leaves(swapped), strict=True):
        np.testing.assert_array_equal(p, q)


def planted_forward():
    given_host = host("mlp")
    forward = esper_jax.graft(given_host.model)
    return jax.jit(lambda morph: forward(morph, given_host.x))


FORWARD = planted_forward()


@settings(max_examples=12)
@given(data=st.data())
def test_no_nan_reaches_the_host_in_any_life(data):
    """Contract 16, 18: random operations, random seeds broken; with nobody blended in, the host's own bits."""
    morph = grown("mlp", True)
    dormant = FORWARD(morph.replace(state={path: SeedState.empty(2) for path in morph.state}))
    for plant in morph.spec.plants:
        if data.draw(st.booleans()):
            harm = data.draw(st.sampled_from([float("nan"), float("inf")]))
            morph = poisoned(morph, harm, only={(plant.site, plant.slot)})
    states = {path: pad(SeedState.empty(2).replace(stage=jnp.ones(2, jnp.int32))) for path in morph.state}
    for operation in data.draw(st.lists(OPERATIONS, min_size=3, max_size=10)):
        states = {path: operate(state, operation) for path, state in states.items()}
        output = FORWARD(morph.replace(state={path: cut(state) for path, state in states.items()}))
        assert bool(jnp.all(jnp.isfinite(output))), operation
        if all(not np.any(np.asarray(state.alpha)) for state in states.values()):
            assert np.asarray(output).tobytes() == np.asarray(dormant).tobytes(), operation


def pad(state):
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), state)


def cut(state):
    return jax.tree.map(lambda leaf: leaf[:2], state)
