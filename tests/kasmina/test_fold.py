"""Folding: fossils become part of the host's weights (contract 20)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.summary import flops

from .hosts import in_stage, noisy

X = jax.random.normal(jax.random.key(1), (4, 6, 4))
IMAGE = jax.random.normal(jax.random.key(2), (3, 7, 6, 4))
IDS = jnp.arange(12).reshape(3, 4) % 7
LAYERS = {
    "dense": (nn.Dense(3), X),
    "dense without bias": (nn.Dense(3, use_bias=False), X),
    "dense_general": (nn.DenseGeneral((2, 3), axis=(-2, -1)), X),
    "dense_general over axis 1": (nn.DenseGeneral(5, axis=1), X),
    "einsum": (nn.Einsum((4, 2, 3), "...i,iho->...ho"), X),
    "einsum with its outputs first": (nn.Einsum((5, 4), "bti,oi->bto"), X),
    "conv": (nn.Conv(5, (3, 3)), IMAGE),
    "conv of rank 1": (nn.Conv(3, (3,)), X),
    "conv of rank 3": (nn.Conv(2, (2, 2, 2)), IMAGE[..., None]),
    "conv strided, dilated, valid": (
        nn.Conv(4, (2, 3), strides=(2, 1), kernel_dilation=(1, 2), padding="VALID"),
        IMAGE,
    ),
    "conv strided, same": (nn.Conv(4, (3, 3), strides=2), IMAGE),
    "conv circular": (nn.Conv(4, (3, 3), padding="CIRCULAR", kernel_dilation=2), IMAGE),
    "conv reflect": (nn.Conv(4, (3, 3), padding="REFLECT"), IMAGE),
    "conv causal": (nn.Conv(4, (3,), padding="CAUSAL"), X),
    "conv with explicit padding": (nn.Conv(4, (3, 3), padding=((2, 1), (0, 1))), IMAGE),
    "conv in groups": (nn.Conv(6, (3, 3), feature_group_count=2), IMAGE),
    "depthwise conv": (nn.Conv(8, (3, 3), feature_group_count=4), IMAGE),
    "conv with input dilation": (nn.Conv(4, (3, 3), input_dilation=2, padding=((1, 2), (2, 0))), IMAGE),
    "conv_transpose": (nn.ConvTranspose(5, (3, 3), strides=(2, 2)), IMAGE),
    "conv_transpose, valid": (nn.ConvTranspose(5, (2, 3), padding="VALID"), IMAGE),
    "embed": (nn.Embed(7, 5), IDS),
    "layer_norm": (nn.LayerNorm(), X),
    "rms_norm": (nn.RMSNorm(), X),
    "group_norm": (nn.GroupNorm(2), X),
    "batch_norm": (nn.BatchNorm(use_running_average=True), IMAGE),
}
FEW = ("dense", "einsum", "conv", "conv in groups", "embed", "layer_norm")
CASES = [
    pytest.param(name, blueprint, marks=[] if name in FEW else pytest.mark.slow)
    for name in LAYERS
    for blueprint in ("lora", "affine")
    if not ("norm" in name and blueprint == "lora")
]


class Host(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return 2.0 * self.layer(x)


def made(layer, x):
    model = Host(layer)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    noise = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(3), leaf.shape, leaf.dtype)  # noqa: E731
    variables = {**variables, "params": jax.tree.map(noise, variables["params"])}
    return model, variables, esper_jax.morph(variables, where="layer$", model=model, example=x)


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


@pytest.mark.parametrize(("name", "blueprint"), CASES)
def test_a_folded_fossil_computes_the_same_for_the_hosts_own_price(name, blueprint):
    """Contract 20: logits within 1e-6 relative, FLOPs of the plain host; the form of the host is as it was."""
    layer, x = LAYERS[name]
    model, variables, morph = made(layer, x)
    config = {"bias": getattr(layer, "use_bias", True)} if blueprint == "affine" else {"rank": 2}
    morph = esper_jax.germinate(morph, "layer", blueprint, key=jax.random.key(1), **config)
    morph = in_stage(noisy(morph, 4), Stage.FOSSILIZED)
    forward = esper_jax.graft(model)
    grown = compiled(forward, morph, x)(morph, x)
    folded = esper_jax.fold(morph)
    assert folded.spec.plants == () and not folded.seeds
    plain = compiled(model.apply, variables, x)
    program = compiled(forward, folded, x)
    output = np.float64(program(folded, x))
    assert np.max(np.abs(output - np.float64(grown))) <= 1e-6 * np.max(np.abs(output))
    assert np.max(np.abs(output - np.float64(plain(variables, x)))) > 1e-3
    assert flops(program) == flops(plain)
    alike = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), folded.host, variables)
    assert all(jax.tree.leaves(alike)) and type(folded.host) is type(variables)
    if "batch_stats" in variables:
        assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, folded.host["batch_stats"], variables["batch_stats"])))


def test_layers_of_a_stack_fold_each_by_its_own_stage():
    """A fossil in layer 1 is merged there; the seed on trial in layer 2 stays, and so does its slot."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(4)(jnp.sin(x)), None

    class Deep(nn.Module):
        axis: int

        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
            return blocks(name="blocks")(x, None)[0]

    for axis in (0, -1):
        model = Deep(axis)
        variables = jax.jit(model.init)(jax.random.key(0), X)
        morph = esper_jax.morph(variables, model=model, example=X)
        site = "blocks/Dense_0"
        morph = noisy(esper_jax.germinate(morph, site, "lora", key=jax.random.key(0), rank=2), 1)
        life = morph.state[site]
        stages = jnp.array([Stage.DORMANT, Stage.FOSSILIZED, Stage.BLENDING])
        life = life.replace(
            stage=life.stage.at[:, 0].set(stages), alpha=life.alpha.at[:, 0].set(jnp.array([0.0, 1.0, 0.4]))
        )
        morph = morph.replace(state={site: life})
        forward = jax.jit(esper_jax.graft(model))
        folded = esper_jax.fold(morph)
        np.testing.assert_allclose(forward(folded, X), forward(morph, X), rtol=1e-6, atol=1e-6)
        assert folded.state[site].stage[:, 0].tolist() == [0, 0, Stage.BLENDING] and folded.spec == morph.spec
        kernel = jnp.moveaxis(folded.variables["params"]["blocks"]["Dense_0"]["kernel"], axis, 0)
        old = jnp.moveaxis(variables["params"]["blocks"]["Dense_0"]["kernel"], axis, 0)
        assert [bool(jnp.array_equal(a, b)) for a, b in zip(kernel, old, strict=True)] == [True, False, True]


