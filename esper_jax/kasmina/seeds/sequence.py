"""`causal_conv`: one causal filter a feature along the sequence, after a layer. Zero at birth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..blueprints import DENSE, NORMS, register_blueprint
from ..spec import Site
from ._parts import at_least_one


def _causal_conv_init(key: jax.Array, site: Site, *, kernel: int = 4) -> dict[str, Array]:
    taps = at_least_one("kernel", kernel)
    width = site.out_features
    return {
        "filter": jax.random.normal(key, (taps, width), site.dtype) * taps**-0.5,
        "gain": jnp.zeros((width,), site.dtype),
    }


def _causal_conv(params: dict[str, Array], u: Float[Array, "... T O"]) -> Float[Array, "... T O"]:
    """Place t sees t and the places before it; without a sequence axis there is only t."""
    if u.ndim < 2:
        return u * params["filter"][-1] * params["gain"]
    taps, length = params["filter"].shape[0], u.shape[-2]
    padded = jnp.pad(u, [(0, 0)] * (u.ndim - 2) + [(taps - 1, 0), (0, 0)])
    shifted = [jax.lax.slice_in_dim(padded, tap, tap + length, axis=-2) * params["filter"][tap] for tap in range(taps)]
    return sum(shifted, jnp.zeros((), u.dtype)) * params["gain"]


register_blueprint(
    "causal_conv",
    init=_causal_conv_init,
    apply=_causal_conv,
    kinds=(*DENSE, *(kind for kind in NORMS if kind != "batch_norm"), "attention", "embed"),
    about="one causal filter a feature along the last axis but one, after the layer",
    citation="So et al., Primer, NeurIPS 2021",
)
