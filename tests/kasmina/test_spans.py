"""Spans: new hidden units between two layers, scored, grown, and folded into a wider model."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.summary import equal_bits, flops

from .hosts import HOSTS, host, in_stage, noisy
from .pairs import NnxMLP

LOSS = optax.softmax_cross_entropy_with_integer_labels
X = jax.random.normal(jax.random.key(1), (32, 4))
IMAGE = jax.random.normal(jax.random.key(2), (4, 7, 6, 3))
Y = jnp.arange(32) % 3


class MLP(nn.Module):
    widths: tuple[int, ...] = (6, 5)
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        for index, width in enumerate(self.widths):
            x = nn.gelu(nn.Dense(width, use_bias=self.bias, name=f"layer_{index}")(x))
        return nn.Dense(3, name="last")(x)


class CNN(nn.Module):
    channels: int = 4

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.channels, (3, 3), padding="VALID", name="a")(x)
        x = nn.silu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Conv(5, (3, 3), strides=2, name="b")(x)
        y = nn.relu(nn.Conv(4, (1, 1), name="c")(x))
        return nn.Conv(2, (1, 1), name="d")(y).mean((1, 2)) + y.mean((1, 2))[:, :2]


def made(model, x):
    variables = jax.jit(model.init)(jax.random.key(0), x)
    noise = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(3), leaf.shape)  # noqa: E731
    variables = jax.tree.map(noise, variables)
    if "batch_stats" in variables:
        variables = {**variables, "batch_stats": jax.tree.map(jnp.abs, variables["batch_stats"])}
    return variables, esper_jax.morph(variables, model=model, example=x)


def test_spans_are_found_with_what_stands_between():
    """Dense-act-Dense, Conv-norm-act-Conv; units that something else reads are not alone."""
    found = {s.ends: (s.activation, s.norm, s.alone) for s in esper_jax.spans(MLP(), made(MLP(), X)[1], X)}
    assert found == {("layer_0", "layer_1"): ("gelu", "", True), ("layer_1", "last"): ("gelu", "", True)}
    found = {s.ends: (s.activation, s.norm, s.alone) for s in esper_jax.spans(CNN(), made(CNN(), IMAGE)[1], IMAGE)}
    assert found[("a", "b")] == ("silu", "norm", True) and found[("c", "d")] == ("relu", "", False)
    given = host("transformer")
    morph = esper_jax.morph(given.variables, model=given.model, example=given.x)
    block = "CheckpointBlock_0"
    assert esper_jax.spans(given.model, morph, given.x)[0].ends == (f"{block}/Dense_0", f"{block}/Dense_1")
    model = NnxMLP(nnx.Rngs(0))
    assert esper_jax.spans(model, esper_jax.morph(model), X)[0].ends == ("first", "last")


@pytest.mark.parametrize("name", HOSTS)
def test_units_leave_the_host_to_the_bit_until_they_blend(name):
    """Contract 16 and 17 for a seed that reads another layer's input, under `nn.remat` too."""
    given = host(name)
    morph = esper_jax.morph(given.variables, model=given.model, example=given.x)
    span = esper_jax.spans(given.model, morph, given.x)[0]
    morph = esper_jax.germinate(morph, span=span.ends, blueprint="units", units=3, key=jax.random.key(0), **span.config)
    morph, forward = noisy(morph, 2), esper_jax.graft(given.model)

    @jax.jit
    def step(morph):
        loss = lambda p: given.loss(forward, morph.with_params(p), given.x)  # noqa: E731
        (value, (logits, updated)), grads = jax.value_and_grad(loss, has_aux=True)(morph.params)
        return (value, logits, updated, grads["host"]), grads["seeds"]

    silent, nothing = step(in_stage(morph, Stage.GERMINATED))
    training, learns = step(in_stage(morph, Stage.TRAINING))
    blended, _ = step(in_stage(morph, Stage.HOLDING))
    assert equal_bits(silent, training) and not equal_bits(silent[1], blended[1])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(learns))


