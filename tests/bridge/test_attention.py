"""Attention that a CPU has written out is JAX's own, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
from esper_jax.bridge.ops.attention import attend

pytestmark = pytest.mark.torch


def mask(kind: str, length: int, keys: int) -> jax.Array | None:
    random = np.random.default_rng(1)
    if kind == "none":
        return None
    if kind == "allowed":
        return jnp.asarray(random.random((2, 1, length, keys)) < 0.7)
    return jnp.asarray(np.where(random.random((length, keys)) < 0.7, random.normal(size=(length, keys)), -np.inf))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "allowed", "added"])
@pytest.mark.parametrize("lengths", [(5, 5), (3, 7), (7, 3), (1, 4)])
def test_attention_is_jaxs(lengths, kind, causal):
    length, keys = lengths
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(2, n, 3, 4)), jnp.float32) for n in (length, keys, keys))
    given = mask(kind, length, keys)
    allowed = given if kind == "allowed" else None if given is None else given > -jnp.inf
    bias = jnp.where(allowed, given, 0)[None, None].astype(jnp.float32) if kind == "added" else None
    wide = None if allowed is None else jnp.broadcast_to(allowed, (2, 1, length, keys))
    some = jnp.ones((2, 1, length, keys), bool) if wide is None else wide
    some = some & jnp.tril(jnp.ones((length, keys), bool)) if causal else some
    some = jnp.swapaxes(jnp.any(some, -1, keepdims=True), 1, 2)

    def plain(q, k, v):
        found = jax.nn.dot_product_attention(q, k, v, bias, wide, scale=0.5, is_causal=causal)
        return jnp.where(some, found, 0)

    wanted, back = jax.vjp(plain, q, k, v)
    found, ours = jax.vjp(lambda q, k, v: attend(q, k, v, given, causal, 0.5), q, k, v)
    cotangent = jnp.asarray(random.normal(size=wanted.shape), jnp.float32)
    for one, other in zip((found, *ours(cotangent)), (wanted, *back(cotangent)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [0, 2])
def test_without_keys_the_output_is_zero(length):
    q, k = jnp.ones((2, length, 3, 4)), jnp.ones((2, 0, 3, 4))
    assert (attend(q, k, k, None, False, 0.5) == jnp.zeros((2, length, 3, 4))).all()
