"""Arguments with which each operator is compared with torch: `CASES[name] = [args, ...]`; a last dict is keywords."""

from __future__ import annotations

from typing import Any

import torch

_g = torch.Generator().manual_seed(0)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_g)


def u(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=_g) * 0.8 + 0.1


def i(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=_g)


def b(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=_g) > 0.5


CASES: dict[str, list[tuple[Any, ...]]] = {}


def case(names: str, *args: tuple[Any, ...]) -> None:
    for name in names.split():
        CASES.setdefault(name, []).extend(args)


for _name in [
    "exp",
    "exp2",
    "expm1",
    "sin",
    "cos",
    "tan",
    "sinh",
    "cosh",
    "tanh",
    "asinh",
    "atan",
    "erf",
    "erfc",
    "sigmoid",
    "sinc",
    "log_sigmoid",
    "neg",
    "abs",
    "sign",
    "sgn",
    "floor",
    "ceil",
    "trunc",
    "frac",
    "square",
    "positive",
    "isnan",
    "isinf",
    "isfinite",
    "conj_physical",
    "relu",
    "clone",
    "detach",
    "alias",
    "silu",
    "selu",
    "mish",
    "celu",
    "elu",
    "gelu",
    "leaky_relu",
    "softplus",
    "hardtanh",
    "relu6",
    "hardsigmoid",
    "hardswish",
    "hardshrink",
    "softshrink",
    "deg2rad",
    "rad2deg",
    "lift_fresh_copy",
    "contiguous",
    "resolve_conj",
    "resolve_neg",
    "conj",
    "real",
    "lift_fresh",
]:
    case(f"{_name}.default", (r(3, 4) * 3,))
for _name in [
    "log",
    "log2",
    "log10",
    "log1p",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "asin",
    "acos",
    "atanh",
    "lgamma",
    "digamma",
    "erfinv",
]:
    case(f"{_name}.default", (u(3, 4),))
case("acosh.default", (u(3) + 1.5,))
case("round.default", (torch.tensor([0.5, 1.5, 2.4, -0.5]),))
case("logical_not.default bitwise_not.default", (b(4),))
case("bitwise_not.default", (i(9, 4),))
case("exp.default sqrt.default sin.default", (i(5, 3) + 1,))
for _name in ["add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge", "remainder", "fmod"]:
    case(f"{_name}.Tensor", (r(3, 4), u(4)), (r(3).bfloat16(), torch.tensor(2.0)), (i(9, 3) + 1, r(3).abs() + 1))
    case(f"{_name}.Scalar", (r(3, 4), 2.5), (i(9, 3), 2))
case("add.Tensor sub.Tensor", (r(3), r(3), {"alpha": 2}))
case("rsub.Scalar", (r(3), 2.0, 3))
case("rsub.Tensor", (r(3), r(3)))
case("floor_divide.default", (r(4) * 5, u(4)), (i(9, 4) - 4, i(3, 4) + 1))
case(
    "div.Tensor_mode",
    (r(4) * 5, u(4), {"rounding_mode": "trunc"}),
    (i(9, 4) - 4, i(3, 4) + 1, {"rounding_mode": "floor"}),
)
case("div.Tensor_mode", (i(9, 4) - 4, i(3, 4) + 1, {"rounding_mode": "trunc"}), (r(3), r(3), {"rounding_mode": None}))
case("div.Scalar_mode", (r(4) * 5, 2, {"rounding_mode": "floor"}))
case("true_divide.Tensor", (i(9, 3), i(3, 3) + 1))
for _name in ["bitwise_and", "bitwise_or", "bitwise_xor"]:
    case(f"{_name}.Tensor", (b(5), b(5)), (i(16, 5), i(16, 5)))
    case(f"{_name}.Scalar", (i(16, 5), 6))
for _name in ["__and__", "__or__", "__xor__"]:
    case(f"{_name}.Tensor", (b(5), b(5)))
    case(f"{_name}.Scalar", (i(16, 5), 6))
