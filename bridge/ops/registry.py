"""The registry of operators: ATen names to functions of JAX arrays, and torch's rules of dtypes."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..graph import BridgeError, Dtype


class Op(NamedTuple):
    """One operator.

    Attributes:
      fn: takes ATen's arguments by its names; arrays in torch's layout.
      elementwise: works on arrays in any common layout.
      channels: takes `last=True` when its first array has its channels last, and says with `Last` when its output has.
      random: takes `draw`, which gives a fresh key, or None where dropout keeps every unit.
    """

    fn: Callable[..., Any]
    elementwise: bool = False
    channels: bool = False
    random: bool = False


class Last(NamedTuple):
    """An array `[N, *spatial, C]` that stands for torch's `[N, C, *spatial]`."""

    array: jax.Array


_OPS: dict[str, Op] = {}


def op(
    *names: str, elementwise: bool = False, channels: bool = False, random: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function for ATen operators, named without the leading `aten.`."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            full = name if name.split(".")[0] in ("sym", "getitem", "esper_jax") else f"aten.{name}"
            _OPS[full] = Op(fn, elementwise, channels, random)
        return fn

    return register


def register_op(name: str, fn: Callable[..., Any], *, elementwise: bool = False, random: bool = False) -> None:
    """Give an operator of torch its form in JAX; one of your own, or one that the library lacks.

    Args:
      name: as torch names it, with overload: `aten.bincount.default`, `mylib.my_op.default`.
      fn: takes the operator's arguments, positional as torch passes them, arrays in torch's layout, and returns its
        output (a tuple for several). It must be differentiable if training should pass through it.
      elementwise: its output at a place depends on its inputs at that place alone, so that any layout will do.
      random: it draws random numbers: it is called with `draw=`, a function that gives a fresh key of the `dropout`
        stream (None where dropout is to keep every unit).

    Raises:
      ValueError: for a name without namespace and overload.
    """
    if name.count(".") < 2:
        raise ValueError(f"register_op: {name!r} is no operator's full name; write e.g. 'mylib.my_op.default'")
    if not callable(fn):
        raise TypeError(f"register_op: fn must be callable, got {type(fn).__name__}")
    _OPS[name] = Op(fn, elementwise=elementwise, random=random)


def supported_ops() -> tuple[str, ...]:
    """The operators that an imported model may use, sorted."""
    return tuple(sorted(_OPS))


def find(name: str) -> Op | None:
    """An operator, or None."""
    return _OPS.get(name)


def unknown(name: str, path: str) -> BridgeError:
    """What to say of an operator that is not there."""
    close = difflib.get_close_matches(name, _OPS, n=1)
    hint = f" (the nearest that is known: {close[0]})" if close else ""
    return BridgeError(
        f"{path or 'the module'} uses {name}, which the bridge does not know{hint}: give it with "
        f"esper_jax.bridge.register_op({name!r}, fn), a function of JAX arrays that takes the operator's arguments"
    )


# --- dtypes ---


def check_fits(where: str, value: Any, dtype: Any) -> None:
    """BridgeError if a numpy array holds integers that the dtype does not."""
    if _beyond(value, dtype):
        raise BridgeError(
            f'{where} holds values beyond {dtype}; run jax.config.update("jax_enable_x64", True) before anything else'
        )


def _beyond(value: Any, dtype: Any) -> bool:
    integers = isinstance(value, np.ndarray | np.generic) and np.issubdtype(value.dtype, np.integer) and value.size
    if not integers or value.dtype == dtype or not np.issubdtype(np.dtype(dtype), np.integer):
        return False
    limits = np.iinfo(np.dtype(dtype))
    return bool(value.max() > limits.max or value.min() < limits.min)


def dtype_of(given: Any) -> Any:
    """A dtype as JAX computes with it: 64 bit only where x64 is on."""
    name = given.name if isinstance(given, Dtype) else given
    return jax.dtypes.canonicalize_dtype(jnp.dtype(name))


def dtype_or_default(dtype: Any, value: Any = 0.0) -> Any:
    """A given dtype, else that in which torch makes an array of such a number."""
    if dtype is not None:
        return dtype_of(dtype)
    return jnp.bool_ if isinstance(value, bool) else dtype_of("int64") if isinstance(value, int) else jnp.float32


def dtype_or_own(dtype: Any, x: Any) -> Any:
    """A given dtype, else the array's."""
    return x.dtype if dtype is None else dtype_of(dtype)


def is_array(value: Any) -> bool:
    """Whether it is an array (of numpy or JAX)."""
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def _category(dtype: Any) -> int:
    if dtype == jnp.bool_:
        return 0
    if jnp.issubdtype(dtype, jnp.integer):
        return 1
    return 3 if jnp.issubdtype(dtype, jnp.complexfloating) else 2


def _of_scalar(value: Any) -> Any:
    if isinstance(value, bool):
        return jnp.dtype(jnp.bool_)
    if isinstance(value, int):
        return dtype_of("int64")
    return jnp.dtype(jnp.complex64 if isinstance(value, complex) else jnp.float32)


def result_dtype(*values: Any) -> Any:
    """Torch's result type: arrays with axes decide, then arrays without, then Python numbers."""
    ranks: list[Any] = [None, None, None]
    for value in values:
        array = is_array(value)
        dtype = jnp.dtype(value.dtype) if array else _of_scalar(value)
        rank = 2 if not array else 1 if value.ndim == 0 else 0
        ranks[rank] = dtype if ranks[rank] is None else jnp.promote_types(ranks[rank], dtype)
    result = None
    for dtype in ranks:
        if dtype is None:
            continue
        if result is None:
            result = dtype
        elif _category(dtype) > _category(result):
            result = jnp.promote_types(result, dtype) if _category(dtype) != 3 or _category(result) < 2 else dtype
    return result


def together(*values: Any) -> tuple[Any, ...]:
    """Values as arrays of their common dtype."""
    dtype = result_dtype(*values)
    return tuple(jnp.asarray(value, dtype) for value in values)


def floating(value: Any) -> Any:
    """An array as floating point: integers and booleans become float32, as torch's default dtype has it."""
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.inexact) else value.astype(jnp.float32)


def number(value: Any) -> Any:
    """A Python number of an argument (complex ones travel as a triple)."""
    return complex(value[1], value[2]) if isinstance(value, tuple) and value[:1] == ("complex",) else value


def axes_of(dim: Any, ndim: int) -> tuple[int, ...]:
    """Axes as non-negative numbers; None and () are all of them."""
    if dim is None or dim == () or ndim == 0:
        return tuple(range(ndim))
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    return tuple(d % ndim for d in dims)


@jax.custom_jvp
def gradient_in_one(x: Any) -> Any:
    """`x`, whose gradient is an array of its own: XLA would add up its parts anew wherever it is read.

    Along a residual stream each part is a sum in its turn, and every block's would be computed in all blocks below.
    """
    return x


@gradient_in_one.defjvp
def _gradient_in_one_jvp(primals: Any, tangents: Any) -> Any:
    (dx,) = tangents
    return primals[0], lax.optimization_barrier(dx)


def full_float(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one array computed in float32 where it comes in 16 bits, as torch computes it."""

    @functools.wraps(fn)
    def wide(x: Any, *args: Any, **kwargs: Any) -> Any:
        x = floating(x)
        narrow = x.dtype in (jnp.bfloat16, jnp.float16)
        return fn(x.astype(jnp.float32), *args, **kwargs).astype(x.dtype) if narrow else fn(x, *args, **kwargs)

    return wide
