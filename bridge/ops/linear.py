"""Matrix products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ...kasmina.products import product
from ..graph import BridgeError
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
    result = product(input, weight.T)
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
    _by_frequency(scale_grad_by_freq)
    return without_padding_gradient(jnp.take(weight, indices, axis=0), indices, padding_idx)


def _by_frequency(scale_grad_by_freq: bool) -> None:
    if scale_grad_by_freq:
        raise BridgeError("an embedding with scale_grad_by_freq=True divides its gradients by counts: use False")


@op("embedding_bag.padding_idx")
def embedding_bag(
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Any,
    include_last_offset: bool,
    padding_idx: Any,
) -> Any:
    """Rows of each bag summed (mode 0), averaged (1) or their largest values (2); an empty bag gives 0."""
    _by_frequency(scale_grad_by_freq)
    bags = offsets.shape[0] - include_last_offset
    bag = jnp.searchsorted(offsets, jnp.arange(indices.shape[0]), side="right") - 1
    if padding_idx is not None:
        bag = jnp.where(indices == padding_idx % weight.shape[0], bags, bag)  # out of range: left out
    rows = jnp.take(weight, indices, axis=0)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    count = jax.ops.segment_sum(jnp.ones_like(bag), bag, bags)
    if mode == 2:
        result = jnp.where(count[:, None] > 0, jax.ops.segment_max(rows, bag, bags), 0)
    else:
        result = jax.ops.segment_sum(rows, bag, bags)
        result = result / jnp.maximum(count, 1)[:, None] if mode == 1 else result
    return result, bag, count, indices


def without_padding_gradient(found: Any, indices: Any, padding_idx: int) -> Any:
    """An embedding's output, of which the padding's row learns nothing."""
    if padding_idx < 0:
        return found
    return jnp.where((indices == padding_idx)[..., None], jax.lax.stop_gradient(found), found)


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