case("maximum.default minimum.default fmax.default fmin.default max.other min.other", (r(4), r(4)))
case("logical_and.default logical_or.default logical_xor.default", (b(5), b(5)))
case("atan2.default hypot.default logaddexp.default", (r(4), r(4)))
case("pow.Tensor_Scalar", (u(4), 3), (u(4), 0.5), (u(4), -0.5), (u(4), 1.7), (i(4, 3), 2))
case("pow.Tensor_Tensor", (u(4), r(4)))
case("pow.Scalar", (2.0, r(4)))
case("addcmul.default addcdiv.default", (r(4), r(4), u(4), {"value": 0.5}))
case("lerp.Scalar", (r(4), r(4), 0.7))
case("lerp.Tensor", (r(4), r(4), u(4)))
case("clamp.default clip.default", (r(9), -0.5, 0.5), (r(9), None, 0.2), (i(9, 5), 2, 4))
case("clamp.Tensor", (r(5), r(5) - 1, r(5) + 1))
case("clamp_min.default", (r(5), 0.1))
case("clamp_min.Tensor", (r(5), r(5)))
case("clamp_max.default", (r(5), 0.1))
case("clamp_max.Tensor", (r(5), r(5)))
case("where.self", (b(3, 4), r(3, 4), r(4)))
case("where.ScalarOther", (b(4), r(4), 2.0))
case("where.ScalarSelf", (b(4), 2.0, r(4)))
case("where.Scalar", (b(4), 2.0, 3.0))
case("masked_fill.Scalar", (r(3, 4), b(4), -1.0))
case("masked_fill.Tensor", (r(3, 4), b(4), torch.tensor(-1.0)))
case("nan_to_num.default", (torch.tensor([1.0, float("nan"), float("inf")]), 0.5, 9.0))
case(
    "_to_copy.default",
    (r(4) * 3, {"dtype": torch.int32}),
    (i(4, 4), {"dtype": torch.float32}),
    (r(3), {"dtype": torch.bfloat16}),
)
case("to.dtype", (r(4) * 3, torch.int32))
case("abs.default", (torch.tensor([0.0, -1.0, 2.0]),))
case("rrelu.default", (r(4),), (r(4), 0.2, 0.6), (r(3, 4), 0.2, 0.6, True))
case("rand.default randn.default", ([3, 5],), ([2], {"dtype": torch.bfloat16}))
case("rand_like.default randn_like.default", (r(3, 5),), (r(3, 2, 4), {"dtype": torch.bfloat16}))
case("uniform.default", (r(3, 5),), (r(3, 5), -2.0), (r(3, 5), -2.0, 3.0), (r(2).bfloat16(), 0.5, 2.0))
case("normal_functional.default", (r(3, 5),), (r(3, 5), 1.0, 0.5))
case("normal.Tensor_Tensor", (r(3, 1), u(1, 5)))
case("normal.Tensor_float", (r(3, 5),), (r(3, 5), 0.5))
case("normal.float_Tensor", (0.5, u(3, 5)))
case("normal.float_float", (0.5, 2.0, [3, 5]))
case("exponential.default", (r(3, 5),), (r(3, 5), 2.0))
_zeros = r(3, 4) * torch.tensor([0.0, 1.0, 1.0, 0.0])
case("xlogy.Tensor", (_zeros, u(3, 4) - 0.1 * _zeros.eq(0)), (_zeros, torch.tensor([0.0, 2.0, torch.inf, torch.nan])))
case("xlogy.Scalar_Self", (0.5, u(3, 4) + 0.1))
case("xlogy.Scalar_Other", (r(3, 4), 2))
case("type_as.default", (i(5, 3, 4), r(2)))
case("log_normal.default", (r(3, 5),), (r(3, 5), 0.2, 0.3))
case("cauchy.default", (r(3, 5),), (r(3, 5), 1.0, 2.0))
case("geometric.default", (r(3, 5), 0.3), (i(3, 3, 5), 0.9))
case("_standard_gamma.default", (u(3, 5) * 4 + 0.1,))
case("bernoulli.default", (u(4, 5),), (u(300),))
case("bernoulli.Tensor", (r(4, 5), u(4, 5)))
case("poisson.default", (u(4, 5) * 10,))
case("randint.default", (7, [3, 5]), (7, [3], {"dtype": torch.int32}))
case("randint.low", (-3, 7, [3, 5]))
case("randint_like.default", (r(3, 5), 7))
case("randint_like.low_dtype", (i(5, 3, 5), -3, 7))
case("randperm.default", (9,), (1,))
case("multinomial.default", (u(3, 6), 1), (u(3, 6), 4), (u(3, 6), 9, True), (u(6), 2))
case("gelu.default", (r(9), {"approximate": "tanh"}))
case("threshold.default", (r(5), 0.1, 20.0))
case("prelu.default", (r(2, 3, 4), u(1)))
case("_prelu_kernel.default", (r(2, 3, 4), u(1, 3, 1)))
case("prelu.default", (r(2, 3, 4), u(3)))
case("glu.default", (r(2, 6), 1))
# reductions
case("sum.default mean.default prod.default max.default min.default var.default std.default trace.default", (r(3, 3),))
case("sum.default any.default all.default", (b(3, 4),))
case(
    "sum.dim_IntList mean.dim var.dim std.dim logsumexp.default amax.default amin.default",
    (r(2, 3, 4), [0, -1], True),
    (r(2, 3, 4), [1]),
)
case("sum.dim_IntList", (i(9, 3, 4), [1], False, {"dtype": torch.float32}))
case("prod.dim_int", (u(2, 3), 1, True))
case("max.dim min.dim", (r(3, 4), 1), (r(3, 4), 0, True))
case("aminmax.default", (r(3, 4), {"dim": 1, "keepdim": True}))
case("argmax.default argmin.default", (r(3, 4),), (r(3, 4), 1, True))
case("any.dim all.dim", (b(3, 4), 1))
case("any.dims all.dims", (b(3, 4, 2), [0, 2]))
case("var.correction std.correction", (r(3, 4), [1], {"correction": 0, "keepdim": True}), (r(3, 4),))
case("var_mean.correction std_mean.correction", (r(3, 4), [1], {"correction": 0}))
case("linalg_vector_norm.default", (r(3, 4),), (r(3, 4), 1, [1]), (r(3, 4), float("inf"), [0], True), (r(3, 4), 3, [1]))
case("norm.ScalarOpt_dim", (r(3, 4), 2, [1], True), (r(3, 4), None, [1]))
case("norm.Scalar", (r(3, 4), 2))
case("linalg_norm.default", (r(5),), (r(3, 4), 2, [1]))
case("linalg_matrix_norm.default", (r(3, 4), 1))
case("softmax.int log_softmax.int", (r(3, 4), 1), (r(3, 4).bfloat16(), 0))
case("_softmax.default _log_softmax.default", (r(3, 4), 1, False))
case("_safe_softmax.default", (r(3, 4), 1))
case("cumsum.default cumprod.default logcumsumexp.default cummax.default cummin.default", (r(3, 4), 1))
case("cummax.default cummin.default", (i(3, 2, 7), -1), (torch.tensor(2.0), 0))
case("cumsum.default", (i(5, 4), 0))
case("sort.default", (r(3, 4),), (r(3, 4), 0, True))
case("sort.stable", (i(3, 7), {"stable": True, "dim": 0, "descending": True}))
case("argsort.default", (r(3, 4), 1, True))
case("argsort.stable", (i(3, 7), {"stable": True, "dim": 0, "descending": False}))
case("topk.default", (r(3, 5), 2), (r(3, 5), 2, 0, False))
case("kthvalue.default", (r(3, 5), 2))
case("median.dim", (r(3, 5), 1), (r(3, 4), 1, True))
case("diff.default", (r(3, 5),), (r(5), 2))
case("dist.default", (r(3), r(3), 2.0), (torch.tensor([0.0, 1.0, -2.0]), torch.zeros(3), 1.0))
case("cosine_similarity.default", (r(3, 4), r(3, 4)), (r(3, 4), r(3, 4), 0, 2.0))
case("cdist.default", (r(3, 4), r(5, 4), 1.0))
case("cdist.default", (r(3, 4), r(5, 4), 3.0), (r(2, 3, 4), r(2, 5, 4), 2.0))
case("pairwise_distance.default", (r(3, 4), r(3, 4)), (r(3, 4), r(4), 3.0, 1e-3, True), (r(4), r(4), 1.0))
case("pdist.default _pdist_forward.default", (r(4, 3), 2.0), (r(4, 3), 1.0))
case("count_nonzero.default", (i(2, 9),))
case("count_nonzero.dim_IntList", (i(2, 3, 4), [1]))
# shapes
case("view.default reshape.default _unsafe_view.default view_copy.default", (r(3, 4), [2, -1]))
case("view_as.default reshape_as.default", (r(3, 4), r(4, 3)))
case("expand.default", (r(3, 1), [2, -1, 4]))
case("expand_as.default", (r(1, 4), r(3, 4)))
case("broadcast_to.default", (r(1, 4), [3, 4]))
case("broadcast_tensors.default", ([r(1, 4), r(3, 1)],))
case("permute.default permute_copy.default", (r(2, 3, 4), [2, 0, -2]))
case("transpose.int transpose_copy.int swapaxes.default swapdims.default", (r(2, 3, 4), 0, -1))
case("t.default numpy_T.default", (r(3, 4),))
case("mT.default adjoint.default", (r(2, 3, 4),))
case("movedim.intlist moveaxis.intlist", (r(2, 3, 4), [0, 1], [2, 0]))
case("movedim.int moveaxis.int", (r(2, 3, 4), 0, 2))
case("unsqueeze.default", (r(3), -1))
case("squeeze.default", (r(1, 3, 1),))
case("squeeze.dim", (r(1, 3, 1), 0), (r(1, 3, 1), 1))
case("squeeze.dims", (r(1, 3, 1), [0, 1]))
case("flatten.using_ints", (r(2, 3, 4), 1), (r(2, 3, 4), 0, 1))
case("unflatten.int", (r(2, 12), 1, [3, -1]))
case("cat.default concat.default", ([r(2, 3), r(2, 1)], 1), ([torch.empty(0), r(2, 3)], 0), ([i(3, 2), r(2)], 0))
case("stack.default", ([r(2, 3), r(2, 3)], -1))
case("hstack.default vstack.default", ([r(2, 3), r(2, 3)],))
case("split.Tensor", (r(5, 2), 2), (r(5, 2), 2, 1))
case("split.sizes split_with_sizes.default", (r(5, 2), [2, 3]))
case("chunk.default", (r(5, 2), 3))
case("tensor_split.sections", (r(5, 2), 3))
case("unbind.int", (r(2, 3), 1))
case("repeat.default tile.default", (r(2, 3), [2, 1, 2]))
case("repeat_interleave.self_int", (r(2, 3), 2), (r(2, 3), 2, 1))
case("flip.default", (r(2, 3), [1]))
case("roll.default", (r(2, 5), [2], [1]), (r(2, 5), [3]), (r(2, 5), [1, 2], [0, 1]))
case("rot90.default", (r(2, 3), 1, [0, 1]))
case("tril.default triu.default", (r(3, 4), 1), (r(2, 3, 3),))
case("diagonal.default", (r(2, 3, 4), 1, 1, 2))
case("diag.default", (r(3),), (r(3, 3), 1))
case("diag_embed.default", (r(2, 3),), (r(2, 3), 1))
case("pixel_shuffle.default", (r(2, 8, 3, 4), 2))
case("pixel_unshuffle.default", (r(2, 3, 4, 6), 2))
case("channel_shuffle.default", (r(2, 6, 3, 3), 3))
case("unfold.default", (r(2, 7), 1, 3, 2))
case("meshgrid.default", ([r(3), r(2)],))
case("meshgrid.indexing", ([r(3), r(2)], {"indexing": "xy"}))
case("view_as_real.default angle.default imag.default", (torch.complex(r(3), r(3)),))
case("view_as_complex.default", (r(3, 2),))
case("complex.default polar.default", (r(3), r(3)))
# places
case("select.int", (r(3, 4), 1, -1))
case("slice.Tensor", (r(5, 4), 0, 1, 9223372036854775807, 2), (r(5, 4), 1, -3))
case("narrow.default", (r(5, 4), 0, 1, 3))
case("index.Tensor", (r(3, 4), [None, i(4, 2, 2)]), (r(3, 4), [i(3, 5), i(4, 5)]))
case("index_put.default", (r(5), [i(5, 3)], r(3), True), (r(3, 4), [b(3, 4)], torch.tensor(1.0)))
case("index_put.default", (r(5, 2), [torch.tensor([0, 3])], r(2, 2)))
case("index_select.default", (r(3, 4), 1, i(4, 2)))
case("gather.default", (r(3, 4), 1, i(4, 3, 2)))
case("scatter.src", (r(3, 4), 1, torch.tensor([[0, 2], [1, 3], [3, 0]]), r(3, 2)))
case("scatter.value", (r(3, 4), 1, i(4, 3, 2), 2.0))
case("scatter_add.default", (r(3, 4), 1, i(4, 3, 2), r(3, 2)))
for _how in ("sum", "prod", "mean", "amax", "amin"):
    case("scatter_reduce.two", (r(3, 4), 1, i(4, 3, 2), r(3, 2), _how))
