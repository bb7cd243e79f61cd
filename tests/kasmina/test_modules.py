"""Layers that carry their own seeds equal their Flax parents, and agree with `graft`."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_jax
from esper_jax import (
    KasminaAttention,
    KasminaBatchNorm,
    KasminaConv,
    KasminaDense,
    KasminaLayerNorm,
    Stage,
    with_seeds_of,
)
from esper_jax.kasmina.summary import equal_bits, program

from .hosts import in_stage, noisy

X = jax.random.normal(jax.random.key(1), (2, 6, 4))
IMAGE = jax.random.normal(jax.random.key(2), (2, 6, 5, 4))
LAYERS = {
    "dense": (KasminaDense, nn.Dense, (3,), {}, "lora", X),
    "conv": (KasminaConv, nn.Conv, (3, (3, 3)), {"strides": 2}, "conv_light", IMAGE),
    "attention": (KasminaAttention, nn.MultiHeadDotProductAttention, (2,), {}, "mlp", X),
    "layer_norm": (KasminaLayerNorm, nn.LayerNorm, (), {}, "norm", X),
    "batch_norm": (KasminaBatchNorm, nn.BatchNorm, (), {"use_running_average": False}, "norm", IMAGE),
}


@pytest.fixture(scope="module", params=LAYERS)
def case(request):
    mine, parent, args, kwargs, blueprint, x = LAYERS[request.param]
    layer, plain = mine(*args, **kwargs, planted=blueprint), parent(*args, **kwargs)
    variables, expected = (jax.jit(m.init)(jax.random.key(0), x) for m in (layer, plain))
    return layer, plain, variables, expected, x


def host_of(variables):
    return {name: tree for name, tree in variables.items() if name not in ("seeds", "kasmina")}


def test_the_layers_own_parameters_are_its_parents(case):
    """Same names, same keys, same bits: checkpoints of the parent fit."""
    _, _, variables, expected, _ = case
    assert equal_bits(host_of(variables), expected)


def test_a_dormant_layer_equals_its_parent_to_the_bit(case):
    """Contract 15, 16: output and updated statistics."""
    layer, plain, variables, expected, x = case
    got = jax.jit(lambda v: layer.apply(v, x, mutable=["batch_stats"]))(variables)
    assert equal_bits(got, jax.jit(lambda v: plain.apply(v, x, mutable=["batch_stats"]))(expected))


def test_without_planted_seeds_the_layer_is_its_parents_program(case):
    """Contract 15."""
    layer, plain, _, expected, x = case
    bare = layer.clone(planted=None)
    call = lambda m: lambda v: m.apply(v, x, mutable=["batch_stats"])  # noqa: E731
    assert program(call(bare), expected) == program(call(plain), expected)


def test_the_layer_and_graft_agree_once_a_seed_is_blended_in(case):
    """One implementation: `morph(variables)` takes the seeds up, `with_seeds_of` gives them back."""
    layer, plain, variables, _, x = case
    morph = esper_jax.morph(variables)
    assert [p.site for p in morph.spec.plants] == ["."] and equal_bits(morph.host, host_of(variables))
    morph = in_stage(noisy(morph, 1), Stage.HOLDING)
    call = lambda forward: jax.jit(lambda m: forward(m, x, mutable=["batch_stats"]))  # noqa: E731
    grafted = call(esper_jax.graft(layer))(morph)
    assert not equal_bits(grafted[0], plain.apply(host_of(variables), x, mutable=["batch_stats"])[0])
    assert equal_bits(call(layer.apply)(with_seeds_of(morph)), grafted)
    np.testing.assert_allclose(call(esper_jax.graft(plain))(morph)[0], grafted[0], atol=1e-6)
    back = esper_jax.morph(with_seeds_of(morph))
    assert back.spec == morph.spec and equal_bits(back, morph)


class Net(nn.Module):
    slots: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.relu(KasminaDense(5, planted={"lora": {"rank": 2}, "mlp": {"hidden": 3}}, slots=self.slots)(x))
        return KasminaDense(2, planted="lora", blend="gate", slots=self.slots)(nn.Dense(4)(x))


@pytest.fixture(scope="module")
def net():
    return Net(), jax.jit(Net().init)(jax.random.key(0), X)


def test_a_model_of_kasmina_layers_lives_a_whole_life_under_graft(net):
    """Contract 1, 16: germinate, train, blend, hold, fossilise; other layers are sites too."""
    model, variables = net
    morph = esper_jax.morph(variables)
    assert {s.path for s in morph.spec.sites} == {"KasminaDense_0", "KasminaDense_1", "Dense_0"}
    forward = jax.jit(esper_jax.graft(model))
    before = forward(morph, X)
    morph = esper_jax.germinate(morph, "KasminaDense_1", "lora", key=jax.random.key(1))
    assert morph.spec.plant("KasminaDense_1", 0).blend == "gate"
    assert equal_bits(forward(morph, X), before)
    for _ in range(4):
        morph = esper_jax.advance(morph, "KasminaDense_1")
    assert forward._cache_size() == 1
    lean = esper_jax.germinate(morph, "Dense_0", "lora", key=jax.random.key(2))
    np.testing.assert_allclose(esper_jax.graft(model)(lean, X), forward(morph, X), atol=1e-6)


def test_more_slots_than_the_layers_have_can_be_asked_for(net):
    """Every site of a morph has the same number of slots, in a tick and in a train step."""
    morph = esper_jax.morph(net[1], slots=6)
    assert {state.stage.shape for state in morph.state.values()} == {(6,)}
    ticked, _ = esper_jax.tick(morph)
    np.testing.assert_allclose(net[0].apply(with_seeds_of(ticked), X), net[0].apply(net[1], X), atol=1e-6)


def test_layers_left_out_by_where_say_so(net):
    """Their seeds cannot be dropped in silence."""
    with pytest.raises(ValueError, match=r"KasminaDense_1.*where="):
        esper_jax.morph(net[1], where="KasminaDense_0")


def test_too_many_blueprints_for_the_slots_are_refused():
    """Rule 4 of the design."""
    with pytest.raises(ValueError, match="raise slots="):
        Net(slots=1).init(jax.random.key(0), X)
    with pytest.raises(KeyError, match="lora"):
        KasminaDense(2, planted="lorra").init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="is dense"):
        KasminaDense(2, planted="se").init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="add, lerp"):
        KasminaDense(2, planted="lora", blend="sum").init(jax.random.key(0), X)


def test_init_of_a_model_of_kasmina_layers_is_silent_and_jits(net):
    """No warning on any of the usual calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variables = jax.jit(net[0].init)(jax.random.key(0), X)
        grads = jax.grad(lambda p: jnp.sum(net[0].apply({**variables, "params": p}, X)))(variables["params"])
    assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])
