"""What the compiled train step does not do: the costs that a resting seed or a probe must not have, by structure."""

from __future__ import annotations

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import TrainState, growable, make_train_step
from esper_jax.kasmina.morph import Morph
from esper_jax.tolaria.step import Calls, one_step
from tests.kasmina.hosts import host

from .test_growable import SITE, TXS, ones, seeded

LOSS = optax.softmax_cross_entropy_with_integer_labels


def compiled(name: str, probe_every: int, morph: Morph | None = None) -> str:
    """The compiled train step of a test host, as text."""
    made = host(name)
    tx = growable(optax.adam(1e-2))
    step = make_train_step(made.model, LOSS, tx, probe_every=probe_every)
    given = morph or esper_jax.morph(made.variables, model=made.model, example=made.x)
    state = TrainState.create(given, tx, key=jax.random.key(0))
    return step.lower(state, (made.x, made.y)).compile().as_text()  # type: ignore[attr-defined, no-any-return]


def outside(text: str) -> str:
    """The program's own instructions, without those of the branches and loops that it calls."""
    return text[text.index("\nENTRY") :]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what XLA's CPU backend writes")
@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_a_step_that_measures_nothing_runs_no_layer_for_the_probes_and_copies_no_parameter(name: str) -> None:
    """Activations of linear layers are found again when they are measured, instead of being kept or recomputed."""
    without, probed = (outside(compiled(name, every)) for every in (0, 50))
    assert "conditional(" in probed
    assert len(re.findall(r" dot\(", probed)) == len(re.findall(r" dot\(", without))
    copied = re.findall(r"= f32\[(\d[\d,]*)\]\S* copy\(%state_morph_host", probed)
    assert copied == []


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what XLA's CPU backend writes")
@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_a_step_that_always_measures_takes_the_growth_gain_from_the_kernels_own_gradient(name: str) -> None:
    """Without a branch, under `nn.remat` too: each site adds the product of its correlations, and one without a kernel
    that of its gain."""
    made = host(name)
    tx, calls = growable(optax.adam(1e-2)), Calls(esper_jax.graft(made.model), LOSS)
    morph = esper_jax.morph(made.variables, model=made.model, example=made.x)
    state = TrainState.create(morph, tx, key=jax.random.key(0))

    def products(sample: bool) -> int:
        step = jax.jit(lambda state, batch: one_step(calls, tx, sample, state, batch))
        return len(re.findall(r" dot\(", step.lower(state, (made.x, made.y)).compile().as_text()))

    kinds = [site.kind for site in morph.spec.sites]
    bare = sum(kind in ("layer_norm", "attention") for kind in kinds)
    assert products(True) - products(False) == len(kinds) + bare


def test_a_resting_seed_gives_its_branch_nothing_to_fill_but_the_layers_output_and_three_numbers() -> None:
    """On the way forward: no activation of the seed leaves the branch, though the backward pass needs them."""
    made = host("mlp")
    morph = esper_jax.morph(made.variables, where=SITE, planted={"mlp": {"hidden": 7}})
    forward = esper_jax.graft(made.model.apply)

    def loss(params: Any) -> jax.Array:
        return jnp.mean(LOSS(forward(morph.with_params(params), made.x), made.y))

    branches = [e for e in jax.make_jaxpr(jax.grad(loss))(morph.params).eqns if e.primitive.name == "cond"]
    first, second = ([v.aval.shape for v in e.outvars] for e in branches)
    batch = len(made.x)
    assert sorted(first, key=len) == [(), (), (), (batch, 5)]
    assert sorted(second) == sorted([(5,), (6, 7), (7,), (7, 5), (batch, 6)])


@pytest.mark.parametrize("moves", [0, 1], ids=["resting", "learning"])
@pytest.mark.parametrize("name", ["clipped", "multisteps", "plateau"])
def test_a_step_of_the_optimizer_is_its_update_applied(name: str, moves: int) -> None:
    """To the bit, but for a learning seed's last addition, which XLA may fuse with what comes before."""
    tx, morph = growable(TXS[name]()), seeded(moves)
    state = by_update = tx.init(morph)
    params = morph.params
    for i in range(3):
        grads, extra = ones(morph, 1.0 + i), {"value": jnp.float32(i)}
        updates, by_update = tx.update(grads, by_update, morph.with_params(params), **extra)
        expected = optax.apply_updates(params, updates)
        params, state = tx.step(grads, state, morph.with_params(params), **extra)
        same = chex.assert_trees_all_close if moves else chex.assert_trees_all_equal
        chex.assert_trees_all_equal((params["host"], state.host), (expected["host"], by_update.host))
        same((params, state), (expected, by_update))


def test_a_layer_with_its_own_product_is_measured_by_its_own_output() -> None:
    """Only a layer that is a product and a bias may be found again from them."""
    import flax.linen as nn

    class Doubled(nn.Dense):
        @nn.compact
        def __call__(self, inputs: jax.Array) -> jax.Array:
            return 2 * super().__call__(inputs)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3)(Doubled(4)(x))

    x, y = host("mlp").x, host("mlp").y
    model = Model()
    variables = model.init(jax.random.key(0), x)
    tx = growable(optax.sgd(0.0))
    state = TrainState.create(esper_jax.morph(variables, model=model, example=x), tx, key=jax.random.key(0))
    state, _ = make_train_step(model, LOSS, tx, probe_every=1, donate=False)(state, (x, y))
    params = variables["params"]["Doubled_0"]
    h = 2 * (np.asarray(x) @ np.asarray(params["kernel"]) + np.asarray(params["bias"]))
    np.testing.assert_allclose(state.meters.stats["Doubled_0"][1], h.var(axis=0).mean(), rtol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only there are kernels made at the first run")
def test_a_program_built_beside_the_training_is_run_on_made_up_arrays_of_its_shapes() -> None:
    """The first run is slow; nobody waits for it, and a loop with a count goes round."""
    from esper_jax.tolaria.compiler import rehearse

    made = host("mlp")
    state = TrainState.create(esper_jax.morph(made.variables), growable(optax.adam(1e-2)), key=jax.random.key(3))
    rest = (made.x[None], np.int32(7))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (state, *rest))
    given: list[Any] = []
    rehearse(lambda *args: given.append(args), shapes)
    assert [type(batches) for _, batches, _ in given] == [np.ndarray, type(made.x)]
    for args in given:
        assert jax.tree.structure(args) == jax.tree.structure(shapes)
        for made_up, shape in zip(jax.tree.leaves(args), jax.tree.leaves(shapes), strict=True):
            assert (made_up.shape, made_up.dtype) == (shape.shape, shape.dtype)
        assert args[2] == 1 and not np.any(args[1])
