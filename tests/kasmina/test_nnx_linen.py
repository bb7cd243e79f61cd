"""Linen modules inside nnx hosts: the same sites, seeds and updates as in Linen."""

import flax.linen as nn
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
from .pairs import IMAGE, LABELS, TEXT, LinenBlock, LinenCNN

LOSS = optax.softmax_cross_entropy_with_integer_labels


def pair(module, x, **streams):
    """The same variables twice: as a Linen variables dict, and in an nnx module."""
    held = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(params=0, **streams)).lazy_init(x)
    variables = nnx.bridge.variables.nnx_attrs_to_linen_vars(
        {name: value for name, value in vars(held).items() if not name.startswith(("to_nnx__", "_pytree__"))}
    )
    return variables, held


def described(morph):
    return [(site.path, site.kind, site.in_shape, site.out_shape, site.geometry) for site in morph.spec.sites]


@pytest.mark.parametrize(("module", "x"), [(LinenCNN(), IMAGE), (LinenBlock(), TEXT)], ids=["cnn", "block"])
def test_it_has_the_sites_of_the_linen_model(module, x):
    """By shapes and names alone as with the variables alone, and traced with an example as with model and example."""
    variables, held = pair(module, x)
    assert described(esper_jax.morph(held)) == described(esper_jax.morph(variables))
    traced = esper_jax.morph(held, example=x)
    assert described(traced) == described(esper_jax.morph(variables, model=module, example=x))
    assert all(site.traced for site in traced.spec.sites)


@pytest.mark.parametrize(("module", "x"), [(LinenCNN(), IMAGE), (LinenBlock(), TEXT)], ids=["cnn", "block"])
@pytest.mark.parametrize("stage", [None, Stage.TRAINING, Stage.BLENDING, Stage.FOSSILIZED])
def test_outputs_and_gradients_are_those_of_the_linen_model(module, x, stage):
    variables, held = pair(module, x)
    morphs = esper_jax.morph(variables, model=module, example=x), esper_jax.morph(held, example=x)
    forwards = esper_jax.graft(module), esper_jax.graft(held)
    found = []
    for morph, forward in zip(morphs, forwards, strict=True):
        if stage is not None:
            for site in [site for site in morph.spec.sites if site.kind in ("conv", "attention", "dense")][:3]:
                name = {"conv": "conv_small", "dense": "lora", "attention": "head_group"}[site.kind]
                morph = esper_jax.germinate(morph, site.path, name, key=jax.random.key(1))
            morph = in_stage(noisy(morph, 2), stage)

        def objective(params, morph=morph, forward=forward):
            return LOSS(forward(morph.with_params(params), x), LABELS[: len(x)]).mean()

        value, grads = jax.jit(jax.value_and_grad(objective))(morph.params)
        found.append((value, grads["host"], grads["seeds"]))
    assert equal_bits(found[0], found[1])


