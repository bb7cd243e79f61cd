"""A stored seed in a slot is a seed like any other: it lives, learns, is saved, and can be taken out."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import uuid
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import Decision, Stage, Urza, restore_morph, seed_of, unload
from esper_jax.kasmina.summary import equal_bits
from esper_jax.tolaria.apply import resolve
from tests.tolaria.test_resume import bits

from .grower import NET, TRAIN, VALIDATION, Grower, trainer
from .world import holding, host_params, same_bits, stored


@pytest.fixture(scope="module")
def urza() -> Urza:
    return Urza(f"memory://{uuid.uuid4().hex}")


@pytest.fixture(scope="module")
def lora(urza: Urza) -> Any:
    """A stored seed with parameters that are not fresh."""
    return urza.get(urza.put(seed_of(holding(), "Dense_0"), measure=False))


@pytest.fixture
def empty() -> Any:
    return esper_jax.morph(host_params(), slots=2)


def test_it_is_germinated_with_its_own_parameters_config_and_blend(empty, urza) -> None:
    """Equal to the bit; everything else about the slot is as for a fresh seed."""
    seed = stored("lora", empty.spec.by_path["Dense_0"], blend="gate", rank=3)
    loaded = esper_jax.germinate(empty, "Dense_0", urza.get(urza.put(seed, measure=False)), score=5.0)
    fresh = esper_jax.germinate(empty, "Dense_0", "lora", blend="gate", rank=3, key=jax.random.key(0), score=5.0)
    assert loaded.spec == fresh.spec and equal_bits(loaded.state, fresh.state) and equal_bits(loaded.host, fresh.host)
    assert same_bits(loaded.seeds["Dense_0"]["slot_0"], seed.params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_a_seed_planted_ahead_takes_it_without_a_new_program(lora) -> None:
    planted = esper_jax.morph(host_params(), planted="lora", slots=2)
    count = chex.assert_max_traces(lambda m: jax.tree.map(lambda leaf: leaf + 1, m), n=1)
    step = jax.jit(count)
    step(planted)
    loaded = esper_jax.germinate(planted, "Dense_0", lora)
    step(loaded)
    assert loaded.spec == planted.spec and same_bits(loaded.seeds["Dense_0"]["slot_0"], lora.params)
    again = jax.jit(lambda m: esper_jax.germinate(m, "Dense_0", lora, with_ok=True))(planted)
    assert bool(again[1]) and equal_bits(again[0], loaded)


@pytest.mark.parametrize(
    ("site", "change", "sentence"),
    [
        ("Dense_1", {}, r"cannot germinate at 'Dense_1': stored down is float32\(4, 8\), .* needs float32\(6, 8\)"),
        ("Dense_0", {"config": {"rank": 2}}, r"stored down is float32\(4, 8\), .* needs float32\(4, 2\)"),
        ("Dense_0", {"params": {"down": np.ones((4, 8), np.float64), "up": np.ones((8, 6))}}, r"float64\(4, 8\)"),
        ("Dense_0", {"params": {"down": np.ones((4, 8), np.float32)}}, "it holds down; .* needs down, up"),
        ("Dense_0", {"blend": "gate"}, "another structure: it holds down, up; .* needs gate/bias"),
        (
            "Dense_0",
            {"blueprint": "conv_light", "config": {}},
            "is made for conv, conv_transpose; site 'Dense_0' is dense",
        ),
        ("Dense_0", {"blueprint": "lorra"}, "unknown blueprint 'lorra'; known: "),
    ],
)
def test_one_that_does_not_fit_is_named_and_the_morph_is_as_it_was(site, change, sentence, empty, lora) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        esper_jax.germinate(empty, site, dataclasses.replace(lora, **change))
    assert str(caught.value).startswith(f"stored seed {lora.id[:12]}")
    assert empty.spec.plants == () and empty.seeds == {} and empty.state == {}


def test_what_else_is_given_beside_a_stored_seed_is_refused(empty, lora) -> None:
    with pytest.raises(TypeError, match="brings its own config and parameters; germinate.* was also given rank"):
        esper_jax.germinate(empty, "Dense_0", lora, rank=8)
    with pytest.raises(TypeError, match="was also given params"):
        esper_jax.germinate(empty, "Dense_0", lora, params=lora.params)
    with pytest.raises(TypeError, match="takes a blueprint's name or a stored seed such as urza.get"):
        esper_jax.germinate(empty, "Dense_0", {"blueprint": "lora"})


def test_any_object_of_that_form_is_a_stored_seed(empty) -> None:
    """The body knows no library: blueprint, config, blend and params are enough."""

    @dataclasses.dataclass
    class Mine:
        blueprint: str
        config: dict[str, Any]
        blend: str
        params: Any

    params = {"down": jnp.ones((4, 2)), "up": jnp.ones((2, 6))}
    morph = esper_jax.germinate(empty, "Dense_0", Mine("lora", {"rank": 2}, "add", params))
    assert same_bits(morph.seeds["Dense_0"]["slot_0"], params)
    sources = pathlib.Path(esper_jax.kasmina.__file__).parent.rglob("*.py")
    assert not [path.name for path in sources if "import urza" in path.read_text() or "..urza" in path.read_text()]


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING])
@pytest.mark.parametrize("planted", [False, True])
def test_unload_takes_a_seed_on_trial_out_at_once(stage: Stage, planted: bool, empty, lora) -> None:
    """Lean: out of the spec. Planted ahead: zeros, DORMANT, the same program. The slot is free at once."""
    start = esper_jax.morph(host_params(), planted="lora", slots=2) if planted else empty
    morph = esper_jax.germinate(start, "Dense_0", lora)
    life = morph.state["Dense_0"]
    life = life.replace(stage=life.stage.at[0].set(int(stage)), faults=life.faults.at[0].set(2))
    out = unload(morph.replace(state={**morph.state, "Dense_0": life}), "Dense_0")
    assert out.spec == start.spec and equal_bits(out.host, start.host) and equal_bits(out.seeds, start.seeds)
    if planted:
        empty_slot = jax.tree.map(lambda field: field[0], out.state["Dense_0"])
        assert (
            int(empty_slot.stage) == Stage.DORMANT and int(empty_slot.faults) == 0 and int(empty_slot.generation) == 1
        )
    else:
        assert out.state == {}
    again = esper_jax.germinate(out, "Dense_0", lora)
    assert int(again.state["Dense_0"].stage[0]) == Stage.GERMINATED


def test_unload_leaves_the_other_seed_of_the_site_alone_and_the_slot_clean(empty, lora) -> None:
    morph = esper_jax.germinate(esper_jax.germinate(empty, "Dense_0", lora), "Dense_0", "mlp", key=jax.random.key(0))
    out = unload(morph, "Dense_0", 0)
    assert [(plant.slot, plant.blueprint) for plant in out.spec.plants] == [(1, "mlp")]
    assert equal_bits(out.seeds["Dense_0"]["slot_1"], morph.seeds["Dense_0"]["slot_1"])
    assert out.state["Dense_0"].stage.tolist() == [Stage.DORMANT, Stage.GERMINATED]
    assert out.state["Dense_0"].generation.tolist() == [1, 1]
    tx = esper_jax.growable(optax.adam(1e-3))
    assert list(tx.grow(tx.init(morph), out).seeds["Dense_0"]) == ["slot_1"]


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        (Stage.FOSSILIZED, "a fossil is for good"),
        (Stage.PRUNED, "rests after a prune"),
        (Stage.EMBARGOED, "rests after a prune"),
        (Stage.RESETTING, "rests after a prune"),
        (Stage.DORMANT, "there is no seed to take out"),
    ],
)
def test_unload_is_refused_where_the_lifecycle_has_no_way_to_pruned(stage: Stage, why: str) -> None:
    morph = holding(stage=stage)
    with pytest.raises(ValueError, match=f"unload.* not possible in {stage.name}, .*{why}.*GERMINATED, TRAINING"):
        unload(morph, "Dense_0")
    same, ok = unload(morph, "Dense_0", with_ok=True)
    assert same is morph and not bool(ok)


def test_unload_under_a_trace_is_for_seeds_planted_ahead(lora) -> None:
    planted = esper_jax.germinate(esper_jax.morph(host_params(), planted="lora", slots=2), "Dense_0", lora)
    out, ok = jax.jit(lambda m: unload(m, "Dense_0", with_ok=True))(planted)
    assert bool(ok) and equal_bits(out, unload(planted, "Dense_0"))
    _, ok = jax.jit(lambda m: unload(m, "Dense_0", with_ok=True))(out)
    assert not bool(ok)
    with pytest.raises(ValueError, match="unload.* of a lean seed changes the structure; call it outside jit"):
        jax.jit(lambda m: unload(m, "Dense_0", with_ok=True))(holding())
    with pytest.raises(ValueError, match="slot 1 of site 'Dense_0' is empty"):
        unload(holding(), "Dense_0", 1)


EPOCHS = 9


def fit(directory: Any, urza: Any, controller: Any, epochs: int = EPOCHS, restore: bool = False) -> Any:
    made = trainer(directory, controller, urza)
    variables = {"params": host_params()}
    state = made.restore() if restore else made.init(variables, key=jax.random.key(1))
    return made.fit(state, TRAIN, VALIDATION, epochs=epochs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, urza: Urza, lora: Any) -> Any:
    """A run in which a decision loads the stored seed: its directory, final state, history and controller."""
    directory, controller = tmp_path_factory.mktemp("whole"), Grower(lora.id[:10])
    return directory, *fit(directory, urza, controller), controller


def test_a_decision_loads_a_stored_seed_and_it_lives_through_its_life(whole, lora) -> None:
    """The event names the whole id, so that the log says what was loaded; the seed trains and blends."""
    _, state, history, controller = whole
    (decided,) = history.of_kind("decision")
    assert decided.data["outcome"] == "applied" and decided.data["stored"] == lora.id
    assert (decided.data["blueprint"], decided.data["config"]["rank"]) == ("lora", 8)
    assert [heard.outcome for heard in controller.heard] == ["applied"]
    stages = [event.data["after"] for event in history.of_kind("stage")]
    assert stages == ["GERMINATED", "TRAINING", "BLENDING", "HOLDING"]
    assert not equal_bits(state.morph.seeds["Dense_0"]["slot_0"], jax.tree.map(jnp.asarray, lora.params))


def test_it_starts_from_the_stored_parameters_and_the_checkpoint_has_them(whole, lora) -> None:
    directory, state, _, _ = whole
    steps = sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())
    first = restore_morph(directory, step=steps[1])
    assert same_bits(first.seeds["Dense_0"]["slot_0"], jax.tree.map(jnp.asarray, lora.params))
    chex.assert_trees_all_equal(bits(restore_morph(directory)), bits(state.morph))


@pytest.mark.slow
def test_a_run_resumed_after_it_was_loaded_ends_the_same_to_the_bit(whole, tmp_path: pathlib.Path, urza, lora) -> None:
    fit(tmp_path, urza, Grower(lora.id), epochs=4)
    state, _ = fit(tmp_path, urza, Grower(lora.id), restore=True)
    chex.assert_trees_all_equal(bits(state), bits(whole[1]))


class Asking:
    """Proposes everything at once, at the first tick."""

    def __init__(self, decisions: list[Decision]) -> None:
        self.decisions, self.heard = tuple(decisions), []

    def init(self, spec: Any, key: Any) -> dict[str, Any]:
        return {}

    def decide(self, state: Any, report: Any, feedback: Any) -> Any:
        self.heard += feedback
        return (self.decisions if report.epoch == 1 else ()), state


def test_what_cannot_be_loaded_is_refused_and_the_training_goes_on(urza: Urza, lora: Any) -> None:
    """Unknown, misfit, contradicted, for another action, over budget, without a library: a reason each, and no seed."""
    misfit = urza.put(stored("lora", esper_jax.morph(host_params()).spec.by_path["Dense_1"], rank=1), measure=False)
    load = lambda stored, **fields: Decision("germinate", "Dense_0", stored=stored, **fields)  # noqa: E731
    cases = [
        (load("0000dead"), "stored: there is no seed '0000dead'"),
        (load(misfit), r"stored down is float32\(6, 1\)"),
        (load(lora.id, blueprint="mlp"), "stored: seed .* is lora .*, not mlp"),
        (load(lora.id, config={"rank": 2}), "stored: seed .* is lora .*, not None {'rank': 2}"),
        (Decision("prune", "Dense_0", 0, stored=lora.id), "only a germination takes a stored seed, not 'prune'"),
        (load(lora.id), "parameter budget: 80 for lora"),
    ]
    controller = Asking([decision for decision, _ in cases])
    made = trainer(None, controller, urza, limits=esper_jax.Limits(max_parameters=10))
    state, history = made.fit(made.init({"params": host_params()}, key=jax.random.key(1)), TRAIN, VALIDATION, epochs=2)
    decided = history.of_kind("decision")
    assert [event.data["outcome"] for event in decided] == ["refused"] * len(cases)
    for event, (_, reason) in zip(decided, cases, strict=True):
        assert re.search(reason, event.data["why"])
    assert state.morph.spec.plants == () and len(history) == 2 and len(controller.heard) == len(cases)
    _, seed, why = resolve(cases[-1][0], None)
    assert seed is None and why == "stored: this run has no library of seeds; give Tolaria(urza=...)"
    with pytest.raises(TypeError, match=r"urza 'seeds' has no get\(\); give a library such as Urza\(url\)"):
        trainer(None, None, "seeds")


def test_the_module_of_this_world_is_the_host_of_these_parameters() -> None:
    shapes = jax.eval_shape(NET.init, jax.random.key(0), TRAIN[0][:1])
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, host_params())
