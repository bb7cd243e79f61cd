"""`lora`: a low-rank linear map beside a layer, in the layer's own form. Zero at birth, and it folds away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..blueprints import CONVS, DENSE, register_blueprint
from ..layout import kernel_order
from ..products import product
from ..spec import Site
from ._convolve import like_layer
from ._parts import at_least_one

Params = Mapping[str, Array]


def _init(key: jax.Array, site: Site, *, rank: int = 8, scale: float = 1.0) -> dict[str, Array]:
    rank = at_least_one("rank", rank)
    lecun = jax.nn.initializers.lecun_uniform()
    if site.kind in CONVS:
        form = form_of(site)
        groups = form.get("groups", 1)
        down = lecun(key, (*form["kernel_size"], site.in_features // groups, groups * rank), site.dtype)
        return {"down": down, "up": jnp.zeros((groups, rank, site.out_features // groups), site.dtype)}
    if site.kind == "embed":  # the gradient of `down` sees a row of it only where its id occurs
        down = jax.nn.initializers.normal(rank**-0.5)(key, (site.in_features, rank), site.dtype)
    else:
        down = lecun(key, (site.in_features, rank), site.dtype)
    return {"down": down, "up": jnp.zeros((rank, site.out_features), site.dtype)}


def _apply(params: Params, u: Float[Array, "..."], site: Site, scale: float) -> Float[Array, "... O"]:
    down, up = params["down"], params["up"]
    if site.kind == "embed":
        return down[u] @ up * scale
    if site.kind not in CONVS:
        return product(product(u, down), up) * scale
    inner = like_layer(site.kind, form_of(site), u, down)
    if up.shape[0] == 1:
        return product(inner, up[0]) * scale
    grouped = inner.reshape(*inner.shape[:-1], up.shape[0], -1)
    return jnp.einsum("...gr,gro->...go", grouped, up).reshape(*inner.shape[:-1], -1) * scale


def _merge(host: Params, params: Params, alpha: Any, *, site: Site, rank: int, scale: float) -> dict[str, Array]:
    down, up = params["down"], params["up"]
    if site.kind == "attention":
        raise ValueError("beside an attention layer nothing is linear; lora at its query, key, value and out is")
    if site.kind not in CONVS:
        return merged(host, jnp.matmul(down, up, precision="highest"), alpha * scale, site)
    split = down.reshape(*down.shape[:-1], up.shape[0], -1)
    delta = jnp.einsum("...igr,gro->...igo", split, up, precision="highest")
    return merged(host, delta.reshape(*delta.shape[:-2], -1), alpha * scale, site)


def merged(host: Params, delta: Array, alpha: Any, site: Site) -> dict[str, Array]:
    """The layer's arrays with `alpha` times a linear map added, `[in, out]` or in the form of a convolution's kernel.

    Raises:
      ValueError: an embedding whose table the model also reads elsewhere.
    """
    name = "kernel"
    if site.kind == "embed":
        name = "embedding"
        if dict(site.geometry).get("tied"):
            raise ValueError("the table is also read by attend(), which folding would change")
    elif site.kind not in CONVS:
        delta = delta.reshape(*site.in_shape, *site.out_shape)
        if site.kind == "einsum":
            order = kernel_order(dict(site.geometry)["equation"])
            delta = delta.transpose([order.index(i) for i in range(len(order))])
    return {**host, name: host[name] + alpha * delta.reshape(host[name].shape)}


def moves_known(site: Site) -> bool:
    """Whether a seed can do what the layer does: a convolution's strides and padding are known from a trace only."""
    form = dict(site.geometry)
    return site.kind not in CONVS or ("kernel_size" in form and not form.get("transpose_kernel"))


def form_of(site: Site) -> dict[str, Any]:
    """How a convolution moves; ValueError where no trace has told."""
    form = dict(site.geometry)
    if "kernel_size" not in form:
        raise ValueError(
            "a seed beside a convolution needs to know how it moves: give morph() model= and example=, so that it is "
            "traced"
        )
    if form.get("transpose_kernel"):
        raise ValueError("no seed can follow a ConvTranspose with transpose_kernel=True")
    return form


register_blueprint(
    "lora",
    init=_init,
    apply=_apply,
    merge=_merge,
    reads="input",
    where=moves_known,
    kinds=(*DENSE, *CONVS, "embed", "attention"),
    about="a low-rank linear map beside the layer",
    citation="Hu et al., LoRA, ICLR 2022",
)
