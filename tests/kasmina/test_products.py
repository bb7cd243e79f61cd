"""Products of two matrices in place of those of arrays with many axes."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from esper_jax.kasmina.products import flat_dot_general, flat_products, product

DIMS = {  # of x, of the kernel, what is contracted
    "dense": ((2, 3, 4, 5), (5, 6), (((3,), (0,)), ((), ()))),
    "two axes in": ((2, 3, 4, 5), (4, 5, 6), (((2, 3), (0, 1)), ((), ()))),
    "two axes out": ((2, 3, 5), (5, 6, 7), (((2,), (0,)), ((), ()))),
    "counted from behind": ((2, 3, 5), (5, 6), (((-1,), (0,)), ((), ()))),
    "one axis": ((5,), (5, 6), (((0,), (0,)), ((), ()))),
    "all axes in": ((4, 5), (4, 5, 6), (((0, 1), (0, 1)), ((), ()))),
    "no rows": ((2, 0, 5), (5, 6), (((2,), (0,)), ((), ()))),
    "a batch": ((2, 3, 5), (2, 5, 6), (((2,), (1,)), ((0,), (0,)))),
    "an axis in the middle": ((2, 5, 3), (5, 6), (((1,), (0,)), ((), ()))),
    "the kernel turned": ((2, 3, 5), (6, 5), (((2,), (1,)), ((), ()))),
}


@pytest.mark.parametrize("name", DIMS)
def test_flat_dot_general_is_dot_general(name):
    x, kernel, dims = DIMS[name]
    random = np.random.default_rng(0)
    x, kernel = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in (x, kernel))
    plain = (tuple(tuple(a % x.ndim for a in dims[0][0]) if i == 0 else dims[0][1] for i in (0, 1)), dims[1])
    wanted, back = jax.vjp(lambda x, k: lax.dot_general(x, k, plain), x, kernel)
    found, ours = jax.vjp(lambda x, k: flat_dot_general(x, k, dims), x, kernel)
    cotangent = jnp.asarray(random.normal(size=wanted.shape), jnp.float32)
    for one, other in zip((found, *ours(cotangent)), (wanted, *back(cotangent)), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused_as_dot_general_does():
    with pytest.raises(TypeError, match="same shape"):
        flat_dot_general(jnp.ones((5, 3, 4)), jnp.ones((4, 3, 5)), (((1, 2), (0, 1)), ((), ())))


def test_dtypes_are_those_of_dot_general():
    x, kernel = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16)
    dims = (((2,), (0,)), ((), ()))
    assert flat_dot_general(x, kernel, dims).dtype == jnp.bfloat16
    assert flat_dot_general(x, kernel, dims, preferred_element_type=jnp.float32).dtype == jnp.float32
    assert product(x, kernel.astype(jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize("space", [(), (3,), (2, 3), (2, 2, 3)])
def test_product_is_matmul(space):
    x, kernel = jax.random.normal(jax.random.key(0), (*space, 4)), jax.random.normal(jax.random.key(1), (4, 5))
    np.testing.assert_allclose(product(x, kernel), x @ kernel, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 4), (16, 8), (9, 1)])
def test_a_tall_kernels_derivatives_are_those_of_matmul(inputs, outputs, dtype):
    """Values, forwards, backwards, backwards of backwards and over a population, of the kernel, of x and of both."""
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, *shape: jax.random.normal(key, shape).astype(dtype)  # noqa: E731
    x, kernel = draw(keys[0], 8, 4, inputs), draw(keys[1], inputs, outputs)
    moves = draw(keys[2], 8, 4, inputs), draw(keys[3], inputs, outputs)

    def found(times):
        loss = lambda x, k: jnp.tanh(times(x, k).astype(jnp.float32)).sum()  # noqa: E731
        slope = lambda x, k: sum((g.astype(jnp.float32) ** 2).sum() for g in jax.grad(loss, (0, 1))(x, k))  # noqa: E731
        yield times(x, kernel)
        for which in (0, 1, (0, 1)):
            yield jax.grad(loss, which)(x, kernel)
            yield jax.grad(slope, which)(x, kernel)
        yield jax.jvp(times, (x, kernel), moves)
        yield jax.jvp(lambda k: times(x, k), (kernel,), moves[1:])
        yield jax.vmap(jax.grad(loss, 1), (None, 0))(x, jnp.stack([kernel, 2 * kernel]))
        yield jax.grad(jax.checkpoint(loss), (0, 1))(x, kernel)

    bound = 1e-5 if dtype == jnp.float32 else 5e-2
    for one, other in zip(found(product), found(jnp.matmul), strict=True):
        assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, other)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype
            scale = float(jnp.abs(b).max())
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=bound, atol=bound * scale)


def test_products_of_integers_are_matmuls():
    x, kernel = jnp.arange(1024).reshape(64, 16), jnp.arange(64).reshape(16, 4)
    np.testing.assert_array_equal(product(x, kernel), x @ kernel)
    np.testing.assert_array_equal(product(x.astype(jnp.float32), kernel), x @ kernel)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU backend")
@pytest.mark.parametrize("shape", [(64, 512), (2, 32, 512)])
def test_the_gradient_to_a_tall_kernel_is_a_wide_product(shape):
    def wide(times):
        text = jax.jit(jax.grad(lambda k, x: (times(x, k) ** 2).sum())).lower(jnp.ones((512, 16)), jnp.ones(shape))
        lines = text.compile().as_text().splitlines()
        return any("f32[16,512]" in line and " dot(" in line for line in lines)

    assert wide(product)
    assert not wide(jnp.matmul)


@pytest.mark.parametrize("policy", ["dots_saveable", "dots_with_no_batch_dims_saveable", "nothing_saveable"])
def test_a_tall_kernels_product_is_saved_where_a_policy_saves_products(policy):
    x, kernel = jnp.ones((64, 16)), jnp.ones((16, 4))

    def products(times):
        def loss(x, k):
            return jnp.sin(times(jnp.concatenate([jnp.tanh(times(x, k))] * 4, -1), k)).sum()

        grad = jax.grad(jax.checkpoint(loss, policy=getattr(jax.checkpoint_policies, policy)), (0, 1))
        return str(jax.make_jaxpr(grad)(x, kernel)).count("dot_general[")

    assert products(product) == products(jnp.matmul)


def test_an_integer_product_of_floats_has_a_derivative():
    dims = (((1,), (0,)), ((), ()))
    times = lambda k: flat_dot_general(jnp.ones((64, 16)), k, dims, preferred_element_type=jnp.int32)  # noqa: E731
    assert not jax.grad(lambda k: times(k).astype(jnp.float32).sum())(jnp.ones((16, 4))).any()


def test_sizes_may_be_symbols():
    """Of the batch, and of the kernel: what cannot be compared is multiplied as it is."""
    sizes = export.symbolic_shape("b, i, o")
    x, kernel = jax.ShapeDtypeStruct(sizes[:2], jnp.float32), jax.ShapeDtypeStruct(sizes[1:], jnp.float32)
    exported = export.export(jax.jit(lambda x, k: jax.grad(lambda k: product(x, k).sum())(k)))(x, kernel)
    np.testing.assert_allclose(exported.call(jnp.ones((5, 4)), jnp.ones((4, 1))), 5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU backend")
def test_nothing_is_transposed_for_the_gradient_to_a_kernel():
    """The cotangent of a layer between others, which Flax's own product writes once more."""

    def transposed(**options):
        model = nn.Sequential([nn.Dense(64, **options), jnp.tanh, nn.Dense(64, **options)])
        x = jnp.ones((4, 32, 64))
        loss = lambda params: (model.apply(params, x) ** 2).sum()  # noqa: E731
        text = jax.jit(jax.grad(loss)).lower(model.init(jax.random.key(0), x)).compile().as_text()
        return text.split("\nENTRY ")[1].count("= f32[64,128]{1,0}")

    assert transposed() > 0
    assert transposed(dot_general_cls=flat_products) == 0
    assert transposed(dot_general=flat_dot_general) == 0
