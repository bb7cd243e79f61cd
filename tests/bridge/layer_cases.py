"""More of `op_cases`: convolutions, pools, resampling, norms and losses; importing it adds them."""

from __future__ import annotations

import torch

from .op_cases import CASES, case, i, r, u

__all__ = ["CASES"]

# convolutions, pools
case("conv1d.default", (r(2, 3, 9), r(4, 3, 3), r(4), [2], [1], [2]), (r(3, 9), r(4, 3, 3)))
case("conv1d.padding", (r(2, 3, 9), r(4, 3, 4), None, [1], "same"))
case(
    "conv2d.default",
    (r(2, 4, 7, 6), r(6, 2, 3, 2), r(6), [2, 1], [1, 0], [1, 2], 2),
    (r(2, 4, 7, 6), r(8, 1, 3, 3), None, [2, 2], [1, 1], [1, 1], 4),
)
case(
    "conv2d.padding",
    (r(2, 3, 7, 6), r(4, 3, 3, 2), r(4), [1, 1], "same", [2, 1]),
    (r(2, 3, 7, 6), r(4, 3, 3, 2), None, [2, 2], "valid"),
)
case("conv3d.default", (r(1, 2, 4, 5, 4), r(3, 2, 2, 3, 2), r(3)))
case("conv3d.padding", (r(1, 2, 4, 5, 4), r(3, 2, 2, 3, 2), r(3), [1, 1, 1], "same"))
case("convolution.default", (r(2, 3, 7, 6), r(4, 3, 3, 2), r(4), [1, 1], [1, 1], [1, 1], False, [0, 0], 1))
case("convolution.default", (r(2, 4, 5, 4), r(4, 3, 3, 2), r(3), [2, 1], [1, 0], [1, 1], True, [1, 0], 1))
case("conv_transpose1d.default", (r(2, 4, 5), r(4, 3, 3), r(3), [2], [1], [1], 1, [2]))
case("conv_transpose2d.input", (r(2, 4, 5, 4), r(4, 3, 3, 2), r(6), [2, 1], [1, 0], [1, 0], 2))
case("conv_transpose3d.input", (r(1, 2, 3, 3, 3), r(2, 3, 2, 2, 2), None, [2, 2, 2]))
case("im2col.default", (r(2, 3, 6, 5), [2, 3], [1, 1], [1, 0], [2, 1]))
case("col2im.default", (r(2, 12, 9), [6, 5], [2, 2], [1, 1], [0, 1], [2, 2]))
for _n, _shape in ((1, (2, 3, 9)), (2, (2, 3, 9, 7)), (3, (1, 2, 7, 6, 5))):
    _two, _three = [2] * _n, [3] * _n
    case(
        f"max_pool{_n}d.default",
        (r(*_shape), _three, _two, [1] * _n, [1] * _n, True),
        (r(*_shape), _two),
        (r(*_shape), _two, [1] * _n, [0] * _n, _two),
    )
    case(
        f"max_pool{_n}d_with_indices.default",
        (r(*_shape), _three, _two, [1] * _n),
        (r(*_shape), _two, [1] * _n, [0] * _n, _two),
    )
    case(
        f"avg_pool{_n}d.default",
        (r(*_shape), _three, _two, [1] * _n, True, False),
        (r(*_shape), _two, _two, [0] * _n, True),
    )
    case(f"adaptive_avg_pool{_n}d.default", (r(*_shape), _two), (r(*_shape), [1] * _n))
    case(f"adaptive_max_pool{_n}d.default", (r(*_shape), _two), (r(*_shape).relu(), [4, 1, 3][:_n]))
    case(f"reflection_pad{_n}d.default replication_pad{_n}d.default", (r(*_shape), [1, 2] * _n))
