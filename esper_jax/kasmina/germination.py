"""Germination: a new seed in a slot, by data alone where one was planted ahead, else by a new spec."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import flag, number
from . import lifecycle
from ._pytree import check_key
from .blend import check_blend
from .blueprints import DENSE, get_blueprint, make_plant, seed_init
from .morph import Morph, with_spec
from .operate import NAN, Layers, answer, beside, chosen, concrete, find_site
from .refusals import taken
from .scores import Score, unit_params
from .spec import Plant, Site, freeze_config
from .stages import Stage
from .state import SeedState
from .stored import Stored, fit_params, label, misfit


def germinate(
    morph: Morph,
    site: str | None = None,
    blueprint: str | Stored | None = None,
    *,
    span: tuple[str, str] | None = None,
    key: jax.Array | None = None,
    slot: int | None = None,
    layer: Layers = None,
    blend: str | None = None,
    params: Any = None,
    init: str | None = None,
    scores: Any = None,
    score: float = NAN,
    with_ok: bool = False,
    **config: Any,
) -> Any:
    """Put a new seed in a slot of a site.

    A dormant seed planted ahead with the same blueprint (and config and blend, where given) is used first: only data
    changes and nothing recompiles. Otherwise an empty slot is used and the spec grows by one plant.

    Args:
      morph: the morph; it is not changed.
      site: the site's path, e.g. `"block_0/Dense_1"`.
      blueprint: a registered blueprint's name, or a stored seed (`urza.get(id)`), which brings config, blend and
        parameters.
      span: instead of `site`, a pair of sites: the seed reads the first one's input and adds to the second one's
        output, as new hidden units between the two do (`blueprint="units"`; `spans` finds such pairs).
      key: a PRNG key for the fresh parameters; needed unless `params` or a stored seed is given.
      slot: a slot; None takes the first that is free.
      layer: at a site of stacked layers (`Site.layers`), the layer or layers that germinate; None is all of them. The
        others get a dormant seed in the same slot, which another call wakes without a new program.
      blend: add, lerp, multiply or gate; None is add, or what the planted seed has.
      params: stored parameters instead of fresh ones, in the blueprint's shapes and dtypes (those of one layer).
      init: for units in a span: "gradmax", "tiny" or "best", where the new units point (see `scores.unit_params`);
        needs `scores`, from `growth_scores(..., spans=[span])`. None draws them at random.
      scores: what `growth_scores` gave.
      score: the validation score now, noted as the score at the start of the stage.
      with_ok: return `(morph, ok)` instead of raising for a stage that does not allow it.
      **config: the blueprint's config.

    Returns:
      The morph with the seed GERMINATED. Where an empty slot was used its structure is new: jitted functions compile
      once more (call `growable(...).grow(opt_state, morph)` first, or they do so twice).

    Raises:
      KeyError: unknown site or blueprint. TypeError: unknown config key, no key, config beside a stored seed, or an
      argument of another kind than the above. ValueError: the slot is taken or does not exist, no slot is free, or the
      blueprint or the stored parameters do not fit the site.
    """
    source = ""
    if span is not None:
        site, source = _ends(morph, site, span)
    if site is None or blueprint is None:
        raise TypeError("germinate() needs a site (or span=) and a blueprint")
    place = find_site(morph, site)
    if source:
        place = morph.spec.place(Plant(site, 0, "", source=source))
    name = f"parameters for {blueprint!r}"
    if not isinstance(blueprint, str):
        name, blueprint, config, blend, params = _unpack(blueprint, place, config, blend, params)
    get_blueprint(blueprint).full_config(config)
    number("score", score)
    flag("with_ok", with_ok)
    if scores is not None and not _are_scores(scores):
        raise TypeError(f"scores must be what growth_scores gave, got {scores!r}")
    if key is not None:
        check_key(key)
    if blend is not None:
        check_blend(blend)
    if key is None and params is None:
        raise TypeError(f"germinate() at {site!r} needs key= for fresh parameters, or params= for stored ones")
    known = isinstance(slot, int | np.integer) and not isinstance(slot, bool)
    if slot is not None and not (known and 0 <= slot < morph.spec.slots):
        raise ValueError(f"site {site!r} has slots 0 to {morph.spec.slots - 1}, got slot {slot!r}")
    resident = _dormant_plant(morph, site, source, blueprint, slot, layer, blend, config)
    if resident is not None:
        plant, grown = resident, morph
    else:
        free = morph.spec.free_slots(site)
        if slot is None and not free or slot is not None and slot not in free:
            raise ValueError(taken(morph, site, blueprint, slot))
        at = free[0] if slot is None else int(slot)
        plant = make_plant(place, at, blueprint, config, blend or "add", resident=False, source=source)
        grown = with_spec(morph, morph.spec.with_plant(plant))
    old, life, now = grown.seeds[site][plant.key], grown.state[site], jnp.asarray(score, jnp.float32)
    mask = chosen(grown, site, plant.slot, layer)
    if init is not None:
        found = None if scores is None or span is None else scores.get(tuple(span))
        if found is None or key is None:
            raise ValueError(
                f"init={init!r} needs key=, span= and scores=growth_scores(..., spans=[span]) of this morph"
            )
        params = unit_params(found, plant, place, init, key)
    if params is not None:
        fresh = fit_params(plant, place, params, name)
        if place.layers:
            fresh = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (place.layers, *jnp.shape(leaf))), fresh)
        placed, state, ok = _placed(plant.slot, fresh, life, old, mask, now)
    else:
        placed, state, ok = _born(get_blueprint(blueprint).init, plant, place, key, life, old, mask, now)
    seeds = {**grown.seeds, site: {**grown.seeds[site], plant.key: placed}}
    return answer(grown.replace(seeds=seeds, state={**grown.state, site: state}), ok, with_ok)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _born(
    init: Callable[..., Any],
    plant: Plant,
    site: Site,
    key: jax.Array,
    life: SeedState,
    old: Any,
    mask: jax.Array,
    score: jax.Array,
) -> tuple[Any, SeedState, jax.Array]:
    """A germination as one program, which is compiled once; `init` tells a blueprint from its replacement."""
    return _placed(plant.slot, seed_init(plant, site, key), life, old, mask, score)


@functools.partial(jax.jit, static_argnums=0)
def _placed(
    slot: int, fresh: Any, life: SeedState, old: Any, mask: jax.Array, score: jax.Array
) -> tuple[Any, SeedState, jax.Array]:
    """The seed's parameters and its site's state after germination in that slot, and whether that was legal."""
    state, moved = lifecycle.transition(life, mask, Stage.GERMINATED, score)
    born = moved[..., slot]
    placed = jax.tree.map(lambda new, kept: jnp.where(beside(born, new), new, kept), fresh, old)
    return placed, state, jnp.all(moved | ~mask)


def _are_scores(scores: Any) -> bool:
    return isinstance(scores, Mapping) and all(isinstance(score, Score) for score in scores.values())


def _ends(morph: Morph, site: str | None, span: Any) -> tuple[str, str]:
    """The target and the source of a span, checked."""
    if site is not None or isinstance(span, str) or not isinstance(span, Sequence) or len(span) != 2:
        raise TypeError(
            f"germinate(span=) takes a pair of sites in the place of site, got site={site!r}, span={span!r}"
        )
    first, second = find_site(morph, span[0]), find_site(morph, span[1])
    known = (*DENSE, "conv")
    wrong = [place for place in (first, second) if place.kind not in known]
    if wrong or first.spatial != second.spatial or first.layers != second.layers:
        raise ValueError(
            f"a span goes from one dense layer or convolution to another of the same rank and stack; {first.path!r} is "
            f"{first.layers or ''} {first.kind} of rank {first.spatial}, {second.path!r} {second.layers or ''} "
            f"{second.kind} of rank {second.spatial}"
        )
    return second.path, first.path


def _dormant_plant(
    morph: Morph,
    site: str,
    source: str,
    blueprint: str,
    slot: int | None,
    layer: Layers,
    blend: str | None,
    config: dict[str, Any],
) -> Plant | None:
    """The first seed planted ahead that is asked for and free to germinate (or, under a trace, may be).

    A stack's lean seeds are planted ahead for the layers that they did not germinate in.
    """
    for plant in morph.spec.planted_at.get(site, ()):
        stage = morph.state[site].stage
        stacked = bool(morph.spec.by_path[site].layers)
        matches = (
            plant.blueprint == blueprint
            and plant.source == source
            and slot in (None, plant.slot)
            and blend in (None, plant.blend)
            and set(freeze_config(config)) <= set(plant.config)
            and (plant.resident or stacked)
        )
        if not matches:
            continue
        asleep = (stage == Stage.DORMANT) | ~chosen(morph, site, plant.slot, layer)
        if not concrete(asleep) or bool(jnp.all(asleep)):
            return plant
    return None


def _unpack(
    stored: Any, site: Site, config: dict[str, Any], blend: str | None, params: Any
) -> tuple[str, str, dict[str, Any], str | None, Any]:
    """A stored seed as `(name for messages, blueprint, config, blend, params)`, if it can live at the site."""
    if not isinstance(stored, Stored):
        raise TypeError(
            f"germinate() takes a blueprint's name or a stored seed such as urza.get(id), got {type(stored).__name__}"
        )
    if config or params is not None:
        given = ", ".join([*config, *(["params"] if params is not None else [])])
        raise TypeError(f"{label(stored)} brings its own config and parameters; germinate() was also given {given}")
    if (why := misfit(stored, site)) is not None:
        raise ValueError(f"{label(stored)} cannot germinate at {site.path!r}: {why.removeprefix(label(stored) + ': ')}")
    return label(stored), stored.blueprint, dict(stored.config), blend or stored.blend, stored.params
