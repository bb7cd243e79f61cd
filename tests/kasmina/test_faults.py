"""A seed that is not finite: the host goes on without it, the step learns of it, the third time prunes it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import esper_jax
from esper_jax import SeedState, Stage
from esper_jax.kasmina import lifecycle
from esper_jax.kasmina.graft import zero_taps
from esper_jax.kasmina.summary import equal_bits

from .hosts import HOSTS, all_finite, compiled_step, grown, host, in_stage, poisoned

WAYS = [(name, resident) for name in HOSTS for resident in (False, True)]
TAPPED = [("mlp", True), ("cnn", False), ("transformer", False)]
LATE = [Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED]


@pytest.mark.parametrize(("name", "resident"), WAYS)
@pytest.mark.parametrize("harm", [float("nan"), float("inf")])
def test_a_broken_seed_in_any_stage_gives_the_hosts_own_bits(name, resident, harm):
    """Contract 18: output, loss, batch_stats and host gradient are those of the dormant morph, at alpha 1 too."""
    step, morph = compiled_step(name), grown(name, resident)
    expected = step(in_stage(morph, Stage.DORMANT))[0]
    for stage in LATE:
        assert equal_bits(step(in_stage(poisoned(morph, harm), stage, float(stage >= Stage.BLENDING)))[0], expected)


@settings(max_examples=15)
@given(data=st.data())
def test_the_host_stays_finite_whichever_seeds_break_at_whatever_alpha(data):
    """Contract 18: sound seeds go on beside broken ones."""
    step, morph = compiled_step("mlp"), grown("mlp", False)
    slots = [(plant.site, plant.slot) for plant in morph.spec.plants]
    stages = {at: (data.draw(st.sampled_from(LATE[1:])), data.draw(st.floats(0, 1, width=32))) for at in slots}
    broken = {at for at in slots if data.draw(st.booleans())}
    harm = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    out, _ = step(in_stage(poisoned(morph, harm, only=broken), stages))
    assert all_finite(out)


def test_a_broken_seed_leaves_the_sound_ones_their_effect():
    """Contract 18: falling back is per slot."""
    step, morph = compiled_step("mlp"), grown("mlp", False)
    slots = [(plant.site, plant.slot) for plant in morph.spec.plants]
    stages = dict.fromkeys(slots, (Stage.BLENDING, 0.5))
    one = step(in_stage(morph, {slots[0]: (Stage.BLENDING, 0.5)}))[0]
    rest_broken = poisoned(in_stage(morph, stages), float("nan"), only=set(slots[1:]))
    assert equal_bits(step(rest_broken)[0], one)


@functools.cache
def tapped_step(name):
    given_host = host(name)
    forward = esper_jax.graft(given_host.model)

    @jax.jit
    def step(morph, sample):
        def loss(params, taps):
            call = lambda m, x, **kw: forward.tapped(m, taps, sample, x, **kw)  # noqa: E731
            return given_host.loss(call, morph.with_params(params), given_host.x)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(morph.params, zero_taps(morph))[0]

    return step


@pytest.mark.parametrize(("name", "resident"), TAPPED)
@pytest.mark.parametrize("stage", [Stage.GERMINATED, *LATE], ids=lambda s: s.name)
def test_faults_surface_as_the_gradient_of_the_taps(name, resident, stage):
    """Contract 18: 1 for each broken slot that computes, from inside `nn.remat` too, and exactly 0 for all others."""
    morph = in_stage(grown(name, resident), stage)
    broken = {(plant.site, plant.slot) for plant in morph.spec.plants[::2]}
    _, taps = tapped_step(name)(poisoned(morph, float("nan"), only=broken), False)
    for plant in morph.spec.plants:
        expected = float(stage != Stage.GERMINATED and (plant.site, plant.slot) in broken)
        assert float(taps[plant.site].faults[plant.slot]) == expected, plant
    assert not any(np.any(np.asarray(tap.faults)) for path, tap in taps.items() if path not in morph.spec.planted_at)


@pytest.mark.parametrize(("name", "resident"), TAPPED)
def test_measuring_leaves_the_hosts_gradient_equal_to_the_bit(name, resident):
    """Contract 16: one program, sampled or not."""
    morph = in_stage(grown(name, resident), Stage.TRAINING)
    quiet, measured = (tapped_step(name)(morph, sample) for sample in (False, True))
    assert equal_bits(quiet[0], measured[0])
    assert all(not np.any(np.asarray(tap.stats)) for tap in quiet[1].values())
    for path in morph.spec.planted_at:
        assert float(measured[1][path].stats[0]) == 1.0


def life(stages, faults=0):
    n = len(stages)
    return SeedState.empty(n).replace(stage=jnp.asarray(stages, jnp.int32), faults=jnp.full(n, faults, jnp.int32))


def test_the_third_fault_prunes_a_seed_that_computes():
    """Contract 18."""
    state = life([Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.GERMINATED, Stage.DORMANT])
    state = state.replace(alpha=jnp.asarray([0.0, 0.5, 1.0, 0.0, 0.0]))
    for i in range(3):
        assert state.stage.tolist()[:3] == [Stage.TRAINING, Stage.BLENDING, Stage.HOLDING], i
        state = jax.jit(lifecycle.count_faults)(state, jnp.ones(5, bool))
    assert state.stage.tolist() == [Stage.PRUNED] * 3 + [Stage.GERMINATED, Stage.DORMANT]
    assert state.faults.tolist() == [3, 3, 3, 0, 0] and not np.any(np.asarray(state.alpha))


def test_a_fossil_is_never_pruned_but_its_faults_are_counted():
    """Contract 1, 18: nothing leads out of FOSSILIZED; it is bypassed while it is broken."""
    state = life([Stage.FOSSILIZED])
    for _ in range(5):
        state = lifecycle.count_faults(state, jnp.ones(1, bool))
    assert state.stage.tolist() == [Stage.FOSSILIZED] and state.faults.tolist() == [5]


def test_faults_are_counted_for_faulty_slots_only_and_forgotten_by_the_next_seed():
    """Contract 18."""
    state = lifecycle.count_faults(life([Stage.TRAINING, Stage.TRAINING], faults=1), jnp.asarray([True, False]))
    assert state.faults.tolist() == [2, 1]
    again, _ = lifecycle.transition(life([Stage.DORMANT], faults=2), jnp.ones(1, bool), Stage.GERMINATED)
    assert again.faults.tolist() == [0]


def test_a_tick_prunes_a_seed_that_reached_three_faults():
    """Contract 18: also when it was counted elsewhere."""
    state, ticked = lifecycle.tick(life([Stage.TRAINING, Stage.FOSSILIZED], faults=3), score=1.0)
    assert state.stage.tolist() == [Stage.PRUNED, Stage.FOSSILIZED]
    assert ticked.after.tolist() == state.stage.tolist()
