"""Which operations of a graph are calls of a Flax layer, with what it is made of and which tensors it owns."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from .graph import Node, Ref, Tensor
from .layout import module_path
from .ops.conv import each, pads, transposed_pads

ATTENTION = "esper_jax.attention.default"
AVERAGES = "a batch norm that averages over all batches (momentum=None)"
WRITTEN_OUT = -1.0
"""The momentum of a norm whose running statistics are operations beside it, so that it is no layer by itself."""


class Layer(NamedTuple):
    """A Flax layer of an imported model.

    Attributes:
      path: of its module.
      kind: which class (see `module.make`).
      fields: what that class is made with.
      leaves: `(leaf path within the layer, collection, torch tensor, part, parts, axes, shape, flipped axes)`.
    """

    path: tuple[str, ...]
    kind: str
    fields: tuple[tuple[str, Any], ...]
    leaves: tuple[tuple[Any, ...], ...]


class Call(NamedTuple):
    """One operation seen as a layer's call."""

    layer: Layer
    inputs: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()
    outputs: int = 0  # 0: the node is the output; else its outputs are picked by getitem


class _Args:
    """A node's arguments by position or name, with defaults."""

    def __init__(self, node: Node, tensors: dict[str, Tensor]) -> None:
        self.node, self.tensors, self.named = node, tensors, dict(node.kwargs)

    def __call__(self, at: int, name: str, default: Any = None) -> Any:
        return self.node.args[at] if at < len(self.node.args) else self.named.get(name, default)

    def tensor(self, value: Any) -> Tensor | None:
        """The parameter or buffer that an argument is, untouched."""
        if isinstance(value, Ref) and value.name.startswith("torch:"):
            return self.tensors.get(value.name.removeprefix("torch:"))
        return None


def recognise(node: Node, tensors: dict[str, Tensor]) -> Call | tuple[str, str] | None:
    """The layer that a node calls; `(torch module, why it is none)`; None for all other operations."""
    recogniser = _RECOGNISERS.get(node.op)
    if recogniser is None:
        return None
    return recogniser(_Args(node, tensors))  # type: ignore[no-any-return]


def _home(weight: Tensor | None, bias: Any, bias_tensor: Tensor | None, args: _Args) -> str | tuple[str, str] | None:
    """The dotted path of the module that owns weight and bias; why there is none; None if there is no parameter."""
    where = args.node.path
    if weight is None or weight.kind != "parameter":
        return (where, "its weight is computed in the forward (weight_norm, a parametrization, a product)")
    owner, _, leaf = weight.name.rpartition(".")
    if not owner:
        return None
    if 0 in weight.shape:
        return (owner, "its weight is empty")
    if leaf not in ("weight", "in_proj_weight", "q_proj_weight"):
        return None
    if bias is not None and (bias_tensor is None or bias_tensor.name != f"{owner}.bias"):
        return (owner, "its bias is not its own parameter")
    return owner


def _plain(
    args: _Args,
    kind: str,
    weight: Any,
    bias: Any,
    fields: dict[str, Any],
    perm: Any,
    name: str,
    inputs: Any,
    flip: int = 0,
    **more: Any,
) -> Any:
    """A layer of one weight and an optional bias."""
    w, b = args.tensor(weight), args.tensor(bias)
    owner = _home(w, bias, b, args)
    if not isinstance(owner, str):
        return owner
    assert w is not None
    leaves = [_leaf((name,), w, perm, flip=flip)]
    if b is not None:
        leaves.append(_leaf(("bias",), b, tuple(range(len(b.shape)))))
    layer = Layer(module_path(owner), kind, tuple(sorted(fields.items())), tuple(leaves))
    return Call(layer, inputs, **more)


def _leaf(
    path: Any,
    tensor: Tensor,
    perm: Any,
    shape: Any = None,
    part: int = 0,
    parts: int = 1,
    to: str = "params",
    flip: int = 0,
) -> Any:
    shape = tuple(tensor.shape[axis] for axis in perm) if shape is None else shape
    return (path, to, tensor.name, part, parts, tuple(perm), tuple(shape), flip)


def _linear(args: _Args) -> Any:
    x, weight, bias = args(0, "input"), args(1, "weight"), args(2, "bias")
    w = args.tensor(weight)
    fields = {"features": w.shape[0] if w else 0, "use_bias": bias is not None}
    return _plain(args, "dense", weight, bias, fields, (1, 0), "kernel", (x,))


def _addmm(args: _Args) -> Any:
    bias, x, weight = args(0, "self"), args(1, "mat1"), args(2, "mat2")
    w, b = args.tensor(weight), args.tensor(bias)
    if args(3, "beta", 1) != 1 or args(4, "alpha", 1) != 1 or w is None or b is None or len(b.shape) != 1:
        return None
    fields = {"features": w.shape[1], "use_bias": True}
    return _plain(args, "dense", weight, bias, fields, (0, 1), "kernel", (x,))


