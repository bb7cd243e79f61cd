"""Attention: the scaled product, and torch's MultiheadAttention where it is no layer of its own."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...kasmina.products import product
from .random import dropped
from .registry import op


@op("scaled_dot_product_attention.default", random=True)
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
    *,
    draw: Any = None,
) -> Any:
    """Attention over `[..., heads, length, features]`; a mask of either kind; rows with nothing allowed give 0."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if not dropout_p and query.ndim == key.ndim == value.ndim == 4:
        by_length = tuple(jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        if can_attend(*by_length):
            return jnp.swapaxes(attend(*by_length, attn_mask, is_causal, scale), 1, 2)
    if enable_gqa:
        key = jnp.repeat(key, query.shape[-3] // key.shape[-3], axis=-3)
        value = jnp.repeat(value, query.shape[-3] // value.shape[-3], axis=-3)
    weights = attention_weights(query, key, attn_mask, is_causal, scale)
    return jnp.matmul(dropped(weights, dropout_p, draw), value)


def can_attend(query: Any, key: Any, value: Any) -> bool:
    """Whether `attend` takes arrays of these shapes and dtypes: one batch, one width, softmax in float32."""
    same = key.shape == value.shape and query.shape[0] == key.shape[0] and query.shape[-1] == key.shape[-1]
    fits = same and query.shape[2] % key.shape[2] == 0
    return fits and query.dtype == key.dtype == value.dtype and query.dtype.itemsize <= 4


def attend(query: Any, key: Any, value: Any, mask: Any, causal: bool, scale: float) -> Any:
    """`jax.nn.dot_product_attention` over `[N, length, heads, features]`; a row of which all is masked gives zeros."""
    allowed = bias = None
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        allowed = mask if mask.dtype == jnp.bool_ else mask > -jnp.inf
        bias = None if mask.dtype == jnp.bool_ else jnp.where(allowed, mask, 0)
    way: Any = functools.partial(jax.nn.dot_product_attention, scale=scale, is_causal=causal)
    some_keys = not isinstance(key.shape[1], int) or key.shape[1] > 0
    if jax.default_backend() == "cpu" and query.dtype == jnp.float32 and query.shape[2] == key.shape[2] and some_keys:
        way = functools.partial(_written_out, causal, scale)
    found = way(query, key, value, bias, allowed)
    if allowed is None:
        return found
    if causal:
        allowed = allowed & jnp.tril(jnp.ones((query.shape[1], key.shape[1]), bool))
    some = jnp.any(allowed, axis=-1, keepdims=True)
    return jnp.where(jnp.swapaxes(some, 1, 2), found, 0)


def _written_out(causal: bool, scale: float, query: Any, key: Any, value: Any, bias: Any, allowed: Any) -> Any:
    """`jax.nn.dot_product_attention` for a CPU: what is divided by the sums is the output, not the weights."""
    logits = jnp.einsum("nqhd,nkhd->nhqk", query * jnp.float32(scale), key)
    logits = logits if bias is None else (logits + bias).astype(logits.dtype)
    if causal:
        triangle = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        allowed = triangle if allowed is None else allowed & triangle
    if allowed is not None:
        logits = jnp.where(allowed, logits, jnp.finfo(logits.dtype).min)
    shares = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, -1, keepdims=True)))
    result = jnp.matmul(shares, jnp.swapaxes(value, 1, 2)) / jnp.sum(shares, -1, keepdims=True)
    return jnp.swapaxes(result, 1, 2)


def attention_weights(query: Any, key: Any, mask: Any, causal: bool, scale: float) -> Any:
    """Softmax of the scaled products, computed in float32; a row of which all is masked becomes zeros."""
    logits = jnp.matmul(query * jnp.asarray(scale, query.dtype), jnp.swapaxes(key, -1, -2))
    dtype = logits.dtype
    logits = logits.astype(jnp.float32) if dtype in (jnp.bfloat16, jnp.float16) else logits
    allowed = None
    if causal:
        allowed = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    if mask is not None:
        if mask.dtype == jnp.bool_:
            allowed = mask if allowed is None else allowed & mask
        else:
            logits = logits + mask.astype(logits.dtype)
            allowed = mask > -jnp.inf if allowed is None else allowed & (mask > -jnp.inf)
    if allowed is None:
        return jax.nn.softmax(logits, axis=-1).astype(dtype)
    lowest = jnp.finfo(logits.dtype).min
    weights = jax.nn.softmax(jnp.where(allowed, logits, lowest), axis=-1)
    some = jnp.any(allowed, axis=-1, keepdims=True)
    return jnp.where(allowed & some, weights, 0).astype(dtype)


