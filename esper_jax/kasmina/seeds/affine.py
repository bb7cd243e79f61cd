"""`affine`: a scale and a bias on the layer's output, from 0. It folds into the layer's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..blueprints import CONVS, DENSE, NORMS, register_blueprint
from ..layout import einsum_axes, kernel_order
from ..spec import Site

Params = Mapping[str, Array]


def _init(key: jax.Array, site: Site, *, bias: bool = True) -> dict[str, Array]:
    names = ("scale", "bias") if bias and site.kind != "rms_norm" else ("scale",)
    return {name: jnp.zeros((site.out_features,), site.dtype) for name in names}


def _apply(params: Params, u: Float[Array, "... O"]) -> Float[Array, "... O"]:
    scaled = u * params["scale"]
    return scaled + params["bias"] if "bias" in params else scaled


def _merge(host: Params, params: Params, alpha: Any, *, site: Site, bias: bool) -> dict[str, Array]:
    if dict(site.geometry).get("tied"):
        raise ValueError("the table is also read by attend(), which folding would change")
    factor = (1 + alpha * params["scale"]).reshape(site.out_shape)
    shift = alpha * params["bias"].reshape(site.out_shape) if "bias" in params else None
    if site.kind == "embed":
        table = host["embedding"] * factor
        return {"embedding": table if shift is None else table + shift}
    weight = "scale" if site.kind in NORMS else "kernel"
    if weight not in host:
        raise ValueError(f"the layer has no {weight}")
    if shift is not None and "bias" not in host:
        raise ValueError("the layer has no bias to take the seed's; germinate affine with bias=False there")
    new = {weight: _scaled(host[weight], factor, site)}
    if "bias" in host:
        new["bias"] = host["bias"].reshape(site.out_shape) * factor + (0 if shift is None else shift)
    return {**host, **new}


def _scaled(weight: Array, factor: Array, site: Site) -> Array:
    if site.kind != "einsum":
        return weight * factor
    equation = dict(site.geometry)["equation"]
    _, writes = einsum_axes(equation, len(equation.split(",")[0].replace("...", "")))
    if list(writes) != sorted(writes):
        raise ValueError(f"the equation {equation} makes its features in another order than its kernel has them")
    order = kernel_order(equation)
    return (weight.transpose(order) * factor).transpose([order.index(i) for i in range(len(order))])


register_blueprint(
    "affine",
    init=_init,
    apply=_apply,
    merge=_merge,
    kinds=(*NORMS, *DENSE, *CONVS, "embed"),
    about="a scale and a bias on the layer's output, from 0",
    citation="Perez et al., FiLM, AAAI 2018 (without its condition)",
)