def _conv(args: _Args) -> Any:
    x, weight, bias = args(0, "input"), args(1, "weight"), args(2, "bias")
    w = args.tensor(weight)
    n = len(w.shape) - 2 if w else 2
    kernel = w.shape[2:] if w else ()
    dilation = each(args(5, "dilation", 1), n)
    fields = {
        "features": w.shape[0] if w else 0,
        "kernel_size": kernel,
        "strides": each(args(3, "stride", 1), n),
        "padding": pads(args(4, "padding", 0), kernel, dilation) if w else (),
        "kernel_dilation": dilation,
        "feature_group_count": args(6, "groups", 1),
        "use_bias": bias is not None,
    }
    return _plain(args, "conv", weight, bias, fields, (*range(2, n + 2), 1, 0), "kernel", (x,))


def _conv_transpose(args: _Args) -> Any:
    x, weight, bias = args(0, "input"), args(1, "weight"), args(2, "bias")
    w = args.tensor(weight)
    if w is None:
        return (args.node.path, "its weight is computed in the forward")
    if args(6, "groups", 1) != 1:
        return (w.name.rpartition(".")[0], "a grouped transposed convolution, which Flax has no layer for")
    n, kernel = len(w.shape) - 2, w.shape[2:]
    dilation = each(args(7, "dilation", 1), n)
    fields = {
        "features": w.shape[1],
        "kernel_size": kernel,
        "strides": each(args(3, "stride", 1), n),
        "padding": transposed_pads(args(4, "padding", 0), args(5, "output_padding", 0), kernel, dilation),
        "kernel_dilation": dilation,
        "use_bias": bias is not None,
    }
    return _plain(args, "conv_transpose", weight, bias, fields, (*range(2, n + 2), 0, 1), "kernel", (x,), flip=n)


def _embedding(args: _Args) -> Any:
    weight, ids, padding = args(0, "weight"), args(1, "indices"), args(2, "padding_idx", -1)
    if args(3, "scale_grad_by_freq", False):
        return (args.node.path, "an embedding whose gradients are divided by counts")
    w = args.tensor(weight)
    fields = {"num_embeddings": w.shape[0] if w else 0, "features": w.shape[1] if w else 0}
    options = (("padding_idx", padding),) if padding >= 0 else ()
    return _plain(args, "embed", weight, None, fields, (0, 1), "embedding", (ids,), options=options)


def _norm(args: _Args, kind: str, weight: Any, bias: Any, fields: dict[str, Any], x: Any, **more: Any) -> Any:
    w = args.tensor(weight)
    if weight is None:
        return (args.node.path, "a norm without parameters") if bias is None else None
    axes = tuple(range(len(w.shape))) if w else (0,)
    return _plain(args, kind, weight, bias, {**fields, "use_bias": bias is not None}, axes, "scale", (x,), **more)


def _layer_norm(args: _Args) -> Any:
    shape = args(1, "normalized_shape")
    fields = {"epsilon": args(4, "eps", 1e-5), "axes": tuple(range(-len(shape), 0))}
    return _norm(args, "layer_norm", args(2, "weight"), args(3, "bias"), fields, args(0, "input"))


def _rms_norm(args: _Args) -> Any:
    shape = args(1, "normalized_shape")
    fields = {"epsilon": args(3, "eps"), "axes": tuple(range(-len(shape), 0))}
    return _norm(args, "rms_norm", args(2, "weight"), None, fields, args(0, "input"))


def _group_norm(args: _Args) -> Any:
    fields = {"epsilon": args(4, "eps", 1e-5), "num_groups": args(1, "num_groups")}
    return _norm(args, "group_norm", args(2, "weight"), args(3, "bias"), fields, args(0, "input"))


def _instance_norm(args: _Args) -> Any:
    if not args(5, "use_input_stats") or args(3, "running_mean") is not None or args(6, "momentum") == WRITTEN_OUT:
        return (args.node.path, "an instance norm with running statistics")
    weight = args.tensor(args(1, "weight"))
    fields = {"epsilon": args(7, "eps"), "num_groups": weight.shape[0] if weight else 0}
    return _norm(args, "group_norm", args(1, "weight"), args(2, "bias"), fields, args(0, "input"))