case("scatter_reduce.two", (r(3, 4), 1, i(4, 3, 2), r(3, 2), "amax", {"include_self": False}))
case("scatter_reduce.two", (r(3, 4), 1, i(4, 3, 2), r(3, 2), "mean", {"include_self": False}))
case("index_add.default", (r(5, 2), 0, torch.tensor([1, 1, 4]), r(3, 2), {"alpha": 2}))
case("index_copy.default", (r(5, 2), 0, torch.tensor([1, 4]), r(2, 2)))
case("index_fill.int_Scalar", (r(5, 2), 0, torch.tensor([1, 4]), 3.0))
case("select_scatter.default", (r(3, 4), r(4), 0, 1))
case("slice_scatter.default", (r(5, 2), r(2, 2), 0, 1, 3))
case("masked_scatter.default", (r(3, 4), b(3, 4), r(12)))
case("take.default", (r(3, 4), i(12, 5)))
case("take_along_dim.default", (r(3, 4), i(4, 3, 2), 1))
case("copy.default", (r(3, 4), r(4)))
case("one_hot.default", (i(4, 3), 5))
case("searchsorted.Tensor", (torch.tensor([1.0, 2.0, 3.0]), r(5) + 2))
case("bucketize.Tensor", (r(5) + 2, torch.tensor([1.0, 2.0, 3.0])))
case("zeros.default ones.default", ([2, 3],), ([2], {"dtype": torch.int64}))
case("new_zeros.default new_ones.default", (r(2), [3, 1]))
case("full.default", ([2, 3], 2), ([2], 2.5), ([2], True))
case("new_full.default", (r(2), [3], 7))
case("zeros_like.default ones_like.default", (i(3, 2),), (r(2), {"dtype": torch.int32}))
case("full_like.default", (r(2), 4))
case("fill.Scalar", (r(2), 4))
case("fill.Tensor", (r(2), torch.tensor(3.0)))
case("arange.default", (5,), (3.5,))
case("arange.start", (1, 5), (0.5, 3))
case("arange.start_step", (1, 9, 2))
case("linspace.default", (0, 1, 5))
case("logspace.default", (0, 1, 5))
case("eye.default", (3,))
case("eye.m", (3, 4))
case("scalar_tensor.default", (3.0,))
case("tril_indices.default triu_indices.default", (3, 4, 1))
# products
case("mm.default matmul.default", (r(3, 4), r(4, 2)))
case("bmm.default matmul.default", (r(2, 3, 4), r(2, 4, 2)))
case("mv.default", (r(3, 4), r(4)))
case("dot.default vdot.default inner.default", (r(4), r(4)))
case("outer.default ger.default", (r(3), r(4)))
case("kron.default", (r(2, 2), r(2, 3)))
case("linear.default", (r(2, 3), r(4, 3), r(4)), (r(2, 5, 3), r(4, 3)))
case("addmm.default", (r(4), r(2, 3), r(3, 4)), (r(4), r(2, 3), r(3, 4), {"beta": 0.5, "alpha": 2}))
case("addmv.default", (r(3), r(3, 4), r(4)))
case("baddbmm.default", (r(2, 3, 5), r(2, 3, 4), r(2, 4, 5), {"beta": 0}))
case("addbmm.default", (r(3, 5), r(2, 3, 4), r(2, 4, 5)))
case("bilinear.default", (r(2, 3), r(2, 4), r(5, 3, 4), r(5)))
case("einsum.default", ("bij, bjk -> bik", [r(2, 3, 4), r(2, 4, 5)]))
case("tensordot.default", (r(2, 3, 4), r(4, 3), [2, 1], [0, 1]))
case("linalg_cross.default", (r(2, 3), r(2, 3)))
case("linalg_inv_ex.default", (r(3, 3) + 3 * torch.eye(3),))
case("embedding.default", (r(5, 3), i(5, 2, 4)), (r(5, 3), i(5, 4), 2))
_q = (r(2, 3, 4, 8), r(2, 3, 5, 8), r(2, 3, 5, 6))
case(
    "scaled_dot_product_attention.default",
    _q,
    (*_q, b(4, 5) | torch.eye(4, 5).bool()),
    (*_q, r(2, 1, 4, 5), {"scale": 0.3}),
)
case("scaled_dot_product_attention.default", (r(2, 4, 5, 8), r(2, 4, 5, 8), r(2, 4, 5, 8), {"is_causal": True}))
case("scaled_dot_product_attention.default", (r(2, 4, 5, 8), r(2, 2, 5, 8), r(2, 2, 5, 8), {"enable_gqa": True}))
case("_weight_norm.default", (r(4, 3), u(4, 1), 0))
# recurrence
_w = [r(12, 4), r(12, 3), r(12), r(12)]
case("lstm.input", (r(5, 2, 4), [r(1, 2, 3), r(1, 2, 3)], _w, True, 1, 0.0, False, False, False))
case("gru.input", (r(2, 5, 4), r(2, 2, 3), [r(9, 4), r(9, 3), r(9), r(9)] * 2, True, 1, 0.0, False, True, True))
case("rnn_tanh.input rnn_relu.input", (r(5, 2, 4), r(1, 2, 3), [r(3, 4), r(3, 3)], False, 1, 0.0, False, False, False))
case("lstm_cell.default", (r(2, 4), [r(2, 3), r(2, 3)], *_w))
case("gru_cell.default", (r(2, 4), r(2, 3), r(9, 4), r(9, 3), r(9), r(9)))
case("rnn_tanh_cell.default rnn_relu_cell.default", (r(2, 4), r(2, 3), r(3, 4), r(3, 3), r(3), r(3)))
# Fourier
_c = torch.complex(r(2, 6), r(2, 6))
case("fft_fft.default fft_ifft.default", (_c,), (_c, 8, 0, "ortho"))
case("fft_rfft.default fft_ihfft.default", (r(2, 6),), (r(2, 6), None, -1, "forward"))
case("fft_irfft.default fft_hfft.default", (torch.fft.rfft(r(2, 6)),), (torch.fft.rfft(r(2, 7)), 7))
case("fft_fft2.default fft_ifft2.default fft_fftn.default fft_ifftn.default", (_c,))
case("fft_rfft2.default fft_rfftn.default", (r(2, 4, 6),))
case("fft_irfft2.default fft_irfftn.default", (torch.fft.rfft2(r(4, 6)),))
case("_fft_r2c.default", (r(2, 6), [1], 0, True), (r(2, 6), [1], 2, False))
case("_fft_c2c.default", (_c, [1], 0, True), (_c, [1], 2, False), (_c, [0, 1], 1, True))
case("_fft_c2r.default", (torch.fft.rfft(r(2, 6)), [1], 2, 6))
case("fft_fftshift.default fft_ifftshift.default", (r(2, 5),), (r(2, 5), [1]))
case("fft_fftfreq.default", (5, 0.5))
case("hann_window.default", (6,))
# other names of the same
case("_cdist_forward.default", (r(3, 4), r(5, 4), 1.0, None))
case("_reshape_alias.default", (r(3, 4), [4, 3], [3, 1]))
case("_unsafe_index_put.default", (r(5), [i(5, 3)], r(3), True))
case("detach_copy.default t_copy.default unbind_copy.int", (r(3, 4),))
case("diagonal_copy.default", (r(3, 4), 1))
case("expand_copy.default", (r(3, 1), [3, 4]))
case("floor_divide.Scalar", (r(4) * 5, 2))
case("index_fill.int_Tensor", (r(5, 2), 0, torch.tensor([1, 4]), torch.tensor(3.0)))
case("linalg_qr.default", (r(4, 3),))
case("native_channel_shuffle.default", (r(2, 6, 3, 3), 3))
case("norm.ScalarOpt_dim_dtype", (r(3, 4).bfloat16(), 2, [1], False, {"dtype": torch.float32}))
case("select_copy.int", (r(3, 4), 1, 2))
case("slice_copy.Tensor", (r(5, 4), 0, 1, 4, 2))
case("split_copy.Tensor", (r(5, 2), 2))
case("split_with_sizes_copy.default", (r(5, 2), [2, 3]))
case("squeeze_copy.dims", (r(1, 3, 1), [0]))
case("unsqueeze_copy.default", (r(3), 0))
case("to.dtype_layout", (r(4) * 3, {"dtype": torch.int32}))
case("to.other", (r(4) * 3, i(3, 2)))