def masks(padding: Any, mask: Any, batch: int, heads: int) -> tuple[Any, Any]:
    """What is allowed and what is added, from torch's two masks (true, or minus infinity, is not allowed)."""
    allowed = bias = None
    for given, shape in ((padding, "keys"), (mask, "pairs")):
        if given is None:
            continue
        if shape == "keys":
            full = given[:, None, None, :]
        else:
            full = given.reshape(batch, heads, *given.shape[-2:]) if given.ndim == 3 else given[None, None]
        one = ~full if full.dtype == jnp.bool_ else full > -jnp.inf
        allowed = one if allowed is None else allowed & one
        if full.dtype != jnp.bool_:
            finite = jnp.where(one, full, 0)
            bias = finite if bias is None else bias + finite
    return allowed, bias


@op("esper_jax.attention.default", random=True)
def attention(
    query: Any,
    key: Any,
    value: Any,
    heads: int,
    in_weight: Any,
    q_weight: Any,
    k_weight: Any,
    v_weight: Any,
    in_bias: Any,
    bias_k: Any,
    bias_v: Any,
    out_weight: Any,
    out_bias: Any,
    key_padding_mask: Any,
    attn_mask: Any,
    add_zero_attn: bool,
    dropout: float,
    training: bool,
    need_weights: bool,
    average: bool,
    is_causal: bool,
    batch_first: bool,
    *,
    draw: Any = None,
) -> Any:
    """nn.MultiheadAttention with its weights as torch has them; `attn_mask` holds what `is_causal` hints at."""
    query, key, value, padding, batched = entered(query, key, value, key_padding_mask, batch_first)
    allowed, bias = masks(padding, attn_mask, query.shape[0], heads)
    weights = jnp.split(in_weight, 3) if in_weight is not None else (q_weight, k_weight, v_weight)
    biases = jnp.split(in_bias, 3) if in_bias is not None else (0, 0, 0)
    q, k, v = (
        (product(x, w.T) + b).reshape(*x.shape[:2], heads, -1)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    k, v = joined(k, bias_k, add_zero_attn), joined(v, bias_v, add_zero_attn)
    mask = one_mask(allowed, bias, k.shape[1] - key.shape[1])
    rate = dropout if training else 0.0
    output, scores = attended(q, k, v, mask, False, rate, draw, need_weights)
    output = product(output.reshape(*query.shape[:2], -1), out_weight.T)
    output = output if out_bias is None else output + out_bias
    return left(output, scores, average, batched, batch_first)


def entered(query: Any, key: Any, value: Any, padding: Any, batch_first: bool) -> tuple[Any, Any, Any, Any, bool]:
    """Queries, keys and values as `[N, length, features]`, the keys' mask, and whether there was a batch."""
    if query.ndim != 3:
        return query[None], key[None], value[None], None if padding is None else padding[None], False
    if not batch_first:
        query, key, value = (jnp.swapaxes(x, 0, 1) for x in (query, key, value))
    return query, key, value, padding, True


def left(output: Any, weights: Any, average: bool, batched: bool, batch_first: bool) -> tuple[Any, Any]:
    """The output as torch's module gives it, and the weights `[N, (heads), L, S]`; None where there are none."""
    if weights is not None and average:
        weights = jnp.mean(weights, 1)
    if not batched:
        return output[0], None if weights is None else weights[0]
    return (output if batch_first else jnp.swapaxes(output, 0, 1)), weights


def joined(x: Any, learnt: Any, zero: bool) -> Any:
    """Keys or values `[N, S, heads, D]`, behind them the learnt one and one of zeros, where these are."""
    n, _, *split = x.shape
    if learnt is not None:
        one = learnt.reshape(1, 1, *split).astype(x.dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(one, (n, 1, *split))], 1)
    return jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) if zero else x


def one_mask(allowed: Any, bias: Any, more: int) -> Any:
    """What is allowed and what is added in one mask of either kind, with all allowed for `more` keys behind."""
    if more and allowed is not None:
        allowed = jnp.pad(allowed, [(0, 0)] * (allowed.ndim - 1) + [(0, more)], constant_values=True)
    if more and bias is not None:
        bias = jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(0, more)])
    if bias is not None and allowed is not None:
        return jnp.where(allowed, bias, -jnp.inf)
    return allowed if bias is None else bias


def attended(
    query: Any, key: Any, value: Any, mask: Any, causal: bool, rate: float, draw: Any, need_weights: bool
) -> tuple[Any, Any]:
    """Attention over `[N, length, heads, features]`: outputs alike, and the weights `[N, heads, L, S]` if needed."""
    scale = 1 / math.sqrt(query.shape[-1])
    if not rate and not need_weights and can_attend(query, key, value):
        return attend(query, key, value, mask, causal, scale), None
    weights = attention_weights(jnp.swapaxes(query, 1, 2), jnp.swapaxes(key, 1, 2), mask, causal, scale)
    weights = dropped(weights, rate, draw)
    return jnp.einsum("nhqk,nkhd->nqhd", weights, value), weights if need_weights else None
