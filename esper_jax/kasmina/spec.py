"""The static structure of a morph: sites, slots and the seeds planted in them. Hashable; a change is a new program."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax

Config = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """One host layer that can carry seeds.

    `path` is the module path joined by `/` (`"."` is the model itself). `in_shape` and `out_shape` are the feature
    dimensions alone, without batch and spatial ones: `(784,)` for a Dense, `(4, 16)` for a DenseGeneral into heads.
    `spatial` is the number of spatial dimensions (2 for an image convolution, else 0). `traced` says that shapes and
    kind come from a trace of the model and not from the shapes of its parameters. `layers` is the number of layers that
    a lifted transform stacked at this path (12 for a block under `nn.scan` of length 12), 0 for a layer of its own.
    `geometry` is what else a trace knows of the layer, e.g. strides and padding of a convolution.
    """

    path: str
    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: str = "float32"
    spatial: int = 0
    traced: bool = False
    layers: int = 0
    geometry: Config = ()

    @property
    def in_features(self) -> int:
        """Features of the layer's input (the product of `in_shape`)."""
        return _product(self.in_shape)

    @property
    def out_features(self) -> int:
        """Features of the layer's output (the product of `out_shape`)."""
        return _product(self.out_shape)


@dataclasses.dataclass(frozen=True)
class Plant:
    """What sits in one slot: a blueprint's name, its full config, and how it is blended.

    `resident` seeds were planted ahead of time and stay in the program when they are reset; the others leave it.
    `source` is the site whose input the seed reads where that is another layer than its own: the seed is a span.
    """

    site: str
    slot: int
    blueprint: str
    config: Config = ()
    blend: str = "add"
    resident: bool = False
    source: str = ""

    @property
    def key(self) -> str:
        """The slot's name in `Morph.seeds[site]`."""
        return slot_name(self.slot)


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """The whole static structure of a `Morph`: its sites, slots per site, and plants (sorted by site, then slot)."""

    sites: tuple[Site, ...]
    slots: int = 4
    plants: tuple[Plant, ...] = ()

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Spec) or hash(self) != hash(other):
            return False
        return self._fields == other._fields

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Spec, self._fields  # without what is cached: strings have other hashes in another process

    @functools.cached_property
    def _fields(self) -> tuple[Any, ...]:
        return self.sites, self.slots, self.plants

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._fields)

    @functools.cached_property
    def by_path(self) -> Mapping[str, Site]:
        """Sites by their path."""
        return {site.path: site for site in self.sites}

    @functools.cached_property
    def planted_at(self) -> Mapping[str, tuple[Plant, ...]]:
        """The plants of each site that has any, in slot order."""
        found: dict[str, list[Plant]] = {}
        for plant in self.plants:
            found.setdefault(plant.site, []).append(plant)
        return {path: tuple(plants) for path, plants in found.items()}

    @functools.cached_property
    def read_at(self) -> tuple[str, ...]:
        """The sites at which seeds read or write: those that have plants, then those that spans come from."""
        sources = [plant.source for plant in self.plants if plant.source]
        return tuple(dict.fromkeys((*self.planted_at, *sources)))

    @functools.cached_property
    def empty(self) -> Spec:
        """The same sites with nothing in their slots."""
        return dataclasses.replace(self, plants=())

    @functools.cached_property
    def has_residents(self) -> bool:
        """Whether any seed was planted ahead of time, and may rest in the program."""
        return any(plant.resident for plant in self.plants)

    def plant(self, site: str, slot: int) -> Plant | None:
        """The plant in that slot, or None where the slot is empty."""
        return next((plant for plant in self.planted_at.get(site, ()) if plant.slot == slot), None)

    def place(self, plant: Plant) -> Site:
        """Where a plant's seed stands: its site; a span's is of kind "span", from its source's input to its output."""
        site = self.by_path[plant.site]
        if not plant.source:
            return site
        source = self.by_path[plant.source]
        geometry = (("first", source.geometry), ("second", site.geometry))
        return dataclasses.replace(site, kind="span", in_shape=source.in_shape, geometry=geometry)

    def free_slots(self, site: str) -> tuple[int, ...]:
        """The empty slots of a site."""
        taken = {plant.slot for plant in self.planted_at.get(site, ())}
        return tuple(slot for slot in range(self.slots) if slot not in taken)

    @functools.cached_property
    def unrolled(self) -> Spec:
        """The spec as reports and controllers see it: each layer of a stack is a site of its own, `path[layer]`.

        A stack's seeds are there ahead of time in the layers where they did not germinate, so they count as resident.
        """
        if not any(site.layers for site in self.sites):
            return self
        parts = {
            site.path: [layer_path(site.path, n) for n in range(site.layers)] or [site.path] for site in self.sites
        }
        sites = [dataclasses.replace(s, path=path, layers=0) for s in self.sites for path in parts[s.path]]
        plants = [
            dataclasses.replace(p, site=path, resident=p.resident or bool(self.by_path[p.site].layers), source=source)
            for p in self.plants
            for path, source in zip(parts[p.site], parts.get(p.source, [""] * len(parts[p.site])), strict=True)
        ]
        return Spec(tuple(sites), self.slots, tuple(plants))

    def locate(self, path: str) -> tuple[str, int | None]:
        """A site's path, or a layer's in a stack (`path[layer]`), as `(site, layer)`; the layer of others is None."""
        stack, _, layer = path.removesuffix("]").rpartition("[")
        if path in self.by_path or not layer.isdigit() or stack not in self.by_path:
            return path, None
        return stack, int(layer)

    def by_layer(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """`{site: arrays}` with those of a stack, `[layers, ...]`, taken apart as in `unrolled`."""
        parts: dict[str, Any] = {}
        for path, tree in found.items():
            layers = self.by_path[path].layers
            for layer in range(layers):
                parts[layer_path(path, layer)] = jax.tree.map(lambda leaf, n=layer: leaf[n], tree)
            if not layers:
                parts[path] = tree
        return parts

    def with_plant(self, plant: Plant) -> Spec:
        """This spec with one more plant (it takes the place of another in the same slot)."""
        return self.without(plant.site, plant.slot)._with((*self.without(plant.site, plant.slot).plants, plant))

    def without(self, site: str, slot: int) -> Spec:
        """This spec with that slot empty."""
        return self._with(tuple(p for p in self.plants if (p.site, p.slot) != (site, slot)))

    def _with(self, plants: tuple[Plant, ...]) -> Spec:
        order = {site.path: index for index, site in enumerate(self.sites)}
        return dataclasses.replace(self, plants=tuple(sorted(plants, key=lambda p: (order[p.site], p.slot))))

    def to_json(self) -> str:
        """The spec as JSON; `Spec.from_json` gives an equal spec back."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Spec:
        """The spec that `to_json` wrote."""
        data = json.loads(text)
        sites = tuple(Site(**{name: _hashable(value) for name, value in site.items()}) for site in data["sites"])
        plants = tuple(Plant(**{**plant, "config": freeze_config(dict(plant["config"]))}) for plant in data["plants"])
        return Spec(sites, data["slots"], plants)


def layer_path(path: str, layer: int) -> str:
    """How a layer of a stack is named where each is a site of its own, e.g. `blocks/Dense_0[3]`."""
    return f"{path}[{layer}]"


def slot_name(slot: int) -> str:
    """The key of a slot in `Morph.seeds[site]`, e.g. `slot_0`."""
    return f"slot_{slot}"


def freeze_config(config: Mapping[str, Any]) -> Config:
    """A config as sorted, hashable pairs (lists become tuples)."""
    return tuple(sorted((name, _hashable(value)) for name, value in config.items()))


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping | set):
        raise TypeError(f"a blueprint's config holds numbers, text and lists of them, got {value!r}")
    return tuple(_hashable(v) for v in value) if isinstance(value, list | tuple) else value


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
