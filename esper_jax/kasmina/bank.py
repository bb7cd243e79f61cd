"""A site's seed bank: the pure function that every adapter calls with a layer's input and output."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from . import state as _state
from ._pytree import Struct, pytree, static
from .blend import join, open_input
from .blueprints import get_blueprint, seed_apply
from .probe import tap
from .spec import Plant, Site
from .state import SeedState


@pytree
class Tap(Struct):
    """Zeros whose *gradients* are what one site measured in a step: `faults` a slot, and the probe's `stats`."""

    faults: Float[Array, " S"]
    stats: Float[Array, " P"]


@pytree
class Bank(Struct):
    """All that one site needs in a forward pass. Adapters carry it to the layer; `plants` and `site` are static."""

    seeds: dict[str, Any]
    state: SeedState | None
    tap: Tap | None
    sample: Bool[Array, ""] | None
    site: Site = static()
    plants: tuple[Plant, ...] = static()


def apply_bank(bank: Bank, u: Float[Array, "... I"], h: Float[Array, "... O"]) -> Float[Array, "... O"]:
    """The site's output: the host's output `h`, with the seeds that have entered blended in (the forward rule).

    Args:
      bank: the site's seeds.
      u: the layer's input, features last; at a convolution `[N, *spatial, I]`.
      h: the layer's own output, likewise.

    Raises:
      ValueError: at trace time, if a seed's output does not have `h`'s shape.
    """
    if bank.tap is not None and bank.sample is not None:
        h = tap(jax.lax.stop_gradient(u), h, bank.tap.stats, bank.sample)
    for plant in bank.plants:
        h = _slot(bank, plant, u, h)
    return h


def _slot(bank: Bank, plant: Plant, u: Array, h: Array) -> Array:
    assert bank.state is not None
    stage, alpha = bank.state.stage[plant.slot], bank.state.alpha[plant.slot]
    pulse = jnp.zeros(()) if bank.tap is None else bank.tap.faults[plant.slot]
    computes, enters = _state.computes(stage), _state.blends(stage)
    variables = bank.seeds[plant.key]
    reads = get_blueprint(plant.blueprint).reads

    def run(variables: Any, u: Array, h: Array, alpha: Array, pulse: Array) -> Array:
        seed_input = open_input(u if reads == "input" else h, enters & (alpha > 0))
        f, gate = seed_apply(plant, bank.site, variables, seed_input)
        if f.shape != h.shape:
            raise ValueError(
                f"site {plant.site!r}: blueprint {plant.blueprint!r} gives shape {f.shape}, the layer's output is "
                f"{h.shape}. Give morph() model= and example= so that the layer is traced, or choose another blueprint"
            )
        return join(plant.blend, h, f.astype(h.dtype), gate.astype(h.dtype), alpha, enters, computes, pulse)

    if not plant.resident:
        return run(variables, u, h, alpha, pulse)
    return jax.lax.cond(computes, run, lambda v, u, h, alpha, pulse: h, variables, u, h, alpha, pulse)
