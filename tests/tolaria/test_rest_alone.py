"""`rest_alone` beside what is not simply planted: lean seeds in the program, and stacks that live layer by layer."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import Stage, TrainState, growable
from esper_jax.kasmina.morph import Morph
from esper_jax.tolaria import step as tolaria_step
from esper_jax.tolaria.dispatch import Dispatch, make_steps
from esper_jax.tolaria.step import Calls
from tests.kasmina import test_stacked as stacks
from tests.kasmina.hosts import CNN, host

STACK = "blocks/Dense_0"


def trained(model: Any, loss: Any, morph: Morph, batches: Any, rest_alone: bool) -> TrainState:
    """The state after a call of five steps. (Adam would move what has no gradient by rounding.)"""
    tx = growable(optax.sgd(1e-2, momentum=0.9))
    steps = make_steps(Calls(esper_jax.graft(model), loss), tx, 4, Dispatch("scan", rest_alone=rest_alone))
    state = TrainState.create(morph, tx, key=jax.random.key(0))
    return steps(state, batches, 5)[0]


def same_both_ways(model: Any, loss: Any, morph: Morph, batch: Any) -> TrainState:
    """What five steps end with, which is the same with `rest_alone` and without."""
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf * (1 + i) for i in range(5)]), batch)
    plain = trained(model, loss, morph, batches, False)
    rested = trained(model, loss, morph, batches, True)
    chex.assert_trees_all_close((rested.morph, rested.opt_state), (plain.morph, plain.opt_state), rtol=1e-5, atol=1e-6)
    assert int(rested.step) == int(plain.step) == 5
    return rested


def moved(after: Any, before: Any) -> bool:
    """Whether any leaf differs."""
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), after, before)))


@pytest.mark.parametrize("trains", [True, False])
def test_a_lean_seed_beside_a_planted_one_trains_or_waits(trains: bool) -> None:
    """One that waits in GERMINATED computes nothing, so the host runs alone and the seed stays as it was."""
    given = host("mlp")
    morph = esper_jax.morph(given.variables, where="Dense_1", planted="lora", slots=2)
    morph = esper_jax.germinate(morph, "Dense_1", "mlp", key=jax.random.key(1), hidden=4)
    lean = next(plant for plant in morph.spec.plants if not plant.resident)
    if trains:
        morph = esper_jax.advance(morph, "Dense_1", lean.slot)
    loss = optax.softmax_cross_entropy_with_integer_labels
    after = same_both_ways(given.model, lambda logits, y: loss(logits, y * 0), morph, (given.x, given.y))
    assert moved(after.morph.seeds["Dense_1"][lean.key], morph.seeds["Dense_1"][lean.key]) == trains
    planted = next(plant for plant in morph.spec.plants if plant.resident)
    assert not moved(after.morph.seeds["Dense_1"][planted.key], morph.seeds["Dense_1"][planted.key])


@pytest.mark.parametrize("layer", [None, 1])
def test_a_stack_in_which_no_layer_or_one_trains(layer: int | None) -> None:
    """One layer's seed that computes keeps the whole stack in the steps that know of seeds."""
    model = stacks.Scanned()
    variables, _ = stacks.made(model)
    morph = esper_jax.morph(variables, where=STACK, model=model, example=stacks.X, planted="lora", slots=1)
    if layer is not None:
        morph = esper_jax.germinate(morph, STACK, "lora", key=jax.random.key(3), layer=layer)
        morph = esper_jax.advance(morph, STACK, 0, layer=layer)
    batch = stacks.X, jnp.ones((*stacks.X.shape[:2], 2))
    after = same_both_ways(model, lambda y, t: jnp.square(y - t), morph, batch)
    stages = [Stage.TRAINING if at == layer else Stage.DORMANT for at in range(stacks.DEPTH)]
    assert after.morph.state[STACK].stage[:, 0].tolist() == stages
    for at in range(stacks.DEPTH):
        row = lambda tree, at=at: jax.tree.map(lambda leaf: leaf[at], tree)  # noqa: E731
        assert moved(row(after.morph.seeds[STACK]), row(morph.seeds[STACK])) == (at == layer)
    assert moved(after.morph.host, morph.host)