def _batch_norm(args: _Args, training: bool) -> Any:
    mean, var = args(3, "running_mean"), args(4, "running_var")
    shift = 1 if training else 0
    fields = {"epsilon": args(6 + shift, "eps"), "momentum": args(5 + shift, "momentum")}
    means = args.tensor(mean)
    if means is None and isinstance(mean, Ref) and mean.name.startswith("stale:"):  # called before in this forward
        owner = _home(args.tensor(args(1, "weight")), None, None, args)
        name = f"{owner}.running_mean" if isinstance(owner, str) else ""
        means = args.tensors.get(name)
        variances = args.tensors.get(f"{owner}.running_var")
    else:
        variances = args.tensor(var)
    if means is None or variances is None:
        return (args.node.path, "a batch norm whose statistics are not its own buffers")
    owner = means.name.rpartition(".")[0]
    weight, bias = args(1, "weight"), args(2, "bias")
    leaves = [_leaf(("mean",), means, (0,), to="batch_stats"), _leaf(("var",), variances, (0,), to="batch_stats")]
    for leaf, value in (("scale", weight), ("bias", bias)):
        tensor = args.tensor(value)
        if value is None:
            continue
        if tensor is None or tensor.name.rpartition(".")[0] != owner:
            return (owner, f"its {leaf} is not its own parameter")
        leaves.append(_leaf((leaf,), tensor, (0,)))
    if not owner:
        return None
    fields |= {"use_scale": weight is not None, "use_bias": bias is not None}
    layer = Layer(module_path(owner), "batch_norm", tuple(sorted(fields.items())), tuple(leaves))
    return Call(layer, (args(0, "input"),), (("frozen", not training),), outputs=5 if training else 3)


def _batch_norm_no_stats(args: _Args) -> Any:
    if args(4, "momentum") == WRITTEN_OUT:
        return (args.node.path, AVERAGES)
    return (args.node.path, "a batch norm without running statistics")


def _attention(args: _Args) -> Any:
    names = [
        "query",
        "key",
        "value",
        "heads",
        "in_weight",
        "q_weight",
        "k_weight",
        "v_weight",
        "in_bias",
        "bias_k",
        "bias_v",
        "out_weight",
        "out_bias",
        "key_padding_mask",
        "attn_mask",
        "add_zero_attn",
        "dropout",
        "training",
        "need_weights",
        "average",
        "is_causal",
        "batch_first",
    ]
    given = {name: args(i, name) for i, name in enumerate(names)}
    tensor = {name: args.tensor(given[name]) for name in names if name.endswith(("weight", "bias", "_k", "_v"))}
    whole, out = tensor["in_weight"], tensor["out_weight"]
    first = whole or tensor["q_weight"]
    if first is None or out is None:
        return (args.node.path, "its weights are computed in the forward")
    owner = first.name.rpartition(".")[0]
    if not owner or out.name != f"{owner}.out_proj.weight":
        return None
    heads, width = given["heads"], out.shape[0]
    split = (heads, out.shape[1] // heads)
    leaves: list[Any] = []
    for i, (leaf, name) in enumerate((("query", "q_weight"), ("key", "k_weight"), ("value", "v_weight"))):
        if whole is not None:
            part = (whole, (1, 0), (whole.shape[1], *split), i, 3)
        else:
            own = tensor[name]
            assert own is not None
            part = (own, (1, 0), (own.shape[1], *split), 0, 1)
        leaves.append(_leaf((leaf, "kernel"), *part))
        if (bias := tensor["in_bias"]) is not None:
            leaves.append(_leaf((leaf, "bias"), bias, (0,), split, i, 3))
    leaves.append(_leaf(("out", "kernel"), out, (1, 0), (*split, width)))
    if (bias := tensor["out_bias"]) is not None:
        leaves.append(_leaf(("out", "bias"), bias, (0,)))
    for name in ("bias_k", "bias_v"):
        if (bias := tensor[name]) is not None:
            leaves.append(_leaf((name,), bias, (0, 1, 2)))
    fields = {
        "num_heads": heads,
        "qkv_features": out.shape[1],
        "out_features": width,
        "use_bias": tensor["in_bias"] is not None,
        "out_bias": tensor["out_bias"] is not None,
        "extra": tensor["bias_k"] is not None,
        "zero": bool(given["add_zero_attn"]),
        "dropout_rate": given["dropout"],
    }
    layer = Layer(module_path(owner), "attention", tuple(sorted(fields.items())), tuple(leaves))
    inputs = tuple(given[name] for name in ("query", "key", "value", "key_padding_mask", "attn_mask"))
    options = tuple((name, bool(given[name])) for name in ("training", "average", "is_causal", "batch_first"))
    return Call(layer, inputs, options, outputs=2)


_RECOGNISERS: dict[str, Any] = {
    "aten.linear.default": _linear,
    "aten.addmm.default": _addmm,
    **{f"aten.conv{n}d.{form}": _conv for n in (1, 2, 3) for form in ("default", "padding")},
    "aten.conv_transpose1d.default": _conv_transpose,
    "aten.conv_transpose2d.input": _conv_transpose,
    "aten.conv_transpose3d.input": _conv_transpose,
    "aten.embedding.default": _embedding,
    "aten.layer_norm.default": _layer_norm,
    "aten.rms_norm.default": _rms_norm,
    "aten.group_norm.default": _group_norm,
    "aten.instance_norm.default": _instance_norm,
    "aten._native_batch_norm_legit_no_training.default": functools.partial(_batch_norm, training=False),
    "aten._native_batch_norm_legit_functional.default": functools.partial(_batch_norm, training=True),
    "aten._native_batch_norm_legit.no_stats": _batch_norm_no_stats,
    ATTENTION: _attention,
}
