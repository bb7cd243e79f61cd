"""Whole runs: seeds that earn their place are kept, sabotaged ones are pruned and leave the host as it was."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import FixedSchedule, Gates, Lifecycle, Stage, Tamiyo, Tolaria, register_blueprint
from esper_jax.tasks import get_task
from tests.tolaria import growing

GATES = Gates(min_training_ticks=3)


def noise_init(key: jax.Array, site: esper_jax.Site, *, scale: float = 3.0) -> dict[str, jax.Array]:
    """Weights of a map that answers with noise whatever is learnt."""
    return {"w": jax.random.normal(key, (site.in_features, site.out_features), site.dtype)}


def noise_apply(params: dict[str, jax.Array], u: jax.Array, scale: float) -> jax.Array:
    """Chaotic in u: its sign flips from example to example. No gradient of its chaos reaches the host."""
    wild = jnp.sin(1e3 * jax.lax.stop_gradient(u @ params["w"]))
    return scale * wild + 1e-6 * (u @ params["w"])


def nan_apply(params: dict[str, jax.Array], u: jax.Array) -> jax.Array:
    """Never finite."""
    return (u @ params["w"]) * jnp.nan


register_blueprint("test-noise", init=noise_init, apply=noise_apply, reads="input", kinds=("dense",), replace=True)
register_blueprint("test-nan", init=noise_init, apply=nan_apply, reads="input", kinds=("dense",), replace=True)


VALIDATION = growing.data(1, 1024)


def run(plan: Any, epochs: int = 40, **options: Any):
    """The small host of `growing`, at a steady learning rate, to its end."""
    gates = Gates(min_training_ticks=3, min_health=0.0, max_exploding=1.0)
    made = growing.trainer(
        None,
        controller=None if plan is None else FixedSchedule(plan, gates=gates),
        lifecycle=Lifecycle(gates, tempo=3),
        tx=optax.adamw(1e-2),
        **options,
    )
    return made.fit(growing.start(made), growing.TRAIN, VALIDATION, epochs=epochs)


@pytest.fixture(scope="module")
def alone():
    """The run in which nothing grows."""
    return run(None)


@pytest.mark.parametrize("blueprint", ["test-noise", "test-nan"])
def test_a_sabotaged_seed_is_pruned_and_the_host_ends_within_noise_of_the_run_without_it(alone, blueprint: str) -> None:
    """Contract 18, 26: noise is pruned by its measured contribution, NaN by its third fault.

    The run goes on for some twenty epochs after the prune, so that what the noise did to the host is outgrown.
    """
    state, history = run({4: [("Dense_1", blueprint, {})]})
    pruned = [e for e in history.of_kind("stage") if e.data["after"] == "PRUNED"]
    assert len(pruned) == 1 and pruned[0].data["blueprint"] == blueprint
    expected = "not finite" if blueprint == "test-nan" else "ramp to 0"
    assert expected in pruned[0].data["reason"]
    assert not [e for e in history.of_kind("stage") if e.data["after"] == "FOSSILIZED"]
    if blueprint == "test-noise":
        values = [e.data["value"] for e in history.of_kind("contribution")]
        assert values and min(values) < 0
    plain_state, plain = alone
    if blueprint == "test-nan":  # it never entered the output: the host is the same to the bit
        same = jax.tree.map(np.array_equal, state.morph.host, plain_state.morph.host)
        assert all(jax.tree.leaves(same))
    # 1,024 validation examples: one standard error of a score is 1.2 points; runs of other keys differ by up to 4
    assert np.mean(history["score"][-8:]) > np.mean(plain["score"][-8:]) - 5.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.morph.host))


def test_a_pruned_lean_seed_leaves_the_program_after_its_rest_and_its_slot_is_free_again() -> None:
    """Contract 3: PRUNED > DORMANT takes 7 ticks, then the lean slot is empty."""
    state, history = run({4: [("Dense_1", "test-nan", {})]}, epochs=16)
    assert state.morph.spec.plants == () and state.morph.seeds == {} and state.opt_state.seeds == {}
    told = [(e.epoch, e.data["after"]) for e in history.of_kind("stage")]
    by_stage = {stage: epoch for epoch, stage in told}
    # The third fault falls inside an epoch, whose own tick is the first of the seven.
    assert by_stage["DORMANT"] - by_stage["PRUNED"] + 1 == 7


def test_every_decision_is_answered_with_measured_feedback() -> None:
    """Contract 27."""
    _, history = run({4: [("Dense_0", "mlp", {"hidden": 8})], 5: [("Dense_0", "lora", {"rank": 2})]}, epochs=20)
    decisions, feedback = history.of_kind("decision"), history.of_kind("feedback")
    assert len(feedback) == len([d for d in decisions if d.epoch < 20])
    applied = next(f for f in feedback if f.data["outcome"] == "applied")
    refused = next(f for f in feedback if f.data["outcome"] == "refused")
    assert applied.data["score_before"] == history["score"][3] and applied.data["score_after"] == history["score"][4]
    assert applied.data["seconds"] > 0
    assert "cooldown" in refused.data["reason"]


def test_divergence_rolls_back_to_a_finite_model_prunes_live_seeds_and_is_told() -> None:
    """Contract 21, 22: the data turns to poison in epoch 8; the run comes back and goes on."""
    x, y = growing.TRAIN

    def train(epoch: int):
        bad = np.where(epoch == 7, np.nan, 1.0).astype(np.float32)
        for begin in range(0, 256, 32):
            yield x[begin : begin + 32] * bad, y[begin : begin + 32]

    class Poisoned(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(nn.Dense(4)(x)))

    model = Poisoned()
    plan = FixedSchedule({4: [("Dense_0", "lora", {"rank": 2})]}, gates=GATES)
    loss = optax.softmax_cross_entropy_with_integer_labels
    made = Tolaria(model, loss, optax.sgd(0.1), controller=plan, progress=False, classes=2)
    state = made.init(model.init(jax.random.key(0), x[:1]), key=jax.random.key(1))
    state, history = made.fit(state, train, growing.VALIDATION, epochs=12)
    rollbacks = history.of_kind("rollback")
    assert rollbacks and rollbacks[0].epoch == 8
    assert rollbacks[0].data["pruned"] == [["Dense_0", 0]]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.morph.host))
    assert history["score"][-1] > 40
    told = [e for e in history.of_kind("stage") if e.data["after"] == "PRUNED"]
    assert told and "rollback" in told[0].data["reason"]


def test_a_run_that_keeps_diverging_ends_clearly_with_the_last_good_state() -> None:
    x, y = growing.TRAIN

    def nothing_finite(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        return outputs.sum() * jnp.inf

    model = growing.Net()
    bad = Tolaria(model, nothing_finite, optax.sgd(0.1), progress=False, max_rollbacks=2)
    with pytest.raises(esper_jax.TrainingDiverged, match="rolled back 3 times") as caught:
        bad.fit(growing.start(bad), (x, y), growing.VALIDATION, epochs=9)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(caught.value.state.morph.host))


def test_planted_growth_runs_a_whole_life_in_one_compiled_step() -> None:
    """Contract 16: germinate, train, blend, hold, fossilise and prune are only data."""
    gates = Gates(min_training_ticks=2, min_health=0.1)
    plan = FixedSchedule({2: [("Dense_0", "mlp", {})], 5: [("Dense_1", "mlp", {})]}, gates=gates)
    made = growing.trainer(
        None, controller=plan, lifecycle=Lifecycle(gates, tempo=3), planted={"mlp": {"hidden": 4}}, slots=1
    )
    _, history = made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=20)
    stages = {e.data["after"] for e in history.of_kind("stage")}
    assert {"TRAINING", "BLENDING", "HOLDING"} <= stages and stages & {"FOSSILIZED", "PRUNED"}
    assert made._step._cache_size() == 1


def test_early_stopping_and_ticks_every_so_many_steps() -> None:
    made = growing.trainer(None, controller=None, patience=2, tick_every=5)
    _, history = made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=200)
    best = int(np.argmax(history["score"]))
    assert len(history) == best + 1 + 2 and history["step"][:3] == [5, 10, 15]
    assert history.of_kind("early_stop")


@pytest.mark.slow
def test_tamiyo_keeps_a_seed_with_a_measured_contribution_on_mnist1d() -> None:
    """The heuristic, on real runs' terms: it finds the plateau, grows, measures and fossilises."""
    task = get_task("mnist1d")
    gates = Gates(min_training_ticks=4)
    made = Tolaria(
        task.model,
        task.loss,
        optax.adamw(1e-2),
        controller=Tamiyo(blueprints=("mlp",), gates=gates),
        lifecycle=Lifecycle(gates, tempo=3),
        score=task.score,
        batch_size=task.batch_size,
        classes=task.classes,
        progress=False,
    )
    state = made.init(task.model.init(jax.random.key(0), task.example), key=jax.random.key(0))
    state, history = made.fit(state, task.train, task.validation, epochs=45)
    kept = [e for e in history.of_kind("stage") if e.data["after"] == "FOSSILIZED"]
    assert kept
    site, slot = kept[0].data["site"], kept[0].data["slot"]
    value = float(state.morph.state[site].contribution[slot])
    assert int(state.morph.state[site].stage[slot]) == Stage.FOSSILIZED and value > 0
    measured = [e.data["value"] for e in history.of_kind("contribution") if e.data["site"] == site]
    assert pytest.approx(value) in measured


def test_a_state_of_another_optimizer_is_refused_in_a_sentence() -> None:
    made = growing.trainer(None)
    other = Tolaria(growing.Net(), growing.LOSS, optax.sgd(0.1), progress=False)
    with pytest.raises(ValueError, match="optimizer state .* another optimizer"):
        other.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=1)
