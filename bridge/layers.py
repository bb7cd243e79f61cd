"""The Flax layers of an imported model: Flax's own where it has them, made and called from torch's layout."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..kasmina.convolutions import conv_general_dilated
from ..kasmina.products import flat_products
from .ops.attention import attended, entered, joined, left, masks, one_mask
from .ops.conv import from_last, to_last
from .ops.linear import without_padding_gradient
from .ops.norm import by_row, normalised, standardised, unbiased, updated
from .ops.registry import Last
from .recognise import Layer


class BatchNorm(nn.BatchNorm):
    """Flax's BatchNorm with torch's momentum (how much of the batch enters) and its unbiased running variance."""

    keeps_meaning = True

    @nn.compact
    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
        """`[..., C]`, normalised over all axes but the last."""
        frozen = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", self.scale_init, shape) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape) if self.use_bias else None
        if frozen:
            return normalised(x, scale, bias, mean.value, var.value, self.epsilon, True)
        result, batch_mean, batch_var = standardised(x, scale, bias, self.epsilon, True)
        count = x.size // batch_mean.size
        if not self.is_initializing():
            kept_mean, kept_var = jax.lax.stop_gradient((batch_mean, batch_var))
            mean.value = updated(mean.value, kept_mean, self.momentum)
            var.value = updated(var.value, unbiased(kept_var, count), self.momentum)
        return result


class LayerNorm(nn.LayerNorm):
    """Flax's LayerNorm with a derivative of its own (`by_row`)."""

    keeps_meaning = True

    @nn.compact
    def __call__(self, x: Any) -> Any:  # type: ignore[override]
        """`[..., F]`, each row normalised."""
        axes = self.feature_axes if isinstance(self.feature_axes, tuple) else (self.feature_axes,)
        shape = x.shape[x.ndim - len(axes) :]
        scale = self.param("scale", self.scale_init, shape) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape) if self.use_bias else None
        return by_row(x, scale, bias, len(axes), self.epsilon)


