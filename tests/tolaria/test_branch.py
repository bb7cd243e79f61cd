"""A change that is made or not: what its predicate already needed is not computed again within it."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import esper_jax
from esper_jax import TrainState, growable
from esper_jax.tolaria.branch import changed_if
from esper_jax.tolaria.dispatch import Dispatch, make_steps
from esper_jax.tolaria.step import Calls
from tests.kasmina.hosts import host

OPTIMIZERS = {
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "clipped by leaf": lambda: optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(1e-2, momentum=0.9)),
    "plain": lambda: optax.adamw(1e-2),
    "normalised": lambda: optax.chain(optax.normalize_by_update_norm(), optax.scale(-1e-2)),
    "trust": lambda: optax.lamb(1e-2),
    "every other": lambda: optax.MultiSteps(optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)), 2),
}


def problem(name: str) -> tuple[Any, Any, Any, Any]:
    """An optimizer's step as a change, its state, gradients, and the same by `lax.cond` alone."""
    tx = OPTIMIZERS[name]()
    params = {"kernel": jnp.arange(12.0).reshape(4, 3) / 7, "bias": jnp.ones(3)}
    grads = jax.tree.map(lambda leaf: jnp.sin(leaf) + 0.3, params)

    def change(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def plain(ok: Any, old: Any, grads: Any) -> Any:
        return jax.lax.cond(ok, lambda old, grads: change(*old, grads), lambda old, _: old, old, grads)

    return change, (params, tx.init(params)), grads, plain


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_change_is_made_or_nothing_is(name: str, ok: bool) -> None:
    change, old, grads, plain = problem(name)
    ours = jax.jit(lambda ok, old, grads: changed_if(ok, change, old, grads))(jnp.bool_(ok), old, grads)
    chex.assert_trees_all_close(ours, jax.jit(plain)(jnp.bool_(ok), old, grads), rtol=1e-6)
    if not ok:
        chex.assert_trees_all_equal(ours, old)


@pytest.mark.parametrize("name", ["clipped", "plain"])
def test_many_in_one_vmap_each_by_its_own_flag(name: str) -> None:
    change, old, grads, plain = problem(name)
    flags, many = jnp.array([True, False, True]), jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), (old, grads))
    ours = jax.vmap(lambda ok, both: changed_if(ok, change, *both))(flags, many)
    chex.assert_trees_all_close(ours, jax.vmap(lambda ok, both: plain(ok, *both))(flags, many), rtol=1e-6)


def test_it_has_a_derivative_and_effects_stay_within() -> None:
    change, old, grads, _ = problem("clipped")

    def loss(scale: Any) -> Any:
        (params, _) = changed_if(jnp.isfinite(scale), change, old, jax.tree.map(lambda g: g * scale, grads))
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))

    assert jnp.isfinite(jax.grad(loss)(1e-3))
    seen: list[float] = []

    def tells(x: Any, given: Any) -> tuple[Any]:
        norm = jnp.sum(given)
        jax.debug.callback(lambda norm: seen.append(float(norm)), norm)
        return (x + norm * given,)

    for ok in (True, False):
        jax.block_until_ready(jax.jit(lambda ok, x: changed_if(ok, tells, (x,), x))(jnp.bool_(ok), jnp.ones(3)))
    jax.effects_barrier()
    assert seen == [3.0]


def reductions(jaxpr: Any, inside: bool = False) -> int:
    """How many sums there are within branches."""
    found = 0
    for equation in jaxpr.eqns:
        found += inside and equation.primitive.name in ("reduce_sum", "dot_general")
        for inner in jaxprs_in_params(equation.params):
            found += reductions(inner, inside or equation.primitive.name == "cond")
    return found


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a select elsewhere")
def test_a_step_sums_the_gradients_outside_its_branch() -> None:
    """Where XLA sees that the norm for the optimizer is the norm that tells whether the batch was good."""
    given = host("mlp")
    batches = jax.tree.map(lambda leaf: leaf[None], (given.x, given.y))
    loss = optax.softmax_cross_entropy_with_integer_labels

    def sums(tx: Any) -> int:
        tx = growable(tx)
        state = TrainState.create(esper_jax.morph(given.variables), tx, key=jax.random.key(0))
        steps = make_steps(Calls(esper_jax.graft(given.model), loss), tx, 0, Dispatch("scan"))
        return reductions(jax.make_jaxpr(steps)(state, batches, 1).jaxpr)

    assert sums(OPTIMIZERS["clipped"]()) == sums(OPTIMIZERS["plain"]()) == 0


def test_what_costs_much_or_might_not_end_stays_within_the_branch() -> None:
    """A loop over a norm that is no number would never end; what gives arrays too would be computed twice."""

    def halved(x: Any, given: Any) -> tuple[Any]:
        norm = jnp.sum(given)
        return (x * jax.lax.while_loop(lambda k: ~(norm * k <= 1.0), lambda k: k * 0.5, 1.0),)

    @jax.jit
    def both(given: Any) -> tuple[Any, Any]:
        norm = jnp.sum(given)
        return given / norm, norm

    def twice(x: Any, given: Any) -> tuple[Any]:
        shares, norm = both(given)
        return (x + shares * norm,)

    x = jnp.arange(3.0)
    kept = jax.jit(lambda ok, x, given: changed_if(ok, halved, (x,), given))(jnp.bool_(False), x, x * jnp.nan)
    assert np.array_equal(kept[0], x)
    for change in (halved, twice):
        traced = jax.make_jaxpr(lambda x, change=change: changed_if(x[0] < 9, change, (x,), x))(x).jaxpr
        outside = {equation.primitive.name for equation in traced.eqns}
        assert not outside & {"while", "jit", "pjit"}
        (found,) = changed_if(jnp.bool_(True), change, (x,), x)
        np.testing.assert_allclose(found, change(x, x)[0])


def test_a_change_of_another_structure_is_an_error() -> None:
    with pytest.raises(TypeError, match="must give the structure of what it changes"):
        changed_if(jnp.bool_(True), lambda a, b: ((a, b), None), (jnp.ones(2), jnp.zeros(2)))
