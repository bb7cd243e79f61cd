"""The stages of a seed and the edges between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_jax
from esper_jax import Lifecycle, SeedState, Stage
from esper_jax.kasmina import lifecycle
from esper_jax.kasmina.stages import EDGES, NEXT
from esper_jax.kasmina.summary import equal_bits

CONTRACT = {
    ("DORMANT", "GERMINATED"),
    ("GERMINATED", "TRAINING"),
    ("GERMINATED", "PRUNED"),
    ("TRAINING", "BLENDING"),
    ("TRAINING", "PRUNED"),
    ("BLENDING", "HOLDING"),
    ("BLENDING", "PRUNED"),
    ("HOLDING", "FOSSILIZED"),
    ("HOLDING", "BLENDING"),
    ("HOLDING", "PRUNED"),
    ("PRUNED", "EMBARGOED"),
    ("EMBARGOED", "RESETTING"),
    ("RESETTING", "DORMANT"),
}
PAIRS = [(a, b) for a in Stage for b in Stage]
STAGES = jnp.asarray([a for a, _ in PAIRS], jnp.int32)
TARGETS = jnp.asarray([b for _, b in PAIRS], jnp.int32)


def used(stages, **changes):
    """A state in which every field is told apart from its reset value."""
    n = len(stages)
    state = SeedState.empty(n).replace(
        stage=jnp.asarray(stages, jnp.int32),
        steps=jnp.full(n, 4, jnp.int32),
        age=jnp.full(n, 9, jnp.int32),
        generation=jnp.full(n, 2, jnp.int32),
        stage_score=jnp.full(n, 50.0),
    )
    return state.replace(**changes)


def all_pairs(state, targets):
    return lifecycle.transition(state, jnp.ones(len(PAIRS), bool), targets, 61.5)


@pytest.mark.parametrize("how", ["plain", "jit", "vmap"])
def test_exactly_the_13_edges_of_the_contract_are_legal_among_all_81(how):
    """Contract 1, 2, 6: an illegal edge changes no field and gives False; a legal one resets steps, notes the score."""
    state = used(STAGES)
    if how == "vmap":
        single = lambda s, t: lifecycle.transition(s, jnp.ones(1, bool), t, 61.5)  # noqa: E731
        split = jax.tree.map(lambda leaf: leaf[:, None], (state, TARGETS))
        moved, ok = jax.tree.map(lambda leaf: leaf[:, 0], jax.vmap(single)(*split))
    else:
        moved, ok = (jax.jit(all_pairs) if how == "jit" else all_pairs)(state, TARGETS)
    for i, (stage, target) in enumerate(PAIRS):
        before, after = (jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in (state, moved))
        legal = (stage.name, target.name) in CONTRACT
        assert bool(ok[i]) == legal, (stage, target)
        if legal:
            assert (int(after.stage), int(after.steps), float(after.stage_score)) == (target, 0, 61.5)
        else:
            assert equal_bits(before, after), (stage, target)


def test_the_edge_table_people_read_is_the_one_that_is_applied():
    """Contract 1."""
    assert {(a.name, b.name) for a, targets in EDGES.items() for b in targets} == CONTRACT
    assert NEXT[Stage.HOLDING] == Stage.FOSSILIZED
    assert Stage.FOSSILIZED not in NEXT


def test_unmasked_slots_do_not_move():
    """Contract 6."""
    state = used([Stage.TRAINING] * 3)
    moved, ok = lifecycle.transition(state, jnp.asarray([True, False, True]), Stage.PRUNED)
    assert ok.tolist() == [True, False, True]
    assert moved.stage.tolist() == [Stage.PRUNED, Stage.TRAINING, Stage.PRUNED]


def planted(stage):
    params = {"Dense_0": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    morph = esper_jax.morph(params, slots=1, planted={"lora": {"rank": 1}})
    return morph.replace(state={"Dense_0": morph.state["Dense_0"].replace(stage=jnp.asarray([stage], jnp.int32))})


@pytest.mark.parametrize(
    ("call", "target", "stages"),
    [
        (esper_jax.prune, "PRUNED", {"GERMINATED", "TRAINING", "BLENDING", "HOLDING"}),
        (esper_jax.fossilize, "FOSSILIZED", {"HOLDING"}),
    ],
)
@pytest.mark.parametrize("stage", list(Stage), ids=lambda s: s.name)
def test_a_concrete_illegal_edge_raises_and_names_both_stages(call, target, stages, stage):
    """Contract 1."""
    morph = planted(stage)
    if stage.name in stages:
        assert call(morph, "Dense_0", 0).state["Dense_0"].stage.tolist() == [Stage[target]]
        return
    with pytest.raises(ValueError, match="not a legal edge") as error:
        call(morph, "Dense_0", 0)
    assert stage.name in str(error.value) and target in str(error.value)
    same, ok = call(morph, "Dense_0", 0, with_ok=True)
    assert not ok and equal_bits(same, morph)


@pytest.mark.parametrize("call", [esper_jax.prune, esper_jax.fossilize, esper_jax.advance])
def test_a_traced_illegal_edge_changes_nothing_and_reports_false(call):
    """Contract 1, 6: all nine stages in one `vmap` under one `jit`."""
    morphs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(planted(stage) for stage in Stage))
    moved, ok = jax.jit(jax.vmap(lambda m: call(m, "Dense_0", 0, with_ok=True)))(morphs)
    for i, stage in enumerate(Stage):
        single = lambda tree, i=i: jax.tree.map(lambda leaf: leaf[i], tree)  # noqa: E731
        if not ok[i]:
            assert equal_bits(single(moved), single(morphs)), stage
        else:
            assert (stage.name, Stage(int(single(moved).state["Dense_0"].stage[0])).name) in CONTRACT
    expected = {esper_jax.prune: 4, esper_jax.fossilize: 1, esper_jax.advance: 7}[call]
    assert int(ok.sum()) == expected


@pytest.mark.parametrize("stage", [Stage.DORMANT, Stage.FOSSILIZED], ids=lambda s: s.name)
def test_advance_says_which_stage_has_no_next_one(stage):
    """Contract 1: nothing follows FOSSILIZED; DORMANT needs `germinate`."""
    with pytest.raises(ValueError, match=stage.name):
        esper_jax.advance(planted(stage), "Dense_0")


def test_advance_walks_the_whole_life_in_order():
    """Contract 1, 2."""
    morph, seen = planted(Stage.GERMINATED), []
    for i in range(4):
        morph = esper_jax.advance(morph, "Dense_0", score=10.0 + i)
        state = morph.state["Dense_0"]
        assert (int(state.steps[0]), float(state.stage_score[0])) == (0, 10.0 + i)
        seen.append(Stage(int(state.stage[0])).name)
    assert seen == ["TRAINING", "BLENDING", "HOLDING", "FOSSILIZED"]


@pytest.mark.parametrize("how", ["loop", "jit", "vmap", "scan"])
def test_a_pruned_slot_is_dormant_again_after_exactly_seven_ticks(how):
    """Contract 3, 6: 1 tick pruned, 5 embargoed, 1 resetting."""
    state = used([Stage.PRUNED, Stage.FOSSILIZED], steps=jnp.zeros(2, jnp.int32))
    tick = lambda s: lifecycle.tick(s, score=1.0)[0]  # noqa: E731
    if how == "scan":
        _, stages = jax.lax.scan(lambda s, _: (tick(s), tick(s).stage), state, None, length=8)
        seen = np.asarray(stages)[:, 0].tolist()
    else:
        if how == "vmap":
            batched = jax.jit(jax.vmap(tick))
            tick = lambda s: jax.tree.map(lambda v: v[0], batched(jax.tree.map(lambda v: v[None], s)))  # noqa: E731
        elif how == "jit":
            tick = jax.jit(tick)
        seen = []
        for _ in range(8):
            state = tick(state)
            seen.append(int(state.stage[0]))
        assert int(state.stage[1]) == Stage.FOSSILIZED
    assert seen == [Stage.EMBARGOED] * 5 + [Stage.RESETTING] + [Stage.DORMANT] * 2


def test_rest_times_are_configurable():
    """Contract 3: numbers are defaults."""
    state, config = used([Stage.PRUNED], steps=jnp.zeros(1, jnp.int32)), Lifecycle(embargo_ticks=1)
    for expected in (Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT):
        state, _ = lifecycle.tick(state, score=1.0, config=config)
        assert int(state.stage[0]) == expected


def test_a_reset_slot_keeps_nothing_of_the_seed_but_the_count_of_germinations():
    """Contract 3."""
    state = used([Stage.RESETTING], faults=jnp.full(1, 3), contribution=jnp.ones(1), health=jnp.ones(1))
    state, ticked = lifecycle.tick(state, score=1.0)
    fresh = SeedState.empty(1).replace(generation=jnp.full(1, 2, jnp.int32), stage_score=jnp.ones(1))
    assert (int(ticked.before[0]), int(ticked.after[0])) == (Stage.RESETTING, Stage.DORMANT)
    assert equal_bits(state, fresh)


def test_planted_parameters_are_zero_again_after_a_reset_and_lean_seeds_are_gone():
    """Contract 3."""
    key = jax.random.key(0)
    morph = esper_jax.germinate(planted(Stage.DORMANT), "Dense_0", "lora", key=key)
    assert any(jnp.any(leaf) for leaf in jax.tree.leaves(morph.seeds))
    morph = esper_jax.prune(morph, "Dense_0", 0)
    for _ in range(7):
        morph, _ = esper_jax.tick(morph)
    assert morph.state["Dense_0"].stage.tolist() == [Stage.DORMANT]
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(morph.seeds))
    assert esper_jax.shed(morph) is morph
    again = esper_jax.germinate(morph, "Dense_0", "lora", key=key)
    assert again.spec == morph.spec and again.state["Dense_0"].generation.tolist() == [2]
