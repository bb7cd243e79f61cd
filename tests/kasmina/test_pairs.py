"""One contract for hosts of both Flax APIs: the same five models in Linen and in nnx."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import FixedSchedule, Gates, Lifecycle, Stage, Tolaria
from esper_jax.kasmina.summary import equal_bits

from .hosts import all_finite, in_stage, noisy, poisoned
from .pairs import LABELS, MODELS, PAIRS, member

LOSS = optax.softmax_cross_entropy_with_integer_labels


def seeded(given, resident=False):
    """A seed of the first fitting blueprint at one site of every kind, GERMINATED and noisy."""
    morph = given.morph()
    for kind in dict.fromkeys(site.kind for site in morph.spec.sites):
        site = next(site for site in morph.spec.sites if site.kind == kind)
        blueprint = "norm" if kind in ("attention", "layer_norm", "rms_norm", "group_norm", "batch_norm") else "lora"
        morph = esper_jax.germinate(morph, site.path, blueprint, key=jax.random.key(1))
    if resident:
        plants = tuple(dataclasses.replace(plant, resident=True) for plant in morph.spec.plants)
        morph = morph.replace(spec=dataclasses.replace(morph.spec, plants=plants))
    return noisy(morph, 3)


def steps_of(given):
    forward = esper_jax.graft(given.model)

    @jax.jit
    def step(morph):
        def loss(params):
            logits, updated = given.run(forward, morph.with_params(params), True)
            return LOSS(logits, LABELS).mean(), (logits, updated)

        (value, (logits, updated)), grads = jax.value_and_grad(loss, has_aux=True)(morph.params)
        return (value, logits, updated, grads["host"]), grads["seeds"]

    return step


@pytest.mark.parametrize("name", MODELS)
def test_both_apis_have_the_same_kinds_of_sites(name):
    """Kinds, features and convolutions' geometry agree."""
    shown = {}
    for api in ("linen", "nnx"):
        sites = member(name, api).morph().spec.sites
        known = ("kernel_size", "strides", "padding", "epsilon", "equation", "heads", "groups")
        shown[api] = sorted(
            (s.kind, s.in_shape, s.out_shape, s.spatial, tuple(v for n, v in s.geometry if n in known)) for s in sites
        )
    assert shown["linen"] == shown["nnx"]


@pytest.mark.parametrize(("name", "api"), PAIRS)
def test_empty_slots_are_the_hosts_own_program(name, api):
    """Contract 15, in training and evaluation, forwards."""
    given = member(name, api)
    morph, forward = given.morph(), esper_jax.graft(given.model)
    for train in (True, False):
        if api == "linen" and train:
            continue  # `mutable` differs; the Linen adapter's own tests hold this
        grown = jax.make_jaxpr(lambda m, train=train: given.run(forward, m, train)[0])(morph)
        bare = jax.make_jaxpr(lambda m, train=train: given.bare(m, train))(morph)
        assert str(grown.jaxpr.eqns) == str(bare.jaxpr.eqns)


@pytest.mark.parametrize(
    "resident", [pytest.param(False, id="lean"), pytest.param(True, id="planted", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("name", "api"), PAIRS)
def test_seeds_at_every_kind_leave_the_host_to_the_bit_until_they_blend(name, api, resident):
    """Contract 16 to 19: loss, outputs, statistics and gradients; then blended, and broken."""
    given = member(name, api)
    morph, step = seeded(given, resident), steps_of(member(name, api))
    silent, nothing = step(in_stage(morph, Stage.GERMINATED))
    training, learns = step(in_stage(morph, Stage.TRAINING))
    broken, _ = step(in_stage(poisoned(morph, float("nan")), Stage.TRAINING))
    blended, _ = step(in_stage(morph, Stage.HOLDING))
    fallen, _ = step(in_stage(poisoned(morph, float("nan")), Stage.HOLDING))
    assert equal_bits(silent, training) and equal_bits(silent, broken) and equal_bits(silent[:3], fallen[:3])
    assert not equal_bits(silent[1], blended[1]) and all_finite(blended) and all_finite(fallen)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))
    for path, slots in learns.items():
        assert any(np.any(leaf) for leaf in jax.tree.leaves(slots)), path


@pytest.mark.parametrize(("name", "api"), PAIRS)
def test_what_was_grown_folds_and_compacts(name, api):
    """Contract 20 on a whole model: what is linear is merged, the rest is baked."""
    given = member(name, api)
    morph = in_stage(seeded(given), Stage.FOSSILIZED)
    forward = esper_jax.graft(given.model)
    expected = given.run(forward, morph, False)[0]
    apply, variables = esper_jax.compact(given.model, morph)
    np.testing.assert_allclose(apply(variables, given.x, **forward.mode(False)), expected, rtol=2e-5, atol=2e-5)
    left = [plant.blueprint for site in variables.get("seeds", {}) for plant in morph.spec.planted_at[site]]
    assert "lora" not in left


@pytest.mark.slow
@pytest.mark.parametrize(("name", "api"), [pair for pair in PAIRS if "nnx" in pair or "block" in pair])
def test_a_run_grows_saves_and_goes_on(name, api, tmp_path):
    """Through Tolaria with checkpoints; the restored state is the state to the bit. (tests/tolaria has Linen.)"""
    given = member(name, api)
    site = next(site for site in given.morph().spec.sites if site.kind == "dense").path
    rng = np.random.default_rng(0)
    x = np.asarray(given.x)[rng.integers(0, 8, 64)]
    data = (x, np.asarray(LABELS)[rng.integers(0, 8, 64)])

    def trainer():
        return Tolaria(
            given.model,
            LOSS,
            optax.adam(1e-2),
            controller=FixedSchedule({1: [(site, "lora", {"rank": 2})]}, keep="always"),
            lifecycle=Lifecycle(gates=Gates(min_training_ticks=1, min_health=0.0), tempo=3),
            checkpoint_dir=tmp_path,
            batch_size=16,
            progress=False,
            compile_in="thread",
        )

    made = trainer()
    traced = {"model": given.model, "example": given.x} if api == "linen" else {}
    state, history = made.fit(made.init(given.given, key=jax.random.key(0), **traced), data, data, epochs=5)
    assert np.isfinite(history["loss"]).all() and any(s != 0 for s in state.morph.state[site].stage)
    restored = trainer().restore()
    assert jax.tree.structure(restored.morph) == jax.tree.structure(state.morph)
    assert equal_bits(restored.morph, state.morph)
