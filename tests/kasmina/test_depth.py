"""Depth growth: a scanned host from L to 2L layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import Stage

X = jax.random.normal(jax.random.key(1), (4, 5, 6))


class Block(nn.Module):
    residual: bool = True

    @nn.compact
    def __call__(self, x, _):
        x = x * self.residual + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        h = nn.Dense(7, name="up")(nn.LayerNorm()(x))
        h = nn.BatchNorm(use_running_average=True)(h)
        return x * self.residual + nn.Dense(6, name="down")(nn.gelu(h)), None


class Deep(nn.Module):
    depth: int = 2
    axis: int = 0
    residual: bool = True

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            Block,
            variable_axes={"params": self.axis, "batch_stats": self.axis},
            split_rngs={"params": True},
            length=self.depth,
        )
        return nn.Dense(2)(blocks(self.residual, name="blocks")(x, None)[0])


def made(model):
    variables = jax.jit(model.init)(jax.random.key(0), X)
    noise = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape)  # noqa: E731
    variables = {**variables, "params": jax.tree.map(noise, variables["params"])}
    return variables, esper_jax.morph(variables, model=model, example=X)


@pytest.mark.parametrize("axis", [0, -1])
def test_identity_order_computes_what_the_shallow_host_did(axis):
    """The layers at zero are found by trying, and are the last before each sum."""
    model = Deep(2, axis)
    variables, morph = made(model)
    deepened = esper_jax.stack(morph, model=model, example=X)
    assert deepened.zeroed == ("blocks/MultiHeadDotProductAttention_0/out", "blocks/down")
    deeper = jax.jit(esper_jax.graft(model.clone(depth=4)))
    np.testing.assert_allclose(deeper(deepened.morph, X), jax.jit(model.apply)(variables, X), rtol=1e-5, atol=1e-6)
    wave = lambda params: jnp.sum(jnp.sin(deeper(deepened.morph.with_params(params), X)))  # noqa: E731
    grads = jax.jit(jax.grad(wave))(deepened.morph.params)
    down = jnp.moveaxis(grads["host"]["blocks"]["down"]["kernel"], axis, 0)
    assert all(bool(jnp.any(row)) for row in down)
    assert {site.layers for site in deepened.morph.spec.sites} == {0, 4}


@pytest.mark.parametrize(("order", "rows"), [("copy", (0, 0, 1, 1)), ("g_stack", (0, 1, 0, 1))])
def test_copies_lie_as_their_order_says(order, rows):
    """Params and statistics alike."""
    variables, morph = made(Deep())
    deeper = esper_jax.stack(morph, order).morph.variables
    for name in ("params", "batch_stats"):
        old, new = variables[name]["blocks"], deeper[name]["blocks"]
        same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a[jnp.array(rows)], b)), old, new)
        assert all(jax.tree.leaves(same))
    assert jnp.array_equal(deeper["params"]["Dense_0"]["kernel"], variables["params"]["Dense_0"]["kernel"])


def test_the_optimizer_goes_on_and_an_added_layer_has_no_past():
    """Moments of the old layers stay to the bit, those of added ones are zero, counts go on; seeds come along."""
    model = Deep()
    _, morph = made(model)
    for layer in (0, 1):
        morph = esper_jax.germinate(morph, "blocks/down", "lora", key=jax.random.key(layer), rank=2, layer=layer)
    kept = morph.state["blocks/down"]
    stages = jnp.array([Stage.FOSSILIZED, Stage.TRAINING])
    kept = kept.replace(stage=kept.stage.at[:, 0].set(stages), alpha=kept.alpha.at[0, 0].set(1.0))
    morph = morph.replace(state={"blocks/down": kept})
    tx = esper_jax.growable(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
    step = jax.jit(lambda g, s, m: tx.step(g, s, m))
    grads = jax.tree.map(lambda leaf: jnp.ones_like(leaf), morph.params)
    params, state = step(grads, tx.init(morph), morph)
    morph = morph.with_params(params)

    deepened = esper_jax.stack(morph, "g_stack")
    grown = tx.deepen(state, deepened)
    mu, old = grown.host[1][0].mu["blocks"]["down"]["kernel"], state.host[1][0].mu["blocks"]["down"]["kernel"]
    assert jnp.array_equal(mu[:2], old) and not jnp.any(mu[2:]) and jnp.any(old)
    assert grown.host[1][0].count == 1
    life = deepened.morph.state["blocks/down"]
    assert life.stage[:, 0].tolist() == [Stage.FOSSILIZED, Stage.TRAINING, Stage.FOSSILIZED, Stage.DORMANT]
    forward = esper_jax.graft(model.clone(depth=4))
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(forward(deepened.morph.with_params(p), X))))(deepened.morph.params)
    params, after = step(grads, grown, deepened.morph)
    assert jax.tree.structure(params) == jax.tree.structure(deepened.morph.params)
    assert after.host[1][0].count == 2


def test_what_cannot_be_deepened_says_why():
    """Each in a sentence."""
    model = Deep(residual=False)
    _, morph = made(model)
    with pytest.raises(ValueError, match=r"needs zero=, or model= and example="):
        esper_jax.stack(morph)
    with pytest.raises(ValueError, match=r"Are its layers residual\?"):
        esper_jax.stack(morph, model=model, example=X)
    with pytest.raises(ValueError, match=r"unknown order 'twice'"):
        esper_jax.stack(morph, "twice")
    with pytest.raises(ValueError, match=r"admits none of the stack's layers"):
        esper_jax.stack(morph, zero="nothing")
    flat = esper_jax.morph({"Dense_0": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match=r"found no stacked layers.*stacked sites: none"):
        esper_jax.stack(flat)
