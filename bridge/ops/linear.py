"""Matrix products, and attention."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from .random import dropped
from .registry import op, together


@op("mm.default", "bmm.default", "matmul.default", "mv.default")
def matmul(self: Any, other: Any) -> Any:
    return jnp.matmul(self, other)


@op("dot.default", "vdot.default", "inner.default")
def inner(self: Any, other: Any) -> Any:
    return jnp.inner(self, other)


@op("outer.default", "ger.default")
def outer(self: Any, vec2: Any) -> Any:
    return jnp.outer(self, vec2)


@op("kron.default")
def kron(self: Any, other: Any) -> Any:
    return jnp.kron(self, other)


@op("linear.default")
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    result = jnp.matmul(input, weight.T) if weight.ndim == 2 else jnp.matmul(input, weight)
    return result if bias is None else result + bias


@op("addmm.default", "addmv.default", "baddbmm.default")
def addmm(self: Any, mat1: Any, mat2: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    product = jnp.matmul(mat1, mat2)
    product = product if alpha == 1 else alpha * product
    return product + (self if beta == 1 else beta * self) if beta != 0 else product


@op("addbmm.default")
def addbmm(self: Any, batch1: Any, batch2: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    return beta * self + alpha * jnp.sum(jnp.matmul(batch1, batch2), axis=0)


@op("bilinear.default")
def bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    result = jnp.einsum("...i,oij,...j->...o", input1, weight, input2)
    return result if bias is None else result + bias


@op("einsum.default")
def einsum(equation: str, tensors: Any, path: Any = None) -> Any:
    return jnp.einsum(equation.replace(" ", ""), *together(*tensors))


@op("tensordot.default")
def tensordot(self: Any, other: Any, dims_self: Any, dims_other: Any) -> Any:
    return jnp.tensordot(self, other, axes=(dims_self, dims_other))


@op("linalg_cross.default")
def cross(self: Any, other: Any, dim: int = -1) -> Any:
    return jnp.cross(self, other, axis=dim)


@op("linalg_inv_ex.default")
def inverse(A: Any, check_errors: bool = False) -> Any:
    return jnp.linalg.inv(A), jnp.zeros(A.shape[:-2], jnp.int32)


@op("embedding.default")
def embedding(
    weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    return without_padding_gradient(jnp.take(weight, indices, axis=0), indices, padding_idx)


def without_padding_gradient(found: Any, indices: Any, padding_idx: int) -> Any:
    """An embedding's output, of which the padding's row learns nothing."""
    if padding_idx < 0:
        return found
    return jnp.where((indices == padding_idx)[..., None], jax.lax.stop_gradient(found), found)


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
    if enable_gqa:
        key = jnp.repeat(key, query.shape[-3] // key.shape[-3], axis=-3)
        value = jnp.repeat(value, query.shape[-3] // value.shape[-3], axis=-3)
    weights = attention_weights(query, key, attn_mask, is_causal, scale)
    return jnp.matmul(dropped(weights, dropout_p, draw), value)


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


@op("linalg_qr.default")
def qr(A: Any, mode: str = "reduced") -> Any:
    return tuple(jnp.linalg.qr(A, mode=mode))


@op("linalg_matrix_norm.default")
def matrix_norm(self: Any, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False, dtype: Any = None) -> Any:
    return jnp.linalg.norm(self, ord=ord, axis=dim, keepdims=keepdim)


@op("_weight_norm.default")
def weight_norm(v: Any, g: Any, dim: int = 0) -> Any:
    axes = tuple(a for a in range(v.ndim) if a != dim % v.ndim) if dim != -1 else tuple(range(v.ndim))
    return v * (g / jnp.sqrt(jnp.sum(v * v, axis=axes, keepdims=True)))