def two(first, second, blend="add", blend2="add", stages=(Stage.FOSSILIZED, Stage.FOSSILIZED)):
    model, _, morph = made(nn.Dense(4), X)
    small = {"lora": {"rank": 2}, "mlp": {"hidden": 3}}
    for slot, (name, how) in enumerate(((first, blend), (second, blend2))):
        key = jax.random.key(slot)
        morph = esper_jax.germinate(morph, "layer", name, key=key, blend=how, **small.get(name, {}))
    return model, in_stage(noisy(morph, 1), {("layer", i): (s, 1.0) for i, s in enumerate(stages)})


@pytest.mark.parametrize("pair", [("lora", "lora"), ("lora", "affine"), ("affine", "lora"), ("affine", "affine")])
def test_seeds_after_each_other_fold_in_their_order(pair):
    """A residual seed reads what the slots before it left."""
    model, morph = two(*pair)
    forward = esper_jax.graft(model)
    folded = esper_jax.fold(morph)
    assert not folded.spec.plants
    np.testing.assert_allclose(forward(folded, X), forward(morph, X), rtol=2e-6, atol=2e-6)


def test_what_would_not_be_exact_is_left_and_named():
    """Non-linear seeds, gates, and what comes after them."""
    model, morph = two("mlp", "affine")
    found = esper_jax.foldable(morph)
    assert found == {("layer", 0): "mlp is not linear", ("layer", 1): "slot 0 comes before it and is not folded"}
    with pytest.warns(UserWarning, match="left 2 fossil.*mlp is not linear.*compact"):
        assert esper_jax.fold(morph).spec == morph.spec
    with pytest.raises(ValueError, match="mlp is not linear"):
        esper_jax.fold(morph, strict=True)
    model, morph = two("mlp", "lora")
    with pytest.warns(UserWarning, match="left 1 fossil"):
        folded = esper_jax.fold(morph)
    forward = esper_jax.graft(model)
    assert [plant.blueprint for plant in folded.spec.plants] == ["mlp"]
    np.testing.assert_allclose(forward(folded, X), forward(morph, X), rtol=2e-6, atol=2e-6)
    _, morph = two("lora", "lora", "gate", "multiply")
    assert all("depends on the input" in why for why in esper_jax.foldable(morph).values())
    _, morph = two("lora", "norm")
    assert esper_jax.foldable(morph)["layer", 1] == "norm is not linear"
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, morph.seeds)
    assert esper_jax.foldable(morph.replace(seeds=broken))["layer", 0] == "its parameters are not finite"


def test_lerp_takes_the_layers_place():
    """`h + a (f - h)`: the layer's weights shrink as the seed's enter."""
    for alpha in (0.3, 1.0):
        model, morph = two("lora", "lora", "lerp")
        morph = in_stage(morph, {("layer", 0): (Stage.FOSSILIZED, alpha), ("layer", 1): (Stage.DORMANT, 0.0)})
        folded = esper_jax.fold(morph)
        forward = esper_jax.graft(model)
        np.testing.assert_allclose(forward(folded, X), forward(morph, X), rtol=2e-6, atol=2e-6)
        assert not folded.spec.plants


