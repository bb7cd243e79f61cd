"""Linen layers that carry their own seeds, for people who write a new model with seeds in it.

Their seeds sit in the collection `seeds` and their lifecycle state in `kasmina`, beside `params`, so an optimizer over
`params` never meets them. `morph(variables)` takes both collections up into a `Morph`; `with_seeds_of(morph)` gives
variables for the plain `model.apply` back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from ._pytree import Struct, pytree, static
from .bank import Bank
from .blend import check_blend
from .blueprints import make_plant, seed_init
from .linen_layers import traced_site, with_seeds
from .sites import RESERVED, join_path, nodes, split_path
from .spec import Plant, Site
from .state import SeedState, resized

SEEDS, LIFE = "seeds", "kasmina"


@pytree
class Planted(Struct):
    """What a Kasmina layer keeps in the collection `kasmina`: its seeds' state, and statically what they are."""

    state: SeedState
    site: Site = static()
    plants: tuple[Plant, ...] = static()


class Embedded(NamedTuple):
    """The seeds of one Kasmina layer, taken out of a model's variables."""

    bank: Planted
    seeds: Mapping[str, Any]


def _seeded(layer: Any, h: Any, *args: Any, **kwargs: Any) -> Any:
    """The layer's output with its own seeds applied; under `graft` the graft applies them instead."""
    if not layer.planted or layer.scope.has_variable("params", RESERVED):
        return h
    if not layer.has_variable(LIFE, "bank") and not layer.is_initializing():
        return h
    check_blend(layer.blend)
    if layer.is_initializing():
        site = traced_site(join_path(layer.path), layer, None, args[0], h, layer.variables.get("params", {}), {})
        if not isinstance(site, Site):
            raise ValueError(f"{join_path(layer.path)} cannot carry seeds: {site}")
        wanted = {layer.planted: {}} if isinstance(layer.planted, str) else dict(layer.planted)
        if len(wanted) > layer.slots:
            raise ValueError(f"{site.path}: {len(wanted)} blueprints planted in {layer.slots} slots; raise slots=")
        plants = tuple(
            make_plant(site, slot, name, config, layer.blend, resident=True)
            for slot, (name, config) in enumerate(wanted.items())
        )
        layer.variable(LIFE, "bank", lambda: Planted(SeedState.empty(layer.slots), site, plants))
        for plant in plants:
            layer.variable(SEEDS, plant.key, lambda plant=plant: seed_init(plant, site, layer.make_rng("params")))
    planted: Planted = layer.get_variable(LIFE, "bank")
    seeds = {plant.key: layer.get_variable(SEEDS, plant.key) for plant in planted.plants}
    return with_seeds(layer, Bank(seeds, planted.state, None, None, planted.site, planted.plants), args, kwargs, h)


class KasminaDense(nn.Dense):
    """`nn.Dense` with a seed bank. `planted` is a blueprint's name or `{name: config}`; `slots` places for seeds."""

    slots: int = 4
    planted: Any = None
    blend: str = "add"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`[..., in] -> [..., features]`; exactly `nn.Dense` while its seeds are dormant or training."""
        return _seeded(self, super().__call__(inputs), inputs)


class KasminaConv(nn.Conv):
    """`nn.Conv` with a seed bank; see `KasminaDense`."""

    slots: int = 4
    planted: Any = None
    blend: str = "add"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`[..., *spatial, in] -> [..., *spatial, features]`."""
        return _seeded(self, super().__call__(inputs), inputs)


class KasminaAttention(nn.MultiHeadDotProductAttention):
    """`nn.MultiHeadDotProductAttention` with a seed bank on its output; see `KasminaDense`."""

    slots: int = 4
    planted: Any = None
    blend: str = "add"

    @nn.compact
    def __call__(self, inputs_q: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """`[..., length, in] -> [..., length, out]`; keys, values, masks and the rest as in Flax."""
        return _seeded(self, super().__call__(inputs_q, *args, **kwargs), inputs_q)


class KasminaLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` with a seed bank; see `KasminaDense`."""

    slots: int = 4
    planted: Any = None
    blend: str = "add"

    @nn.compact
    def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
        """`[..., features] -> [..., features]`."""
        return _seeded(self, super().__call__(x, **kwargs), x)


class KasminaBatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` with a seed bank; see `KasminaDense`."""

    slots: int = 4
    planted: Any = None
    blend: str = "add"

    @nn.compact
    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """`[..., features] -> [..., features]`; `use_running_average`, `mask` as in Flax."""
        return _seeded(self, super().__call__(x, *args, **kwargs), x)


def take_seeds(variables: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Embedded]]:
    """Split Kasmina layers' seeds from a model's variables: the host's own variables, and the seeds by site."""
    life = variables.get(LIFE)
    if not isinstance(life, Mapping) or "params" not in variables:
        return variables, {}
    seeds = {join_path(path): node for path, node in nodes(variables.get(SEEDS, {}))}
    found = {
        join_path(path): Embedded(node["bank"], seeds.get(join_path(path), {}))
        for path, node in nodes(life)
        if isinstance(node.get("bank"), Planted)
    }
    host = {name: tree for name, tree in variables.items() if name not in (LIFE, SEEDS)}
    return (host, found) if found else (variables, {})


def give_seeds(morph: Any, embedded: Mapping[str, Embedded]) -> dict[str, Any]:
    """The `seeds` and `state` of a morph with those of its model's Kasmina layers in place."""
    return {
        "seeds": {**morph.seeds, **{path: dict(given.seeds) for path, given in embedded.items()}},
        "state": {
            **morph.state,
            **{path: resized(given.bank.state, morph.spec.slots) for path, given in embedded.items()},
        },
    }


def with_seeds_of(morph: Any) -> dict[str, Any]:
    """Variables for a model written with Kasmina layers, seeds and state included, for its plain `apply`.

    For an nnx model an `nnx.State`, for `nnx.update(model, ...)`.

    Raises:
      TypeError: `morph` is no `Morph`.
    """
    from .morph import check_morph

    check_morph(morph, "with_seeds_of")
    if morph.form is not None:
        own: dict[tuple[str, ...], Any] = {}
        for path in morph.spec.planted_at:
            parts = split_path(path)
            own[(*parts, "kasmina_seeds")] = morph.seeds[path]
            own[(*parts, "kasmina_life")] = morph.state[path]
        return morph.form.state(morph.host, own)  # type: ignore[no-any-return]
    seeds: dict[str, Any] = {}
    life: dict[str, Any] = {}
    for path, plants in morph.spec.planted_at.items():
        for tree, node in ((seeds, morph.seeds[path]), (life, {"bank": _planted(morph, path, plants)})):
            at = tree
            for part in path.split("/") if path != "." else ():
                at = at.setdefault(part, {})
            at.update(node)
    return {**morph.variables, SEEDS: seeds, LIFE: life}


def _planted(morph: Any, path: str, plants: tuple[Plant, ...]) -> Planted:
    return Planted(morph.state[path], morph.spec.by_path[path], plants)