class Mixed(nnx.Module):
    """A Linen block between two layers of nnx's own, told in its own words whether it trains."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.block = nnx.bridge.ToNNX(LinenBlock(), rngs=rngs)
        self.last = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.block(self.first(x)))


def test_a_linen_module_inside_a_larger_nnx_model_is_grown_at_both_kinds_of_layers():
    model = nnx.bridge.lazy_init(Mixed(nnx.Rngs(0)), TEXT)
    morph = esper_jax.morph(model, example=TEXT)
    paths = {site.path: site.kind for site in morph.spec.sites}
    assert paths["first"] == "dense" and paths["block/Dense_0"] == "dense"
    assert paths["block/MultiHeadDotProductAttention_0"] == "attention"
    forward = esper_jax.graft(model)
    assert equal_bits(forward(morph, TEXT), model(TEXT))
    for site in ("first", "block/Dense_0"):
        morph = esper_jax.germinate(morph, site, "lora", key=jax.random.key(3))
    isolated = in_stage(noisy(morph, 4), Stage.TRAINING)
    assert equal_bits(jax.jit(forward)(isolated, TEXT), nnx.jit(lambda model: model(TEXT))(model))
    blended = in_stage(isolated, Stage.FOSSILIZED)
    whole = forward(blended, TEXT)
    assert not np.allclose(whole, model(TEXT), atol=1e-3)
    folded = esper_jax.fold(blended)
    assert not folded.spec.plants
    close = 1e-6 * float(np.abs(whole).max())  # entries are sums of terms as large as the largest
    np.testing.assert_allclose(forward(folded, TEXT), whole, rtol=1e-5, atol=close)
    nnx.update(model, esper_jax.unmorph(folded))
    np.testing.assert_allclose(model(TEXT), whole, rtol=1e-5, atol=close)


def test_the_users_module_is_as_it_was_and_one_without_seeds_is_told_too_whether_it_trains():
    """Statistics and dropout inside the Linen module follow `train`, as those of nnx layers do."""
    _, held = pair(LinenCNN(), IMAGE)
    before = nnx.graphdef(held), type(held)
    morph = esper_jax.morph(held)
    forward = esper_jax.graft(held, updates=True)
    _, state = jax.jit(lambda morph: forward(morph, IMAGE, **forward.mode(True)))(morph)
    _, still = jax.jit(lambda morph: forward(morph, IMAGE, **forward.mode(False)))(morph)
    assert np.any(state["BatchNorm_0"]["mean"].get_value()) and not np.any(still["BatchNorm_0"]["mean"].get_value())
    assert (nnx.graphdef(held), type(held)) == before and not np.any(held.BatchNorm_0["mean"].get_value())
    assert jax.tree.structure(state) == jax.tree.structure(nnx.state(held))


def test_it_trains_and_grows_in_tolaria():
    _, held = pair(LinenBlock(), TEXT, dropout=1)
    run = esper_jax.Tolaria(held, LOSS, optax.adam(1e-2), controller=None)
    state = run.init(held, key=jax.random.key(0), example=TEXT)
    grown = esper_jax.germinate(state.morph, "Dense_0", "lora", key=jax.random.key(1))
    state = run.init(grown, key=jax.random.key(0))
    data = np.asarray(TEXT), np.asarray(LABELS[: len(TEXT)])
    after, history = run.fit(state, data, data, epochs=3)
    assert history["train_loss"][-1] < history["train_loss"][0]
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.morph.seeds, after.morph.seeds)
    assert all(jax.tree.leaves(moved["Dense_0"]))
    counts = jax.tree.leaves(after.morph.host["rng_count"])
    assert any(int(count) > 1 for count in counts), "a fresh mask every step"


class Stacked(nnx.Module):
    """Two Linen modules as one, scanned by nnx."""

    def __init__(self, x):
        made = nnx.vmap(lambda key: nnx.bridge.ToNNX(nn.Dense(4), rngs=nnx.Rngs(params=key)).lazy_init(x))
        self.layers = made(jax.random.split(jax.random.key(0), 2))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_seeds_in_a_linen_module_that_nnx_scans_are_refused_by_name():
    model = Stacked(TEXT)
    morph = esper_jax.germinate(esper_jax.morph(model), "layers", "lora", layer=0, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"layers: a Dense under nnx.scan or nnx.vmap cannot carry seeds"):
        esper_jax.graft(model)(morph, TEXT)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=deterministic)(x))


class Says(nnx.Module):
    """It gives the mode by position itself."""

    def __init__(self, rngs):
        self.inner = nnx.bridge.ToNNX(Inner(), rngs=rngs)

    def __call__(self, x):
        return self.inner(x, True)


def test_a_mode_that_the_model_itself_gives_stands_and_a_wrong_example_is_an_error_that_names_it():
    model = nnx.bridge.lazy_init(Says(nnx.Rngs(0)), TEXT)
    forward = esper_jax.graft(model)
    morph = esper_jax.morph(model, example=TEXT)
    assert equal_bits(forward(morph, TEXT, **forward.mode(True)), model(TEXT))
    with pytest.raises(ValueError, match=r"Says cannot be traced on example= \(\(2, 9\)\)"):
        esper_jax.morph(model, example=jnp.ones((2, 9)))