def test_a_stacks_resting_steps_are_those_of_the_stack_with_empty_slots() -> None:
    model = stacks.Scanned()
    variables, _ = stacks.made(model)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), (stacks.X, jnp.ones((*stacks.X.shape[:2], 2))))
    sites = {"where": STACK, "model": model, "example": stacks.X, "slots": 1}

    def host_after(**options: Any) -> Any:
        morph = esper_jax.morph(variables, **sites, **options)
        return trained(model, lambda y, t: jnp.square(y - t), morph, batches, True).morph.host

    chex.assert_trees_all_close(host_after(planted="lora"), host_after(), rtol=1e-6, atol=1e-7)


def own_loop(**options: Any) -> tuple[Any, TrainState, Any]:
    """A step for a loop of one's own, the state of an MLP with a planted seed, and a batch."""
    given = host("mlp")
    loss, tx = optax.softmax_cross_entropy_with_integer_labels, growable(optax.adam(1e-2))
    step = esper_jax.make_train_step(given.model, loss, tx, donate=False, **options)
    morph = esper_jax.morph(given.variables, where="Dense_1", planted="lora", slots=1)
    return step, TrainState.create(morph, tx, key=jax.random.key(0)), (given.x, given.y)


def test_in_a_loop_of_ones_own_resting_seeds_are_no_arguments(monkeypatch) -> None:
    """The host's bits are those of empty slots, and nothing is asked of the device from step to step."""
    step, state, batch = own_loop(rest_alone=True)
    asked, looked = [], tolaria_step.computes
    monkeypatch.setattr(tolaria_step, "computes", lambda stage: (asked.append(1), looked(stage))[1])
    rested, other, alone = state, jax.tree.map(jnp.array, state), state.alone()
    for _ in range(3):  # two runs in turn by one step
        rested, _ = step(rested, batch)
        other, _ = step(other, batch)
        alone, _ = step(alone, batch)
    chex.assert_trees_all_equal(other, rested)
    chex.assert_trees_all_equal(rested.alone(), alone)
    assert rested.morph.seeds is state.morph.seeds and rested.morph.state is state.morph.state
    assert rested.opt_state.seeds is state.opt_state.seeds
    assert len(asked) == 2 and step.jitted._cache_size() == 1


def test_in_a_loop_of_ones_own_a_seed_that_computes_is_met_and_left_again() -> None:
    step, state, batch = own_loop(rest_alone=True)
    plain, _, _ = own_loop()
    state, _ = step(state, batch)
    morph = esper_jax.germinate(state.morph, "Dense_1", "lora", key=jax.random.key(1))
    waiting, _ = step(state.replace(morph=morph), batch)
    assert step.jitted._cache_size() == 1
    state = waiting.replace(morph=esper_jax.advance(waiting.morph, "Dense_1", 0))
    trains, expected = state, state
    for _ in range(2):
        trains, _ = step(trains, batch)
        expected, _ = plain(expected, batch)
    chex.assert_trees_all_equal(trains, expected)
    assert moved(trains.morph.seeds, state.morph.seeds) and step.jitted._cache_size() == 2
    pruned = trains.replace(morph=esper_jax.prune(trains.morph, "Dense_1", 0))
    after, _ = step(pruned, batch)
    assert after.morph.seeds is pruned.morph.seeds and step.jitted._cache_size() == 2


def test_within_transformations_of_ones_own_the_step_knows_of_its_seeds() -> None:
    """Where stages are traced nothing can be looked up; then the result is that of the step without the option."""
    step, state, batch = own_loop(rest_alone=True)
    plain, _, _ = own_loop()
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    awake = esper_jax.germinate(state.morph, "Dense_1", "lora", key=jax.random.key(1))
    awake = state.replace(morph=esper_jax.advance(awake, "Dense_1", 0))
    with jax.checking_leaks():
        jax.jit(step)(state, batch)
        jax.jit(lambda batch: step(awake, batch))(batch)
    for transformed in (jax.jit, lambda one: jax.vmap(one, (0, None))):
        given = state if transformed is jax.jit else both
        chex.assert_trees_all_equal(transformed(step)(given, batch), transformed(plain)(given, batch))


