"""`head_group`: attention heads beside an attention layer, over the same queries, keys, values and masks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..blueprints import register_blueprint
from ..spec import Site
from ._parts import at_least_one


def _head_group_init(key: jax.Array, site: Site, *, heads: int = 1, width: int = 16) -> dict[str, Array]:
    at_least_one("heads", heads)
    at_least_one("width", width)
    form = dict(site.geometry)
    memory = form.get("memory", (site.in_features, site.in_features))
    lecun, keys = jax.nn.initializers.lecun_uniform(), jax.random.split(key, 3)
    sizes = (site.in_features, *memory)
    made = {
        name: lecun(k, (size, heads * width), site.dtype).reshape(size, heads, width)
        for name, k, size in zip(("query", "key", "value"), keys, sizes, strict=True)
    }
    return {**made, "out": jnp.zeros((heads, width, site.out_features), site.dtype)}


def _head_group(params: dict[str, Array], u: Any) -> Float[Array, "... T O"]:
    """`u` is what the layer was called with: queries, keys, values and a mask (see `Attended`)."""
    queries, keys, values, mask = u if isinstance(u, tuple) else (u, u, u, None)
    q, k, v = (
        jnp.einsum("...ti,ihw->...thw", given, params[name])
        for name, given in (("query", queries), ("key", keys), ("value", values))
    )
    weights = jnp.einsum("...qhw,...khw->...hqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        heads = params["query"].shape[1]
        shared = mask if mask.shape[-3] == heads else jnp.all(mask, axis=-3, keepdims=True)
        weights = jnp.where(shared, weights, jnp.finfo(weights.dtype).min)
    seen = jnp.einsum("...hqk,...khw->...qhw", jax.nn.softmax(weights, axis=-1), v)
    return jnp.einsum("...qhw,hwo->...qo", seen, params["out"])


register_blueprint(
    "head_group",
    init=_head_group_init,
    apply=_head_group,
    reads="call",
    kinds="attention",
    about="further heads over the same keys, values and mask",
    citation="Vaswani et al., Attention Is All You Need, NeurIPS 2017",
)
