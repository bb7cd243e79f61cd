"""The calls people make on a morph, and what they say when a word is wrong."""

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_jax
from esper_jax import Morph, Spec, Stage
from esper_jax.kasmina.summary import equal_bits

from .hosts import host

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def mlp():
    return host("mlp")


@pytest.fixture(scope="module")
def empty(mlp):
    return esper_jax.morph(mlp.variables, slots=2)


@pytest.fixture(scope="module")
def one(empty):
    return esper_jax.germinate(empty, "Dense_1", "lora", key=KEY, rank=2)


def test_germinating_puts_fresh_parameters_in_the_first_free_slot_and_changes_nothing_else(empty, one, mlp):
    """Contract 1, 2: the old morph is as it was; the new seed is GERMINATED with the score noted."""
    assert empty.spec.plants == () and one.host is empty.host
    assert [(p.site, p.slot, dict(p.config), p.blend) for p in one.spec.plants] == [
        ("Dense_1", 0, {"rank": 2, "scale": 1.0}, "add")
    ]
    assert one.state["Dense_1"].stage.tolist() == [Stage.GERMINATED, Stage.DORMANT]
    again = esper_jax.germinate(one, "Dense_1", "mlp", key=KEY, score=12.5, hidden=3)
    assert again.spec.plants[1].slot == 1 and float(again.state["Dense_1"].stage_score[1]) == 12.5
    assert equal_bits(again.seeds["Dense_1"]["slot_0"], one.seeds["Dense_1"]["slot_0"])


def test_two_keys_give_two_seeds_and_one_key_the_same(empty):
    """Rule 5 of the design."""
    made = [esper_jax.germinate(empty, "Dense_1", "lora", key=jax.random.key(i)).seeds for i in (0, 0, 1)]
    assert equal_bits(made[0], made[1]) and not equal_bits(made[0], made[2])


WRONG = [
    (lambda m: esper_jax.germinate(m, "Dens_1", "lora", key=KEY), KeyError, "'Dens_1'.*Dense_0, Dense_1, Dense_2"),
    (lambda m: esper_jax.germinate(m, "Dense_1", "lorra", key=KEY), KeyError, "'lorra'.*lora.*mlp"),
    (lambda m: esper_jax.germinate(m, "Dense_1", "lora", key=KEY, rnak=2), TypeError, "'rnak'.*rank=8"),
    (lambda m: esper_jax.germinate(m, "Dense_1", "norm", key=KEY, rank=2), TypeError, "takes none"),
    (
        lambda m: esper_jax.germinate(m, "Dense_1", "conv_light", key=KEY),
        ValueError,
        "is dense. Blueprints for it:.*lora",
    ),
    (lambda m: esper_jax.germinate(m, "Dense_1", "lora"), TypeError, "key="),
    (lambda m: esper_jax.germinate(m, "Dense_1", "lora", key=KEY, slot=2), ValueError, "slots 0 to 1"),
    (lambda m: esper_jax.germinate(m, "Dense_1", "lora", key=KEY, slot=-1), ValueError, "slots 0 to 1"),
    (lambda m: esper_jax.germinate(m, "Dense_1", "lora", key=KEY, slot=0), ValueError, "slot 0 is taken.*GERMINATED"),
    (
        lambda m: esper_jax.germinate(m, "Dense_1", "lora", key=KEY, blend="sum"),
        ValueError,
        "add, lerp, multiply, gate",
    ),
    (lambda m: esper_jax.germinate(m.host, "Dense_1", "lora", key=KEY), TypeError, r"Morph.*morph\(params\)"),
    (lambda m: esper_jax.germinate(m, "Dense_1", "lora", params={"down": jnp.ones(3)}), ValueError, "structure"),
    (
        lambda m: esper_jax.germinate(
            m, "Dense_1", "lora", rank=2, params={"down": jnp.ones((6, 3)), "up": jnp.ones((2, 5))}
        ),
        ValueError,
        r"stored down.*\(6, 3\).*\(6, 2\)",
    ),
    (lambda m: esper_jax.advance(m, "Dense_9"), KeyError, "Dense_0"),
    (lambda m: esper_jax.advance(m, "Dense_1", 1), ValueError, r"slot 1 .*is empty; planted slots: 0 \(lora\)"),
    (lambda m: esper_jax.prune(m, "Dense_0"), ValueError, "is empty; planted slots: none"),
    (lambda m: esper_jax.fossilize(m, "Dense_1"), ValueError, "GERMINATED > FOSSILIZED.*TRAINING, PRUNED"),
    (lambda m: esper_jax.set_alpha(m, "Dense_1", 0, 0.5), ValueError, "GERMINATED.*BLENDING and HOLDING"),
    (lambda m: esper_jax.set_alpha(m, "Dense_1", 0, 1.5), ValueError, "between 0 and 1"),
    (lambda m: esper_jax.set_alpha(m, "Dense_1", 0, 0.5, curve="cubic"), ValueError, "linear, cosine, sigmoid"),
]