def test_what_is_changed_in_place_is_seen_and_nothing_is_fetched_in_secret() -> None:
    step, state, batch = own_loop(rest_alone=True)
    with jax.transfer_guard_device_to_host("disallow"):
        state, _ = step(state, batch)
    morph = esper_jax.advance(esper_jax.germinate(state.morph, "Dense_1", "lora", key=jax.random.key(1)), "Dense_1", 0)
    before = morph.seeds
    state = state.replace(morph=state.morph.replace(seeds=morph.seeds))
    state.morph.state["Dense_1"] = morph.state["Dense_1"]
    after, _ = step(state, batch)
    assert moved(after.morph.seeds, before)


def cnn_run(epochs: int = 6, **options: Any) -> tuple[TrainState, Any, Any]:
    """A CNN, whose steps are not scanned on a CPU, with a planted seed that germinates at the second tick."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 6, 6, 2)).astype(np.float32), rng.integers(0, 3, 24).astype(np.int32)
    gates = esper_jax.Gates(min_training_ticks=1, min_health=0.0)
    wanted: dict[str, Any] = {
        "controller": esper_jax.FixedSchedule({2: [("Conv_1", "conv_light", {})]}, gates=gates),
        "lifecycle": esper_jax.Lifecycle(gates),
        "planted": {"conv_light": {}},
        "where": "Conv_1",
        "slots": 1,
        "batch_size": 8,
        "dispatch": "loop",
    }
    loss, tx = optax.softmax_cross_entropy_with_integer_labels, optax.sgd(1e-2, momentum=0.9)
    made = esper_jax.Tolaria(CNN(), loss, tx, **{**wanted, **options})
    state = made.init(host("cnn").variables, key=jax.random.key(0), model=CNN(), example=x[:1])
    state, history = made.fit(state, (x, y), (x, y), epochs=epochs)
    return state, history, made


def test_where_steps_are_not_scanned_resting_seeds_are_left_to_another_program() -> None:
    """That of the host alone runs first, and that with the seed is there when it wakes, built meanwhile."""
    state, history, made = cnn_run(rest_alone=True)
    plain, told, _ = cnn_run()
    stages = [(e.epoch, e.data["after"]) for e in history.of_kind("stage")]
    assert stages == [(e.epoch, e.data["after"]) for e in told.of_kind("stage")] and (3, "TRAINING") in stages
    chex.assert_trees_all_close((state.morph, state.opt_state), (plain.morph, plain.opt_state), rtol=1e-4, atol=1e-5)
    ran = {spec.plants for spec, _ in made._step.ran}
    ahead = {spec.plants for spec, _ in made._step.ahead}
    assert ran == {()} and ahead == {state.morph.spec.plants}
    assert made._step._cache_size() == 1 and not history.of_kind("warning")


def test_unrolled_steps_have_each_of_their_programs_built_before_a_seed_wakes() -> None:
    """Three batches an epoch, two a call: a call of two and a call of one."""
    _, history, made = cnn_run(rest_alone=True, dispatch="unroll", steps_per_dispatch=2)
    assert ("TRAINING",) in {(e.data["after"],) for e in history.of_kind("stage")}
    assert {spec.plants for spec, _ in made._step.ran} == {()} and len(made._step.ahead) == 2


def test_a_run_that_is_not_scanned_ends_with_the_bits_of_empty_slots_where_no_seed_wakes() -> None:
    rested, _, _ = cnn_run(epochs=2, rest_alone=True)
    empty, _, _ = cnn_run(epochs=2, planted=None, controller=None)
    assert rested.morph.spec.plants and not empty.morph.spec.plants
    chex.assert_trees_all_equal(rested.morph.host, empty.morph.host)
