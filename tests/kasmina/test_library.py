"""The library of blueprints: zero at birth, learning where they fit, and their prices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.blueprints import registered
from esper_jax.kasmina.summary import equal_bits

from .hosts import in_stage, noisy

X = jax.random.normal(jax.random.key(1), (3, 6, 4))
IMAGE = jax.random.normal(jax.random.key(2), (2, 6, 5, 4))
IDS = jnp.arange(12).reshape(3, 4) % 7
LAYERS = {
    "dense": (nn.Dense(5), X),
    "einsum": (nn.Einsum((4, 2, 3), "...i,iho->...ho"), X),
    "conv": (nn.Conv(8, (3, 3)), IMAGE),
    "conv_transpose": (nn.ConvTranspose(8, (3, 3), strides=(2, 2)), IMAGE),
    "embed": (nn.Embed(7, 5), IDS),
    "attention": (nn.MultiHeadDotProductAttention(2), X),
    "layer_norm": (nn.LayerNorm(), X),
    "rms_norm": (nn.RMSNorm(), X),
    "group_norm": (nn.GroupNorm(2), X),
    "batch_norm": (nn.BatchNorm(use_running_average=True), IMAGE),
}
OWN = (
    *("affine", "bottleneck", "causal_conv", "conv_heavy", "conv_light", "conv_small", "depthwise"),
    *("glu", "head_group", "linear", "lora", "mlp", "norm", "se"),
)


class Host(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return jnp.sin(1.1 * self.layer(x))


@pytest.mark.parametrize(
    ("kind", "resident"),
    [pytest.param(kind, False, id=f"{kind}-lean") for kind in LAYERS]
    + [
        pytest.param(kind, True, id=f"{kind}-planted", marks=pytest.mark.slow)
        for kind in ("dense", "conv", "embed", "attention", "layer_norm")
    ],
)
def test_every_blueprint_that_fits_is_born_silent_and_learns(kind, resident):
    """At alpha 1 a fresh seed changes nothing; in TRAINING it has a gradient and the host its own, to the bit."""
    layer, x = LAYERS[kind]
    model = Host(layer)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    sites = {"where": "layer$", "model": model, "example": x}
    names = [
        b.name for b in registered() if b.name in OWN and b.fits(esper_jax.morph(variables, **sites).spec.sites[0])
    ]
    assert len(names) >= 2
    planted = {name: {} for name in names} if resident else None
    morph = esper_jax.morph(variables, slots=len(names), planted=planted, **sites)
    for slot, name in enumerate(names):
        morph = esper_jax.germinate(morph, "layer", name, key=jax.random.key(slot))
    forward = esper_jax.graft(model)

    @jax.jit
    def step(morph):
        def loss(params):
            outputs = forward(morph.with_params(params), x)
            return jnp.sum(outputs**2), outputs

        (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(morph.params)
        return (outputs, grads["host"]), grads["seeds"]["layer"]

    silent, _ = step(in_stage(morph, Stage.GERMINATED))
    born, _ = step(in_stage(morph, Stage.HOLDING))
    np.testing.assert_allclose(born[0], silent[0], atol=1e-6)
    training, learns = step(in_stage(noisy(morph, 2), Stage.TRAINING))
    assert equal_bits(training, silent)
    for slot, name in enumerate(names):
        assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(learns[f"slot_{slot}"])), name
    blended, _ = step(in_stage(noisy(morph, 2), Stage.HOLDING))
    assert not np.allclose(blended[0], silent[0], atol=1e-3) and np.all(np.isfinite(blended[0]))


def test_a_blueprint_that_cannot_sit_there_says_what_can():
    """By name and kind."""
    model = Host(nn.RMSNorm())
    morph = esper_jax.morph(jax.jit(model.init)(jax.random.key(0), X))
    with pytest.raises(ValueError, match=r"'conv_heavy' is made for conv, conv_transpose; site 'layer' is rms_norm"):
        esper_jax.germinate(morph, "layer", "conv_heavy", key=jax.random.key(0))


@pytest.mark.parametrize("cross", [False, True])
def test_a_head_group_attends_over_the_same_keys_values_and_mask(cross):
    """Against attention written out; a masked key has no influence."""

    class Reader(nn.Module):
        @nn.compact
        def __call__(self, x, memory, mask):
            keys = memory if cross else None
            return nn.MultiHeadDotProductAttention(2, name="attend")(x, keys, mask=mask)

    model, memory = Reader(), jax.random.normal(jax.random.key(3), (3, 5, 7))
    length = 5 if cross else 6
    mask = jnp.ones((3, 1, 6, length), bool).at[..., 1].set(False)
    variables = jax.jit(model.init)(jax.random.key(0), X, memory, mask)
    morph = esper_jax.morph(variables, model=model, example=(X, memory, mask))
    morph = esper_jax.germinate(morph, "attend", "head_group", key=jax.random.key(1), heads=2, width=3)
    morph = in_stage(noisy(morph, 1), Stage.HOLDING)
    forward = esper_jax.graft(model)
    seed = morph.seeds["attend"]["slot_0"]
    source = memory if cross else X
    q, k, v = (
        jnp.einsum("nti,ihw->nthw", u, seed[name]) for name, u in (("query", X), ("key", source), ("value", source))
    )
    weights = jnp.einsum("nqhw,nkhw->nhqk", q, k) / jnp.sqrt(3.0)
    weights = jax.nn.softmax(jnp.where(mask, weights, -1e30))
    extra = jnp.einsum("nhqk,nkhw,hwo->nqo", weights, v, seed["out"])
    expected = model.apply(variables, X, memory, mask) + extra
    np.testing.assert_allclose(forward(morph, X, memory, mask), expected, rtol=1e-4, atol=1e-5)
    if cross:
        moved = memory.at[:, 1].add(9.0)
        np.testing.assert_allclose(forward(morph, X, moved, mask), expected, rtol=1e-4, atol=1e-5)


def test_a_causal_conv_sees_no_later_place():
    """A change at place 3 reaches places 3 and after."""
    model = Host(nn.LayerNorm())
    variables = jax.jit(model.init)(jax.random.key(0), X)
    morph = esper_jax.germinate(esper_jax.morph(variables), "layer", "causal_conv", key=jax.random.key(0), kernel=3)
    morph = in_stage(noisy(morph, 1), Stage.HOLDING)
    forward = esper_jax.graft(model)
    changed = np.any(np.asarray(forward(morph, X) != forward(morph, X.at[:, 3].add(1.0))), axis=(0, 2))
    assert changed.tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize("name", ["lora on the query", "lora on the output"])
def test_lora_grows_inside_attention_and_folds(name):
    """The projections are sites of their own."""
    path = {"lora on the query": "layer/query", "lora on the output": "layer/out"}[name]
    model = Host(nn.MultiHeadDotProductAttention(2))
    variables = jax.jit(model.init)(jax.random.key(0), X)
    morph = esper_jax.morph(variables, model=model, example=X)
    morph = in_stage(
        noisy(esper_jax.germinate(morph, path, "lora", key=jax.random.key(0), rank=2), 1), Stage.FOSSILIZED
    )
    folded = esper_jax.fold(morph)
    assert not folded.spec.plants
    forward = esper_jax.graft(model)
    np.testing.assert_allclose(forward(folded, X), forward(morph, X), rtol=1e-5, atol=1e-5)
    assert not np.allclose(forward(morph, X), model.apply(variables, X), atol=1e-3)


def test_the_table_counts_parameters_and_flops_at_a_site_too():
    """Of those that fit it only."""
    morph = esper_jax.morph({"Dense_0": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}})
    lines = {line.split()[0]: line for line in esper_jax.blueprints(morph.spec.by_path["Dense_0"]).splitlines()}
    assert "conv_light" not in lines and f"  {8 * 4 + 8 * 3}  " in lines["lora"]
    assert "yes" in lines["lora"] and "  no  " in lines["mlp"]
    whole = {line.split()[0]: line for line in esper_jax.blueprints().splitlines()}
    assert "not here" not in "".join(whole.values()) and {"glu", "head_group", "units", "linear"} <= set(whole)
