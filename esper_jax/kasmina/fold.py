"""Folding: linear fossils become part of the host's own weights, and cost nothing from then on (contract 20)."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import flag, inputs, together
from .blueprints import get_blueprint
from .graft import graft
from .layout import host_arrays, with_host_arrays
from .morph import Morph, check_morph
from .operate import find_site, planted_state, shed
from .spec import Plant, Site
from .stages import Stage
from .state import SeedState, computes, layers_of, slot_of, with_slot
from .widen import obstacle, widened_morph

Slot = tuple[str, int]
TOLERANCE, LOW_TOLERANCE = 1e-4, 0.1
"""How far outputs may be apart, relative to the largest, for a fold to count as exact; for 16-bit outputs."""


def fold(
    morph: Morph,
    site: str | None = None,
    slot: int | None = None,
    *,
    strict: bool = False,
    model: Any = None,
    example: Any = None,
    **kwargs: Any,
) -> Morph:
    """Merge fossils into the host's own weights.

    A folded seed's slot is empty again (dormant, where it was planted ahead), and the host computes what host and seed
    computed: in float32 the logits differ by rounding alone, for bfloat16 see the table in docs/design.md. Weights are
    merged in float32 at least and rounded once. Seeds in other stages stay as they are. The units of a span make the
    layers at its ends wider: the host is then that of a wider model (`sizes_changed`, `widened`).

    Args:
      morph: the morph, with concrete arrays; it is not changed.
      site: fold at this site only; None is all of them.
      slot: fold this slot of `site` only.
      strict: raise for a fossil that cannot be folded, instead of warning of it.
      model: the host's module, with `example` one input: each fold is tried on it, and one that changes the output is
        left. So weights that the model reads elsewhere are found out, which no look at its layers tells.
      example: one input, an array or a tuple of arguments.
      **kwargs: keyword arguments of that call.

    Returns:
      The morph, with the host in the form it was given. Call `growable(...).fold(opt_state, before, after)` after it:
      the optimizer state of all that is left is kept, and that of units goes with them.

    Raises:
      KeyError: unknown site. ValueError: a slot without a fossil; with `strict`, a fossil that cannot be folded; only
      one of `model` and `example`. TypeError: an argument of another kind than the above.
    """
    check_morph(morph, "fold")
    flag("strict", strict)
    together("fold()", model, example)
    wanted = _wanted(morph, site, slot)
    left: dict[Slot, str] = {}
    same = None if model is None else _Same(model, example, kwargs)
    for plant in wanted:
        reason = _obstacle(morph, plant)
        if not reason:
            folded = _folded(morph, plant)
            reason = "" if same is None or plant.source else same(morph, folded)
        if reason:
            left[plant.site, plant.slot] = reason
        else:
            morph = folded
    if left:
        told = "; ".join(f"{path} slot {at}: {why}" for (path, at), why in left.items())
        if strict:
            raise ValueError(f"fold() cannot fold {told}")
        warnings.warn(
            f"fold() left {len(left)} fossil(s) in place: {told}. compact() gives a model that holds them",
            stacklevel=2,
        )
    return shed(morph)


class _Same:
    """Compares what two morphs of one model compute on an example, in evaluation mode."""

    def __init__(self, model: Any, example: Any, kwargs: Mapping[str, Any]) -> None:
        forward = graft(model)
        args, options = inputs("example", example), {**forward.mode(False), **kwargs}
        self.run = jax.jit(lambda morph: forward(morph, *args, **options))

    def __call__(self, before: Morph, after: Morph) -> str:
        """Why the second is another network than the first, or an empty text."""
        worst = 0.0
        for a, b in zip(jax.tree.leaves(self.run(before)), jax.tree.leaves(self.run(after)), strict=True):
            if jnp.issubdtype(a.dtype, jnp.inexact):
                gap = float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))))
                size = float(jnp.max(jnp.abs(a.astype(jnp.float32)))) + 1e-30
                worst = max(worst, gap / size / (TOLERANCE if a.dtype.itemsize > 2 else LOW_TOLERANCE))
        if worst <= 1:
            return ""
        return "the model's output is another one afterwards: it reads the layer's weights elsewhere too"


def foldable(morph: Morph) -> dict[Slot, str]:
    """Which fossils `fold` would merge: `{(site, slot): reason}`, where an empty reason says that it can."""
    check_morph(morph, "foldable")
    found: dict[Slot, str] = {}
    for plant in _wanted(morph, None, None):
        reason = _obstacle(morph, plant)
        found[plant.site, plant.slot] = reason
        morph = morph if reason else _folded(morph, plant)
    return found


def _wanted(morph: Morph, site: str | None, slot: int | None) -> list[Plant]:
    """The plants with a fossil, in slot order."""
    if site is None:
        if slot is not None:
            raise ValueError(f"fold() was given slot={slot} without a site")
    elif slot is not None:
        planted_state(morph, site, slot)
    else:
        find_site(morph, site)
    plants = [
        plant
        for plant in morph.spec.plants
        if site in (None, plant.site) and slot in (None, plant.slot) and np.any(_fossils(morph, plant))
    ]
    if slot is not None and not plants:
        raise ValueError(f"{site} slot {slot} holds no fossil; fold() merges FOSSILIZED seeds only")
    return plants


def _fossils(morph: Morph, plant: Plant) -> np.ndarray:
    """Whether the seed is FOSSILIZED; in a stack, in each layer."""
    return np.asarray(morph.state[plant.site].stage)[..., plant.slot] == Stage.FOSSILIZED


def _obstacle(morph: Morph, plant: Plant) -> str:
    """Why the fossil cannot be folded, or an empty text."""
    blueprint, site = get_blueprint(plant.blueprint), morph.spec.by_path[plant.site]
    for end in filter(None, (plant.source, plant.site)):
        if custom := dict(morph.spec.by_path[end].geometry).get("custom"):
            return f"the layer {end} is {custom}, and may use its weights in a way of its own"
    if plant.source:
        return obstacle(morph, plant)
    if blueprint.merge is None:
        return f"{plant.blueprint} is not linear"
    if plant.blend == "lerp" and blueprint.reads != "input":
        return f"the blend lerp takes the place of the layer's output, which {plant.blueprint} reads"
    if plant.blend not in ("add", "lerp"):
        return f"the blend {plant.blend} depends on the input"
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(morph.seeds[plant.site][plant.key])):
        return "its parameters are not finite"
    for other in morph.spec.planted_at[plant.site]:
        awake = np.any(computes(morph.state[other.site].stage[..., other.slot]))
        commutes = other.blend == plant.blend == "add" and "output" not in (
            get_blueprint(other.blueprint).reads,
            blueprint.reads,
        )
        if other.slot < plant.slot and awake and not commutes:
            return f"slot {other.slot} comes before it and is not folded"
    try:
        jax.eval_shape(lambda: _merged(morph, plant, site))
    except ValueError as error:
        return str(error)
    return ""


def _folded(morph: Morph, plant: Plant) -> Morph:
    """The morph with one fossil in its host's weights."""
    if plant.source:
        return widened_morph(morph, plant)
    site = morph.spec.by_path[plant.site]
    merged = _merged(morph, plant, site)
    params = with_host_arrays(morph.params["host"], site, merged)
    state = morph.state[plant.site]
    fossil = jnp.asarray(_fossils(morph, plant))
    now = slot_of(state, plant.slot)
    empty = slot_of(SeedState.empty(1, layers_of(state)), 0).replace(generation=now.generation)
    rested = jax.tree.map(lambda new, old: jnp.where(fossil, new, old), empty, now)
    zero = lambda leaf: jnp.where(fossil.reshape(fossil.shape + (1,) * (leaf.ndim - fossil.ndim)), 0, leaf)  # noqa: E731
    seeds = {**morph.seeds[plant.site], plant.key: jax.tree.map(zero, morph.seeds[plant.site][plant.key])}
    host = morph.with_params({"host": params, "seeds": morph.seeds}).host
    return morph.replace(
        host=host,
        seeds={**morph.seeds, plant.site: seeds},
        state={**morph.state, plant.site: with_slot(state, plant.slot, rested)},
    )