@pytest.mark.parametrize(("call", "error", "words"), WRONG)
def test_a_wrong_word_raises_and_lists_what_exists(one, call, error, words):
    """Contract 1, 4."""
    with pytest.raises(error, match=words):
        call(one)


def test_a_full_site_says_what_sits_in_its_slots(one):
    """Contract 4."""
    full = esper_jax.germinate(one, "Dense_1", "mlp", key=KEY)
    with pytest.raises(ValueError, match=r"no slot is free.*slot 0: lora.*slot 1: mlp"):
        esper_jax.germinate(full, "Dense_1", "norm", key=KEY)


def test_a_slot_reset_but_not_shed_says_how_to_free_it(one):
    """Contract 3, 4."""
    morph = esper_jax.prune(one, "Dense_1")
    for _ in range(7):
        morph, _ = esper_jax.tick(morph)
    with pytest.raises(ValueError, match="shed"):
        esper_jax.germinate(morph, "Dense_1", "lora", key=KEY, slot=0)
    assert esper_jax.germinate(esper_jax.shed(morph), "Dense_1", "lora", key=KEY, slot=0).spec.plants[0].slot == 0


def test_a_seed_planted_ahead_germinates_without_a_new_program(mlp):
    """Contract 16: the spec is the same, one compilation serves both, config asked for must be the planted one."""
    morph = esper_jax.morph(mlp.variables, planted={"lora": {"rank": 2}})
    forward = jax.jit(esper_jax.graft(mlp.model))
    before = forward(morph, mlp.x)
    grown = esper_jax.germinate(morph, "Dense_1", "lora", key=KEY)
    assert grown.spec == morph.spec and equal_bits(forward(grown, mlp.x), before)
    assert forward._cache_size() == 1
    other = esper_jax.germinate(morph, "Dense_1", "lora", key=KEY, rank=3)
    assert [p.slot for p in other.spec.planted_at["Dense_1"]] == [0, 1]


def test_germination_works_under_jit_and_vmap_and_reports(mlp):
    """Contract 1, 6: a second germination of the same slot reports False and keeps the first parameters."""
    morph = esper_jax.morph(mlp.variables, where="Dense_1", slots=1, planted={"lora": {"rank": 2}})

    @jax.jit
    @jax.vmap
    def twice(key):
        first, ok1 = esper_jax.germinate(morph, "Dense_1", "lora", key=key, with_ok=True)
        second, ok2 = esper_jax.germinate(first, "Dense_1", "lora", key=jax.random.fold_in(key, 1), with_ok=True)
        return first, second, ok1, ok2

    first, second, ok1, ok2 = twice(jax.random.split(KEY, 3))
    assert ok1.tolist() == [True] * 3 and ok2.tolist() == [False] * 3
    assert equal_bits(first, second)
    assert first.state["Dense_1"].stage.shape == (3, 1)


