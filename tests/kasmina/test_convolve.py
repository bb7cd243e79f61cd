"""The seeds' own convolution equals XLA's, in value and gradient, wherever it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.kasmina.seeds._convolve import convolve, plain

CASES = [
    ((7,), (3,), 4, 6, 1),
    ((7,), (4,), 4, 4, 4),
    ((6, 5), (3, 3), 4, 6, 1),
    ((6, 5), (3, 3), 4, 6, 2),
    ((6, 5), (2, 5), 3, 3, 3),
    ((6, 5), (3, 3), 4, 8, 4),
    ((4, 3, 5), (3, 3, 3), 2, 3, 1),
    ((4, 3, 5), (1, 3, 2), 4, 4, 4),
    ((1, 1), (3, 3), 2, 2, 1),
]


def operands(space, taps, inputs, outputs, groups):
    x = jax.random.normal(jax.random.key(0), (2, *space, inputs))
    return x, jax.random.normal(jax.random.key(1), (*taps, inputs // groups, outputs))


def both(groups, wrap=lambda f: f):
    loss = lambda conv: lambda x, k: jnp.sum(jnp.sin(conv(x, k)))  # noqa: E731
    mine = wrap(loss(lambda x, k: convolve(x, k, groups)))
    theirs = wrap(loss(lambda x, k: plain(groups, x, k)))
    return jax.jit(jax.value_and_grad(mine, (0, 1))), jax.jit(jax.value_and_grad(theirs, (0, 1)))


def close(got, want):
    for p, q in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(p, q, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients_equal_the_plain_convolution(case):
    """To float32 rounding of sums in another order, for ranks 1 to 3, odd and even kernels, groups."""
    mine, theirs = both(case[-1])
    close(mine(*operands(*case)), theirs(*operands(*case)))


@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_gradient_vmap_and_cond_work_together(case):
    """As a population of planted seeds uses it: `vmap` of `grad` of `cond`, kernels and inputs and flags batched."""
    x, kernel = operands(*case)

    def under_cond(loss):
        return lambda x, k, flag: jax.lax.cond(flag, loss, lambda x, k: jnp.sum(x), x, k)

    batch = jnp.stack([x, 2 * x, -x]), jnp.stack([kernel, -kernel, kernel / 2]), jnp.asarray([True, False, True])

    def run(conv):
        loss = under_cond(lambda x, k: jnp.sum(jnp.sin(conv(x, k))))
        return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1))))(*batch)

    got = run(lambda x, k: convolve(x, k, case[-1]))
    want = run(lambda x, k: plain(case[-1], x, k))
    close(got, want)


def test_mixed_precision_gives_the_promoted_dtype():
    """A bf16 image and a float32 kernel, and two of bf16; gradients keep the operands' dtypes."""
    x, kernel = operands(*CASES[2])
    half = x.astype(jnp.bfloat16)
    assert convolve(half, kernel).dtype == jnp.float32
    assert convolve(half, kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    grads = jax.grad(lambda x, k: jnp.sum(convolve(x, k)), (0, 1))(half, kernel)
    assert (grads[0].dtype, grads[1].dtype) == (jnp.bfloat16, jnp.float32)


def test_wrong_shapes_are_refused_in_words():
    """Rule 4 of the design."""
    with pytest.raises(ValueError, match="one rank, 1 to 3"):
        convolve(jnp.ones((2, 4, 3)), jnp.ones((3, 3, 3, 3)))
    with pytest.raises(ValueError, match="3 features do not fit"):
        convolve(jnp.ones((2, 4, 3)), jnp.ones((3, 2, 4)))
