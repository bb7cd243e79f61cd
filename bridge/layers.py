"""The Flax layers of an imported model: Flax's own where it has them, made and called from torch's layout."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .ops.attention import attend, attention_weights, can_attend, masks
from .ops.conv import convolve, from_last, to_last
from .ops.linear import without_padding_gradient
from .ops.norm import normalised, statistics, unbiased, updated
from .ops.random import dropped
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
        batch_mean, batch_var, count = statistics(x, True)
        if not self.is_initializing():
            kept_mean, kept_var = jax.lax.stop_gradient((batch_mean, batch_var))
            mean.value = updated(mean.value, kept_mean, self.momentum)
            var.value = updated(var.value, unbiased(kept_var, count), self.momentum)
        return normalised(x, scale, bias, batch_mean, batch_var, self.epsilon, True)


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
        self.query = nn.DenseGeneral(split, use_bias=self.use_bias)
        self.key = nn.DenseGeneral(split, use_bias=self.use_bias)
        self.value = nn.DenseGeneral(split, use_bias=self.use_bias)
        self.out = nn.DenseGeneral(self.out_features or 0, axis=(-2, -1), use_bias=self.out_bias)
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
        queries, keys, bias, causal = self._prepared(inputs_q, k, mask, bias, causal)
        values, scale = self._joined(self.value(v), "bias_v"), 1 / (queries.shape[-1] ** 0.5)
        if (deterministic or not self.dropout_rate) and can_attend(queries, keys, values):
            return self.out(attend(queries, keys, values, bias, causal, scale))
        weights = attention_weights(_heads_first(queries), _heads_first(keys), bias, causal, scale)
        if not deterministic:
            weights = dropped(weights, self.dropout_rate, draw)
        return self.out(jnp.einsum("nhqk,nkhd->nqhd", weights, values))

    def weights(self, q: Any, k: Any, mask: Any, bias: Any, causal: bool) -> Any:
        """The attention weights `[N, heads, L, S]`."""
        queries, keys, bias, causal = self._prepared(q, k, mask, bias, causal)
        scale = 1 / (queries.shape[-1] ** 0.5)
        return attention_weights(_heads_first(queries), _heads_first(keys), bias, causal, scale)

    def _prepared(self, q: Any, k: Any, mask: Any, bias: Any, causal: bool) -> tuple[Any, Any, Any, bool]:
        """Queries and keys by heads, one mask of either kind, and whether the causal one is still to be applied."""
        queries, keys = self.query(q), self._joined(self.key(k), "bias_k")
        more = keys.shape[1] - k.shape[1]
        if more and causal:
            rows = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
            mask, causal = rows if mask is None else mask & rows, False
        if more and mask is not None:
            mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, more)], constant_values=True)
        if more and bias is not None:
            bias = jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(0, more)])
        if bias is not None and mask is not None:
            bias = jnp.where(mask, bias, -jnp.inf)
        elif mask is not None:
            bias = mask
        return queries, keys, bias, causal

    def _joined(self, x: Any, name: str) -> Any:
        """Keys or values `[N, S, heads, D]` with the learnt one and the zeros behind."""
        n, _, *split = x.shape
        if self.extra:
            learnt = getattr(self, name).reshape(1, 1, *split)
            x = jnp.concatenate([x, jnp.broadcast_to(learnt, (n, 1, *split)).astype(x.dtype)], 1)
        return jnp.concatenate([x, jnp.zeros((n, 1, *split), x.dtype)], 1) if self.zero else x


_heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)


def make(layer: Layer) -> nn.Module:
    """A new Flax layer, to be named by the module that holds it."""
    fields = dict(layer.fields)
    if layer.kind == "conv":
        return nn.Conv(**fields, conv_general_dilated=convolve)
    if layer.kind in ("layer_norm", "rms_norm"):
        axes = fields.pop("axes")
        eps = fields.pop("epsilon")
        if layer.kind == "rms_norm":
            fields.pop("use_bias")
        eps = float(jnp.finfo(jnp.float32).eps) if eps is None else eps
        cls = nn.LayerNorm if layer.kind == "layer_norm" else nn.RMSNorm
        return cls(**fields, epsilon=eps, reduction_axes=axes, feature_axes=axes, use_fast_variance=False)
    if layer.kind == "group_norm":
        return nn.GroupNorm(**fields, use_fast_variance=False)
    return _CLASSES[layer.kind](**fields)


_CLASSES: dict[str, Any] = {
    "dense": nn.Dense,
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
    batched = q.ndim == 3
    if not batched:
        q, k, v = q[None], k[None], v[None]
        padding = None if padding is None else padding[None]
    turned = batched and not options["batch_first"]
    if turned:
        q, k, v = (jnp.swapaxes(x, 0, 1) for x in (q, k, v))
    heads = dict(layer.fields)["num_heads"]
    # is_causal is a hint that attn_mask is causal; torch refuses it without a mask
    allowed, bias = masks(padding, mask, q.shape[0], heads)
    training = options["training"] and bool(module.dropout_rate)
    key = draw() if training else None
    once = (lambda: key) if training else None
    output = module(q, k, v, mask=allowed, bias=bias, deterministic=not training, draw=once)
    weights = None
    if options["need_weights"]:
        weights = module.weights(q, k, allowed, bias, False)
        weights = dropped(weights, module.dropout_rate, once) if training else weights
        weights = jnp.mean(weights, 1) if options["average"] else weights
        weights = weights if batched else weights[0]
    output = jnp.swapaxes(output, 0, 1) if turned else output if batched else output[0]
    return output, weights


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