case("avg_pool2d.default", (r(2, 3, 9, 7), [3, 3], [2, 2], [1, 1], False, True, 5))
case("_adaptive_avg_pool2d.default", (r(2, 3, 5, 7), [2, 3]))
case("_adaptive_avg_pool3d.default", (r(2, 3, 5, 7, 4), [2, 3, 2]))
case(
    "pad.default", (r(2, 3, 4), [1, 2]), (r(2, 3, 4), [1, -1, 2, 0], "constant", 0.5), (r(2, 3, 4), [1, 2], "circular")
)
case("pad.default", (r(2, 3, 4), [1, 2], "reflect"), (r(2, 3, 4), [1, 2], "replicate"))
case("constant_pad_nd.default", (r(2, 3, 4), [1, 2, 0, 1], 3.0))
case("upsample_nearest1d.vec", (r(2, 3, 5), [8], None), (r(2, 3, 5), None, [1.7]), (r(2, 3, 9), None, [0.6]))
case(
    "upsample_nearest2d.vec _upsample_nearest_exact2d.vec",
    (r(2, 3, 5, 4), [8, 3], None),
    (r(2, 3, 5, 4), None, [2.0, 1.5]),
)
case("upsample_nearest3d.vec", (r(1, 2, 3, 4, 3), None, [2.0, 2.0, 2.0]))
case("_upsample_nearest_exact1d.vec", (r(2, 3, 5), [8], None))
case("_upsample_nearest_exact3d.vec", (r(1, 2, 3, 4, 3), [5, 5, 5], None))
case("upsample_linear1d.vec", (r(2, 3, 5), [8], False, None), (r(2, 3, 5), None, True, [1.7]))
case(
    "upsample_bilinear2d.vec",
    (r(2, 3, 5, 4), [8, 3], False, None),
    (r(2, 3, 5, 4), [8, 3], True, None),
    (r(2, 3, 5, 4), None, False, [2.0, 1.5]),
)
case("upsample_bicubic2d.vec", (r(2, 3, 5, 4), [8, 7], False, None), (r(2, 3, 5, 4), [8, 7], True, None))
case("upsample_trilinear3d.vec", (r(1, 2, 3, 4, 3), [5, 5, 5], False, None))
case("upsample_nearest2d.default", (r(2, 3, 5, 4), [8, 3]), (r(2, 3, 5, 4), [10, 6], 2.0, 1.5))
case("upsample_bilinear2d.default", (r(2, 3, 5, 4), [8, 3], True), (r(2, 3, 5, 4), [10, 6], False, 2.0, 1.5))
for _mode in range(3):
    for _pad in range(3):
        for _align in (False, True):
            _rest = (_mode, _pad, _align)
            case("grid_sampler.default grid_sampler_2d.default", (r(2, 3, 5, 4), r(2, 3, 3, 2) * 1.5, *_rest))
            if _mode < 2:
                case("grid_sampler.default grid_sampler_3d.default", (r(2, 3, 3, 5, 4), r(2, 3, 2, 3, 3) * 1.5, *_rest))
case("grid_sampler.default", (r(2, 3, 1, 4), r(2, 3, 3, 2), 0, 2, True))
case("affine_grid_generator.default", (r(2, 2, 3), [2, 3, 4, 5], False), (r(2, 2, 3), [2, 3, 4, 5], True))
case("affine_grid_generator.default", (r(2, 3, 4), [2, 3, 4, 5, 3], False), (r(2, 2, 3), [2, 3, 1, 5], True))
case("_upsample_nearest_exact1d.default", (r(2, 3, 5), [8]))
case("_upsample_nearest_exact2d.default", (r(2, 3, 5, 4), [8, 3]))
case("_upsample_nearest_exact3d.default", (r(1, 2, 3, 4, 3), [5, 5, 5]))
case("upsample_nearest1d.default", (r(2, 3, 5), [8]))
case("upsample_nearest3d.default", (r(1, 2, 3, 4, 3), [5, 5, 5]))
case("upsample_bicubic2d.default", (r(2, 3, 5, 4), [8, 7], False))
case("upsample_linear1d.default", (r(2, 3, 5), [8], True))
case("upsample_trilinear3d.default", (r(1, 2, 3, 4, 3), [5, 5, 5], False))
for _mode in ("bilinear", "bicubic"):
    case(
        f"_upsample_{_mode}2d_aa.vec",
        (r(2, 3, 9, 7), [4, 3], False, None),
        (r(2, 3, 9, 7), None, False, [0.4, 1.7]),
        (r(2, 3, 9, 7), [4, 12], True, None),
        (r(2, 3, 9, 7), None, False, [0.3, 1.1]),
        (r(2, 3, 9, 7), [1, 7], True, None),
    )
    case(f"_upsample_{_mode}2d_aa.default", (r(2, 3, 9, 7), [4, 14], False), (r(2, 3, 9, 7), [4, 3], False, 0.5, 0.5))
