"""Runs that grow single layers of a scanned host."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from esper_jax import FixedSchedule, Gates, Lifecycle, Limits, Stage, Tamiyo, Tolaria, restore_morph
from esper_jax.nissa import read_events
from tests.tolaria import growing


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.Dense(4)(nn.relu(nn.LayerNorm()(x))), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(4)(x)
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2)(layers(name="layers")(x, None)[0])


SITE = "layers/Dense_0"
PLAN = {2: [(f"{SITE}[1]", "mlp", {"hidden": 8})], 4: [(f"{SITE}[2]", "mlp", {"hidden": 8})]}


def trainer(directory, controller, **options):
    gates = Gates(min_training_ticks=2, min_health=0.1)
    return Tolaria(
        Net(),
        growing.LOSS,
        optax.adam(1e-2),
        controller=controller,
        lifecycle=Lifecycle(gates=gates, tempo=3),
        checkpoint_dir=directory,
        limits=Limits(cooldown=0),
        batch_size=32,
        progress=False,
        compile_in="thread",
        **options,
    )


def start(made):
    return made.init(Net().init(jax.random.key(1), growing.TRAIN[0][:2]), key=jax.random.key(2))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run that grows layer 1, then layer 2."""
    directory = tmp_path_factory.mktemp("whole")
    made = trainer(directory, FixedSchedule(PLAN, keep="always"))
    state, history = made.fit(start(made), growing.TRAIN, growing.VALIDATION, epochs=14)
    return directory, state, history


def test_layers_grow_by_name_and_live_apart(whole):
    """Each layer is a site of its own to the controller and in the log; its life is one row of the stack's state."""
    directory, state, history = whole
    stages = state.morph.state[SITE].stage[:, 0].tolist()
    assert stages[0] == Stage.DORMANT and set(stages[1:]) <= {Stage.HOLDING, Stage.FOSSILIZED, Stage.BLENDING}
    assert len(state.morph.spec.plants) == 1
    germinated = [event for event in read_events(directory / "events.jsonl") if event.kind == "germinated"]
    assert [event.data["site"] for event in germinated] == [f"{SITE}[1]", f"{SITE}[2]"]
    assert [event.data["parameters"] for event in germinated] == [76, 76]
    first = history.records[0]["sites"]
    assert {f"{SITE}[{n}]" for n in range(3)} <= set(first)
    gains = [first[f"{SITE}[{n}]"]["gain"] for n in range(3)]
    assert len(set(gains)) == 3 and all(np.isfinite(gains))
    measured = [event for event in read_events(directory / "events.jsonl") if event.kind == "contribution"]
    assert {event.data["site"] for event in measured} == {f"{SITE}[1]", f"{SITE}[2]"}


def test_a_run_that_grows_layers_resumes_to_the_bit(whole, tmp_path):
    """Contract: the state, a stack's rows included, is all that a run needs."""
    _, state, history = whole
    made = trainer(tmp_path, FixedSchedule(PLAN, keep="always"))
    made.fit(start(made), growing.TRAIN, growing.VALIDATION, epochs=7)
    made = trainer(tmp_path, FixedSchedule(PLAN, keep="always"))
    resumed, again = made.fit(made.restore(), growing.TRAIN, growing.VALIDATION, epochs=14)
    chex.assert_trees_all_equal(resumed.morph, state.morph)
    assert [r["score"] for r in again.records] == [r["score"] for r in history.records]
    chex.assert_trees_all_equal(restore_morph(tmp_path), state.morph)


def test_a_rollback_prunes_the_layers_that_live_and_keeps_those_that_are_kept(whole):
    """Contract 22, row by row."""
    from esper_jax.tolaria import snapshot

    _, state, _ = whole
    life = state.morph.state[SITE]
    rows = np.array([Stage.DORMANT, Stage.FOSSILIZED, Stage.TRAINING])
    life = life.replace(stage=life.stage.at[:, 0].set(rows), alpha=life.alpha.at[:, 0].set(np.array([0.0, 1.0, 0.0])))
    state = state.replace(morph=state.morph.replace(state={**state.morph.state, SITE: life}))
    back, pruned = snapshot.roll_back(state, snapshot.take(state))
    assert [(plant.site, plant.slot) for plant in pruned] == [(f"{SITE}[2]", 0)]
    after = back.morph.state[SITE]
    assert after.stage[:, 0].tolist() == [Stage.DORMANT, Stage.FOSSILIZED, Stage.PRUNED]
    seeds = state.morph.seeds[SITE]["slot_0"]["down"], back.morph.seeds[SITE]["slot_0"]["down"]
    assert np.array_equal(seeds[0][1], seeds[1][1]) and not np.any(seeds[1][2])


def test_tamiyo_chooses_the_layer_of_the_highest_gain(tmp_path):
    """Where to grow is a choice among layers."""
    controller = Tamiyo(blueprints=("mlp",), min_epoch=2, plateau=1, stable_ticks=1, stable_low=-9.0, stable_high=9.0)
    made = trainer(tmp_path, controller)
    made.fit(start(made), growing.TRAIN, growing.VALIDATION, epochs=8)
    germinated = [event for event in read_events(tmp_path / "events.jsonl") if event.kind == "germinated"]
    assert germinated
    epoch = [e for e in read_events(tmp_path / "events.jsonl") if e.kind == "epoch"][germinated[0].epoch - 1]
    gains = {path: site["gain"] for path, site in epoch.data["sites"].items() if "LayerNorm" not in path}
    assert germinated[0].data["site"] == max(gains, key=gains.get)
