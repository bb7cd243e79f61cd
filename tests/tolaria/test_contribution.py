"""What a seed contributes, measured on the whole validation set in one program with alphas as inputs."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax.kasmina.morph import Morph
from esper_jax.tolaria.evaluate import ROWS, Evaluator, default_score, measured_plants
from esper_jax.tolaria.step import Calls
from tests.kasmina.hosts import host, in_stage, noisy

GIVEN = host("mlp")
X = np.asarray(jax.random.normal(jax.random.key(5), (40, 4)))
Y = np.arange(40) % 3


def morph_with(seeds: int) -> Morph:
    """The MLP with that many noisy seeds, all HOLDING."""
    morph = esper_jax.morph(GIVEN.variables, slots=2)
    for i in range(seeds):
        morph = esper_jax.germinate(
            morph, ("Dense_0", "Dense_1", "Dense_2")[i % 3], "lora", key=jax.random.key(i), rank=2
        )
    return in_stage(noisy(morph, 3), esper_jax.Stage.HOLDING)


def score(morph: Morph, off: set[tuple[str, int]]) -> float:
    """Accuracy in points with some alphas at 0, measured the plain way."""
    state = dict(morph.state)
    for site, slot in off:
        state[site] = state[site].replace(alpha=state[site].alpha.at[slot].set(0.0))
    logits = esper_jax.graft(GIVEN.model)(morph.replace(state=state), X)
    return 100 * float(np.mean(np.argmax(logits, -1) == Y))


def evaluator(batch_size: int = 16) -> Evaluator:
    calls = Calls(esper_jax.graft(GIVEN.model), optax.softmax_cross_entropy_with_integer_labels)
    return Evaluator(calls, None, batch_size)


@pytest.mark.parametrize("seeds", [1, 2, 3, 4, 5])
def test_contribution_is_the_score_with_all_minus_the_score_without_that_seed(seeds: int) -> None:
    """Contract 24; 40 examples in batches of 16 leave a smaller last one, which must count by its size."""
    morph = morph_with(seeds)
    plants = measured_plants(morph)
    names = [(p.site, p.slot) for p in plants]
    assert len(names) == seeds
    before = jax.tree.map(np.asarray, morph)
    measured = evaluator().contributions(morph, (X, Y), plants)
    chex.assert_trees_all_equal(morph, before)
    for name in names:
        assert measured.single[name] == pytest.approx(score(morph, set()) - score(morph, {name}), abs=1e-3)
    everyone = set(names)
    if not 2 <= seeds <= 4:
        assert measured.pairs == {}
        return
    for (a, b), value in measured.pairs.items():
        f = [score(morph, everyone - on) for on in ({a, b}, {a}, {b}, set())]
        assert value == pytest.approx(f[0] - f[1] - f[2] + f[3], abs=1e-3)
    assert len(measured.pairs) == seeds * (seeds - 1) // 2


def test_one_compiled_program_serves_any_set_of_live_seeds() -> None:
    measure = evaluator(64)
    morph = morph_with(4)
    for count in (1, 2, 4):
        measure.contributions(morph, (X, Y), measured_plants(morph)[:count])
    assert measure.rows._cache_size() == 1 and ROWS == 4


def test_only_blending_and_holding_seeds_are_measured() -> None:
    morph = morph_with(1)
    for stage in esper_jax.Stage:
        measured = measured_plants(in_stage(morph, stage))
        assert bool(measured) == (stage.name in ("BLENDING", "HOLDING"))


def test_loss_and_score_over_uneven_batches_are_those_of_the_whole() -> None:
    morph = morph_with(1)
    loss, points = evaluator(16)(morph, (X, Y))
    logits = esper_jax.graft(GIVEN.model)(morph, X)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(Y)).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert points == pytest.approx(score(morph, set()), abs=1e-4)


def test_without_a_score_a_task_that_is_no_classification_says_what_to_give() -> None:
    with pytest.raises(ValueError, match="give score="):
        default_score(jnp.ones((3, 2)), jnp.ones((3, 2)))
