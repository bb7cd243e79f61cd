"""LayerNorm: its derivative is written out, and is that of the formula in every direction; gradients of forks."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.bridge.ops.norm import by_row
from esper_jax.tolaria.step import _equations as equations

SHAPE = (4, 6, 5, 8)


def plainly(x, weight, bias, axes, eps):
    """The same by its formula, derived by JAX."""
    last = tuple(range(x.ndim - axes, x.ndim))
    wide = x.astype(jnp.float32)
    y = (wide - jnp.mean(wide, last, keepdims=True)) / jnp.sqrt(jnp.var(wide, last, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).astype(x.dtype)


def given(axes=1, weight=True, bias=True, dtype=jnp.float32):
    draw = np.random.default_rng(0)
    of = lambda wanted: jnp.asarray(draw.standard_normal(SHAPE[-axes:]), dtype) if wanted else None  # noqa: E731
    return jnp.asarray(3 + 2 * draw.standard_normal(SHAPE), dtype), of(weight), of(bias)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_derivative_is_that_of_the_formula_forwards_and_backwards_and_once_more(axes, weight, bias):
    args = given(axes, weight, bias)
    ours, theirs = (functools.partial(of, f, axes) for f in (by_row, plainly))
    chex.assert_trees_all_close(ours(*args), theirs(*args), rtol=1e-5, atol=1e-5)

    draw = np.random.default_rng(1)
    like = lambda tree: jax.tree.map(lambda a: jnp.asarray(draw.standard_normal(a.shape), a.dtype), tree)  # noqa: E731
    tangents, cotangent = like(args), like(args[0])
    found, wanted = (jax.jvp(f, args, tangents)[1] for f in (ours, theirs))
    chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-4)
    found, wanted = (jax.vjp(f, *args)[1](cotangent) for f in (ours, theirs))
    chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-4)

    def slope(f):
        return lambda *args: jax.grad(lambda args: jnp.sum(jnp.sin(f(*args))))(args)

    found, wanted = (jax.jvp(slope(f), args, tangents)[1] for f in (ours, theirs))
    chex.assert_trees_all_close(found, wanted, rtol=1e-3, atol=1e-3)


def of(function, axes, x, weight, bias):
    return function(x, weight, bias, axes, 1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_are_standardised_in_float32_and_have_gradients_of_their_own_dtype(dtype):
    args = given(dtype=dtype)
    total = lambda f: lambda *args: jnp.sum(jnp.sin(of(f, 1, *args).astype(jnp.float32)))  # noqa: E731
    found, wanted = (jax.grad(total(f), (0, 1, 2))(*args) for f in (by_row, plainly))
    assert of(by_row, 1, *args).dtype == dtype and [g.dtype for g in found] == [dtype] * 3
    chex.assert_trees_all_close(*(jax.tree.map(jnp.float32, g) for g in (found, wanted)), rtol=3e-2, atol=3e-2)


def test_sums_that_the_weight_enters_are_products_with_it_on_the_way_back():
    args = given()
    gradient = jax.make_jaxpr(jax.grad(lambda *args: jnp.sum(jnp.sin(of(by_row, 1, *args)))))(*args)
    products = [e for e in equations(gradient.jaxpr) if e.primitive.name == "dot_general"]
    assert [e.outvars[0].aval.shape for e in products] == [(*SHAPE[:-1], 1)] * 2


def test_networks_beside_each_other_have_rows_of_their_own():
    x, weight, bias = given()
    several, weights = jnp.stack([x, 2 * x + 1]), jnp.stack([weight, 3 * weight])
    together = jax.vmap(lambda x, weight: of(by_row, 1, x, weight, bias))(several, weights)
    alone = [of(by_row, 1, x, weight, bias) for x, weight in zip(several, weights, strict=True)]
    chex.assert_trees_all_close(together, jnp.stack(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize(("residual", "forks"), [(True, 1), (False, 0)])
def test_what_a_norm_and_something_else_read_has_its_gradient_added_up_once(residual, forks):
    torch = pytest.importorskip("torch")
    import esper_jax

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = torch.nn.Linear(5, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 6)

        def forward(self, x):
            x = self.first(x)
            return x + self.last(self.norm(x)) if residual else self.last(self.norm(x))

    model, variables = esper_jax.from_torch(Block(), torch.randn(3, 5))
    loss = lambda params: model.apply({"params": params}, jnp.ones((3, 5))).sum()  # noqa: E731
    gradient = jax.make_jaxpr(jax.grad(loss))(variables["params"])
    assert sum(e.primitive.name == "optimization_barrier" for e in equations(gradient.jaxpr)) == forks
    assert "optimization_barrier" not in str(jax.make_jaxpr(loss)(variables["params"]))