def test_stored_parameters_are_placed_as_they_are(empty, one):
    """A seed from elsewhere keeps its bits."""
    stored = jax.tree.map(lambda v: v + 1, one.seeds["Dense_1"]["slot_0"])
    placed = esper_jax.germinate(empty, "Dense_1", "lora", params=stored, rank=2)
    assert equal_bits(placed.seeds["Dense_1"]["slot_0"], stored)


def test_alpha_by_hand_and_a_scheduled_prune_end_to_end(one):
    """Contract 9, 12, 13, 14."""
    morph = esper_jax.advance(esper_jax.advance(one, "Dense_1"), "Dense_1")
    with pytest.raises(ValueError, match="0 of 5 ticks"):
        esper_jax.set_alpha(morph, "Dense_1", 0, 0.5)
    for _ in range(5):
        morph, report = esper_jax.tick(morph, score=3.0)
    assert int(report["Dense_1"].after[0]) == Stage.HOLDING
    lowered = esper_jax.set_alpha(morph, "Dense_1", 0, 0.5, steps=3)
    assert int(lowered.state["Dense_1"].stage[0]) == Stage.BLENDING
    going = esper_jax.prune(morph, "Dense_1", steps=3)
    with pytest.raises(ValueError, match="scheduled prune"):
        esper_jax.advance(going, "Dense_1")
    for expected in (Stage.BLENDING, Stage.BLENDING, Stage.PRUNED):
        assert expected in (Stage.BLENDING, Stage.PRUNED)
        going, _ = esper_jax.tick(going)
        assert int(going.state["Dense_1"].stage[0]) == expected


@pytest.mark.parametrize("how", ["variables", "bare", "frozen", "bare frozen"])
def test_unmorph_returns_the_host_in_the_form_it_was_given(mlp, how):
    """Bare params, variables and FrozenDicts; the very same arrays; and the grafted module takes all of them."""
    given = mlp.variables["params"] if "bare" in how else mlp.variables
    given = flax.core.freeze(given) if "frozen" in how else given
    morph = esper_jax.morph(given)
    assert esper_jax.unmorph(morph) is given
    forward, bare = esper_jax.graft(mlp.model), mlp.model.apply(mlp.variables, mlp.x)
    assert equal_bits(forward(morph, mlp.x), bare)
    grown = esper_jax.germinate(morph, "Dense_1", "lora", key=KEY)
    assert equal_bits(forward(grown, mlp.x), bare)
    changed = grown.with_params(jax.tree.map(lambda v: v * 1, grown.params))
    assert type(changed.host) is type(given) and equal_bits(forward(changed, mlp.x), bare)


def test_unmorph_warns_only_when_a_seed_was_part_of_the_output(one):
    """A host without its seeds computes something else."""
    assert esper_jax.unmorph(one) is one.host
    blended = esper_jax.advance(esper_jax.advance(one, "Dense_1"), "Dense_1")
    with pytest.warns(UserWarning, match="Dense_1 slot_0"):
        esper_jax.unmorph(blended)


def test_a_plain_function_of_bare_params_can_be_grafted(mlp):
    """`graft` of any function of the host's variables, in the form that `morph` was given."""
    bare = mlp.variables["params"]
    forward = esper_jax.graft(lambda params, x: mlp.model.apply({"params": params}, x))
    morph = esper_jax.germinate(esper_jax.morph(bare), "Dense_1", "lora", key=KEY)
    assert equal_bits(forward(morph, mlp.x), mlp.model.apply(mlp.variables, mlp.x))


def test_the_spec_survives_json_and_hashing(one):
    """Checkpoints carry it: sites, slots, plants and configs."""
    again = Spec.from_json(one.spec.to_json())
    assert again == one.spec and hash(again) == hash(one.spec) and again is not one.spec
    assert again != Spec(again.sites, again.slots)


