"""Convolutions that a CPU computes another way are XLA's own, forwards and backwards."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from esper_jax.kasmina import conv_general_dilated as convolve
from esper_jax.kasmina import flat_products, morph
from esper_jax.kasmina.convolutions import _ways, dimension_numbers


def reference(x, kernel, strides, padding, *given):
    """XLA's convolution of an input that is padded beforehand: some that are cut on one side it computes wrongly."""
    space = [(low, high, 0) for low, high in padding]
    padded = lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *space, (0, 0, 0)])
    return lax.conv_general_dilated(padded, kernel, strides, [(0, 0)] * len(space), *given)


CASES = {  # spatial axes, inputs, kernel, outputs, strides, padding, dilation, groups
    "one tap": (2, 6, (1, 1), 10, (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    "one tap, strided and dilated": (2, 6, (1, 1), 10, (2, 3), ((0, 0), (0, 0)), (2, 2), 1),
    "one tap in one dimension": (1, 5, (1,), 64, (2,), ((0, 0),), (1,), 1),
    "one tap in three dimensions": (3, 4, (1, 1, 1), 2, (1, 2, 1), ((0, 0),) * 3, (1, 1, 1), 1),
    "one tap, padded": (2, 6, (1, 1), 10, (1, 1), ((1, 1), (0, 2)), (1, 1), 1),
    "one tap a group": (2, 6, (1, 1), 6, (1, 1), ((0, 0), (0, 0)), (1, 1), 2),
    "three channels": (2, 3, (3, 3), 32, (2, 1), ((1, 1), (0, 1)), (1, 1), 1),
    "seven channels, dilated": (2, 7, (3, 2), 8, (1, 1), ((2, 2), (0, 0)), (2, 1), 1),
    "five channels in one dimension": (1, 5, (4,), 16, (1,), ((2, 1),), (1,), 1),
    "three channels, many outputs": (2, 3, (3, 3), 48, (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
    "many channels": (2, 16, (3, 3), 24, (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
    "many channels, padded unevenly": (2, 24, (3, 4), 16, (1, 1), ((0, 2), (2, 1)), (1, 1), 1),
    "many channels along an axis": (2, 16, (1, 3), 24, (1, 1), ((0, 0), (1, 1)), (1, 1), 1),
    "many channels along the other": (2, 16, (3, 1), 24, (1, 1), ((1, 1), (0, 0)), (1, 1), 1),
    "many channels, not padded": (2, 16, (2, 2), 24, (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    "many channels, larger than the input": (2, 16, (3, 3), 24, (1, 1), ((2, 2), (2, 2)), (1, 1), 1),
    "many channels, dilated": (2, 16, (3, 3), 24, (1, 1), ((2, 2), (2, 2)), (2, 2), 1),
    "many channels, strided": (2, 32, (3, 3), 24, (2, 2), ((1, 1), (0, 1)), (1, 1), 1),
    "many channels, strided along an axis": (2, 32, (3, 3), 24, (2, 1), ((1, 1), (0, 1)), (1, 1), 1),
    "many channels, strided in one dimension": (1, 32, (3,), 24, (2,), ((1, 1),), (1,), 1),
    "many channels, strided in three dimensions": (
        3,
        32,
        (2, 1, 2),
        8,
        (2, 3, 2),
        ((0, 1), (0, 0), (0, 0)),
        (1,) * 3,
        1,
    ),
    "many channels, cut off": (2, 16, (3, 3), 24, (1, 1), ((0, 1), (-1, 1)), (1, 1), 1),
    "many channels, strided, with no output": (2, 32, (10, 3), 24, (2, 2), ((0, 0), (0, 0)), (1, 1), 1),
    "few channels, cut off": (2, 8, (3, 3), 8, (1, 1), ((-1, 1), (0, 0)), (1, 1), 1),
    "five channels, cut off": (2, 5, (3, 3), 8, (1, 1), ((1, 0), (2, -1)), (1, 1), 1),
    "depthwise, cut off": (2, 4, (3, 3), 8, (1, 1), ((-1, 1), (2, -1)), (1, 1), 4),
    "depthwise, in blocks": (2, 4, (2, 3), 4, (1, 1), ((0, 0), (1, 1)), (1, 1), 4),
    "depthwise, far strides": (2, 4, (3, 3), 4, (9, 10), ((1, 1), (2, 3)), (1, 1), 4),
    "depthwise": (2, 4, (3, 3), 8, (2, 1), ((1, 1), (2, 0)), (1, 2), 4),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_xlas_convolution(case):
    spatial, inputs, size, outputs, strides, padding, dilation, groups = CASES[case]
    random = np.random.default_rng(0)
    x = random.normal(size=(6, *(9,) * spatial, inputs)).astype(np.float32)
    kernel = random.normal(size=(*size, inputs // groups, outputs)).astype(np.float32)
    given = (strides, padding, None, dilation, dimension_numbers(spatial), groups)
    wanted, back = jax.vjp(lambda x, k: reference(x, k, *given), x, kernel)
    found, ours = jax.vjp(lambda x, k: convolve(x, k, *given), x, kernel)
    cotangent = random.normal(size=wanted.shape).astype(np.float32)
    for one, other in zip((found, *ours(cotangent)), (wanted, *back(cotangent)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


LARGE = {  # images, rows, inputs, kernel, outputs, strides, padding: each with another choice of ways
    "all stretched": (16, 12, 32, (3, 3), 32, (1, 1), ((1, 1), (1, 1))),
    "all stretched, padded unevenly": (16, 13, 32, (3, 4), 40, (1, 1), ((0, 2), (3, 1))),
    "all stretched, cut off": (16, 14, 32, (3, 3), 32, (1, 1), ((1, -1), (-1, 2))),
    "all stretched, cut off on every side": (16, 16, 32, (3, 3), 32, (1, 1), ((-1, -1), (-2, 0))),
    "stretched forwards": (4, 24, 32, (3, 3), 32, (1, 1), ((1, 1), (1, 1))),
    "stretched in the kernel alone": (32, 12, 16, (3, 3), 32, (1, 1), ((1, 1), (1, 1))),
    "strided, patches for the input": (32, 12, 32, (3, 3), 64, (2, 2), ((1, 1), (1, 1))),
    "strided, padded unevenly, cut off": (32, 13, 32, (3, 3), 64, (2, 2), ((-1, 1), (0, 2))),
    "strided, many taps": (32, 12, 32, (5, 5), 32, (2, 2), ((2, 2), (2, 2))),
    "strided along an axis": (16, 12, 32, (3, 3), 48, (1, 2), ((1, 1), (1, 1))),
    "strided along the other": (16, 12, 32, (3, 3), 48, (3, 1), ((1, 1), (1, 1))),
    "strided, larger than the output": (4, 4, 32, (3, 3), 48, (2, 2), ((1, 1), (1, 1))),
    "strided, few images": (2, 12, 32, (3, 3), 48, (2, 2), ((1, 1), (1, 1))),
}


@pytest.mark.parametrize("case", LARGE)
def test_each_way_of_a_large_convolution_gives_the_numbers_of_xlas_in_every_derivative(case):
    images, rows, inputs, size, outputs, strides, padding = LARGE[case]
    random = np.random.default_rng(1)
    x = random.normal(size=(images, rows, rows + 1, inputs)).astype(np.float32)
    kernel = random.normal(size=(*size, inputs, outputs)).astype(np.float32) / 10
    assert set(ways(x, kernel, strides, padding)) != {"plain"}
    given = (strides, padding, None, (1, 1), dimension_numbers(2), 1)

    def derivatives(conv):
        def value(x, kernel):
            return (conv(x, kernel, *given) ** 2).sum()

        grads = jax.grad(value, (0, 1))
        tangents = 0.1 * x, kernel
        both = jax.jvp(lambda x, k: conv(x, k, *given), (x, kernel), tangents)
        one = jax.jvp(lambda k: conv(x, k, *given), (kernel,), tangents[1:])
        return both, one, grads(x, kernel), jax.jvp(grads, (x, kernel), tangents)

    found, wanted = (jax.jit(derivatives, static_argnums=0)(conv) for conv in (convolve, reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), found, wanted)


class Host(nn.Module):
    """A Flax model whose layers compute as this library's do, or as Flax's do."""

    ours: bool
    padding: str

    @nn.compact
    def __call__(self, x):
        conv = {"conv_general_dilated": convolve} if self.ours else {}
        dense = {"dot_general_cls": flat_products} if self.ours else {}
        x = nn.relu(nn.Conv(32, (3, 3), padding=self.padding, **conv)(x))
        x = nn.relu(nn.Conv(48, (3, 3), strides=2, padding=self.padding, **conv)(x))
        x = nn.relu(nn.Conv(48, (3, 3), kernel_dilation=2, feature_group_count=48, padding=self.padding, **conv)(x))
        return nn.Dense(5, **dense)(nn.ConvTranspose(8, (2, 2), strides=(2, 2))(x).mean((1, 2)))


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
def test_flaxs_layers_take_it_and_remain_sites(padding):
    x = np.random.default_rng(2).normal(size=(16, 16, 18, 3)).astype(np.float32)
    ours, plain = Host(True, padding), Host(False, padding)
    variables = plain.init(jax.random.key(0), x)
    grads = [jax.jit(jax.grad(lambda v, m=m: (m.apply(v, x) ** 2).sum()))(variables) for m in (ours, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), *grads)
    found = [morph(variables, model=m, example=x).spec for m in (ours, plain)]
    assert found[0].sites == found[1].sites


def test_other_dimension_numbers_and_types_are_left_to_xla():
    x, kernel = np.ones((16, 32, 12, 12), np.float32), np.ones((32, 32, 3, 3), np.float32)
    given = ((1, 1), "SAME")
    first = jax.make_jaxpr(lambda x, k: convolve(x, k, *given))(x, kernel)
    assert str(first) == str(jax.make_jaxpr(lambda x, k: lax.conv_general_dilated(x, k, *given))(x, kernel))
    last = np.ones((16, 12, 12, 32), np.float32), np.ones((3, 3, 32, 32), np.float32)
    half = [x.astype(jnp.bfloat16) for x in last]
    wide = convolve(*half, *given, dimension_numbers=dimension_numbers(2), preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("way", ["shard_map", "explicit"])
def test_parts_on_several_devices_are_convolved_and_differentiated(groups, way):
    if len(jax.devices()) < 2:
        several = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",  # elsewhere the flag adds no device, and this would begin anew in each process
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
        }
        name = f"{__file__}::test_parts_on_several_devices_are_convolved_and_differentiated[{way}-{groups}]"
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", name], env=several, check=False)
        assert done.returncode == 0
        return
    auto = way == "shard_map"
    kind = jax.sharding.AxisType.Auto if auto else jax.sharding.AxisType.Explicit
    mesh, spec = jax.make_mesh((2,), ("d",), axis_types=(kind,), devices=jax.devices()[:2]), jax.sharding.PartitionSpec
    x = np.random.default_rng(3).normal(size=(4, 8, 8, 8)).astype(np.float32)
    kernel = np.ones((3, 3, 8 // groups, 8), np.float32)

    def grad(conv, x, kernel):
        return jax.grad(
            lambda x: (conv(x, kernel, (1, 1), "SAME", None, None, dimension_numbers(2), groups) ** 2).sum()
        )(x)

    with jax.set_mesh(mesh):
        ours = functools.partial(grad, convolve)
        if auto:
            ours = jax.shard_map(ours, mesh=mesh, in_specs=(spec("d"), spec()), out_specs=spec("d"))
        found = jax.jit(ours)(jax.device_put(x, jax.NamedSharding(mesh, spec("d"))), kernel)
    np.testing.assert_allclose(found, grad(lax.conv_general_dilated, x, kernel), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 4])
def test_no_images_and_no_output_are_as_xlas(groups):
    given = (1, 1), "VALID", None, None, dimension_numbers(2), groups
    for shape, size in (((0, 6, 6, 4), (3, 3)), ((2, 2, 2, 4), (4, 1))):
        x, kernel = np.ones(shape, np.float32), np.ones((*size, 4 // groups, 4), np.float32)
        values = (lambda k, x=x, c=conv: c(x, k, *given).sum() for conv in (convolve, lax.conv_general_dilated))
        both = [jax.value_and_grad(value)(kernel) for value in values]
        chex.assert_trees_all_equal(*both)


@pytest.mark.parametrize("groups", [1, 32])
def test_every_size_may_be_open(groups):
    n, h, w = jax.export.symbolic_shape("n, 4*h, 4*w")
    for size, strides, padding in (((1, 1), (2, 2), ((0, 0),) * 2), ((3, 3), (1, 1), ((1, 1), (0, 2)))):
        given = strides, padding, None, None, dimension_numbers(2), groups
        grad = jax.jit(jax.grad(lambda x, k: (convolve(x, k, *given) ** 2).sum(), (0, 1)))  # noqa: B023
        x, kernel = np.ones((2, 8, 12, 32), np.float32), np.ones((*size, 32 // groups, 32), np.float32)
        shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((n, h, w, 32), kernel.shape)]
        for one, other in zip(jax.export.export(grad)(*shapes).call(x, kernel), grad(x, kernel), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4)


def test_all_that_xlas_takes_is_taken_by_position_and_name():
    x, kernel = np.ones((4, 8, 8, 4), np.float32), np.ones((3, 3, 4, 4), np.float32)
    given = (1, 1), "SAME", None, np.array([1, 1]), dimension_numbers(2), 1
    wanted = lax.conv_general_dilated(x, kernel, *given, 2)
    np.testing.assert_array_equal(convolve(x, kernel, *given, 2), wanted)
    np.testing.assert_array_equal(convolve(x, kernel, *given, batch_group_count=2), wanted)
    found = convolve(x, kernel, *given, 1, lax.Precision.HIGHEST)
    np.testing.assert_allclose(found, lax.conv_general_dilated(x, kernel, *given, 1, lax.Precision.HIGHEST), rtol=1e-5)
    depthwise = np.ones((3, 3, 1, 8), np.float32)
    for groups in (2, 8):
        with pytest.raises(ValueError, match="feature_group_count"):
            convolve(x, depthwise, *given[:-1], groups)
    with pytest.raises(TypeError, match="same dtypes"):
        convolve(x, np.ones((1, 1, 4, 4), jnp.bfloat16), *given)


@pytest.mark.parametrize(
    ("strides", "padding"),
    [((1,), "SAME"), ((1, 1), ((1, 1),)), ((0, 1), "SAME"), ((1, 1), "SOME"), ((1, 1, 1), "SAME")],
)
def test_what_is_wrong_is_said_as_xlas_convolution_says_it(strides, padding):
    x, kernel = np.ones((2, 8, 8, 4), np.float32), np.ones((3, 3, 4, 4), np.float32)
    said = []
    for conv in (convolve, lax.conv_general_dilated):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
            conv(x, kernel, strides, padding, dimension_numbers=dimension_numbers(2))
        said.append((type(raised.value), str(raised.value)[:60]))
    assert said[0] == said[1]


def ways(x, kernel, strides, padding):
    """The names of what computes the three ways of a convolution."""
    found = _ways(None, x, kernel, strides, padding, None) or (None,) * 3
    return ["plain" if way is None else way.func.__name__ for way in found]


def test_each_way_is_chosen_by_itself():
    x, strided = np.ones((32, 12, 13, 32), np.float32), np.ones((3, 3, 32, 64), np.float32)
    assert ways(x, strided, (2, 2), ((1, 1),) * 2) == ["_stretched", "_patches", "_stretched"]
    assert ways(x[:2], strided, (2, 2), ((1, 1),) * 2) == ["_patches"] * 3
    assert ways(x, strided, (1, 1), ((1, 1),) * 2) == ["_stretched"] * 3
    assert ways(x[:15], strided, (1, 1), ((1, 1),) * 2) == ["_stretched", "_stretched", "plain"]
    assert ways(x[..., :16], strided[:, :, :16], (1, 1), ((1, 1),) * 2) == ["plain", "plain", "_stretched"]
    assert ways(x[:2], strided[..., :16], (1, 1), ((1, 1),) * 2) == ["plain"] * 3
    many = np.ones((5, 5, 32, 32), np.float32)
    assert ways(x, many, (2, 2), ((2, 2),) * 2) == ["_stretched", "plain", "_stretched"]
    assert ways(x[:, :6, :6], many, (2, 2), ((2, 2),) * 2)[1] == "_patches"  # larger than the output
    assert ways(x.astype(jnp.bfloat16), strided, (1, 1), ((1, 1),) * 2) == ["plain"] * 3
    assert ways(x[..., :3], strided[:, :, :3, :32], (1, 1), ((1, 1),) * 2) == ["_patches"] * 3


def test_a_gradient_that_is_not_asked_for_is_not_computed():
    x, kernel = np.ones((16, 12, 12, 32), np.float32), np.ones((3, 3, 32, 32), np.float32)
    call = functools.partial(
        convolve, window_strides=(1, 1), padding=((1, 1),) * 2, dimension_numbers=dimension_numbers(2)
    )
    for argument in (0, 1):
        grad = jax.jit(jax.grad(lambda x, k: (call(x, k) ** 2).sum(), argument))
        entry = grad.lower(x, kernel).compile().as_text().split("\nENTRY ")[-1]
        assert entry.count(" convolution(") == 2 or jax.default_backend() != "cpu"


def test_sizes_may_be_open_in_an_exported_program():
    n, h, w = jax.export.symbolic_shape("n, h, w")
    for inputs, outputs, stride in ((3, 16, 1), (32, 32, 1), (32, 32, 2)):
        call = functools.partial(
            convolve, window_strides=(stride,) * 2, padding=((1, 1), (1, 1)), dimension_numbers=dimension_numbers(2)
        )
        x, kernel = jnp.ones((3, 20, 10, inputs)), jnp.ones((3, 3, inputs, outputs))
        for shape in ((n, h, w, inputs), (n, 20, 10, inputs)):
            open_ = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(kernel.shape, jnp.float32)
            found = jax.export.export(jax.jit(call))(*open_).call(x, kernel)
            np.testing.assert_allclose(found, call(x, kernel), rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_batch_may_be_open_in_exported_gradients_of_a_depthwise_convolution(stride):
    (n,) = jax.export.symbolic_shape("n")
    call = functools.partial(
        convolve,
        window_strides=(stride,) * 2,
        padding=((1, 1), (1, 1)),
        dimension_numbers=dimension_numbers(2),
        feature_group_count=8,
    )
    grads = jax.jit(jax.grad(lambda x, kernel: (call(x, kernel) ** 2).sum(), (0, 1)))
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(6, 8, 8, 8)).astype("f"), random.normal(size=(3, 3, 1, 8)).astype("f")
    open_ = jax.ShapeDtypeStruct((n, *x.shape[1:]), jnp.float32), jax.ShapeDtypeStruct(kernel.shape, jnp.float32)
    found = jax.export.export(grads)(*open_).call(x, kernel)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4), found, grads(x, kernel))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU backend")
@pytest.mark.parametrize("size", [(3, 3), (4, 4), (1, 3), (3, 1), (2, 2)])
def test_no_direction_of_many_channels_goes_to_ynnpack(size):
    x, kernel = np.ones((32, 16, 16, 32), np.float32), np.ones((*size, 32, 32), np.float32)
    padding = tuple((n // 2, (n - 1) // 2) for n in size)
    call = functools.partial(convolve, window_strides=(1, 1), padding=padding, dimension_numbers=dimension_numbers(2))
    compiled = jax.jit(jax.grad(lambda x, k: (call(x, k) ** 2).sum(), (0, 1))).lower(x, kernel).compile().as_text()
    fused, entry = compiled.split("\nENTRY ")
    assert entry.count(" convolution(") == 3
    assert " convolution(" not in fused


def test_one_tap_is_a_product_whose_gradients_are_products():
    x, kernel = np.ones((2, 8, 8, 6), np.float32), np.ones((1, 1, 6, 4), np.float32)
    call = functools.partial(
        convolve, window_strides=(1, 1), padding=((0, 0), (0, 0)), dimension_numbers=dimension_numbers(2)
    )
    compiled = jax.jit(jax.grad(lambda x, k: (call(x, k) ** 2).sum(), (0, 1))).lower(x, kernel).compile().as_text()
    if jax.default_backend() == "cpu":
        assert " convolution(" not in compiled
