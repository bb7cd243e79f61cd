"""Layers stacked by `nn.scan` and `nn.vmap`: one site, a life for each layer's seed."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.summary import equal_bits

from .hosts import all_finite

X = jax.random.normal(jax.random.key(1), (4, 5, 6))
DEPTH = 3


class Block(nn.Module):
    """A transformer block as the body of a scan."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(6)(nn.gelu(nn.Dense(7)(x + h))), None


class Scanned(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            nn.remat(Block), variable_axes={"params": self.axis}, split_rngs={"params": True}, length=DEPTH
        )
        return nn.Dense(2)(blocks(name="blocks")(x, None)[0])


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=DEPTH
        )
        return nn.Dense(2)(members(6, name="members")(x).mean(0))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = functools.partial(nn.scan, variable_axes={"params": 0}, split_rngs={"params": True})
        return nn.Dense(2)(inner(inner(Block, length=2), length=DEPTH)(name="blocks")(x, None)[0])


@functools.cache
def made(model):
    variables = jax.jit(model.init)(jax.random.key(0), X)
    return variables, esper_jax.morph(variables, model=model, example=X)


HOSTS = [Scanned(0), Scanned(1), Scanned(-1), Ensemble()]
SITES = {Scanned: "blocks/Dense_0", Ensemble: "members"}


def planted(model, layer, resident=False, stage=Stage.TRAINING):
    """A lora of noise at the stack, in one layer, brought to TRAINING or on."""
    variables, morph = made(model)
    site = SITES[type(model)]
    if resident:
        morph = esper_jax.morph(variables, where=site, model=model, example=X, planted={"lora": {"rank": 2}})
    morph = esper_jax.germinate(morph, site, "lora", key=jax.random.key(3), layer=layer, rank=2)
    key = morph.spec.plants[0].key
    noise = jax.tree.map(lambda leaf: leaf.at[layer].add(0.3), morph.seeds[site][key])
    morph = morph.replace(seeds={site: {key: noise}})
    while stage > int(morph.state[site].stage[layer, 0]):
        morph = esper_jax.advance(morph, site, 0, layer=layer)
        if morph.state[site].stage[layer, 0] == Stage.BLENDING and stage > Stage.BLENDING:
            full = morph.state[site].alpha.at[layer, 0].set(1.0)
            morph = morph.replace(state={site: morph.state[site].replace(alpha=full, ramp_done=full * 0 + 5)})
    return morph


def loss(forward, morph):
    logits = forward(morph, X)
    return jnp.mean(jnp.square(logits - 1)), logits


@pytest.mark.parametrize("model", HOSTS, ids=repr)
def test_a_stack_is_one_site_that_knows_its_layers(model):
    """Traced along any axis; from shapes alone along axis 0."""
    variables, morph = made(model)
    layers = {site.path: site.layers for site in morph.spec.sites}
    assert layers.pop("Dense_0") == 0 and set(layers.values()) == {DEPTH}
    if getattr(model, "axis", 0) == 0:
        guessed = {s.path: (s.kind, s.in_shape, s.out_shape, s.layers) for s in esper_jax.morph(variables).spec.sites}
        assert guessed == {s.path: (s.kind, s.in_shape, s.out_shape, s.layers) for s in morph.spec.sites}


def test_parameters_boxed_with_partition_names_are_found_and_grow():
    """A host initialised with `nn.with_partitioning` keeps its boxes; seeds have none."""

    class Named(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            return x + nn.Dense(6, kernel_init=init)(nn.LayerNorm()(x)), None

    class Host(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(
                Named,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=DEPTH,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return blocks(name="blocks")(x, None)[0]

    model = Host()
    variables = model.init(jax.random.key(0), X)
    morph = esper_jax.morph(variables, model=model, example=X)
    assert morph.spec.sites == esper_jax.morph(nn.meta.unbox(variables), model=model, example=X).spec.sites
    morph = esper_jax.germinate(morph, "blocks/Dense_0", "lora", key=jax.random.key(0), layer=1)
    step = esper_jax.make_train_step(model, lambda y, t: jnp.square(y - t), optax.sgd(0.1), donate=False)
    state = esper_jax.TrainState.create(morph, esper_jax.growable(optax.sgd(0.1)), key=jax.random.key(0))
    state, metrics = step(state, (X, X))
    assert not metrics["skipped"]
    assert state.morph.host["params"]["blocks"]["Dense_0"]["kernel"].names == ("layers", "in", "out")


def test_a_stack_of_stacks_is_skipped_by_name():
    """Layers stacked along two axes are not supported; the rest of the model is."""
    model = Twice()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    with pytest.warns(UserWarning, match=r"blocks/Dense_0 \(Dense, stacked along more than one axis\)"):
        morph = esper_jax.morph(variables, model=model, example=X)
    assert [site.path for site in morph.spec.sites] == ["Dense_0"]


@pytest.mark.parametrize("model", HOSTS, ids=repr)
def test_empty_slots_of_a_stack_are_the_hosts_own_program(model):
    """Contract 15."""
    variables, morph = made(model)
    forward = esper_jax.graft(model)
    grown = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(forward(morph.with_params(p), X))))(morph.params)
    bare = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, X))))(variables["params"])
    assert str(grown.jaxpr.eqns) == str(bare.jaxpr.eqns)


