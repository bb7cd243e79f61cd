"""nnx hosts: what is theirs alone."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.summary import equal_bits

from .hosts import in_stage, noisy
from .pairs import IMAGE, LABELS, TEXT, NnxBlock, NnxCNN

LOSS = optax.softmax_cross_entropy_with_integer_labels


@pytest.fixture(params=[True, False], ids=["graph mode", "tree mode"])
def mode(request):
    """nnx as it is today, and as it is announced to be."""
    before = (
        flax.config.flax_nnx_graph_mode if hasattr(flax.config, "flax_nnx_graph_mode") else flax.config.nnx_graph_mode
    )
    flax.config.update("nnx_graph_mode", request.param)
    yield request.param
    flax.config.update("nnx_graph_mode", before)


def structure(model):
    return nnx.graphdef(model), jax.tree.structure(nnx.state(model))


def test_the_users_model_keeps_its_structure_and_gets_its_updates(mode):
    """Statistics and counts come back as an `nnx.State` of its own structure; the model itself is not touched."""
    model = NnxCNN(nnx.Rngs(0))
    before = structure(model)
    morph = esper_jax.germinate(esper_jax.morph(model), "one", "se", key=jax.random.key(0))
    outputs, state = jax.jit(esper_jax.graft(model, updates=True))(morph, IMAGE)
    assert structure(model) == before and jax.tree.structure(state) == before[1]
    direct = nnx.clone(model)
    np.testing.assert_allclose(outputs, direct(IMAGE), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["norm"]["mean"].get_value(), direct.norm.mean.get_value(), rtol=1e-5)
    nnx.update(model, state)
    assert np.any(model.norm.mean.get_value())
    state = esper_jax.unmorph(morph)
    assert isinstance(state, nnx.State) and jax.tree.structure(state) == before[1]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state, nnx.state(NnxCNN(nnx.Rngs(0)))))


def test_a_state_alone_makes_a_morph_too(mode):
    """Kinds are read from shapes and names; the graft is the module's."""
    model = NnxBlock(nnx.Rngs(0))
    by_state, by_module = esper_jax.morph(nnx.state(model)), esper_jax.morph(model)
    assert [site.path for site in by_state.spec.sites] == [site.path for site in by_module.spec.sites]
    assert equal_bits(esper_jax.graft(model)(by_state, TEXT), esper_jax.graft(model)(by_module, TEXT))


def test_dropout_follows_the_keys_in_the_morph(mode):
    """Counts go on with the updates: two calls differ, two runs do not."""
    model = NnxBlock(nnx.Rngs(0))
    forward = jax.jit(esper_jax.graft(model, updates=True))
    morph = esper_jax.morph(model)
    first, state = forward(morph, TEXT)
    again, _ = forward(morph, TEXT)
    assert equal_bits(first, again)
    nnx.update(model, state)
    second, _ = esper_jax.graft(model, updates=True)(esper_jax.morph(model), TEXT)
    assert not equal_bits(first, second)


def test_it_lives_beside_nnx_jit_and_nnx_optimizer(mode):
    """A user's own loop: the host's gradients as an `nnx.State`, the optimizer and the model stay nnx's."""
    model = NnxCNN(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    morph = esper_jax.germinate(esper_jax.morph(model), "last", "lora", key=jax.random.key(0), rank=2)
    morph = in_stage(noisy(morph, 1), Stage.TRAINING)
    forward = esper_jax.graft(model)
    plain = nnx.clone(model), None
    other = nnx.Optimizer(plain[0], optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, morph):
        morph = esper_jax.kasmina.nnx.with_model(morph, model)

        def loss(params):
            outputs, updated = forward(morph.with_params(params), IMAGE, mutable=["batch_stats"])
            return LOSS(outputs, LABELS).mean(), updated

        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(morph.params)
        optimizer.update(model, esper_jax.kasmina.nnx.as_state(morph, grads["host"]))
        nnx.update(model, esper_jax.kasmina.nnx.as_state(morph, updated["batch_stats"], "batch_stats"))
        return value, grads["seeds"]

    @nnx.jit
    def bare(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: LOSS(m(IMAGE), LABELS).mean())(model)
        optimizer.update(model, grads)
        return value

    for _ in range(3):
        value, seeds = step(model, optimizer, morph)
        np.testing.assert_allclose(value, bare(plain[0], other), rtol=1e-5)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(seeds))
    np.testing.assert_allclose(model.last.kernel.get_value(), plain[0].last.kernel.get_value(), rtol=1e-4, atol=1e-6)


