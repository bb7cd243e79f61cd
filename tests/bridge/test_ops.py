"""Each operator against torch's own: values, dtypes, and gradients where there are any."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from esper_jax.bridge import BridgeError, register_op, supported_ops  # noqa: E402
from esper_jax.bridge.convert import numpy_of  # noqa: E402
from esper_jax.bridge.graph import Dtype  # noqa: E402
from esper_jax.bridge.ops import registry  # noqa: E402
from esper_jax.bridge.ops.registry import Last, find, result_dtype  # noqa: E402
from esper_jax.bridge.torch_random import EveryUnit  # noqa: E402

from .layer_cases import CASES  # noqa: E402
from .zoo import MODELS  # noqa: E402

pytestmark = pytest.mark.torch
SAME = {"int64": "int32", "float64": "float32", "complex128": "complex64"}
INDIRECT = {
    "aten.native_dropout.default", "aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default",
    "aten.bernoulli.p", "aten.rrelu_with_noise_functional.default",
}  # fmt: skip
"""Random ones: tested by the share that they keep (`test_module.py`), and in models (`test_random.py`)."""


def ours(value):
    if isinstance(value, torch.Tensor):
        return jnp.asarray(numpy_of(value))
    if isinstance(value, torch.dtype):
        return Dtype(str(value).removeprefix("torch."))
    return tuple(ours(v) for v in value) if isinstance(value, list | tuple) else value


def flat(value):
    if isinstance(value, Last):
        return [jnp.moveaxis(value.array, -1, 1)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in flat(item)]
    return [value]


NUMBERLESS = {
    "relu": (), "relu6": (), "hardtanh": (), "hardsigmoid": (), "hardswish": (), "leaky_relu": (), "elu": (),
    "clamp_min": (0.0,), "threshold": (0.1, 20.0), "clamp": (-1.0, 1.0), "amax": ([1],), "amin": ([1],),
    "softmax.int": (1,), "max.dim": (1,), "min.dim": (1,), "median.dim": (1,), "cummax": (1,), "cummin": (1,),
    "topk": (2, 1), "sort": (1,), "max_pool1d": ([2],), "max_pool2d": ([2, 2],), "adaptive_max_pool1d": ([3],),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERLESS)
def test_what_is_no_number_stays_one(name):
    """A divergence must not be hidden."""
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    x[0, 1, 2] = x[1, 4] = torch.nan
    packet, _, overload = name.partition(".")
    rest, overload = NUMBERLESS[name], overload or "default"
    wanted = flat(getattr(getattr(torch.ops.aten, packet), overload)(x, *rest))
    found = flat(find(f"aten.{packet}.{overload}").fn(ours(x), *ours(rest)))
    for got, want in zip(found, wanted, strict=True):
        assert np.array_equal(np.isnan(np.asarray(got)), np.isnan(want.numpy()))


@pytest.mark.parametrize(("shape", "axis"), [((), 0), ((0, 4), 1), ((2, 0), 0)])
def test_the_largest_of_one_and_of_an_empty_batch_has_a_gradient(shape, axis):
    grad = jax.grad(lambda x: jnp.sum(find("aten.amax.default").fn(x, (axis,))))(jnp.ones(shape))
    assert grad.shape == shape and bool(jnp.all(grad == 1))


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_operator_gives_what_torch_gives(name):
    packet, overload = name.split(".")
    reference = getattr(getattr(torch.ops.aten, packet), overload)
    op = find(f"aten.{name}")
    assert op is not None, f"{name} is not registered"
    for args in CASES[name]:
        kwargs = args[-1] if args and isinstance(args[-1], dict) else {}
        args = args[: len(args) - bool(kwargs)]
        cloned = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, list(args))
        with EveryUnit():
            wanted = flat(reference(*cloned, **kwargs))
        more = {"draw": lambda: None} if op.random else {}
        found = flat(op.fn(*ours(args), **{k: ours(v) for k, v in kwargs.items()}, **more))
        for got, want in zip(found, wanted, strict=False):
            if got is None or not isinstance(want, torch.Tensor):
                continue
            wide = str(want.dtype).removeprefix("torch.")
            assert got.dtype == SAME.get(wide, wide), name
            want = numpy_of(want)
            assert got.shape == want.shape, name
            limit = 2e-2 if wide == "bfloat16" else 2e-5
            np.testing.assert_allclose(
                np.asarray(got).astype(np.complex128), want.astype(np.complex128), rtol=limit, atol=limit, err_msg=name
            )


DIFFERENTIABLE = [
    name for name in sorted(CASES)
    if not name.startswith(("_native_batch_norm_legit_no", "fft", "_fft", "view_as_complex", "complex", "polar"))
]  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_its_gradient_is_torchs(name):
    packet, overload = name.split(".")
    reference, op = getattr(getattr(torch.ops.aten, packet), overload), find(f"aten.{name}")
    for args in CASES[name][:2]:
        kwargs = args[-1] if args and isinstance(args[-1], dict) else {}
        args = list(args[: len(args) - bool(kwargs)])
        if not args or not isinstance(args[0], torch.Tensor) or args[0].dtype != torch.float32:
            continue
        x = args[0].clone().requires_grad_()
        with EveryUnit():
            output = reference(x, *args[1:], **kwargs)
        output = output[0] if isinstance(output, list | tuple) else output
        if not output.requires_grad or output.is_complex():
            continue
        weights = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)) + 0.5
        try:
            (want,) = torch.autograd.grad((output.float() * weights).sum(), x)
        except RuntimeError:
            continue  # torch has none

        def loss(first, rest=args[1:], kwargs=kwargs, weights=weights):
            more = {"draw": lambda: None} if op.random else {}
            found = flat(op.fn(first, *ours(rest), **{k: ours(v) for k, v in kwargs.items()}, **more))[0]
            return jnp.sum(found.astype(jnp.float32) * numpy_of(weights))

        got = jax.jit(jax.grad(loss))(ours(args[0]))
        np.testing.assert_allclose(np.asarray(got), want.numpy(force=True), rtol=1e-4, atol=1e-4, err_msg=name)


def test_every_registered_operator_has_a_case_or_is_python():
    names = {name for name in supported_ops() if name.startswith("aten.")}
    left = {n.removeprefix("aten.") for n in names - INDIRECT} - set(CASES) - UNTESTED_HERE
    assert not left, sorted(left)


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("last", [False, True])
def test_bags_of_any_length_are_torchs(mode, padding, last):
    """Empty bags, ids behind the last offset, and a bag of nothing but padding too; gradients as well."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 3, generator=generator, requires_grad=True)
    ids, offsets = torch.tensor([0, 5, 2, 2, 2, 3, 1, 1]), torch.tensor([0, 2, 2, 4, 5, 8 if last else 6])
    args = (weight, ids, offsets, False, mode, False, None, last, padding)
    want = torch.ops.aten.embedding_bag.padding_idx(*args)[0]
    op = find("aten.embedding_bag.padding_idx")
    got = op.fn(*ours(args))[0]
    np.testing.assert_allclose(got, want.numpy(force=True), atol=1e-6)
    (want * want.detach().cos()).sum().backward()
    gradient = jax.grad(lambda w: jnp.sum(op.fn(w, *ours(args[1:]))[0] * jnp.cos(got)))(ours(weight))
    np.testing.assert_allclose(gradient, weight.grad.numpy(), atol=1e-6)


