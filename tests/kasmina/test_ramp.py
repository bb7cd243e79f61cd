"""Alpha: curves, ramps, scheduled prunes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_jax import SeedState, Stage
from esper_jax.kasmina import lifecycle, ramp
from esper_jax.kasmina.ramp import CURVES, TEMPOS, alpha_at, curve_code
from esper_jax.kasmina.state import learns

ONE = jnp.ones(1, bool)
unit = st.floats(0, 1, width=32)
along = jax.jit(lambda start, target, steps, curve: alpha_at(start, target, steps, jnp.arange(65), curve))


def state(stage, **fields):
    made = SeedState.empty(1).replace(stage=jnp.asarray([stage], jnp.int32))
    return made.replace(**{k: jnp.asarray([v], getattr(made, k).dtype) for k, v in fields.items()})


@settings(max_examples=60)
@given(start=unit, target=unit, steps=st.integers(1, 60), curve=st.sampled_from(CURVES))
def test_a_ramp_is_monotone_bounded_and_lands_exactly(start, target, steps, curve):
    """Contract 11."""
    values = np.asarray(along(start, target, steps, curve_code(curve)))
    start, target = np.float32(start), np.float32(target)
    assert values[0] == start and np.all(values[steps:] == target)
    moves = np.diff(values[: steps + 1])
    assert np.all(moves >= 0) if target >= start else np.all(moves <= 0)
    assert np.all((values >= min(start, target)) & (values <= max(start, target)))


@pytest.mark.parametrize("curve", CURVES)
def test_curves_are_the_published_formulas(curve):
    """Contract 11: within float32 rounding of the formulas in float64."""
    t = np.linspace(0, 1, 101)
    logistic = lambda t: 1 / (1 + np.exp(-12 * (t - 0.5)))  # noqa: E731
    expected = {
        "linear": t,
        "cosine": (1 - np.cos(np.pi * t)) / 2,
        "sigmoid": (logistic(t) - logistic(0)) / (logistic(1) - logistic(0)),
    }[curve]
    got = ramp.shape(jnp.asarray(t, jnp.float32), jnp.int32(curve_code(curve)))
    np.testing.assert_allclose(got, expected, atol=5e-7)
    assert float(got[0]) == 0.0 and float(got[-1]) == 1.0


def test_an_unknown_curve_lists_the_known_ones():
    """Contract 11."""
    with pytest.raises(ValueError, match="linear, cosine, sigmoid"):
        curve_code("cubic")
    with pytest.raises(ValueError, match="linear, cosine, sigmoid"):
        lifecycle.start_ramp(state(Stage.BLENDING), ONE, 1.0, 3, "cubic")


@pytest.mark.parametrize("stage", list(Stage), ids=lambda s: s.name)
def test_a_ramp_starts_in_blending_and_holding_only(stage):
    """Contract 12."""
    _, ok = lifecycle.start_ramp(state(stage), ONE, 0.5, 3)
    assert bool(ok[0]) == (stage in (Stage.BLENDING, Stage.HOLDING))


@pytest.mark.parametrize("tempo", TEMPOS)
def test_a_new_ramp_must_wait_for_the_last_one_to_end(tempo):
    """Contract 12: refused on each tick of the ramp, accepted on its last."""
    seed, ok = lifecycle.start_ramp(state(Stage.BLENDING), ONE, 0.5, tempo)
    assert ok[0]
    for _ in range(tempo):
        assert not lifecycle.start_ramp(seed, ONE, 1.0, 3)[1][0]
        seed, _ = lifecycle.tick(seed, score=1.0)
    assert float(seed.alpha[0]) == 0.5 and int(seed.stage[0]) == Stage.BLENDING
    assert lifecycle.start_ramp(seed, ONE, 1.0, 3)[1][0]


def test_blending_runs_from_0_to_exactly_1_and_then_holds():
    """Contract 9, 11, 12."""
    seed, ok = lifecycle.blend(state(Stage.TRAINING), ONE, 50.0, 5, "cosine")
    assert ok[0] and float(seed.alpha[0]) == 0.0
    alphas = []
    for _ in range(5):
        assert int(seed.stage[0]) == Stage.BLENDING
        seed, _ = lifecycle.tick(seed, score=51.0)
        alphas.append(float(seed.alpha[0]))
    assert alphas == sorted(alphas) and alphas[-1] == 1.0 and 0 < alphas[0] < alphas[3] < 1
    assert int(seed.stage[0]) == Stage.HOLDING


def test_lowering_alpha_in_holding_returns_the_seed_to_blending():
    """Contract 14: and it stays there, since its ramp does not end at 1."""
    seed, ok = lifecycle.start_ramp(state(Stage.HOLDING, alpha=1.0, stage_score=42.0, steps=3), ONE, 0.25, 3)
    assert ok[0] and int(seed.stage[0]) == Stage.BLENDING
    assert (int(seed.steps[0]), float(seed.alpha[0]), float(seed.stage_score[0])) == (0, 1.0, 42.0)
    for _ in range(6):
        seed, _ = lifecycle.tick(seed, score=1.0)
    assert int(seed.stage[0]) == Stage.BLENDING and float(seed.alpha[0]) == 0.25
    assert not lifecycle.start_ramp(state(Stage.HOLDING, alpha=1.0), ONE, 1.0, 3)[1][0]


@pytest.mark.parametrize("stage", [Stage.BLENDING, Stage.HOLDING], ids=lambda s: s.name)
def test_a_scheduled_prune_freezes_ramps_to_zero_and_then_prunes(stage):
    """Contract 13."""
    seed = state(stage, alpha=0.75)
    assert learns(seed)[0]
    seed, ok = lifecycle.schedule_prune(seed, ONE, 3, "linear")
    assert ok[0] and int(seed.stage[0]) == Stage.BLENDING and not learns(seed)[0]
    seen = []
    for _ in range(3):
        seed, _ = lifecycle.tick(seed, score=33.0)
        seen.append((Stage(int(seed.stage[0])).name, round(float(seed.alpha[0]), 6)))
    assert seen == [("BLENDING", 0.5), ("BLENDING", 0.25), ("PRUNED", 0.0)]
    assert not seed.pruning[0] and float(seed.stage_score[0]) == 33.0


def test_a_seed_claimed_by_a_scheduled_prune_goes_nowhere_else():
    """Contract 13: no ramp, no stage but PRUNED, neither by hand nor at a tick."""
    seed, _ = lifecycle.schedule_prune(state(Stage.HOLDING, alpha=1.0), ONE, 5)
    assert not lifecycle.start_ramp(seed, ONE, 1.0, 3)[1][0]
    assert not lifecycle.transition(seed, ONE, Stage.HOLDING)[1][0]
    assert lifecycle.transition(seed, ONE, Stage.PRUNED)[1][0]
    stopped = seed.replace(stage=jnp.asarray([Stage.HOLDING], jnp.int32))
    assert not lifecycle.transition(stopped, ONE, Stage.FOSSILIZED)[1][0]


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING], ids=lambda s: s.name)
def test_a_scheduled_prune_of_a_seed_with_alpha_0_takes_effect_at_once(stage):
    """Contract 13: there is nothing to ramp down; the score is noted."""
    seed, ok = lifecycle.schedule_prune(state(stage), ONE, 5, score=12.0)
    assert ok[0] and int(seed.stage[0]) == Stage.PRUNED and float(seed.stage_score[0]) == 12.0


@pytest.mark.parametrize("stage", [Stage.DORMANT, Stage.FOSSILIZED, Stage.PRUNED], ids=lambda s: s.name)
def test_a_scheduled_prune_of_a_seed_that_is_not_on_trial_is_refused(stage):
    """Contract 1, 13."""
    before = state(stage, alpha=1.0)
    after, ok = lifecycle.schedule_prune(before, ONE, 5)
    assert not ok[0] and int(after.stage[0]) == stage and not after.pruning[0]


@pytest.mark.parametrize(("target", "steps"), [(-0.1, 3), (1.1, 3), (float("nan"), 3), (0.5, 0)])
def test_a_ramp_out_of_range_is_refused(target, steps):
    """Contract 11."""
    with pytest.raises(ValueError, match="alpha must be between|1 tick or more"):
        lifecycle.start_ramp(state(Stage.BLENDING), ONE, target, steps)