def test_an_error_in_the_model_leaves_no_trace(mode):
    """The call works on a copy, put back also when it raises."""

    class Breaks(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.fails = nnx.Linear(4, 4, rngs=rngs), True

        def __call__(self, x):
            x = self.layer(x)
            if self.fails:
                raise RuntimeError("as planned")
            return x

    model = Breaks(nnx.Rngs(0))
    morph = esper_jax.germinate(esper_jax.morph(model), "layer", "lora", key=jax.random.key(0))
    forward = esper_jax.graft(model)
    with pytest.raises(RuntimeError, match="as planned"):
        forward(morph, jnp.ones((2, 4)))
    assert type(model.layer) is nnx.Linear and not hasattr(model.layer, "esper_bank")
    model.fails = False
    assert equal_bits(forward(morph, jnp.ones((2, 4))), model(jnp.ones((2, 4))))


def test_shared_layers_and_layers_called_twice_are_one_site(mode):
    """Both calls feed the seed."""

    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.layer(self.layer(x))

    model, x = Twice(nnx.Rngs(0)), TEXT
    morph = in_stage(
        noisy(esper_jax.germinate(esper_jax.morph(model), "layer", "lora", key=jax.random.key(0), rank=2), 1),
        Stage.HOLDING,
    )
    seed = morph.seeds["layer"]["slot_0"]
    once = lambda u: model.layer(u) + u @ seed["down"] @ seed["up"]  # noqa: E731
    np.testing.assert_allclose(esper_jax.graft(model)(morph, x), once(once(x)), atol=1e-5)


def scanned(kind):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.layer = nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return x + jnp.sin(self.layer(self.norm(x)))

    class Deep(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def make(rngs):
                return Block(rngs)

            self.blocks = make(rngs)
            self.last = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def through(block, x):
                return nnx.remat(Block.__call__)(block, x) if kind == "remat" else block(x)

            return self.last(through(self.blocks, x))

    return Deep


@pytest.mark.parametrize("kind", ["scan", "remat"])
def test_scanned_layers_are_one_site_with_a_life_each(mode, kind):
    """`nnx.vmap` makes them, `nnx.scan` runs them: layer 1 trains while the host updates as without it."""
    model = scanned(kind)(nnx.Rngs(0))
    x = TEXT[:, 0]
    morph = esper_jax.morph(model)
    assert {site.path: site.layers for site in morph.spec.sites} == {"blocks/layer": 3, "blocks/norm": 3, "last": 0}
    morph = esper_jax.germinate(morph, "blocks/layer", "lora", key=jax.random.key(0), rank=2, layer=1)
    seeds = jax.tree.map(lambda leaf: leaf + 0.3, morph.seeds)
    morph = esper_jax.advance(morph.replace(seeds=seeds), "blocks/layer")
    forward = esper_jax.graft(model)
    asleep = esper_jax.unload(morph, "blocks/layer", with_ok=True)[0]
    grad = jax.jit(jax.grad(lambda p, m: LOSS(forward(m.with_params(p), x), LABELS).mean()))
    grads = grad(morph.params, morph)
    np.testing.assert_allclose(forward(morph, x), model(x), rtol=1e-5, atol=1e-6)
    down = grads["seeds"]["blocks/layer"]["slot_0"]["down"]
    assert [bool(jnp.any(row)) for row in down] == [False, True, False]
    without = grad(asleep.params, asleep)
    for a, b in zip(jax.tree.leaves(without["host"]), jax.tree.leaves(grads["host"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    life = morph.state["blocks/layer"]
    on = life.replace(stage=life.stage.at[1, 0].set(Stage.HOLDING), alpha=life.alpha.at[1, 0].set(1.0))
    blended = morph.replace(state={"blocks/layer": on})
    assert not np.allclose(forward(blended, x), model(x), atol=1e-3)


def test_a_layer_called_by_keyword_is_read_too(mode):
    """Its input has the layer's own name for it; a head group reads a call's keys and masks."""

    class Named(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.attention = (
                nnx.Linear(4, 4, rngs=rngs),
                nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs),
            )

        def __call__(self, x):
            x = self.layer(inputs=x)
            return self.attention(inputs_q=x, mask=jnp.ones((1, 1, 5, 5), bool))

    model = Named(nnx.Rngs(0))
    morph = esper_jax.germinate(esper_jax.morph(model), "layer", "lora", key=jax.random.key(0), rank=2)
    morph = esper_jax.germinate(morph, "attention", "head_group", key=jax.random.key(0))
    forward = esper_jax.graft(model)
    silent = forward(in_stage(noisy(morph, 1), Stage.TRAINING), TEXT)
    np.testing.assert_allclose(silent, model(TEXT), rtol=1e-5, atol=1e-6)
    assert not np.allclose(forward(in_stage(noisy(morph, 1), Stage.HOLDING), TEXT), silent, atol=1e-3)


def test_compare_sees_the_same_program_and_bits_where_slots_are_empty():
    """And what a seed costs where they are not."""
    model = NnxBlock(nnx.Rngs(0))
    morph = esper_jax.morph(model)
    found = esper_jax.compare(model, morph, TEXT, repeats=1)
    assert found.same_program and found.equal_bits and found.host_flops == found.grown_flops > 0
    grown = in_stage(noisy(esper_jax.germinate(morph, "up", "lora", key=jax.random.key(0)), 1), Stage.HOLDING)
    found = esper_jax.compare(model, grown, TEXT, repeats=1)
    assert not found.equal_bits and found.grown_flops > found.host_flops


def test_a_morph_of_another_model_is_refused_by_the_variable():
    """In words."""
    morph = esper_jax.morph(NnxBlock(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="it is of another model than the graft"):
        esper_jax.graft(NnxCNN(nnx.Rngs(0)))(morph, IMAGE)
    with pytest.raises(TypeError, match="updates=True"):
        esper_jax.graft(lambda v, x: x, updates=True)


def test_kasmina_layers_carry_their_own_seeds(mode):
    """Alone, in a morph, and back in the model: the same numbers; an optimizer over `nnx.Param` meets no seed."""
    layers = esper_jax.kasmina.nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = layers.KasminaConv(2, 4, (3, 3), planted="se", rngs=rngs)
            self.norm = layers.KasminaBatchNorm(4, planted="norm", rngs=rngs)
            self.last = layers.KasminaDense(4, 3, planted={"lora": {"rank": 2}}, slots=2, rngs=rngs)

        def __call__(self, x):
            return self.last(self.norm(self.conv(x)).mean((1, 2)))

    model, plain = Model(nnx.Rngs(0)), NnxCNN(nnx.Rngs(0))
    model.eval()
    alike = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    assert layers.KasminaDense.__name__ == "KasminaDense" and isinstance(model.last, nnx.Linear)
    assert set(nnx.to_pure_dict(nnx.state(model, nnx.Param))["last"]) == {"kernel", "bias"}
    assert type(alike.kernel) is type(model.last.kernel) and plain is not None
    morph = esper_jax.morph(model)
    assert [plant.blueprint for plant in morph.spec.plants] == ["se", "lora", "norm"]
    forward = esper_jax.graft(model)
    before = model(IMAGE)
    np.testing.assert_allclose(forward(morph, IMAGE), before, rtol=1e-6)
    grown = in_stage(noisy(morph, 1), Stage.HOLDING)
    expected = forward(grown, IMAGE)
    assert not np.allclose(expected, before, atol=1e-3)
    nnx.update(model, esper_jax.with_seeds_of(grown))
    np.testing.assert_allclose(model(IMAGE), expected, rtol=1e-5, atol=1e-6)
    again = esper_jax.morph(model)
    assert equal_bits(again.seeds, grown.seeds) and equal_bits(again.state, grown.state)
    with pytest.raises(ValueError, match="2 blueprints planted in 1 slots"):
        layers.KasminaDense(4, 3, planted={"lora": {}, "mlp": {}}, slots=1, rngs=nnx.Rngs(0))
