"""A seed beside dense layers and attention: `mlp`. Zero at birth: the last layer starts at 0."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..blueprints import DENSE, register_blueprint
from ..products import product
from ..spec import Site
from ._parts import at_least_one

BESIDE = (*DENSE, "attention")
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": jax.nn.gelu, "relu": jax.nn.relu}


def _mlp_init(key: jax.Array, site: Site, *, hidden: int = 64, activation: str = "gelu") -> dict[str, Array]:
    hidden = at_least_one("hidden", hidden)
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    return {
        "down": jax.nn.initializers.lecun_uniform()(key, (site.in_features, hidden), site.dtype),
        "down_bias": jnp.zeros((hidden,), site.dtype),
        "up": jnp.zeros((hidden, site.out_features), site.dtype),
        "up_bias": jnp.zeros((site.out_features,), site.dtype),
    }


def _mlp(params: dict[str, Array], u: Float[Array, "... I"], activation: str) -> Float[Array, "... O"]:
    hidden = ACTIVATIONS[activation](product(u, params["down"]) + params["down_bias"])
    return product(hidden, params["up"]) + params["up_bias"]


register_blueprint(
    "mlp",
    init=_mlp_init,
    apply=_mlp,
    reads="input",
    kinds=BESIDE,
    about="a two-layer perceptron beside the layer",
    citation="Houlsby et al., Parameter-Efficient Transfer Learning, ICML 2019",
)
