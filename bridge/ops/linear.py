"""Matrix products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

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
