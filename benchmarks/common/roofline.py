"""The machine's own ceilings, measured: how fast a large matrix product and a large copy are."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .timing import interleave


def roofline(dtype: str = "float32", size: int | None = None, rounds: int = 20) -> dict[str, float]:
    """Measured ceilings of the first device.

    Args:
      dtype: of the matrices.
      size: n of an n x n product; None takes 8192 on an accelerator and 1024 on a processor. The copy is 16 n x n.
      rounds: samples.

    Returns:
      `matmul_flops` (floating-point operations a second, 2 n^3 a product), `copy_bytes` (bytes a second, read and
      written both counted) and `size`. Medians.
    """
    n = size or (1024 if jax.default_backend() == "cpu" else 8192)
    a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    long = jnp.zeros((16, n, n), dtype)
    product = jax.jit(lambda x: x @ x)
    # A copy that the compiler cannot leave out: one addition a number, bounded by memory.
    copy = jax.jit(lambda x: x + jnp.ones((), x.dtype))
    timed = interleave({"matmul": lambda _: product(a), "copy": lambda _: copy(long)}, rounds=rounds, sets=1)
    return {
        "matmul_flops": 2 * n**3 / timed["matmul"].median,
        "copy_bytes": 2 * long.nbytes / timed["copy"].median,
        "size": n,
    }
