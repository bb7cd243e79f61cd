"""`glu`: a gated linear unit beside a layer. Zero at birth: what leaves it starts at 0."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..blueprints import DENSE, register_blueprint
from ..products import product
from ..spec import Site
from ._parts import at_least_one

GATES: dict[str, Callable[[Array], Array]] = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "sigmoid": jax.nn.sigmoid}


def _glu_init(key: jax.Array, site: Site, *, hidden: int = 64, activation: str = "silu") -> dict[str, Array]:
    hidden = at_least_one("hidden", hidden)
    if activation not in GATES:
        raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join(GATES)}")
    lecun, keys = jax.nn.initializers.lecun_uniform(), jax.random.split(key)
    return {
        "gate": lecun(keys[0], (site.in_features, hidden), site.dtype),
        "value": lecun(keys[1], (site.in_features, hidden), site.dtype),
        "up": jnp.zeros((hidden, site.out_features), site.dtype),
    }


def _glu(params: dict[str, Array], u: Float[Array, "... I"], activation: str) -> Float[Array, "... O"]:
    hidden = GATES[activation](product(u, params["gate"])) * product(u, params["value"])
    return product(hidden, params["up"])


register_blueprint(
    "glu",
    init=_glu_init,
    apply=_glu,
    reads="input",
    kinds=(*DENSE, "attention"),
    about="a gated linear unit beside the layer",
    citation="Shazeer, GLU Variants Improve Transformer, 2020",
)
