"""A finished network: host and grown seeds as plain variables and one function, with no lifecycle machinery."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import linen
from .bank import Bank
from .fold import fold
from .graft import Graft, graft
from .morph import Morph, check_morph
from .spec import Plant
from .state import blends

SEEDS = "seeds"


def compact(model: Any, morph: Morph) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Bake a grown network: what can be folded is, what remains runs as plain layers beside the host's.

    Seeds that are part of the output (BLENDING, HOLDING, FOSSILIZED) stay, their alpha a constant of the function; all
    others are dropped. The function has no branch, no rule of its own for gradients and no state: its FLOPs are the
    host's plus the seeds', and it can be trained on, jitted and exported like any other (`jax.export.export`).

    Args:
      model: the Linen module or its `apply`, as for `graft`.
      morph: the grown network, with concrete arrays; it is not changed.

    Returns:
      `(apply, variables)`: `apply(variables, *args, **kwargs)` has the signature of the model's own `apply`.
      `variables` is the host's variables dict, with the remaining seeds' parameters under `"seeds"`:
      `{site: {slot: params}}`, all of them plain dicts of arrays.

    Raises:
      TypeError: `morph` is no `Morph`, or `model` cannot be called. ValueError: a seed is not finite.
    """
    check_morph(morph, "compact", "second")
    forward = graft(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be folded is kept here
        morph = fold(morph)
    kept = [plant for plant in morph.spec.plants if np.any(_alpha(morph, plant))]
    seeds: dict[str, dict[str, Any]] = {}
    for plant in kept:
        seed = morph.seeds[plant.site][plant.key]
        if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(seed)):
            raise ValueError(f"compact() cannot keep {plant.site} slot {plant.slot}: its parameters are not finite")
        seeds.setdefault(plant.site, {})[plant.key] = seed
    variables = {name: _plain(part) for name, part in linen.unboxed(morph.variables).items()}
    if SEEDS in variables:
        raise ValueError(f"the host has a collection {SEEDS!r} of its own, where compact() keeps the grown seeds")
    alphas = {(plant.site, plant.slot): _alpha(morph, plant) for plant in kept}
    return Compact(forward, morph, tuple(kept), alphas), {**variables, SEEDS: seeds} if kept else variables


class Compact:
    """The function that `compact` gives."""

    def __init__(
        self, forward: Graft, morph: Morph, plants: tuple[Plant, ...], alphas: Mapping[tuple[str, int], Any]
    ) -> None:
        self._forward, self._spec, self._plants, self._alphas = forward, morph.spec, plants, alphas

    def __call__(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The network's output: what the model's own `apply` returns for the same arguments."""
        host = {name: part for name, part in variables.items() if name != SEEDS}
        sources = {plant.source for plant in self._plants if plant.source}
        banks = {}
        for site in dict.fromkeys(plant.site for plant in self._plants):
            plants = tuple(plant for plant in self._plants if plant.site == site)
            fixed = {plant.key: jnp.asarray(self._alphas[site, plant.slot]) for plant in plants}
            place = self._spec.by_path[site]
            constant = () if place.layers else tuple(float(self._alphas[site, p.slot]) for p in plants)
            seeds = dict(variables[SEEDS][site])
            places = tuple(map(self._spec.place, plants))
            banks[site] = Bank(
                seeds, None, None, None, place, plants, fixed if place.layers else {}, constant, places, site in sources
            )
        for site in sources - set(banks):
            banks[site] = Bank({}, None, None, None, self._spec.by_path[site], (), read=True)
        return self._forward.baked(host, banks, *args, **kwargs)

    def __repr__(self) -> str:
        names = ", ".join(f"{plant.blueprint} at {plant.site}" for plant in self._plants) or "no seeds left"
        return f"compact({self._forward!r}, {names})"


def _alpha(morph: Morph, plant: Plant) -> np.ndarray:
    """The seed's share of the output; in a stack, of each layer's."""
    state = morph.state[plant.site]
    entered = np.asarray(blends(state.stage))[..., plant.slot]
    return np.where(entered, np.asarray(state.alpha)[..., plant.slot], 0.0).astype(np.float32)


def _plain(tree: Any) -> Any:
    return {name: _plain(child) for name, child in tree.items()} if isinstance(tree, Mapping) else tree