@pytest.mark.parametrize(
    "resident", [pytest.param(False, id="lean"), pytest.param(True, id="planted", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("model", HOSTS, ids=repr)
def test_one_layers_seed_trains_while_the_host_updates_as_without_it(model, resident):
    """Contract 16 and 17 over ten AdamW steps with clipping; the other layers' seeds stay as they are."""
    morph, forward = planted(model, 1, resident), esper_jax.graft(model)
    site = SITES[type(model)]
    asleep = morph.replace(state={site: morph.state[site].replace(stage=morph.state[site].stage * 0)})
    tx = esper_jax.growable(optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)))

    @jax.jit
    def step(morph, state):
        (value, logits), grads = jax.value_and_grad(lambda p: loss(forward, morph.with_params(p)), has_aux=True)(
            morph.params
        )
        params, state = tx.step(grads, state, morph)
        return morph.with_params(params), state, value, logits

    states = [(asleep, tx.init(asleep)), (morph, tx.init(morph))]
    for _ in range(10):
        (still, sleeping, *seen), (moved, learnt, *also) = (step(*state) for state in states)
        assert equal_bits(seen, also) and equal_bits(still.host, moved.host)
        assert equal_bits(sleeping.host, learnt.host)
        states = [(still, sleeping), (moved, learnt)]
    assert step._cache_size() == 1
    before, after = morph.seeds[site]["slot_0"], states[1][0].seeds[site]["slot_0"]
    for name in before:
        changed = np.any(np.asarray(before[name] != after[name]), axis=(1, 2))
        assert changed.tolist() == [False, True, False]
    count = [x for x in jax.tree.leaves(states[1][1].seeds[site]["slot_0"].inner) if x.dtype == jnp.int32]
    assert [c.tolist() for c in count] == [[0, 10, 0]] * len(count)


def test_a_blended_layer_computes_its_seed_and_the_others_do_not():
    """Against the same blocks applied one by one."""
    model = Scanned(0)
    morph = planted(model, 1, stage=Stage.HOLDING)
    variables, seed = made(model)[0]["params"], morph.seeds["blocks/Dense_0"]["slot_0"]

    class Open(nn.Module):
        @nn.compact
        def __call__(self, x, down, up):
            h = nn.MultiHeadDotProductAttention(2, name="MultiHeadDotProductAttention_0")(nn.LayerNorm()(x))
            h = x + h
            h = nn.gelu(nn.Dense(7, name="Dense_1")(h))
            return x + nn.Dense(6, name="Dense_0")(h) + h @ down @ up

    x = X
    for layer in range(DEPTH):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], variables["blocks"])
        scale = float(layer == 1)
        x = Open().apply({"params": own}, x, seed["down"][layer] * scale, seed["up"][layer])
    expected = nn.Dense(2).apply({"params": variables["Dense_0"]}, x)
    np.testing.assert_allclose(esper_jax.graft(model)(morph, X), expected, rtol=2e-5, atol=2e-5)


def test_waking_another_layer_changes_data_only():
    """One program for all layers; each has its own stage, and a summary line."""
    model = Scanned(0)
    morph = planted(model, 1)
    forward = jax.jit(esper_jax.graft(model))
    forward(morph, X)
    woken = esper_jax.germinate(morph, "blocks/Dense_0", "lora", key=jax.random.key(5), layer=2)
    woken = esper_jax.advance(woken, "blocks/Dense_0", layer=2)
    forward(woken, X)
    assert forward._cache_size() == 1 and woken.spec == morph.spec
    assert woken.state["blocks/Dense_0"].stage[:, 0].tolist() == [Stage.DORMANT, Stage.TRAINING, Stage.TRAINING]
    table = str(esper_jax.summary(woken))
    assert "3 x dense" in table and "0.1 " in table and "0.2 " in table and "1 DORMANT" in table
    with pytest.raises(ValueError, match=r"cannot germinate 'lora' at 'blocks/Dense_0': slot 0 is taken"):
        esper_jax.germinate(woken, "blocks/Dense_0", "lora", key=jax.random.key(5), layer=2, slot=0)