def test_seeds_on_trial_and_their_optimizer_are_left_alone():
    """Folding one seed keeps the other's parameters, state and moments, and the host's moments; the free slot grows."""
    _, morph = two("lora", "mlp", stages=(Stage.FOSSILIZED, Stage.TRAINING))
    tx = esper_jax.growable(optax.adam(1e-2))
    step = jax.jit(lambda g, s, m: tx.step(g, s, m))
    params, state = step(jax.tree.map(jnp.ones_like, morph.params), tx.init(morph), morph)
    morph = morph.with_params(params)
    folded = esper_jax.fold(morph, "layer", 0)
    after = tx.grow(state, folded)
    assert [plant.slot for plant in folded.spec.plants] == [1]
    same = lambda a, b: all(jax.tree.leaves(jax.tree.map(jnp.array_equal, a, b)))  # noqa: E731
    assert same(folded.seeds["layer"]["slot_1"], morph.seeds["layer"]["slot_1"])
    assert same(after.host, state.host) and same(after.seeds["layer"]["slot_1"], state.seeds["layer"]["slot_1"])
    again = esper_jax.germinate(folded, "layer", "lora", key=jax.random.key(9), slot=0)
    assert again.state["layer"].generation[0] == 2
    with pytest.raises(ValueError, match="slot 1 holds no fossil"):
        esper_jax.fold(morph, "layer", 1)
    with pytest.raises(KeyError, match="unknown site 'nowhere'"):
        esper_jax.fold(morph, "nowhere")


def test_a_resident_fossil_rests_after_folding_and_nothing_recompiles():
    """Planted ahead: the spec stays, the slot is dormant again."""
    model, variables, _ = made(nn.Dense(4), X)
    morph = esper_jax.morph(variables, where="layer$", planted={"lora": {"rank": 2}}, model=model, example=X)
    morph = in_stage(noisy(morph, 1), Stage.FOSSILIZED)
    forward = jax.jit(esper_jax.graft(model))
    grown = forward(morph, X)
    folded = esper_jax.fold(morph)
    np.testing.assert_allclose(forward(folded, X), grown, rtol=2e-6, atol=2e-6)
    assert folded.spec == morph.spec and forward._cache_size() == 1
    assert folded.state["layer"].stage.tolist()[0] == Stage.DORMANT and not np.any(
        folded.seeds["layer"]["slot_0"]["up"]
    )


def test_unmorph_after_a_fold_gives_plain_variables_that_compute_what_was_grown():
    """Without a warning; bare params stay bare params, bfloat16 stays bfloat16 within its rounding."""
    model, morph = two("lora", "affine")
    grown = esper_jax.graft(model)(morph, X)
    np.testing.assert_allclose(model.apply(esper_jax.unmorph(esper_jax.fold(morph)), X), grown, rtol=2e-6, atol=2e-6)
    bare = morph.replace(host=morph.host["params"])
    assert set(esper_jax.unmorph(esper_jax.fold(bare))) == {"layer"}
    half = nn.Dense(4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model, _, morph = made(half, X.astype(jnp.bfloat16))
    morph = esper_jax.germinate(morph, "layer", "lora", key=jax.random.key(0), rank=2)
    morph = in_stage(noisy(morph, 1), Stage.FOSSILIZED)
    folded = esper_jax.fold(morph)
    assert folded.variables["params"]["layer"]["kernel"].dtype == jnp.bfloat16
    outputs = [np.float32(esper_jax.graft(model)(m, X.astype(jnp.bfloat16))) for m in (morph, folded)]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=2**-5)


def test_tied_tables_and_untraced_convolutions_say_why_they_cannot():
    """`attend` reads the table itself; a convolution's strides are no shape."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            table = nn.Embed(7, 4, name="layer")
            return table.attend(table(ids))

    model = Tied()
    variables = jax.jit(model.init)(jax.random.key(0), IDS)
    morph = esper_jax.morph(variables, model=model, example=IDS)
    morph = in_stage(noisy(esper_jax.germinate(morph, "layer", "lora", key=jax.random.key(0)), 1), Stage.FOSSILIZED)
    assert "attend" in esper_jax.foldable(morph)["layer", 0]
    conv, image = nn.Conv(4, (3, 3)), IMAGE
    variables = Host(conv).init(jax.random.key(0), image)
    with pytest.raises(ValueError, match="model= and example="):
        esper_jax.germinate(esper_jax.morph(variables), "layer", "lora", key=jax.random.key(0))


def test_a_model_that_reads_the_weights_elsewhere_is_found_out_by_trying():
    """An untraced tied table looks like any other; with `model=` and `example=` the fold is left."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            table = nn.Embed(7, 4, name="layer")
            return nn.Dense(7, name="last")(table(ids)) + table.attend(table(ids))

    model = Tied()
    variables = jax.jit(model.init)(jax.random.key(0), IDS)
    morph = esper_jax.morph(variables)
    for site in ("layer", "last"):
        morph = esper_jax.germinate(morph, site, "lora", key=jax.random.key(0), rank=2)
    morph = in_stage(noisy(morph, 1), Stage.FOSSILIZED)
    with pytest.warns(UserWarning, match="layer slot 0: the model's output is another one afterwards"):
        folded = esper_jax.fold(morph, model=model, example=IDS)
    assert [plant.site for plant in folded.spec.plants] == ["layer"]
    forward = esper_jax.graft(model)
    np.testing.assert_allclose(forward(folded, IDS), forward(morph, IDS), rtol=1e-5, atol=1e-5)