@pytest.mark.parametrize("case", ["mlp", "mlp without bias", "cnn"])
def test_units_fold_into_a_wider_plain_model(case):
    """Logits within 1e-6 relative in evaluation mode, FLOPs of the wider host, a norm's statistics included."""
    model, x = {"mlp": (MLP(), X), "mlp without bias": (MLP(bias=False), X), "cnn": (CNN(), IMAGE)}[case]
    variables, morph = made(model, x)
    span = esper_jax.spans(model, morph, x)[0]
    bias = case == "mlp"
    config = {**span.config, "bias": bias} if case != "cnn" else span.config
    morph = esper_jax.germinate(morph, span=span.ends, blueprint="units", units=3, key=jax.random.key(0), **config)
    morph = in_stage(noisy(morph, 2), Stage.FOSSILIZED)
    folded = esper_jax.fold(morph)
    assert not folded.spec.plants
    sizes = esper_jax.sizes_changed(morph, folded)
    wider = esper_jax.widened(model, morph, folded, x)
    assert sizes[span.first] == (span.units, span.units + 3)
    expected = np.float64(jax.jit(esper_jax.graft(model))(morph, x))
    found = np.float64(jax.jit(wider.apply)(esper_jax.unmorph(folded), x))
    assert np.max(np.abs(found - expected)) <= 2e-6 * np.max(np.abs(expected))
    assert not np.allclose(expected, model.apply(variables, x), atol=1e-3)
    plain = jax.jit(wider.apply).lower(jax.jit(wider.init)(jax.random.key(0), x), x).compile()
    assert flops(jax.jit(wider.apply).lower(folded.variables, x).compile()) == flops(plain)


