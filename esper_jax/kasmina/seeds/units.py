"""`units`: new hidden units, from one layer's input to a later layer's output. Zero at birth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..blueprints import SPAN, register_blueprint
from ..products import product
from ..spec import Site
from ._convolve import like_layer
from ._parts import at_least_one

Params = Mapping[str, Array]
UNIT_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "softplus": jax.nn.softplus,
    "leaky_relu": jax.nn.leaky_relu,
    "relu6": jax.nn.relu6,
    "hard_swish": jax.nn.hard_swish,
    "identity": lambda x: x,
}
"""What may stand between two layers of a span, elementwise."""


def _init(
    key: jax.Array, site: Site, *, units: int = 8, activation: str = "relu", bias: bool = True, norm: str = ""
) -> dict[str, Array]:
    units = at_least_one("units", units)
    if activation not in UNIT_ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join(UNIT_ACTIVATIONS)}")
    first, second = _taps(site)
    he = jax.nn.initializers.he_uniform()
    params = {
        "enter": he(key, (*first, site.in_features, units), site.dtype),
        "leave": jnp.zeros((*second, units, site.out_features), site.dtype),
    }
    return {**params, "bias": jnp.zeros((units,), site.dtype)} if bias else params


def _apply(params: Params, u: Float[Array, "... I"], site: Site, activation: str) -> Float[Array, "... O"]:
    if not site.spatial:
        hidden = product(u, params["enter"])
        hidden = UNIT_ACTIVATIONS[activation](hidden + params["bias"] if "bias" in params else hidden)
        return product(hidden, params["leave"])
    first, second = _forms(site)
    hidden = like_layer("conv", first, u, params["enter"])
    hidden = UNIT_ACTIVATIONS[activation](hidden + params["bias"] if "bias" in params else hidden)
    return like_layer("conv", second, hidden, params["leave"])


def _taps(site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not site.spatial:
        return (), ()
    first, second = _forms(site)
    return tuple(first["kernel_size"]), tuple(second["kernel_size"])


def _forms(site: Site) -> tuple[dict[str, Any], dict[str, Any]]:
    forms = [dict(form) for _, form in site.geometry]
    if any("kernel_size" not in form for form in forms):
        raise ValueError(
            "units between convolutions need to know how they move: give morph() model= and example=, so that they are "
            "traced"
        )
    if any(form["groups"] != 1 for form in forms):
        raise ValueError("units cannot stand between grouped convolutions")
    return forms[0], forms[1]


register_blueprint(
    "units",
    init=_init,
    apply=_apply,
    reads="input",
    kinds=SPAN,
    about="new hidden units between two layers: germinate(span=(first, second))",
    citation="Evci et al., GradMax, ICLR 2022",
)
