"""BatchNorm in training: its derivative is written out, and is that of the formula in every direction."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.bridge.ops.norm import standardised
from esper_jax.tolaria.step import _equations as equations

LARGE = (16, 6, 5, 8)


def plainly(x, weight, bias, eps, last):
    """The same by its formula, derived by JAX."""
    channel = x.ndim - 1 if last else 1
    axes = tuple(a for a in range(x.ndim) if a != channel)
    spread = lambda v: v if last else v.reshape((1, -1) + (1,) * (x.ndim - 2))  # noqa: E731
    wide = x.astype(jnp.float32)
    mean, var = jnp.mean(wide, axes), jnp.var(wide, axes)
    y = (wide - spread(mean)) / jnp.sqrt(spread(var) + eps)
    y = y if weight is None else y * spread(weight)
    return (y if bias is None else y + spread(bias)).astype(x.dtype), mean, var


def given(last=True, weight=True, bias=True, dtype=jnp.float32):
    draw = np.random.default_rng(0)
    shape = LARGE if last else (LARGE[0], LARGE[-1], *LARGE[1:-1])
    x = jnp.asarray(3 + 2 * draw.standard_normal(shape), dtype)
    of = lambda wanted: jnp.asarray(draw.standard_normal(LARGE[-1]), jnp.float32) if wanted else None  # noqa: E731
    return x, of(weight), of(bias)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_derivative_is_that_of_the_formula_forwards_and_backwards_and_once_more(last, weight, bias):
    args = given(last, weight, bias)
    ours, theirs = (functools.partial(f, eps=1e-3, last=last) for f in (of_ours, plainly))
    chex.assert_trees_all_close(ours(*args), theirs(*args), rtol=1e-5, atol=1e-5)

    draw = np.random.default_rng(1)
    like = lambda tree: jax.tree.map(lambda a: jnp.asarray(draw.standard_normal(a.shape), a.dtype), tree)  # noqa: E731
    tangents, cotangents = like(args), like(ours(*args))
    found, wanted = (jax.jvp(f, args, tangents)[1] for f in (ours, theirs))
    chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-4)
    found, wanted = (jax.vjp(f, *args)[1](cotangents) for f in (ours, theirs))
    chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-4)

    def slope(f):
        return lambda *args: jax.grad(lambda args: jnp.sum(jnp.sin(f(*args)[0])))(args)

    found, wanted = (jax.jvp(slope(f), args, tangents)[1] for f in (ours, theirs))
    chex.assert_trees_all_close(found, wanted, rtol=1e-3, atol=1e-3)


def of_ours(x, weight, bias, eps, last):
    return standardised(x, weight, bias, eps, last)


def test_bfloat16_is_standardised_in_float32_and_has_gradients_of_its_own_dtype():
    x, weight, bias = given(dtype=jnp.bfloat16)
    y, mean, var = standardised(x, weight, bias, 1e-5, True)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    total = lambda f: lambda *args: jnp.sum(jnp.sin(f(*args, 1e-5, True)[0].astype(jnp.float32)))  # noqa: E731
    found, wanted = (jax.grad(total(f), (0, 1, 2))(x, weight, bias) for f in (standardised, plainly))
    assert [g.dtype for g in found] == [jnp.bfloat16, jnp.float32, jnp.float32]
    chex.assert_trees_all_close(*(jax.tree.map(jnp.float32, g) for g in (found, wanted)), rtol=2e-2, atol=2e-2)


def test_the_way_back_takes_two_sums_over_the_input_and_keeps_one_array_beside_it():
    args = given()

    def loss(*args):
        return jnp.sum(jnp.sin(standardised(*args, 1e-5, True)[0]))

    sums = lambda jaxpr: sum(  # noqa: E731
        e.primitive.name == "reduce_sum" and e.invars[0].aval.shape == LARGE for e in equations(jaxpr)
    )
    forward = sums(jax.make_jaxpr(loss)(*args).jaxpr)
    assert forward == 3  # mean, variance, and the loss's own
    assert sums(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*args).jaxpr) <= forward + 3  # one of them on the way forward
    _, back = jax.vjp(lambda *args: standardised(*args, 1e-5, True)[0], *args)
    assert sum(leaf.shape == LARGE for leaf in jax.tree.leaves(back)) == 1


def test_of_two_rows_the_gradient_is_as_exact_as_it_can_be():
    """There all but a part in 1e5 of it cancels; a mean that is rounded would be most of the rest."""
    draw = np.random.default_rng(0)
    errors = []
    for _ in range(40):
        x, g = (np.float32(5 * k + draw.standard_normal((2, 8))) for k in (1, 0))
        ones, zeros = jnp.ones(8), jnp.zeros(8)
        found = jax.vjp(lambda x: standardised(x, ones, zeros, 1e-5, True)[0], jnp.asarray(x))[1](jnp.asarray(g))[0]  # noqa: B023
        half, c = (g - g.mean(0, dtype=np.float64)), (x - x.mean(0, dtype=np.float64))
        var = np.mean(c * c, 0)
        want = half * (1e-5 / (var + 1e-5)) / np.sqrt(var + 1e-5)
        errors.append(np.abs(found - want).max() / np.abs(want).max())
    assert np.median(errors) < 3e-4


def test_networks_beside_each_other_have_the_statistics_of_each():
    x, weight, bias = given()
    several = jnp.stack([x, 2 * x + 1])
    weights = jnp.stack([weight, 3 * weight])
    together = jax.vmap(lambda x, weight: standardised(x, weight, bias, 1e-5, True))(several, weights)
    alone = [standardised(x, weight, bias, 1e-5, True) for x, weight in zip(several, weights, strict=True)]
    chex.assert_trees_all_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), rtol=1e-5, atol=1e-5)
