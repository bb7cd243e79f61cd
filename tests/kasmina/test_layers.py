"""Seeds at every kind of layer, in the layouts that Flax allows."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.summary import equal_bits

from .hosts import BLENDS, CNN, all_finite, fitting, in_stage, noisy

X = jax.random.normal(jax.random.key(1), (2, 6, 4))
IMAGE = jax.random.normal(jax.random.key(2), (2, 6, 5, 4))
LAYERS = {
    "dense": (nn.Dense(3), X),
    "dense without bias, one row": (nn.Dense(3, use_bias=False), X[0, 0]),
    "dense_general to heads": (nn.DenseGeneral((2, 3)), X),
    "dense_general over two axes": (nn.DenseGeneral(5, axis=(-2, -1)), X),
    "dense_general over axis 1": (nn.DenseGeneral((2, 2), axis=1), X),
    "dense_general over axes given as positive": (nn.DenseGeneral(3, axis=(1, 2)), X),
    "conv": (nn.Conv(3, (3, 3)), IMAGE),
    "conv unbatched": (nn.Conv(3, (3, 3)), IMAGE[0]),
    "conv with two batch axes": (nn.Conv(3, (3,)), IMAGE),
    "conv strided, dilated, circular": (nn.Conv(4, (3, 3), strides=2, kernel_dilation=2, padding="CIRCULAR"), IMAGE),
    "conv grouped, valid": (nn.Conv(4, (3, 2), feature_group_count=2, padding="VALID"), IMAGE),
    "conv of rank 1": (nn.Conv(3, (3,)), X),
    "conv of rank 3": (nn.Conv(2, (2, 2, 2)), IMAGE[..., None]),
    "attention": (nn.MultiHeadDotProductAttention(num_heads=2, out_features=6), X),
    "layer_norm": (nn.LayerNorm(), X),
    "layer_norm without bias": (nn.LayerNorm(use_bias=False), X),
    "batch_norm": (nn.BatchNorm(use_running_average=True), IMAGE),
    "bf16 parameters": (nn.Dense(3, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), X.astype(jnp.bfloat16)),
    "bf16 computation": (nn.Conv(3, (3, 3), dtype=jnp.bfloat16), IMAGE),
    "integers": (nn.Dense(3), jnp.arange(8).reshape(2, 4)),
    "bytes": (nn.Conv(3, (3, 3)), (IMAGE * 10).astype(jnp.uint8)),
}


class Inside(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.layer(x) * 1


@pytest.mark.parametrize("name", LAYERS)
def test_every_fitting_blueprint_grows_at_the_layer(name):
    """Contract 5, 16, 17: silent bits, a gradient, a change once blended; all blueprints at once, in all blends.

    Two of the four for the further convolutions, to save compiling.
    """
    layer, x = LAYERS[name]
    model = Inside(layer)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    morph = esper_jax.morph(variables, model=model, example=x)
    (site,) = [site for site in morph.spec.sites if site.path == "layer"]
    names = fitting(site)[-2:] if name.startswith("conv ") else fitting(site)
    assert names
    morph = esper_jax.morph(variables, where="layer$", model=model, example=x, slots=len(names))
    for i, blueprint in enumerate(names):
        morph = esper_jax.germinate(morph, "layer", blueprint, key=jax.random.key(i), blend=BLENDS[i % 4])
    morph, forward = noisy(morph, 2), esper_jax.graft(model)

    @jax.jit
    def step(morph):
        def loss(seeds, host):
            out = forward(morph.with_params({"host": host, "seeds": seeds}), x)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(morph.seeds, morph.params["host"])
        return out, grads

    silent, (no_seeds, host_grads) = step(in_stage(morph, Stage.DORMANT))
    training, (seed_grads, still) = step(in_stage(morph, Stage.TRAINING))
    blended, _ = step(in_stage(morph, Stage.BLENDING, 0.5))
    bare = jax.jit(model.apply)(variables, x)
    assert silent.shape == bare.shape and silent.dtype == bare.dtype
    np.testing.assert_allclose(np.float32(silent), np.float32(bare), atol=1e-5)
    assert equal_bits((silent, host_grads), (training, still))
    assert not equal_bits(silent, blended) and all_finite(blended)
    assert not any(np.any(np.asarray(g, np.float32)) for g in jax.tree.leaves(no_seeds))
    for key, grads in seed_grads["layer"].items():
        assert any(np.any(np.asarray(g, np.float32)) for g in jax.tree.leaves(grads)), (key, names)


def test_a_shared_layer_called_twice_uses_one_seed_twice():
    """Contract 17: both calls feed its gradient."""

    class Twice(nn.Module):
        def setup(self):
            self.layer = nn.Dense(4)

        def __call__(self, x):
            return self.layer(self.layer(x))

    model = Twice()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    morph = esper_jax.germinate(esper_jax.morph(variables), "layer", "lora", key=jax.random.key(0), rank=2)
    morph = in_stage(noisy(morph, 1), Stage.HOLDING)
    seed, host = morph.seeds["layer"]["slot_0"], variables["params"]["layer"]
    once = lambda u: u @ host["kernel"] + host["bias"] + u @ seed["down"] @ seed["up"]  # noqa: E731
    np.testing.assert_allclose(esper_jax.graft(model)(morph, X), once(once(X)), atol=1e-4)


def test_attention_keeps_its_masks_keys_and_dropout():
    """Arguments of the layer pass through; the seed stands beside its output."""

    class Reader(nn.Module):
        @nn.compact
        def __call__(self, x, memory, mask):
            return nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.5, deterministic=False)(
                x, memory, mask=mask
            )

    model, memory = Reader(), X[:, :3]
    mask = jnp.asarray([True, False, True])[None, None, None].repeat(6, 2)
    rngs = {"dropout": jax.random.key(3)}
    variables = model.init({"params": jax.random.key(0), **rngs}, X, memory, mask)
    morph = esper_jax.morph(variables)
    assert {s.kind for s in morph.spec.sites} == {"attention", "dense_general"}
    morph = esper_jax.germinate(morph, "MultiHeadDotProductAttention_0", "mlp", key=jax.random.key(0), hidden=3)
    morph = in_stage(morph, Stage.TRAINING)
    forward = esper_jax.graft(model)
    bare = model.apply(variables, X, memory, mask, rngs=rngs)
    np.testing.assert_allclose(forward(morph, X, memory, mask, rngs=rngs), bare, atol=1e-6)
    assert not equal_bits(bare, model.apply(variables, X, memory, mask, rngs={"dropout": jax.random.key(4)}))


def test_a_jitted_or_partial_apply_can_be_grafted_and_called_again_without_a_false_warning():
    """The second call of a jitted apply comes from its cache; the seeds are in it."""
    model = nn.Sequential([nn.Dense(3), nn.Dense(2)])
    variables = jax.jit(model.init)(jax.random.key(0), X)
    morph = esper_jax.germinate(esper_jax.morph(variables), "layers_0", "lora", key=jax.random.key(0))
    morph = in_stage(noisy(morph, 0), Stage.HOLDING)
    plain, jitted = esper_jax.graft(model)(morph, X), esper_jax.graft(jax.jit(model.apply))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            np.testing.assert_allclose(jitted(morph, X), plain, atol=1e-6)
    assert esper_jax.graft(jitted) is jitted


def test_a_seed_at_a_layer_that_is_never_called_says_so():
    """Rule 4 of the design."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x, use=False):
            unused = nn.Dense(2, name="unused")
            y = nn.Dense(3, name="used")(x)
            return unused(y) if use or self.is_initializing() else y

    model = Tied()
    morph = esper_jax.morph(model.init(jax.random.key(0), X))
    morph = esper_jax.germinate(morph, "unused", "lora", key=jax.random.key(0))
    with pytest.warns(UserWarning, match="seeds at unused have no effect"):
        esper_jax.graft(model)(morph, X)


