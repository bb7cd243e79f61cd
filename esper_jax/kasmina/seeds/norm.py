"""A seed that follows a normalisation or a dense layer: `norm`. Zero at birth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..blueprints import DENSE, NORMS, register_blueprint
from ..spec import Site
from ._parts import normalise


def _norm_init(key: jax.Array, site: Site) -> dict[str, Array]:
    return {name: jnp.zeros((site.out_features,), site.dtype) for name in ("scale", "bias")}


def _norm(params: dict[str, Array], u: Float[Array, "... O"]) -> Float[Array, "... O"]:
    return normalise(u, (u.ndim - 1,)) * params["scale"] + params["bias"]


register_blueprint(
    "norm",
    init=_norm_init,
    apply=_norm,
    kinds=(*NORMS, *DENSE, "attention"),
    about="the layer's output normalised over its features, rescaled from 0",
    citation="Ba et al., Layer Normalization, 2016",
)
