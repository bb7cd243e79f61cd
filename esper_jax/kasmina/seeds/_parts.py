"""Small parts that seeds share: normalisation, a fresh kernel, checked config values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..spec import Site

EPSILON = 1e-5


def at_least_one(name: str, value: int) -> int:
    """`value` itself; ValueError if it is below 1."""
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
    return value


def he(key: jax.Array, shape: tuple[int, ...], dtype: str) -> Array:
    """A kernel `[*taps, in, out]` scaled for a rectifier after it (He et al., ICCV 2015)."""
    return jax.nn.initializers.he_uniform()(key, shape, dtype)


def norm_params(features: int, site: Site) -> dict[str, Array]:
    """The scale and bias of `group_norm`: 1 and 0."""
    return {"scale": jnp.ones((features,), site.dtype), "bias": jnp.zeros((features,), site.dtype)}


def group_norm(params: dict[str, Array], x: Float[Array, "N *space C"], most: int) -> Float[Array, "N *space C"]:
    """Group normalisation in at most `most` groups of 4 features or more (Wu and He, ECCV 2018).

    Groups never get so small that an image of one pixel is normalised away.
    """
    features = x.shape[-1]
    groups = next((g for g in range(most, 0, -1) if features % g == 0 and features // g >= 4), 1)
    split = x.reshape(*x.shape[:-1], groups, features // groups)
    axes = (*range(1, x.ndim - 1), x.ndim)
    return normalise(split, axes).reshape(x.shape) * params["scale"] + params["bias"]


def normalise(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """`x` with mean 0 and variance 1 over `axes`, computed in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axes, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + EPSILON)
    return scaled.astype(x.dtype)