@pytest.mark.parametrize(("mode", "axes"), [(0, 2), (1, 2), (2, 2), (0, 3), (1, 3)])
@pytest.mark.parametrize("padding", range(3))
def test_sampling_learns_its_values_and_its_places_as_torch_does(mode, axes, padding):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(2, 3, *range(4, 4 + axes), generator=generator)
    grid = 1.5 * torch.randn(2, *[3] * axes, axes, generator=generator)
    grid[0, 0] = torch.tensor([-1.0, 0.0, 1.0])[:, None]  # at the borders and in the middle
    op = find("aten.grid_sampler.default")
    for align in (False, True):
        leaves = image.clone().requires_grad_(), grid.clone().requires_grad_()
        output = torch.ops.aten.grid_sampler(*leaves, mode, padding, align)
        weights = output.detach().cos()
        want = torch.autograd.grad((output * weights).sum(), leaves)

        def loss(image, grid, align=align, weights=ours(weights)):
            return jnp.sum(op.fn(image, grid, mode, padding, align) * weights)

        got = jax.jit(jax.grad(loss, (0, 1)))(ours(image), ours(grid))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-4)


UNTESTED_HERE = {
    "embedding_bag.padding_idx",  # of what it gives, its output only: above
    "empty.memory_format", "empty_like.default", "new_empty.default",  # zeros here, anything in torch
    "sym_size.int", "sym_numel.default",  # sizes: every model of the zoo
    "as_strided.default",  # refused: below
}  # fmt: skip


def test_memory_as_torch_lays_it_out_is_refused():
    with pytest.raises(BridgeError, match="JAX arrays have no strides"):
        find("aten.as_strided.default").fn(jnp.ones(4), (2, 2), (1, 1))