_overlapping = torch.nn.functional.max_pool2d(r(2, 3, 7, 5), 3, 1, return_indices=True)
case("max_unpool2d.default", (*_overlapping, [7, 5]), (r(3, 2, 2), torch.tensor([[[0, 3], [9, 5]]] * 3), [3, 4]))
_overlapping = torch.nn.functional.max_pool3d(r(2, 3, 4, 5, 4), 2, 1, return_indices=True)
case("max_unpool3d.default", (*_overlapping, [4, 5, 4], [1, 1, 1], [0, 0, 0]))
# norms
case("layer_norm.default", (r(2, 3, 4), [3, 4], r(3, 4), r(3, 4)), (r(2, 4), [4], None, None, 1e-3))
case("rms_norm.default", (r(2, 4), [4], r(4), 1e-6), (r(2, 4), [4]))
case("group_norm.default", (r(2, 6, 5), 3, r(6), r(6)), (r(2, 6, 4, 3), 2))
case("instance_norm.default", (r(2, 3, 5), r(3), r(3), None, None, True, 0.1, 1e-5, False))
case("instance_norm.default", (r(2, 3, 5), r(3), r(3), r(3), u(3), False, 0.1, 1e-5, False))
case("_native_batch_norm_legit_no_training.default", (r(4, 3, 5), r(3), r(3), r(3), u(3), 0.1, 1e-5))
case("_native_batch_norm_legit_functional.default", (r(4, 3, 5), r(3), r(3), r(3), u(3), True, 0.2, 1e-5))
case("_native_batch_norm_legit.no_stats", (r(4, 3, 5), r(3), r(3), True, 0.1, 1e-5))
# losses
case(
    "mse_loss.default l1_loss.default smooth_l1_loss.default huber_loss.default",
    (r(3, 4), r(3, 4)),
    (r(3, 4), r(3, 4), 2),
)
case("binary_cross_entropy_with_logits.default", (r(3, 4), u(3, 4)), (r(3, 4), u(3, 4), u(4), u(4), 2))
case("cross_entropy_loss.default", (r(3, 5), i(5, 3)), (r(3, 5), i(5, 3), None, 1, -100, 0.1))
case("cross_entropy_loss.default", (r(3, 5, 2), i(5, 3, 2), u(5), 1, 1), (r(3, 5), r(3, 5).softmax(-1)))
_weighted = (r(3, 5, 2), i(5, 3, 2), u(5))
case("cross_entropy_loss.default", *((*_weighted, how, 1, 0.2) for how in range(3)))
_weighted = (r(3, 5, 2), r(3, 5, 2).softmax(1), u(5))
case("cross_entropy_loss.default", *((*_weighted, how, -100, 0.2) for how in range(3)))
case("nll_loss_nd.default nll_loss.default", (r(3, 5), i(5, 3)))
case("kl_div.default", (r(3, 4), u(3, 4)), (r(3, 4), r(3, 4), 2, {"log_target": True}))
_probability = torch.cat([u(6), torch.tensor([0.0, 1.0, 0.0, 1.0])])
_certain = torch.cat([u(6), torch.tensor([0.0, 1.0, 1.0, 0.0])])
case("binary_cross_entropy.default", (_probability, _certain), (u(3, 4), u(3, 4), u(4), 2), (u(3), u(3), None, 0))
_sign = i(2, 4) * 2 - 1
case("poisson_nll_loss.default", (r(3, 4), i(4, 3, 4).float(), True, True, 1e-8, 1), (u(5), u(5), False, False, 0.1, 2))
case("margin_ranking_loss.default", (r(4), r(4), _sign, 0.3), (r(4), r(4), _sign, 0.3, 0))
case("hinge_embedding_loss.default", (r(4), _sign, 0.7), (r(4), _sign, 1.0, 2))
case("cosine_embedding_loss.default", (r(4, 3), r(4, 3), _sign, -0.2), (r(3), r(3), torch.tensor(1)))
case(
    "triplet_margin_loss.default",
    (r(4, 3), r(4, 3), r(4, 3)),
    (r(4, 3), r(4, 3), r(4, 3), 0.5, 3.0, 1e-6, True, 0),
)
case("soft_margin_loss.default", (r(4), _sign), (r(4) * 9, _sign, 2))
case("multi_margin_loss.default", (r(4, 5), i(5, 4)), (r(4, 5), i(5, 4), 2, 0.5, u(5), 2), (r(5), torch.tensor([2])))
_labels = torch.tensor([[3, 0, -1, 1], [-1, 2, 1, 0], [1, 2, 3, 0]])
case("multilabel_margin_loss.default", (r(3, 4), _labels), (r(3, 4), _labels, 0), (r(4), _labels[0]))