def test_calls_without_a_layer_move_the_layers_that_have_a_seed():
    """And name the one that cannot move."""
    model = Scanned(0)
    site = "blocks/Dense_0"
    morph = planted(model, 1)
    blending = esper_jax.advance(morph, site)
    assert blending.state[site].stage[:, 0].tolist() == [0, Stage.BLENDING, 0]
    with pytest.raises(ValueError, match=r"slot 0: DORMANT > PRUNED"):
        esper_jax.prune(morph, site, layer=(0, 1))
    with pytest.raises(ValueError, match=r"has layers 0 to 2, got layer 3"):
        esper_jax.prune(morph, site, layer=3)
    with pytest.raises(ValueError, match=r"'Dense_0' is one layer, not a stack"):
        esper_jax.germinate(morph, "Dense_0", "lora", key=jax.random.key(0), layer=0)
    pruned = esper_jax.prune(esper_jax.germinate(morph, site, "lora", key=jax.random.key(0), layer=0), site, layer=1)
    assert pruned.state[site].stage[:, 0].tolist() == [Stage.GERMINATED, Stage.PRUNED, 0]
    for _ in range(8):
        pruned, _ = esper_jax.tick(pruned)
    assert pruned.state[site].stage[:, 0].tolist() == [Stage.TRAINING, Stage.DORMANT, 0]
    assert esper_jax.shed(pruned).spec.plants and not np.any(pruned.seeds[site]["slot_0"]["down"][1])
    assert not esper_jax.shed(esper_jax.unload(pruned, site)).spec.plants


@pytest.mark.parametrize("model", HOSTS, ids=repr)
def test_a_layers_broken_seed_is_bypassed_and_counted_there(model):
    """Contract 18."""
    morph, forward = planted(model, 1, stage=Stage.HOLDING), esper_jax.graft(model)
    site = SITES[type(model)]
    broken = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), morph.seeds[site]["slot_0"])
    morph = morph.replace(seeds={site: {"slot_0": broken}})
    state = esper_jax.TrainState.create(morph, esper_jax.growable(optax.sgd(0.1)), key=jax.random.key(0))
    step = esper_jax.make_train_step(forward, lambda y, t: jnp.square(y - t), optax.sgd(0.1), donate=False)
    for _ in range(3):
        state, metrics = step(state, (X, jnp.ones(())))
        assert all_finite(state.morph.host) and not metrics["skipped"]
    assert state.morph.state[site].faults[:, 0].tolist() == [0, 3, 0]
    assert state.morph.state[site].stage[:, 0].tolist() == [0, Stage.PRUNED, 0]


def test_a_layers_seed_is_stored_and_germinates_in_another_layer():
    """A stored seed is that of one layer, with that layer's own measurements."""
    model, site = Scanned(0), "blocks/Dense_0"
    morph = planted(model, 1, stage=Stage.HOLDING)
    with pytest.raises(ValueError, match=r"stack of 3 layers; say which one with layer="):
        esper_jax.seed_of(morph, site)
    stored = esper_jax.seed_of(morph, site, layer=1)
    assert stored.site.layers == 0 and stored.provenance["layer"] == 1
    again = esper_jax.germinate(morph, site, stored, layer=2)
    up = again.seeds[site]["slot_0"]["up"]
    assert np.array_equal(up[2], up[1]) and again.state[site].stage[2, 0] == Stage.GERMINATED


def test_contributions_are_measured_layer_by_layer():
    """Contract 24."""
    morph = planted(Scanned(0), 1, stage=Stage.HOLDING)
    forward = jax.jit(esper_jax.graft(Scanned(0)))
    found, noted = esper_jax.contributions(morph, lambda m: -jnp.mean(jnp.square(forward(m, X) - 1)))
    assert list(found) == [("blocks/Dense_0", 0, 1)] and found["blocks/Dense_0", 0, 1] != 0
    assert noted.state["blocks/Dense_0"].contribution[1, 0] == np.float32(found["blocks/Dense_0", 0, 1])
