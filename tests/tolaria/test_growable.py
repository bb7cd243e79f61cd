"""Optimizers whose state grows with the morph."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import growable
from esper_jax.kasmina.morph import Morph
from tests.kasmina.hosts import host

SITE = "Dense_1"
TXS = {
    "adamw": lambda: optax.adamw(1e-2),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "scheduled": lambda: optax.sgd(optax.linear_schedule(1.0, 0.0, 10), momentum=0.9),
    "ema": lambda: optax.chain(optax.adam(1e-2), optax.ema(0.9)),
    "multisteps": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2).gradient_transformation(),
    "plateau": lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
    "adafactor": lambda: optax.adafactor(1e-2),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "noisy": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
}


def seeded(stage_moves: int = 1, resident: bool = True) -> Morph:
    """The MLP with one lora seed, TRAINING after one move."""
    planted = {"lora": {"rank": 2}} if resident else None
    morph = esper_jax.morph(host("mlp").variables, where=SITE, planted=planted)
    morph = esper_jax.germinate(morph, SITE, "lora", key=jax.random.key(0), rank=2)
    for _ in range(stage_moves):
        morph = esper_jax.advance(morph, SITE, 0)
    return morph


def ones(morph: Morph, scale: float = 1.0) -> dict:
    return jax.tree.map(lambda leaf: scale * jnp.ones_like(leaf), morph.params)


@pytest.mark.parametrize("name", TXS)
def test_host_updates_and_state_are_those_of_optax_alone_and_the_seeds_those_of_a_run_of_its_own(name: str) -> None:
    tx, alone = growable(TXS[name]()), optax.with_extra_args_support(TXS[name]())
    morph = seeded()
    state, host_state = tx.init(morph), alone.init(morph.params["host"])
    own = morph.params["seeds"][SITE]["slot_0"]
    own_state = alone.init(own)
    for i in range(4):
        grads = ones(morph, 1.0 + i)
        updates, state = tx.update(grads, state, morph, value=jnp.float32(i))
        expected, host_state = alone.update(grads["host"], host_state, morph.params["host"], value=jnp.float32(i))
        seed_expected, own_state = alone.update(grads["seeds"][SITE]["slot_0"], own_state, own, value=jnp.float32(i))
        chex.assert_trees_all_equal(updates["host"], expected)
        chex.assert_trees_all_close(updates["seeds"][SITE]["slot_0"], seed_expected, rtol=1e-5)
    chex.assert_trees_all_equal(state.host, host_state)


@pytest.mark.parametrize("name", TXS)
def test_growth_keeps_every_leaf_of_the_state_and_the_new_seed_starts_from_scratch(name: str) -> None:
    tx = growable(TXS[name]())
    morph = esper_jax.morph(host("mlp").variables)
    state = tx.init(morph)
    for _ in range(3):
        _, state = tx.update(ones(morph), state, morph, value=jnp.float32(1))
    grown = esper_jax.germinate(morph, SITE, "lora", key=jax.random.key(0), rank=2)
    bigger = tx.grow(state, grown)
    chex.assert_trees_all_equal(bigger.host, state.host)
    fresh = optax.with_extra_args_support(TXS[name]()).init(grown.seeds[SITE]["slot_0"])
    chex.assert_trees_all_equal(bigger.seeds[SITE]["slot_0"].inner, fresh)
    assert tx.grow(bigger, morph).seeds == {}


def test_a_seed_that_does_not_learn_gets_no_update_and_keeps_its_state() -> None:
    tx = growable(optax.adamw(1e-2, weight_decay=0.1))
    for moves in (0, 1):
        morph = seeded(moves)
        morph = morph.replace(seeds=jax.tree.map(lambda leaf: leaf + 1, morph.seeds))
        updates, _ = tx.update(ones(morph), tx.init(morph), morph)
        total = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(updates["seeds"]))
        assert (total > 0) == (moves == 1)


def test_a_seed_frozen_by_a_scheduled_prune_is_not_moved() -> None:
    """Contract 13."""
    morph = seeded(2)
    for _ in range(5):
        morph, _ = esper_jax.tick(morph)
    morph = esper_jax.prune(morph, SITE, 0, steps=3)
    tx = growable(optax.adamw(1e-2))
    updates, _ = tx.update(ones(morph), tx.init(morph), morph)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates["seeds"]))


def test_a_seed_with_a_nan_gradient_is_not_moved_and_its_moments_stay_clean() -> None:
    tx = growable(optax.adam(1e-2))
    morph = seeded()
    grads = ones(morph)
    grads["seeds"] = jax.tree.map(lambda leaf: leaf * jnp.nan, grads["seeds"])
    updates, state = tx.update(grads, tx.init(morph), morph)
    chex.assert_tree_all_finite((updates, state))


def test_a_slot_that_germinates_again_starts_with_fresh_moments_and_count() -> None:
    """Each seed has its own step count, starting when it germinates."""
    tx = growable(optax.adam(1e-2))
    morph = seeded()
    state = tx.init(morph)
    for _ in range(5):
        _, state = tx.update(ones(morph), state, morph)
    assert int(state.seeds[SITE]["slot_0"].inner[0].count) == 5
    morph = esper_jax.prune(morph, SITE, 0)
    for _ in range(7):
        morph, _ = esper_jax.tick(morph)
    again = esper_jax.advance(esper_jax.germinate(morph, SITE, "lora", key=jax.random.key(1)), SITE, 0)
    _, state = tx.update(ones(again), state, again)
    assert int(state.seeds[SITE]["slot_0"].inner[0].count) == 1
    assert int(state.host[0].count) == 6


def test_params_instead_of_the_morph_is_an_error_that_says_so() -> None:
    tx = growable(optax.adam(1e-2))
    with pytest.raises(TypeError, match="takes the Morph itself"):
        tx.init({"kernel": jnp.ones(3)})
    with pytest.raises(TypeError, match="needs an optax transformation"):
        growable(1e-3)
