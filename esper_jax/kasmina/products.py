"""Products of arrays of many axes with a layer's kernel, as products of two matrices.

Where the left side has several leading axes, JAX's gradient to the kernel contracts them all, and XLA's CPU backend
writes the cotangent once more, transposed, before it does: a fifth of a transformer block's step. Of two matrices it
takes either side as it lies. It is slow at tall products of them, as the gradient to a kernel with few outputs is (that
of a low-rank seed, of a classifier's last layer, of a block's way back from four times its width): 1.5 to 10 times
slower than at the same product the other way round, which is taken in its place and then transposed. On other
platforms, and where an axis behind the first is sharded, which flattening would gather, the product stays as it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

FEW = 256
Call = Callable[[Array, Array], Array]


def product(
    x: Float[Array, "*space I"], kernel: Float[Array, "I O"], precision: Any = None
) -> Float[Array, "*space O"]:
    """`jnp.matmul(x, kernel, precision=precision)`."""
    if x.ndim < 2 or kernel.ndim != 2 or not _flattens(x):
        return jnp.matmul(x, kernel, precision=precision)
    dtype = jnp.result_type(x, kernel)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(dtype)
    return _times(rows, kernel.astype(dtype), precision=precision).reshape(*x.shape[:-1], kernel.shape[-1])


def flat_dot_general(
    x: Array,
    kernel: Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> Array:
    """`lax.dot_general` for Flax's `Dense` and `DenseGeneral`.

    Args:
      x: `[*space, *inputs]`.
      kernel: `[*inputs, *outputs]`.
      dimension_numbers: as `lax.dot_general` takes them; others than those of these two shapes go to it as they are.
      precision: as `lax.dot_general` takes it.
      preferred_element_type: as `lax.dot_general` takes it.
      **options: all else that `lax.dot_general` takes.
    """
    (from_x, from_kernel), (batch, _) = dimension_numbers
    count = len(from_x)
    trailing = tuple(axis % x.ndim for axis in from_x) == tuple(range(x.ndim - count, x.ndim))
    options |= {"precision": precision, "preferred_element_type": preferred_element_type}
    fits = tuple(from_kernel) == tuple(range(count)) and x.shape[x.ndim - count :] == kernel.shape[:count]
    if batch or not trailing or not fits or not _flattens(x):
        return lax.dot_general(x, kernel, dimension_numbers, **options)
    space, outputs = x.shape[: x.ndim - count], kernel.shape[count:]
    rows = x.reshape(math.prod(space), math.prod(x.shape[len(space) :]))
    matrix = kernel.reshape(math.prod(kernel.shape[:count]), math.prod(outputs))
    return jnp.reshape(_times(rows, matrix, **options), (*space, *outputs))


def flat_products() -> Any:
    """`flat_dot_general`, for the `dot_general_cls=` of Flax's layers."""
    return flat_dot_general


def _times(rows: Float[Array, "N I"], matrix: Float[Array, "I O"], **options: Any) -> Float[Array, "N O"]:
    """Their product; where the gradient to `matrix` would be a tall product, it is taken from a wide one."""

    def plain(rows: Array, matrix: Array) -> Array:
        return lax.dot_general(rows, matrix, (((1,), (0,)), ((), ())), **options)

    sizes = *rows.shape, matrix.shape[1]
    dtypes = matrix.dtype, options.get("preferred_element_type") or matrix.dtype
    known = all(isinstance(size, int) for size in sizes)  # and not symbols
    if not known or not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
        return plain(rows, matrix)
    count, inputs, outputs = sizes
    if inputs < 2 * outputs or count < 4 * outputs or outputs >= FEW:  # for fewer rows turning costs more than it saves
        return plain(rows, matrix)

    def turned(rows: Array, matrix: Array) -> Array:
        other = lax.optimization_barrier(matrix.T)  # without it XLA would turn the product back
        return lax.dot_general(rows, other, (((1,), (1,)), ((), ())), **options)

    return by_ways(plain, plain, turned)(rows, matrix)


def by_ways(value: Call, in_left: Call, in_right: Call) -> Call:
    """A function that is linear in each of its two arguments, by three functions that all compute it.

    Args:
      value: gives what it returns, and is what a policy of `jax.checkpoint` sees.
      in_left: gives what is linear in the first argument: its transpose is the gradient to that.
      in_right: the same for the second argument.
    """
    call = jax.custom_jvp(value)

    @functools.partial(call.defjvp, symbolic_zeros=True)
    def derivative(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
        (left, right), (by_left, by_right) = primals, tangents
        parts = [] if isinstance(by_left, SymbolicZero) else [in_left(by_left, right)]
        parts += [] if isinstance(by_right, SymbolicZero) else [in_right(left, by_right)]
        return value(left, right), functools.reduce(jnp.add, parts)

    return call


def _flattens(x: Array) -> bool:
    """Whether leading axes may become one: on a CPU, unless an axis behind the first is known to be sharded."""
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ())
    return jax.default_backend() == "cpu" and all(part is None for part in spec[1:])
