"""awake: the morph with the seeds that compute, and a program that knows of no others."""

import jax
import numpy as np
import pytest

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.summary import equal_bits, program
from tests.kasmina import test_stacked as stacks

from .hosts import HOSTS, grown, host, in_stage


def staged(morph, stages):
    """The morph with these stages, in turn over its plants; blended ones at an alpha of one half."""
    halves = [(stage, 0.5 if Stage.BLENDING <= stage <= Stage.FOSSILIZED else 0.0) for stage in stages]
    return in_stage(morph, {(p.site, p.slot): half for p, half in zip(morph.spec.plants, halves, strict=False)})


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", HOSTS)
def test_a_planted_morph_whose_seeds_all_rest_is_the_hosts_own_program(name, train):
    given, forward = host(name), esper_jax.graft(host(name).model)
    kwargs = given.call_kwargs(train)
    resting = [Stage.DORMANT, Stage.GERMINATED, Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING]
    morph = staged(grown(name, resident=True), resting * 4)
    bare = program(lambda v, x: given.model.apply(v, x, **kwargs), given.variables, given.x)
    assert program(lambda m, x: forward(m, x, **kwargs), morph, given.x) != bare
    assert program(lambda m, x: forward(m, x, **kwargs), esper_jax.awake(morph), given.x) == bare


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("name", HOSTS)
def test_the_seeds_that_compute_stay_and_compute_the_same(name, resident):
    """Values, and the gradients to host and seeds."""
    given, forward = host(name), esper_jax.graft(host(name).model)
    stages = [Stage.BLENDING, Stage.DORMANT, Stage.TRAINING, Stage.PRUNED, Stage.FOSSILIZED, Stage.GERMINATED]
    morph = staged(grown(name, resident), stages * 4)
    view = esper_jax.awake(morph)
    kept = [p for p, stage in zip(morph.spec.plants, stages * 4, strict=False) if stage in stages[::2]]
    assert list(view.spec.plants) == kept and 0 < len(kept) < len(morph.spec.plants)

    def loss(params, morph):
        return given.loss(forward, morph.with_params(params), given.x)[0]

    both = jax.jit(jax.value_and_grad(loss))
    (value, grads), (expected, wanted) = both(view.params, view), both(morph.params, morph)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    near(value, expected)
    jax.tree.map(near, grads["host"], wanted["host"])
    for plant in kept:
        jax.tree.map(near, grads["seeds"][plant.site][plant.key], wanted["seeds"][plant.site][plant.key])
    assert all(equal_bits(view.state[site], morph.state[site]) for site in view.state)


def test_a_morph_without_seeds_at_rest_is_the_same_object():
    morph = grown("mlp", resident=True)
    morph = staged(morph, [Stage.TRAINING] * len(morph.spec.plants))
    assert esper_jax.awake(morph) is morph
    empty = esper_jax.morph(host("mlp").variables)
    assert esper_jax.awake(empty) is empty


def test_a_seed_stays_that_computes_in_one_of_its_layers_or_in_one_member_of_a_population():
    stack = stacks.planted(stacks.Scanned(0), 1)
    assert esper_jax.awake(stack).spec.plants  # it trains in layer 1 and in no other
    off = esper_jax.prune(stack, "blocks/Dense_0", layer=1)
    assert not esper_jax.awake(off).spec.plants

    morph = grown("mlp", resident=True)
    one = staged(morph, [Stage.TRAINING])
    both = jax.tree.map(lambda *leaves: np.stack(leaves), morph, one)
    view, first = esper_jax.awake(both), morph.spec.plants[0]
    assert view.spec.plants == (first,)
    forward, x = esper_jax.graft(host("mlp").model), host("mlp").x
    each = jax.vmap(forward, (0, None))
    np.testing.assert_allclose(each(view, x), each(both, x), rtol=1e-6)


def test_it_is_refused_where_the_stages_are_not_known():
    morph = grown("mlp", resident=True)
    with pytest.raises(ValueError, match="outside jit and vmap"):
        jax.jit(esper_jax.awake)(morph)
    with pytest.raises(ValueError, match="no arrays yet"):
        esper_jax.awake(jax.eval_shape(lambda: morph))
    with pytest.raises(TypeError, match="awake"):
        esper_jax.awake(morph.params)
