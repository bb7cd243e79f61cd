"""Measuring seeds in a loop of one's own: faults, health, contributions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import Stage
from tests.kasmina.hosts import host, in_stage, noisy

GIVEN = host("mlp")
FORWARD = esper_jax.graft(GIVEN.model)


def seeded() -> esper_jax.Morph:
    morph = esper_jax.morph(GIVEN.variables)
    morph = esper_jax.germinate(morph, "Dense_0", "lora", key=jax.random.key(0), rank=2)
    return noisy(esper_jax.germinate(morph, "Dense_1", "mlp", key=jax.random.key(1), hidden=4), 3)


@jax.jit
def observed(morph: esper_jax.Morph) -> esper_jax.Morph:
    def loss(params):
        logits = FORWARD(morph.with_params(params), GIVEN.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, GIVEN.y).mean()

    return esper_jax.observe(morph, jax.grad(loss)(morph.params))


def accuracy(morph: esper_jax.Morph) -> jax.Array:
    return jnp.mean(jnp.argmax(FORWARD(morph, GIVEN.x), -1) == GIVEN.y)


@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.BLENDING, Stage.HOLDING])
def test_a_nan_seed_is_pruned_by_its_third_fault_in_a_loop_of_ones_own(stage: Stage) -> None:
    """Contract 18."""
    morph = in_stage(seeded(), stage, 0.5 if stage == Stage.BLENDING else None)
    sick = jax.tree.map(lambda leaf: leaf * jnp.nan, morph.seeds["Dense_0"])
    morph = morph.replace(seeds={**morph.seeds, "Dense_0": sick})
    for _ in range(3):
        morph = observed(morph)
    assert int(morph.state["Dense_0"].stage[0]) == Stage.PRUNED and int(morph.state["Dense_0"].faults[0]) == 3
    assert int(morph.state["Dense_1"].stage[0]) == stage and int(morph.state["Dense_1"].faults[0]) == 0
    assert 0 < float(morph.state["Dense_1"].health[0]) <= 1 and float(morph.state["Dense_1"].ratio[0]) > 0


def test_contributions_are_score_differences_and_are_noted_where_gate_5_reads_them() -> None:
    """Contract 10, 24."""
    morph = in_stage(seeded(), Stage.HOLDING)
    found, noted = esper_jax.contributions(morph, jax.jit(accuracy))
    for (site, slot), value in found.items():
        alone = accuracy(esper_jax.silence(morph, site, slot))
        assert value == pytest.approx(100 * float(accuracy(morph) - alone), abs=1e-4)
        assert float(noted.state[site].contribution[slot]) == pytest.approx(value)
    assert set(found) == {("Dense_0", 0), ("Dense_1", 0)}
    assert esper_jax.contributions(in_stage(morph, Stage.TRAINING), accuracy)[0] == {}


def test_a_silenced_seed_leaves_the_others_and_its_own_life_as_they_are() -> None:
    morph = in_stage(seeded(), Stage.HOLDING)
    quiet = esper_jax.silence(morph, "Dense_1", 0)
    assert float(quiet.state["Dense_1"].alpha[0]) == 0 and float(quiet.state["Dense_0"].alpha[0]) == 1
    assert int(quiet.state["Dense_1"].stage[0]) == Stage.HOLDING
    with pytest.raises(KeyError, match="unknown site"):
        esper_jax.silence(morph, "Dense_9", 0)
    with pytest.raises(TypeError, match="needs a Morph first, got dict"):
        esper_jax.tick({})


def test_an_isolated_seed_does_not_outgrow_a_tenth_of_the_host_however_long_it_trains() -> None:
    """Nothing tells a seed in isolation when it has gone far enough; the leash does, at any learning rate."""
    morph = esper_jax.morph(GIVEN.variables)
    morph = esper_jax.germinate(morph, "Dense_1", "mlp", key=jax.random.key(1), hidden=8)
    morph = esper_jax.advance(morph, "Dense_1", 0)
    tx = esper_jax.growable(optax.set_to_zero(), seeds=optax.sgd(0.3))
    opt_state = tx.init(morph)

    @jax.jit
    def step(morph, opt_state):
        def loss(params):
            logits = FORWARD(morph.with_params(params), GIVEN.x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, GIVEN.y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(morph.params), opt_state, morph)
        return morph.with_params(optax.apply_updates(morph.params, updates)), opt_state

    def sizes(morph):
        full = in_stage(morph, Stage.HOLDING)
        _, with_seed = GIVEN.model.apply(morph.host, GIVEN.x, capture_intermediates=True, mutable=["intermediates"])
        h = with_seed["intermediates"]["Dense_1"]["__call__"][0]
        _, grown = FORWARD(full, GIVEN.x, capture_intermediates=True, mutable=["intermediates"])
        f = grown["intermediates"]["Dense_1"]["__call__"][0] - h
        return float(jnp.linalg.norm(f)), float(jnp.linalg.norm(h))

    for _ in range(300):
        morph, opt_state = step(morph, opt_state)
    f, h = sizes(morph)
    assert 0.05 * h < f < 0.2 * h
    chex_equal = jax.tree.map(np.array_equal, morph.host, GIVEN.variables)
    assert all(jax.tree.leaves(chex_equal))