def test_folded_units_take_their_moments_along():
    """The next update is that of the wider model; everything else of the optimizer stays."""
    model = MLP()
    _, morph = made(model, X)
    ends = ("layer_0", "layer_1")
    morph = esper_jax.germinate(morph, span=ends, blueprint="units", units=2, activation="gelu", key=jax.random.key(0))
    morph = in_stage(noisy(morph, 1), Stage.FOSSILIZED)
    tx = esper_jax.growable(optax.adam(1e-2))
    step = jax.jit(lambda g, s, m: tx.step(g, s, m))
    forward = esper_jax.graft(model)

    @functools.partial(jax.jit, static_argnums=0)
    def loss(forward, morph):
        return jax.grad(lambda p: LOSS(forward(morph.with_params(p), X), Y).mean())(morph.params)

    state = tx.init(morph)
    for _ in range(3):
        params, state = step(loss(forward, morph), state, morph)
        morph = morph.with_params(params)
    folded = esper_jax.fold(morph)
    after = tx.fold(state, morph, folded)
    wider = esper_jax.graft(esper_jax.widened(model, morph, folded, X))
    assert jax.tree.map(jnp.shape, after.host[0].mu) == jax.tree.map(jnp.shape, folded.params["host"])
    params, state = step(loss(forward, morph), state, morph)
    expected = esper_jax.fold(morph.with_params(params)).params["host"]
    found, _ = step(loss(wider, folded), after, folded)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found["host"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_a_span_or_fold_says_why():
    """Each in a sentence."""
    model = MLP()
    _, morph = made(model, X)
    grow = lambda m, ends, **k: esper_jax.germinate(m, span=ends, blueprint="units", key=jax.random.key(0), **k)  # noqa: E731
    with pytest.raises(KeyError, match="unknown site 'nowhere'"):
        grow(morph, ("nowhere", "last"))
    with pytest.raises(TypeError, match="takes a pair of sites"):
        grow(morph, "layer_0")
    with pytest.raises(ValueError, match="made for span"):
        esper_jax.germinate(morph, "last", "units", key=jax.random.key(0))
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        grow(morph, ("layer_0", "layer_1"), activation="swish")
    backwards = in_stage(grow(morph, ("last", "layer_0"), units=1), Stage.TRAINING)
    with pytest.raises(ValueError, match="was not called before it"):
        esper_jax.graft(model)(backwards, X)
    both = grow(esper_jax.germinate(morph, "layer_1", "mlp", key=jax.random.key(0)), ("layer_0", "layer_1"))
    found = esper_jax.foldable(in_stage(both, Stage.FOSSILIZED))
    assert "mlp at layer_1 slot 0 has the old width" in found["layer_1", 1]
    folded = esper_jax.fold(in_stage(grow(morph, ("layer_0", "layer_1"), units=1), Stage.FOSSILIZED))
    with pytest.raises(ValueError, match="layer_0 from 6 to 7; change them in its code"):
        esper_jax.widened(nn.Sequential([nn.Dense(6), nn.Dense(5)]), morph, folded, X)


def test_scores_are_the_gradient_of_a_zero_layer_and_come_in_order():
    """M = (input)^T (output gradient); gains sorted; the same with seeds of no effect."""
    model = MLP()
    variables, morph = made(model, X)
    ends = ("layer_0", "layer_1")
    scores = esper_jax.growth_scores(morph, (X, Y), LOSS, forward=model, spans=[ends])
    gains = [float(score.gain) for score in scores.values()]
    assert gains == sorted(gains, reverse=True) and set(scores) == {"layer_0", "layer_1", "last", ends}

    def shifted(kernel):
        params = jax.tree.map(lambda leaf: leaf, variables["params"])
        params["layer_1"] = {**params["layer_1"], "kernel": params["layer_1"]["kernel"] + kernel}
        return LOSS(model.apply({"params": params}, X), Y).mean()

    matrix = jax.grad(shifted)(jnp.zeros((6, 5)))
    np.testing.assert_allclose(scores["layer_1"].gain, jnp.sum(matrix**2), rtol=1e-4)
    values = jnp.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(scores["layer_1"].values, values[:4], rtol=1e-3)
    assert "layer_0 -> layer_1" in repr(scores)
    with pytest.raises(KeyError, match="unknown site 'nowhere' in spans"):
        esper_jax.growth_scores(morph, (X, Y), LOSS, forward=model, spans=[("nowhere", "last")])


def test_large_matrices_are_decomposed_by_a_few_products():
    """Randomised: the leading values within a percent."""
    from esper_jax.kasmina.scores import _decomposed

    left, right = (jax.random.normal(jax.random.key(i), (600, 3)) for i in (0, 1))
    matrix = left @ jnp.diag(jnp.array([4.0, 2.0, 1.0])) @ right.T + 0.01 * jax.random.normal(
        jax.random.key(2), (600, 600)
    )
    found, exact = _decomposed(matrix, 3), jnp.linalg.svd(matrix, compute_uv=False)[:3]
    np.testing.assert_allclose(found.values, exact, rtol=1e-2)
    rebuilt = found.enter * found.values @ found.leave
    assert float(jnp.linalg.norm(rebuilt - matrix) / jnp.linalg.norm(matrix)) < 0.02


@pytest.mark.parametrize("init", ["gradmax", "tiny", "best"])
def test_inits_change_nothing_at_birth_and_gain_more_than_chance(init):
    """The loss jump is exactly 0; the gradient that the new units' outgoing weights see is larger than at random."""
    model, ends = MLP(bias=False), ("layer_0", "layer_1")
    _, morph = made(model, X)
    forward = esper_jax.graft(model)
    value = lambda m: LOSS(forward(m, X), Y).mean()  # noqa: E731
    scores = esper_jax.growth_scores(morph, (X, Y), LOSS, forward=model, spans=[ends])
    common = {"span": ends, "blueprint": "units", "units": 2, "activation": "gelu", "bias": False}

    def slope(**options):
        grown = in_stage(esper_jax.germinate(morph, **common, **options), Stage.HOLDING)
        assert equal_bits(value(grown), value(morph))
        grads = jax.grad(lambda p: value(grown.with_params(p)))(grown.params)["seeds"]["layer_1"]["slot_0"]
        length = jnp.linalg.norm(grown.seeds["layer_1"]["slot_0"]["enter"])
        return float(jnp.linalg.norm(grads["leave"]) / length)

    chance = np.mean([slope(key=jax.random.key(seed)) for seed in range(5)])
    assert slope(key=jax.random.key(0), init=init, scores=scores) > 1.1 * chance
    with pytest.raises(ValueError, match="unknown init 'luck'"):
        esper_jax.germinate(morph, **common, key=jax.random.key(0), init="luck", scores=scores)
    with pytest.raises(ValueError, match="needs key=, span= and scores="):
        esper_jax.germinate(morph, **common, key=jax.random.key(0), init=init)