def _merged(morph: Morph, plant: Plant, site: Site) -> dict[str, Any]:
    """The layer's own arrays with the seed in them, in their shapes and dtypes; `[layers, ...]` first in a stack."""
    blueprint = get_blueprint(plant.blueprint)
    assert blueprint.merge is not None
    merge = blueprint.merge
    config = {"site": dataclasses.replace(site, layers=0), **dict(plant.config)}
    host = host_arrays(morph.params["host"], site)
    params = morph.seeds[plant.site][plant.key]
    alpha = morph.state[plant.site].alpha[..., plant.slot]
    alpha = jnp.where(jnp.asarray(_fossils(morph, plant)), alpha, 0.0)

    def one(host: Mapping[str, Any], params: Any, alpha: Any) -> dict[str, Any]:
        wide = {name: _wide(leaf) for name, leaf in host.items()}
        if plant.blend == "lerp":
            wide = {name: leaf * (1 - alpha) for name, leaf in wide.items()}
        found = merge(wide, jax.tree.map(_wide, params), alpha, **config)
        return {name: found[name].reshape(leaf.shape).astype(leaf.dtype) for name, leaf in host.items()}

    return (jax.vmap(one) if site.layers else one)(host, params, alpha)


def _wide(leaf: Any) -> Any:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
