"""Planted growth: whole lives in one compiled step, sleeping seeds skipped, populations in one `vmap`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import Gates, Lifecycle, Stage, TrainState, growable, make_train_step
from tests.kasmina.hosts import host, in_stage, noisy

LOSS = optax.softmax_cross_entropy_with_integer_labels
LIFE = Lifecycle(Gates(min_training_ticks=2, min_health=0.0, max_exploding=1.0), tempo=3)
RANK = 7  # a size that nothing in the host has
KEPT, PRUNED = "Dense_0", "Dense_1"


class Program:
    """A train step and a tick, compiled once for a small MLP with a dormant seed planted at two layers."""

    def __init__(self) -> None:
        self.given = host("mlp")
        self.morph = esper_jax.morph(
            self.given.variables, where="Dense_[01]", planted={"lora": {"rank": RANK}}, slots=1
        )
        self.tx = growable(optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2)))
        self.step = make_train_step(self.given.model, LOSS, self.tx, probe_every=3, donate=False)
        self.tick = jax.jit(lambda morph: esper_jax.tick(morph, score=1.0, config=LIFE)[0])

    def start(self) -> TrainState:
        """The state before the first step."""
        return TrainState.create(self.morph, self.tx, key=jax.random.key(3))

    def run(self, state: TrainState, steps: int = 2) -> TrainState:
        """A few steps and a tick."""
        for i in range(steps):
            state, _ = self.step(state, (self.given.x + 0.1 * i, self.given.y))
        return state.replace(morph=self.tick(state.morph))


@pytest.fixture(scope="module")
def program() -> Program:
    return Program()


@pytest.fixture
def compiled(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What jax has compiled since the test began, by its own log."""
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield lambda: [r.getMessage()[:90] for r in caplog.records if r.getMessage().startswith("Compiling")]


def germinate(state: TrainState, site: str, seed: int) -> TrainState:
    return state.replace(morph=esper_jax.germinate(state.morph, site, "lora", key=jax.random.key(seed)))


def life(program: Program, state: TrainState) -> tuple[TrainState, list[tuple[int, ...]]]:
    """Three germinations, one fossilisation, one prune with its rest; the stages of both seeds all along."""
    stages = []
    for now in range(22):
        if now in (1, 3, 18):
            state = germinate(state, KEPT if now == 1 else PRUNED, now)
        if now == 9:
            state = state.replace(morph=esper_jax.fossilize(state.morph, KEPT))
        if now == 8:
            state = state.replace(morph=esper_jax.prune(state.morph, PRUNED))
        stages.append(stages_of(state))
        state = program.run(state)
    return state, [*stages, stages_of(state)]


def stages_of(state: TrainState) -> tuple[int, ...]:
    return tuple(int(state.morph.state[site].stage[0]) for site in (KEPT, PRUNED))


def test_a_run_with_three_germinations_a_fossil_and_a_prune_compiles_its_step_once(program, compiled) -> None:
    """Contract 1, 3, 16: the step's cache holds one program, and by jax's own log it was compiled once.

    A second such life, in which the little programs of each operation are warm too, compiles nothing at all.
    """
    life(program, program.start())
    big = [message for message in compiled() if "train_step" in message or "<lambda>" in message]
    assert len(big) == 2, big  # the step and the tick
    state, warm = program.start(), len(compiled())
    state, stages = life(program, state)
    assert compiled()[warm:] == []
    assert program.step._cache_size() == 1 and program.tick._cache_size() == 1
    assert {Stage(stage) for both in stages for stage in both} == set(Stage)
    assert stages[-1] == (Stage.FOSSILIZED, Stage.BLENDING)
    assert [int(state.morph.state[site].generation[0]) for site in (KEPT, PRUNED)] == [1, 2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.morph.host))


def test_a_seed_in_an_empty_slot_is_seen_to_compile(program, compiled) -> None:
    """Guards the test above: the same log and the same count do tell a new program."""
    empty = TrainState.create(esper_jax.morph(program.given.variables), program.tx, key=jax.random.key(3))
    step = make_train_step(program.given.model, LOSS, program.tx, probe_every=0, donate=False)
    batch = (program.given.x, program.given.y)
    step(empty, batch)
    warm = len(compiled())
    grown = esper_jax.germinate(empty.morph, KEPT, "lora", key=jax.random.key(0))
    step(empty.replace(morph=grown, opt_state=program.tx.grow(empty.opt_state, grown)), batch)
    assert any("train_step" in message for message in compiled()[warm:])
    assert step._cache_size() == 2


def test_at_germination_logits_loss_and_host_update_are_equal_to_the_bit(program) -> None:
    """Contract 16: one state, one program, with the seed asleep, germinated, and in training; also if it is NaN."""
    before = program.run(program.start())
    born = germinate(before, KEPT, 5)
    trains = born.replace(morph=esper_jax.advance(born.morph, KEPT))
    sick = trains.replace(morph=trains.morph.replace(seeds=jax.tree.map(lambda v: v * jnp.nan, trains.morph.seeds)))
    forward = jax.jit(lambda morph: esper_jax.graft(program.given.model)(morph, program.given.x))
    batch = (program.given.x, program.given.y)

    def seen(state: TrainState) -> Any:
        after, metrics = program.step(state, batch)
        host_side = (after.morph.host, after.opt_state.host, metrics["loss"], metrics["grad_norm"])
        return host_side, forward(state.morph), forward(after.morph)

    expected = seen(before)
    for state in (born, trains, sick):
        chex.assert_trees_all_equal(seen(state), expected)
    entered = trains.replace(morph=in_stage(noisy(trains.morph, 0), Stage.BLENDING, 0.5))
    assert not np.array_equal(seen(entered)[1], expected[1])


