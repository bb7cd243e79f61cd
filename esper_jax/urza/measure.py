"""What one forward pass of a seed costs: XLA's count of operations, and time on this machine."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from ..kasmina.blueprints import get_blueprint, seed_apply
from ..kasmina.spec import Plant, freeze_config
from ..kasmina.summary import flops
from .program import features
from .record import StoredSeed

REPEATS = 20
SPACE = 8


def cost(seed: StoredSeed, example: tuple[int, ...] | None) -> tuple[float, float, dict[str, Any]]:
    """FLOPs, milliseconds (median of 20 warm calls) and where measured, of the seed's forward pass, gate included.

    Args:
      seed: its blueprint must be registered.
      example: the input's shape; None takes one example, and 8 positions a spatial dimension.

    Raises:
      ValueError: the seed cannot run an input of that shape.
    """
    site, wide = seed.site, features(seed.site, get_blueprint(seed.blueprint).reads)
    shape = (1, *(SPACE,) * site.spatial, wide) if example is None else tuple(example)
    plant = Plant(site.path, 0, seed.blueprint, freeze_config(seed.config), seed.blend)
    u = jax.random.normal(jax.random.key(0), shape, jnp.dtype(site.dtype))
    params = jax.tree.map(jnp.asarray, seed.params)
    try:
        run = jax.jit(lambda params, u: seed_apply(plant, site, params, u)).lower(params, u).compile()
    except Exception as error:  # a user's blueprint raises what it likes
        raise ValueError(f"{seed.blueprint!r} cannot run an input of shape {shape} ({error})") from error
    jax.block_until_ready(run(params, u))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(params, u))
        times.append(1e3 * (time.perf_counter() - start))
    device = jax.devices()[0]
    on = {"shape": list(shape), "dtype": site.dtype, "platform": device.platform, "device": device.device_kind}
    return flops(run), statistics.median(times), {**on, "calls": REPEATS}
