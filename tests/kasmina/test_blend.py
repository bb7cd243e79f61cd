"""Blends: the formulas, their exact ends, and the gradients that pass through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.blend import check_blend, join, open_input
from esper_jax.kasmina.summary import equal_bits

from .hosts import BLENDS, MLP, host, in_stage, noisy

FORMULAS = {
    "add": lambda h, f, g, a: h + a * f,
    "lerp": lambda h, f, g, a: h + a * (f - h),
    "multiply": lambda h, f, g, a: h * (1 + a * np.tanh(f)),
    "gate": lambda h, f, g, a: h + a * g * f,
}
H, F = (np.asarray(jax.random.normal(jax.random.key(i), (4, 3))) for i in (0, 1))
G = np.asarray(jax.random.uniform(jax.random.key(2), (4, 1)))
BATCHED = {
    blend: jax.jit(lambda h, f, g, a, e, c, b=blend: join(b, h, f, g, a, e, c, jnp.zeros(()))) for blend in BLENDS
}


def joined(blend, h, f, alpha, enters=True, computes=True):
    return np.asarray(BATCHED[blend](h, f, G, jnp.float32(alpha), enters, computes))


@settings(max_examples=30)
@given(alpha=st.floats(0, 1, width=32), blend=st.sampled_from(BLENDS))
def test_the_value_is_the_published_formula_with_alpha_applied_once(alpha, blend):
    """Forward rule: float32 rounding apart."""
    np.testing.assert_allclose(joined(blend, H, F, alpha), FORMULAS[blend](H, F, G, np.float32(alpha)), atol=1e-6)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("harm", [0.0, float("nan"), float("inf"), 3e38])
def test_at_alpha_0_the_value_is_h_to_the_bit_whatever_f_is(blend, harm):
    """Forward rule, contract 18: signed zeros of h included."""
    h = H.copy()
    h[0] = -0.0
    assert equal_bits(joined(blend, h, F * 0 + np.float32(harm), 0.0), h)
    assert equal_bits(joined(blend, h, F, 1.0, enters=False), h)


def test_lerp_at_alpha_1_is_f_to_the_bit():
    """Forward rule."""
    assert equal_bits(joined("lerp", H, F, 1.0), F)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_blended_seeds_gradients_are_those_of_the_formula(blend, alpha):
    """Contract 19: against plain autodiff of the formula, to float32 rounding; alpha gets none, it is scheduled."""
    reference = {**FORMULAS, "multiply": lambda h, f, g, a: h * (1 + a * jnp.tanh(f))}[blend]
    mine = lambda h, f, g, a: jnp.sum(jnp.sin(join(blend, h, f, g, a, True, True, jnp.zeros(()))))  # noqa: E731
    theirs = lambda h, f, g, a: jnp.sum(jnp.sin(reference(h, f, g, a)))  # noqa: E731
    got = jax.grad(mine, (0, 1, 2, 3))(H, F, G, jnp.float32(alpha))
    want = jax.grad(theirs, (0, 1, 2))(H, F, G, jnp.float32(alpha))
    for p, q in zip(got[:3], want, strict=True):
        np.testing.assert_allclose(p, q, atol=2e-6)
    assert float(got[3]) == 0.0


@pytest.mark.parametrize("blend", BLENDS)
def test_a_training_seeds_gradient_is_that_of_full_alpha_and_the_host_keeps_its_own(blend):
    """Contract 17."""
    reference = {**FORMULAS, "multiply": lambda h, f, g, a: h * (1 + a * jnp.tanh(f))}[blend]
    cotangent = jnp.cos(H)
    _, vjp = jax.vjp(lambda h, f: join(blend, h, f, G, jnp.float32(0), False, True, jnp.zeros(())), H, F)
    _, full = jax.vjp(lambda f: reference(H, f, G, 1.0), F)
    to_host, to_seed = vjp(cotangent)
    assert equal_bits(to_host, cotangent)
    np.testing.assert_allclose(to_seed, full(cotangent)[0], atol=1e-6)


def test_the_seeds_input_passes_a_gradient_only_when_open_and_finite():
    """Contract 17, 18, 19."""
    pull = lambda is_open, c: jax.vjp(lambda u: open_input(u, is_open), H)[1](c)[0]  # noqa: E731
    assert equal_bits(pull(True, jnp.asarray(F)), F)
    assert not np.any(np.asarray(pull(False, jnp.asarray(F))))
    assert not np.any(np.asarray(pull(True, jnp.asarray(F).at[0, 0].set(jnp.nan))))


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("resident", [False, True])
def test_layers_before_a_fully_blended_site_still_receive_gradient(blend, resident):
    """Contract 19: through the seed itself, which the host's own kernel, set to 0 here, cannot give."""
    given_host = host("mlp")
    morph = esper_jax.morph(given_host.variables, planted={"lora": {"rank": 2}} if resident else None, blend=blend)
    morph = esper_jax.germinate(morph, "Dense_1", "lora", key=jax.random.key(0), blend=blend, rank=2)
    morph = noisy(morph, 1)
    params = jax.tree.map(lambda v: v, morph.params)
    params["host"]["Dense_1"]["kernel"] = params["host"]["Dense_1"]["kernel"] * 0
    params["host"]["Dense_1"]["bias"] = params["host"]["Dense_1"]["bias"] + 0.5
    morph = morph.with_params(params)
    forward = esper_jax.graft(given_host.model)
    loss = jax.jit(jax.grad(lambda p, m: given_host.loss(forward, m.with_params(p), given_host.x, False)[0]))
    for stage in (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED):
        grads = loss(morph.params, in_stage(morph, {("Dense_1", 0): (stage, 1.0)}))
        assert float(jnp.abs(grads["host"]["Dense_0"]["kernel"]).max()) > 1e-4, stage
        assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads["seeds"]["Dense_1"]["slot_0"]))
    before = loss(morph.params, in_stage(morph, {("Dense_1", 0): (Stage.TRAINING, 0.0)}))
    assert not jnp.any(before["host"]["Dense_0"]["kernel"])


def test_blended_output_of_a_model_is_the_formula_at_the_site():
    """Forward rule: recomputed by hand for one lora seed at the last layer."""
    given_host = host("mlp")
    morph = esper_jax.germinate(esper_jax.morph(given_host.variables), "Dense_2", "lora", key=jax.random.key(0), rank=2)
    morph = in_stage(noisy(morph, 3), {("Dense_2", 0): (Stage.BLENDING, 0.4)})
    seed = morph.seeds["Dense_2"]["slot_0"]
    hidden = given_host.model.apply(given_host.variables, given_host.x, capture_intermediates=True)[1]
    u = jax.nn.relu(hidden["intermediates"]["Dense_1"]["__call__"][0])
    h = MLP().apply(given_host.variables, given_host.x)
    expected = h + 0.4 * (u @ seed["down"]) @ seed["up"]
    np.testing.assert_allclose(esper_jax.graft(given_host.model)(morph, given_host.x), expected, atol=1e-5)


def test_an_unknown_blend_lists_the_known_ones():
    """Rule 4 of the design."""
    with pytest.raises(ValueError, match="add, lerp, multiply, gate"):
        check_blend("sum")
    with pytest.raises(ValueError, match="add, lerp, multiply, gate"):
        esper_jax.morph(host("mlp").variables, blend="sum")