def equations(jaxpr: Any, inside: bool = False) -> Iterator[tuple[Any, bool]]:
    """All equations of a jaxpr with whether they are in a branch of a `cond`."""
    for eqn in jaxpr.eqns:
        yield eqn, inside
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, inside or eqn.primitive.name == "cond")


def products(function: Any, *given: Any) -> tuple[int, int]:
    """Matrix products that know of the seeds' rank: outside every branch, and inside one."""
    found = [0, 0]
    for eqn, inside in equations(jax.make_jaxpr(function)(*given).jaxpr):
        shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
        if eqn.primitive.name == "dot_general" and any(RANK in shape for shape in shapes):
            found[inside] += 1
    return found[0], found[1]


def test_a_planted_seeds_products_are_behind_a_branch_forward_and_in_the_whole_step(program) -> None:
    """Two products a seed forward; the step has those and at least as many again for their gradients."""
    batch = (program.given.x, program.given.y)
    forward = esper_jax.graft(program.given.model)
    outside, inside = products(forward, program.morph, program.given.x)
    assert (outside, inside) == (0, 4)
    outside, inside = products(program.step, program.start(), batch)
    assert outside == 0 and inside >= 8
    lean = esper_jax.germinate(esper_jax.morph(program.given.variables), KEPT, "lora", rank=RANK, key=jax.random.key(0))
    assert products(forward, lean, program.given.x) == (2, 0)


CALLS: list[int] = []


def counting_init(key: jax.Array, site: esper_jax.Site) -> dict[str, jax.Array]:
    """A linear map."""
    return {"w": 0.1 * jax.random.normal(key, (site.in_features, site.out_features), site.dtype)}


def counting_apply(params: dict[str, jax.Array], u: jax.Array) -> jax.Array:
    """The map, which tells the host whenever it is really computed."""
    jax.debug.callback(lambda: CALLS.append(1))
    return u @ params["w"]


esper_jax.register_blueprint(
    "test-counting", init=counting_init, apply=counting_apply, reads="input", kinds=("dense",), replace=True
)
ASLEEP = (Stage.DORMANT, Stage.GERMINATED, Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING)


@pytest.fixture(scope="module")
def counted() -> tuple[Any, esper_jax.Morph]:
    """A compiled step, value and gradient, of an MLP with one seed that counts its calls."""
    given = host("mlp")
    morph = esper_jax.morph(given.variables, where=KEPT, planted="test-counting", slots=1)
    forward = esper_jax.graft(given.model)
    loss = lambda params, morph: LOSS(forward(morph.with_params(params), given.x), given.y).mean()  # noqa: E731
    return jax.jit(lambda morph: jax.value_and_grad(loss)(morph.params, morph)), noisy(morph, 1)


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.name)
def test_a_sleeping_seed_is_never_computed_and_a_waking_one_is(counted, stage: Stage) -> None:
    """Counted where it runs, in one program for all stages."""
    step, morph = counted
    CALLS.clear()
    jax.block_until_ready(step(in_stage(morph, stage)))
    jax.effects_barrier()
    assert bool(CALLS) is (stage not in ASLEEP)
    assert step._cache_size() == 1


def test_a_population_of_differently_grown_networks_steps_in_one_vmap_and_one_program(program) -> None:
    """Contract 6: each member as it steps alone, to 1e-5, because batched products add in another order.

    A sleeper that is NaN changes nothing. Sleeping seeds are computed and masked here: the batch has no branch left.
    """
    grown = noisy(program.run(germinate(program.start(), KEPT, 5)).morph, 2)
    stages = [
        {},
        {(KEPT, 0): (Stage.TRAINING, 0.0)},
        {(KEPT, 0): (Stage.BLENDING, 0.3), (PRUNED, 0): (Stage.TRAINING, 0.0)},
        {(KEPT, 0): (Stage.FOSSILIZED, 1.0), (PRUNED, 0): (Stage.HOLDING, 1.0)},
    ]
    asleep = in_stage(grown, Stage.DORMANT)
    members = [program.start().replace(morph=in_stage(asleep, given)) for given in stages]
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, members[0].morph.seeds)
    members.append(members[0].replace(morph=members[0].morph.replace(seeds=nan)))
    batch = (program.given.x, program.given.y)
    together = jax.jit(jax.vmap(program.step, in_axes=(0, None)))
    stacked, metrics = together(jax.tree.map(lambda *leaves: jnp.stack(leaves), *members), batch)
    for i, member in enumerate(members):
        alone, told = program.step(member, batch)
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        chex.assert_trees_all_close(mine.morph.host, alone.morph.host, atol=1e-5)
        chex.assert_trees_all_close(mine.morph.seeds, alone.morph.seeds, atol=1e-5)
        chex.assert_trees_all_equal(
            {path: life.stage for path, life in mine.morph.state.items()},
            {path: life.stage for path, life in alone.morph.state.items()},
        )
        np.testing.assert_allclose(metrics["loss"][i], told["loss"], atol=1e-5)
    healthy, sick = (jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in (0, 4))
    chex.assert_trees_all_equal(sick.morph.host, healthy.morph.host)
    together(jax.tree.map(lambda *leaves: jnp.stack(leaves), *members[::-1]), batch)
    assert together._cache_size() == 1
    outside, _ = products(together, stacked, batch)
    assert outside >= 8