class After(torch.nn.Module):
    """A function of a convolution's output (which has its channels last) and of further inputs."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = torch.nn.Conv2d(2, 3, 2), function

    def forward(self, x, *more):
        return self.function(self.conv(x), *more)


def _losses(x, target):
    """All that need no more than an output, its probability or its sign as a target."""
    chance, sign, sure = target.sigmoid(), target.sign(), x.sigmoid()
    functions = torch.nn.functional
    return (
        functions.poisson_nll_loss(x, target.exp(), full=True),
        functions.poisson_nll_loss(sure, target.exp(), log_input=False, reduction="none"),
        functions.binary_cross_entropy(sure, chance),
        functions.margin_ranking_loss(x, target, sign, margin=0.5),
        functions.hinge_embedding_loss(x, sign),
        functions.cosine_embedding_loss(x.flatten(1), target.flatten(1), sign[:, 0, 0, 0], margin=-1.0),
        functions.triplet_margin_loss(x, target, chance, swap=True),
        functions.multi_margin_loss(x.flatten(1), (sign > 0).long()[:, 0, 0, 0]),
        functions.multilabel_margin_loss(x.flatten(1), (sign > 0).long().flatten(1)),
        functions.multilabel_soft_margin_loss(x.flatten(1), chance.flatten(1)),
        functions.soft_margin_loss(x, sign),
        functions.cross_entropy(x, chance.softmax(1), weight=sure[0, :, 0, 0].detach(), label_smoothing=0.1),
        functions.pairwise_distance(x, target),
    )


def _unpooled(x):
    values, places = torch.nn.functional.max_pool2d(x, 3, 1, return_indices=True)
    flat = torch.nn.functional.max_pool1d(x.flatten(2), 2, return_indices=True)
    unpooled = torch.nn.functional.max_unpool2d(values, places, 3, 1, output_size=x.shape)
    return unpooled, torch.nn.functional.max_unpool1d(*flat, 2)


IMPORTED = {
    "sampling": (
        lambda x, grid: torch.nn.functional.grid_sample(x, grid, "bicubic", "reflection", align_corners=True),
        lambda: (torch.randn(2, 4, 4, 2),),
    ),
    "antialias": (
        lambda x: torch.nn.functional.interpolate(x, (2, 7), mode="bicubic", antialias=True),
        tuple,
    ),
    "unpooling": (_unpooled, tuple),
    "places of an adaptive pool": (
        lambda x: torch.nn.functional.adaptive_max_pool2d(x.relu(), (2, 3), return_indices=True),
        tuple,
    ),
    "losses": (_losses, lambda: (torch.randn(2, 3, 5, 4),)),
}


@pytest.mark.parametrize("name", IMPORTED)
def test_a_module_with_it_is_imported(name):
    import esper_jax

    function, more = IMPORTED[name]
    found = esper_jax.from_torch(After(function), (torch.randn(2, 2, 6, 5), *more()))
    assert found.report.checks and found.report.passed


def test_an_operator_of_ones_own_is_registered_and_used(monkeypatch):
    import esper_jax

    monkeypatch.setattr(registry, "_OPS", dict(registry._OPS))

    class Bessel(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    x = torch.rand(3, 4)
    with pytest.raises(esper_jax.bridge.BridgeError, match="register_op"):
        esper_jax.from_torch(Bessel(), x)

    def series(x):  # converges fast where |x| < 1
        terms = [
            (-1) ** k * (x / 2) ** (2 * k) / float(np.prod(np.arange(1, k + 1), initial=1.0)) ** 2 for k in range(8)
        ]
        return sum(terms)

    register_op("aten.special_bessel_j0.default", series, elementwise=True)
    model, variables = esper_jax.from_torch(Bessel(), x)
    np.testing.assert_allclose(model.apply(variables, x.numpy()), torch.special.bessel_j0(x).numpy(), rtol=1e-5)
    with pytest.raises(ValueError, match="no operator's full name"):
        register_op("bessel", series)
    with pytest.raises(TypeError, match="fn must be callable"):
        register_op("a.b.c", 3)


def test_dtypes_meet_as_torch_has_it():
    """Arrays with axes decide, then those without, then numbers."""
    half, full, whole = (jnp.zeros((2,), d) for d in (jnp.bfloat16, jnp.float32, jnp.int32))
    zero = jnp.zeros((), jnp.float32)
    assert result_dtype(half, zero) == jnp.bfloat16
    assert result_dtype(half, 2.5) == jnp.bfloat16
    assert result_dtype(half, full) == jnp.float32
    assert result_dtype(whole, zero) == jnp.float32
    assert result_dtype(whole, 2.5) == jnp.float32
    assert result_dtype(whole, 2) == jnp.int32
    assert result_dtype(jnp.zeros((2,), bool), 2) == jnp.int32


def test_the_zoo_is_large_enough():
    assert len(MODELS) >= 40