class Attention(nn.MultiHeadDotProductAttention):
    """torch's MultiheadAttention with the parameters of Flax's: `query`, `key`, `value` and `out` kernels by heads.

    Attributes:
      out_bias: whether the output has a bias.
      extra: whether one learnt key and value (`bias_k`, `bias_v`) join the sequence.
      zero: whether a key and value of zeros join it.
    """

    one_site = True
    out_bias: bool = True
    extra: bool = False
    zero: bool = False

    @property
    def keeps_meaning(self) -> bool:
        """Whether its arrays mean what they do in Flax's own layer."""
        return not self.extra and not self.zero

    def setup(self) -> None:
        split = (self.num_heads, (self.qkv_features or 0) // self.num_heads)
        dense = functools.partial(nn.DenseGeneral, dot_general_cls=flat_products)
        self.query = dense(split, use_bias=self.use_bias)
        self.key = dense(split, use_bias=self.use_bias)
        self.value = dense(split, use_bias=self.use_bias)
        self.out = dense(self.out_features or 0, axis=(-2, -1), use_bias=self.out_bias)
        if self.extra:
            shape = (1, 1, self.qkv_features or 0)
            self.bias_k = self.param("bias_k", nn.initializers.normal(), shape)
            self.bias_v = self.param("bias_v", nn.initializers.normal(), shape)

    def __call__(  # type: ignore[override]
        self,
        inputs_q: Any,
        inputs_k: Any = None,
        inputs_v: Any = None,
        *,
        mask: Any = None,
        bias: Any = None,
        causal: bool = False,
        deterministic: bool = True,
        draw: Any = None,
    ) -> Any:
        """Outputs `[N, L, out]` of queries `[N, L, E]`; `mask` is true where allowed, `bias` is added to the logits."""
        k = inputs_q if inputs_k is None else inputs_k
        v = k if inputs_v is None else inputs_v
        return self.out(self._attended(inputs_q, k, v, mask, bias, causal, deterministic, draw, False)[0])

    def weights(self, q: Any, k: Any, v: Any, *, mask: Any, bias: Any, deterministic: bool, draw: Any) -> Any:
        """The attention weights `[N, heads, L, S]` behind a call's output."""
        return self._attended(q, k, v, mask, bias, False, deterministic, draw, True)[1]

    def _attended(
        self, q: Any, k: Any, v: Any, mask: Any, bias: Any, causal: bool, deterministic: bool, draw: Any, need: bool
    ) -> tuple[Any, Any]:
        queries = self.query(q)
        keys = joined(self.key(k), self.bias_k if self.extra else None, self.zero)
        values = joined(self.value(v), self.bias_v if self.extra else None, self.zero)
        more = keys.shape[1] - k.shape[1]
        if more and causal:
            rows = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
            mask, causal = rows if mask is None else mask & rows, False
        rate = 0.0 if deterministic else self.dropout_rate
        return attended(queries, keys, values, one_mask(mask, bias, more), causal, rate, draw, need)


def make(layer: Layer) -> nn.Module:
    """A new Flax layer, to be named by the module that holds it."""
    fields = dict(layer.fields)
    if layer.kind == "conv":
        return nn.Conv(**fields, conv_general_dilated=conv_general_dilated)
    if layer.kind in ("layer_norm", "rms_norm"):
        axes = fields.pop("axes")
        eps = fields.pop("epsilon")
        if layer.kind == "rms_norm":
            fields.pop("use_bias")
        eps = float(jnp.finfo(jnp.float32).eps) if eps is None else eps
        cls = LayerNorm if layer.kind == "layer_norm" else nn.RMSNorm
        return cls(**fields, epsilon=eps, reduction_axes=axes, feature_axes=axes, use_fast_variance=False)
    if layer.kind == "group_norm":
        return nn.GroupNorm(**fields, use_fast_variance=False)
    return _CLASSES[layer.kind](**fields)


_CLASSES: dict[str, Any] = {
    "dense": functools.partial(nn.Dense, dot_general_cls=flat_products),
    "conv_transpose": nn.ConvTranspose,
    "embed": nn.Embed,
    "batch_norm": BatchNorm,
    "attention": Attention,
}


def call(layer: Layer, module: Any, inputs: tuple[Any, ...], options: dict[str, Any], draw: Any) -> tuple[Any, ...]:
    """What a layer gives for inputs in torch's layout (or `Last`); the first is the output."""
    return _CALLS[layer.kind](layer, module, inputs, options, draw)  # type: ignore[no-any-return]


def plain(x: Any) -> Any:
    """A value in torch's layout."""
    return jnp.moveaxis(x.array, -1, 1) if isinstance(x, Last) else x


def _dense(layer: Layer, module: Any, inputs: Any, options: Any, draw: Any) -> tuple[Any, ...]:
    return (module(plain(inputs[0])),)


def _embed(layer: Layer, module: Any, inputs: Any, options: Any, draw: Any) -> tuple[Any, ...]:
    ids = plain(inputs[0])
    return (without_padding_gradient(module(ids), ids, options.get("padding_idx", -1)),)


def _spatial(layer: Layer, module: Any, inputs: Any, options: Any, draw: Any) -> tuple[Any, ...]:
    n = len(dict(layer.fields)["kernel_size"])
    (x,) = inputs
    if isinstance(x, Last):
        return (Last(module(x.array)),)
    batched = x.ndim == n + 2
    result = module(to_last(x, n))
    return (Last(result) if batched else from_last(result, n),)


def _grouped(layer: Layer, module: Any, inputs: Any, options: Any, draw: Any) -> tuple[Any, ...]:
    (x,) = inputs
    if isinstance(x, Last):
        return (Last(module(x.array)),)
    return (Last(module(to_last(x, x.ndim - 2))) if x.ndim > 2 else module(x),)


def _batch(layer: Layer, module: Any, inputs: Any, options: Any, draw: Any) -> tuple[Any, ...]:
    (x,) = inputs
    if not isinstance(x, Last):
        x = Last(to_last(x, x.ndim - 2))
    result = module(x.array, use_running_average=options["frozen"])
    return (Last(result) if result.ndim > 2 else result,)


def _attend(layer: Layer, module: Any, inputs: Any, options: Any, draw: Any) -> tuple[Any, ...]:
    q, k, v, padding, mask = (plain(x) for x in inputs)
    q, k, v, padding, batched = entered(q, k, v, padding, options["batch_first"])
    # is_causal is a hint that attn_mask is causal; torch refuses it without a mask
    allowed, bias = masks(padding, mask, q.shape[0], dict(layer.fields)["num_heads"])
    rate = module.dropout_rate if options["training"] else 0.0
    key = draw() if rate else None
    given = {"mask": allowed, "bias": bias, "deterministic": not rate, "draw": lambda: key}
    output = module(q, k, v, **given)
    weights = module.weights(q, k, v, **given) if options["need_weights"] else None
    return left(output, weights, options["average"], batched, options["batch_first"])


_CALLS: dict[str, Any] = {
    "dense": _dense,
    "embed": _embed,
    "conv": _spatial,
    "conv_transpose": _spatial,
    "layer_norm": _dense,
    "rms_norm": _dense,
    "group_norm": _grouped,
    "batch_norm": _batch,
    "attention": _attend,
}
