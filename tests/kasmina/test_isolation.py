"""Until a seed is blended in, the host computes, learns and remembers exactly what it does without it."""

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.summary import equal_bits

from .hosts import HOSTS, born, compiled_step, grown, host, in_stage, poisoned, slot_norm

SILENT = [
    Stage.DORMANT,
    Stage.GERMINATED,
    Stage.TRAINING,
    Stage.BLENDING,
    Stage.HOLDING,
    Stage.FOSSILIZED,
    Stage.PRUNED,
    Stage.EMBARGOED,
    Stage.RESETTING,
]
HARM = {"sound": None, "nan": float("nan"), "inf": float("inf"), "huge": 3e38}
WAYS = [(name, resident) for name in HOSTS for resident in (False, True)]


@pytest.fixture(scope="module", params=WAYS, ids=[f"{n}-{'planted' if r else 'lean'}" for n, r in WAYS])
def case(request):
    """The compiled step, a morph with two seeds a site, and what the step gives while all are DORMANT."""
    name, resident = request.param
    step, morph = compiled_step(name), in_stage(grown(name, resident), Stage.DORMANT)
    return name, step, morph, step(morph)[0]


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("stage", SILENT)
def test_host_is_equal_to_the_bit_in_one_program_whatever_silent_stage_all_seeds_are_in(case, stage, harm):
    """Contract 16, 18: logits, loss, host gradients and batch_stats; at alpha 0, NaN, Inf and huge seeds included."""
    _, step, morph, expected = case
    seeds = morph if HARM[harm] is None else poisoned(morph, HARM[harm])
    assert equal_bits(step(in_stage(seeds, stage, 0.0))[0], expected)


@settings(max_examples=12)
@given(data=st.data())
def test_host_is_equal_to_the_bit_for_any_mixture_of_silent_stages_and_harm(case, data):
    """Contract 16, 18."""
    _, step, morph, expected = case
    slots = [(plant.site, plant.slot) for plant in morph.spec.plants]
    stages = {at: (data.draw(st.sampled_from(SILENT)), 0.0) for at in slots}
    mixed = morph
    for at in slots:
        harm = HARM[data.draw(st.sampled_from(sorted(HARM)))]
        mixed = mixed if harm is None else poisoned(mixed, harm, only={at})
    assert equal_bits(step(in_stage(mixed, stages))[0], expected)


def test_one_compilation_serves_every_stage(case):
    """Contract 16: life is data."""
    _, step, morph, _ = case
    before = step._cache_size()
    for stage in Stage:
        step(in_stage(morph, stage))
    assert step._cache_size() == before


def test_every_seed_in_training_gets_a_gradient_of_its_own_from_birth(case):
    """Contract 17: also with the zero last layer of a seed just born."""
    _, step, morph, expected = case
    for seeds in (morph, born(morph, 0)):
        out, grads = step(in_stage(seeds, Stage.TRAINING))
        assert equal_bits(out, expected)
        for plant in morph.spec.plants:
            assert slot_norm(grads, plant.site, plant.slot) > 1e-8, plant


@pytest.mark.parametrize(
    "stage", [Stage.DORMANT, Stage.GERMINATED, Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING], ids=lambda s: s.name
)
def test_a_seed_that_does_not_train_gets_a_zero_gradient(case, stage):
    """Contract 17."""
    _, step, morph, _ = case
    grads = step(in_stage(morph, stage))[1]
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(grads))


def test_a_blended_seed_does_change_the_host(case):
    """Guards the tests above: the same comparison sees each single seed enter."""
    _, step, morph, expected = case
    for plant in morph.spec.plants:
        one = in_stage(morph, {(plant.site, plant.slot): (Stage.BLENDING, 0.5)})
        assert not equal_bits(step(one)[0][1], expected[1]), plant


def test_a_run_that_germinates_a_seed_midway_keeps_the_hosts_parameters_and_optimizer_to_the_bit():
    """Contract 16: 40 AdamW steps with clipping; the seed GERMINATED at 10, TRAINING from 20, its own SGD beside."""
    given_host, morph = host("cnn"), in_stage(grown("cnn", True), Stage.DORMANT)
    forward = esper_jax.graft(given_host.model)
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))

    @jax.jit
    def step(morph, opt_state):
        def loss(params):
            value, (_, updated) = given_host.loss(forward, morph.with_params(params), given_host.x)
            return value, updated

        (_, updated), grads = jax.value_and_grad(loss, has_aux=True)(morph.params)
        updates, opt_state = tx.update(grads["host"], opt_state, morph.params["host"])
        seeds = jax.tree.map(lambda p, g: p - 0.1 * g, morph.seeds, grads["seeds"])
        params = {"host": optax.apply_updates(morph.params["host"], updates), "seeds": seeds}
        return morph.with_params(params).with_collections(updated), opt_state

    def run(stages):
        state = morph, tx.init(morph.params["host"])
        for i in range(40):
            state = step(in_stage(state[0], stages.get(i, Stage.DORMANT)) if i in stages else state[0], state[1])
        return state

    still, moved = run({}), run({10: Stage.GERMINATED, 20: Stage.TRAINING})
    assert equal_bits((still[0].host, still[1]), (moved[0].host, moved[1]))
    assert not equal_bits(still[0].seeds, moved[0].seeds)
    assert not equal_bits(still[0].host, morph.host)