def test_a_morph_is_a_pytree_that_says_what_it_is(one):
    """`repr` works on arrays, traces, shapes and batches."""
    leaves, tree = jax.tree.flatten(one)
    assert isinstance(tree.unflatten(leaves), Morph)
    assert "lora at Dense_1 GERMINATED" in repr(one) and "83 host parameters" in repr(one)
    assert "lora at Dense_1" in repr(jax.eval_shape(lambda: one))
    assert "all slots empty" in repr(esper_jax.morph(one.host))


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: esper_jax.morph(3), TypeError, "nested dicts of arrays"),
        (lambda: esper_jax.morph({"params": {"Dense_0": {"kernel": "x"}}}), TypeError, "Dense_0/kernel is str"),
        (lambda: esper_jax.morph(host("mlp").variables, slots=0), ValueError, "slots"),
        (lambda: esper_jax.morph(host("mlp").variables, planted="lorra"), KeyError, "lora"),
        (lambda: esper_jax.morph(host("mlp").variables, planted="conv_light"), ValueError, "the sites are dense"),
        (lambda: esper_jax.morph(host("mlp").variables, slots=1, planted=["lora", "mlp"]), ValueError, "raise slots="),
        (lambda: esper_jax.morph(host("mlp").variables, planted={"lora": {"rnk": 1}}), TypeError, "rank=8"),
        (
            lambda: esper_jax.morph(host("mlp").variables, where="Dence"),
            ValueError,
            "'Dence' admits; the host has: Dense_0",
        ),
        (lambda: esper_jax.morph(host("mlp").variables, where="Dense_("), ValueError, "no regular expression"),
        (lambda: esper_jax.morph(host("mlp").variables, where=3), TypeError, "regex or a predicate"),
        (lambda: esper_jax.morph(host("mlp").variables, model=host("mlp").model), ValueError, "together"),
        (lambda: esper_jax.morph(host("mlp").variables, model=np.sin, example=1), TypeError, "flax.linen.Module"),
        (lambda: esper_jax.morph(esper_jax.morph(host("mlp").variables)), TypeError, "got a Morph"),
        (lambda: esper_jax.graft(3), TypeError, "Flax module or its apply"),
        (
            lambda: esper_jax.graft(host("mlp").model)(host("mlp").variables, host("mlp").x),
            TypeError,
            "takes a Morph first",
        ),
    ],
)
def test_a_wrong_argument_is_answered_in_one_sentence(call, error, word):
    """Contract 4 and rule 4 of the design."""
    with pytest.raises(error, match=word):
        call()


def test_a_second_germination_of_its_kind_compiles_nothing_and_its_parameters_are_the_blueprints_own(mlp, caplog):
    """Planted growth without a stall: a germination is one small program a plant, made once."""
    from esper_jax.kasmina.blueprints import seed_init

    planted = esper_jax.morph(mlp.variables, planted={"lora": {"rank": 3}}, slots=1)
    esper_jax.germinate(planted, "Dense_0", "lora", key=jax.random.key(0))
    with jax.log_compiles():
        grown = esper_jax.germinate(planted, "Dense_0", "lora", key=jax.random.key(1), score=2.0)
        assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")] == []
    plant = grown.spec.planted_at["Dense_0"][0]
    expected = seed_init(plant, grown.spec.by_path["Dense_0"], jax.random.key(1))
    assert equal_bits(grown.seeds["Dense_0"]["slot_0"], expected)
    assert float(grown.state["Dense_0"].stage_score[0]) == 2.0


def test_a_blueprint_that_replaces_another_is_the_one_that_germinates(mlp):
    for value in (1.0, 2.0):
        esper_jax.register_blueprint(
            "test-replaced",
            init=lambda key, site, value=value: {"w": jnp.full((site.in_features, site.out_features), value)},
            apply=lambda params, u: u @ params["w"],
            reads="input",
            config={},
            replace=True,
        )
        grown = esper_jax.germinate(esper_jax.morph(mlp.variables), "Dense_0", "test-replaced", key=jax.random.key(0))
        assert float(grown.seeds["Dense_0"]["slot_0"]["w"][0, 0]) == value
