"""`linear`: a full linear map beside a layer, from zero. Its first gradient is the gain of growing there; it folds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..blueprints import CONVS, DENSE, SPAN, register_blueprint
from ..products import product
from ..spec import Site
from ._convolve import like_layer
from .lora import form_of, merged, moves_known

Params = Mapping[str, Array]


def _init(key: jax.Array, site: Site, *, scale: float = 1.0) -> dict[str, Array]:
    shape: tuple[int, ...] = (site.in_features, site.out_features)
    if site.kind in CONVS:
        form = form_of(site)
        shape = (*form["kernel_size"], site.in_features // form.get("groups", 1), site.out_features)
    if site.kind == SPAN and site.spatial:
        raise ValueError("linear cannot span convolutions; units can")
    return {"kernel": jnp.zeros(shape, site.dtype)}


def _apply(params: Params, u: Float[Array, "..."], site: Site, scale: float) -> Float[Array, "... O"]:
    if site.kind == "embed":
        return params["kernel"][u] * scale
    if site.kind in CONVS:
        return like_layer(site.kind, form_of(site), u, params["kernel"]) * scale
    return product(u, params["kernel"]) * scale


def _merge(host: Params, params: Params, alpha: Any, *, site: Site, scale: float) -> dict[str, Array]:
    return merged(host, params["kernel"], alpha * scale, site)


register_blueprint(
    "linear",
    init=_init,
    apply=_apply,
    merge=_merge,
    reads="input",
    where=moves_known,
    kinds=(*DENSE, *CONVS, "embed", SPAN),
    about="a full linear map beside the layer",
    citation="the zero layer of Evci et al., GradMax, ICLR 2022",
)