def test_mutable_params_come_back_without_the_seeds():
    """`mutable=True` returns the host's own collections."""
    model = CNN()
    variables = jax.jit(model.init)(jax.random.key(0), IMAGE)
    morph = esper_jax.germinate(esper_jax.morph(variables), "Conv_0", "se", key=jax.random.key(0))
    _, updated = esper_jax.graft(model)(morph, IMAGE, mutable=True)
    assert jax.tree.structure(updated) == jax.tree.structure(dict(variables))


def test_a_population_in_different_stages_equals_each_member_alone():
    """Contract 6: `vmap` over stacked morphs; to 1e-5, batched products add in another order."""
    model = CNN()
    variables = jax.jit(model.init)(jax.random.key(0), IMAGE)
    planted = esper_jax.morph(variables, where="Conv_0|Dense", slots=2, planted=["se", "depthwise", "lora"])
    members = [
        in_stage(noisy(planted, i), s, a)
        for i, (s, a) in enumerate(
            [(Stage.DORMANT, None), (Stage.TRAINING, None), (Stage.HOLDING, None), (Stage.BLENDING, 0.4)]
        )
    ]
    forward = esper_jax.graft(model)

    def loss(params, morph):
        return jnp.sum(jnp.square(forward(morph.with_params(params), IMAGE, train=False)))

    run = lambda morph: jax.value_and_grad(loss)(morph.params, morph)  # noqa: E731
    single = jax.jit(run)
    alone = [single(member) for member in members]
    together = jax.jit(jax.vmap(run))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *members))
    for i, expected in enumerate(alone):
        for p, q in zip(jax.tree.leaves(together), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(p[i], q, rtol=2e-4, atol=1e-4)
