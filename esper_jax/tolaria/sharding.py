"""Where a run's arrays live on a mesh of devices: the host's by a rule, what grew or follows them accordingly."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..kasmina.morph import Morph
from ..kasmina.sites import split_path
from ..kasmina.spec import Site
from .peers import alone, put
from .state import TrainState

RULES = ("dp", "fsdp")
SEEDS = ("host", "replicated", "auto")
LEAST = 1 << 12
"""Elements below which "fsdp" keeps an array whole, and "auto" a seed's: gathering it costs more than it saves."""
DATA = "data"
"""The mesh axis along which batches are divided, where the mesh has one of this name; else its first axis."""

Places = dict[tuple[str, ...], tuple[tuple[int, ...], PartitionSpec]]
"""By the keys of its path, an array's shape and how it is divided."""


class Layout:
    """How a run is laid out on a mesh.

    Args:
      mesh: the devices; None is all of them along one axis named "data".
      rule: "dp" (parameters on every device), "fsdp" (each parameter divided along its longest axis that the devices
        divide), `PartitionSpec`s in the structure of the host's params, or `{regular expression: PartitionSpec}`, of
        which the first that is found in a parameter's path (`encoder/Dense_0/kernel`) holds; what none names is whole.
      seeds: "host" divides a seed's arrays along the features as its site's are, "replicated" keeps seeds whole, and
        "auto" those of fewer than `least` elements (adapters).
      least: the fewest elements that are worth dividing.

    Raises:
      ValueError: an unknown rule or an axis that the mesh does not have. TypeError: no mesh, or no specs.
    """

    def __init__(self, mesh: Mesh | None = None, rule: Any = "dp", seeds: str = "host", least: int = LEAST) -> None:
        if mesh is not None and not isinstance(mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, such as jax.make_mesh gives, got {type(mesh).__name__}")
        devices = np.asarray(jax.devices()) if mesh is None else mesh.devices
        names = (DATA,) if mesh is None else mesh.axis_names
        self.mesh = Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
        if isinstance(rule, str) and rule not in RULES:
            raise ValueError(f"sharding must be 'dp', 'fsdp' or PartitionSpecs, got {rule!r}")
        if seeds not in SEEDS:
            raise ValueError(f"seed_sharding must be one of {', '.join(SEEDS)}, got {seeds!r}")
        self.rule, self.seeds, self.least = rule, seeds, least
        self.axis = DATA if DATA in names else names[0]
        self.across = int(self.mesh.shape[self.axis])
        if not isinstance(rule, str):
            self._check_specs()
        self.whole = NamedSharding(self.mesh, PartitionSpec())

    def shardings(self, tree: Any) -> Any:
        """A `NamedSharding` for each leaf of a `Morph` or `TrainState`, arrays or shapes, in the same structure.

        Optimizer state follows its parameter: a leaf whose path ends in a parameter's, and that has its shape, is
        divided as the parameter is. Everything else (stages, meters, counts, keys) is on every device.
        """
        morph = tree if isinstance(tree, Morph) else tree.morph
        host = self._host(morph)
        seeds = self._seeds(morph, host)
        at = jax.tree_util.tree_map_with_path
        placed = jax.tree.map(lambda leaf: self.whole, morph).with_params(
            {
                "host": at(lambda path, leaf: self._named(host, path), morph.params["host"]),
                "seeds": at(lambda path, leaf: self._named(seeds, path), morph.seeds),
            }
        )
        if isinstance(tree, Morph):
            return placed

        def of_seed(site: str, key: str, state: Any) -> Any:
            own = {path[2:]: place for path, place in seeds.items() if path[:2] == (site, key)}
            return at(functools.partial(self._follows, own), state)

        slots = tree.opt_state.seeds.items()
        optimizer = tree.opt_state.replace(
            host=at(functools.partial(self._follows, host), tree.opt_state.host),
            seeds={site: {key: of_seed(site, key, one) for key, one in held.items()} for site, held in slots},
        )
        rest = jax.tree.map(lambda leaf: self.whole, tree.replace(morph=None, opt_state=None))
        return rest.replace(morph=placed, opt_state=optimizer)

    def place(self, tree: Any) -> Any:
        """A `Morph` or `TrainState` with its arrays where they belong; those that are there already are kept."""
        bare = tree.replace(governor=None, control=None) if isinstance(tree, TrainState) else tree
        placed = jax.tree.map(put, bare, self.shardings(bare))
        return placed.replace(governor=tree.governor, control=tree.control) if isinstance(tree, TrainState) else placed

    def pinned(self, state: TrainState) -> TrainState:
        """Inside a program: its resulting state stays where it belongs, so that no call moves or recompiles."""
        return jax.lax.with_sharding_constraint(state, self.shardings(state))

    def shaped(self, tree: Any) -> Any:
        """Shapes of a `Morph` or `TrainState` (as `jax.ShapeDtypeStruct`s) with their shardings."""

        def one(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            weak = getattr(leaf, "weak_type", False)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak)

        return jax.tree.map(one, tree, self.shardings(tree))

    def batch_sharding(self, size: int, axis: int = 0) -> NamedSharding:
        """Where batches of `size` examples along `axis` go; on every device whole if the devices do not divide them."""
        if size % self.across:
            return self.whole
        return NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, self.axis))

    def put_batch(self, batch: Any, axis: int = 0) -> Any:
        """A batch on the mesh, divided along `axis`; with several processes each has the whole of it in hand."""
        return jax.tree.map(lambda leaf: put(leaf, self.batch_sharding(np.shape(leaf)[axis], axis)), batch)

    def join_batch(self, batch: Any, axis: int = 0) -> Any:
        """A batch on the mesh, divided along `axis`; with several processes each gives its own share of it.

        Raises:
          ValueError: the processes' shares do not divide over the devices.
        """
        processes = jax.process_count()
        if processes == 1:
            return self.put_batch(batch, axis)

        def one(leaf: Any) -> jax.Array:
            size = np.shape(leaf)[axis] * processes
            self.check_batch(size)
            sharding = self.batch_sharding(size, axis)
            return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

        return jax.tree.map(one, batch)

    def check_batch(self, size: int) -> None:
        """ValueError unless the devices divide a batch of `size` examples."""
        if size % self.across:
            raise ValueError(
                f"a batch of {size} examples does not divide over {self.across} devices; choose a multiple of "
                f"{self.across}"
            )

    def _host(self, morph: Morph) -> Places:
        """The place of each of the host's parameters, by its path in the params."""
        leaves = {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(morph.params["host"])}
        given = None if isinstance(self.rule, str) or self._patterns else self._given(leaves)
        found = {}
        for path, leaf in leaves.items():
            shape = tuple(leaf.shape)
            spec = self._chosen(path, shape) if given is None else given[path]
            self._check_fit("/".join(path), shape, spec)
            found[path] = shape, spec
        return found

    def _chosen(self, path: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        if self.rule == "dp":
            return PartitionSpec()
        if self.rule == "fsdp":
            fitting = [n for n, size in enumerate(shape) if size % self.across == 0]
            if math.prod(shape) < self.least or not fitting:
                return PartitionSpec()
            longest = max(fitting, key=lambda n: shape[n])
            return PartitionSpec(*(None,) * longest, self.axis)
        text = "/".join(path)
        return next((spec for pattern, spec in self.rule.items() if re.search(pattern, text)), PartitionSpec())

    def _given(self, leaves: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], PartitionSpec]:
        """The user's specs by path; None in their tree is a parameter that is whole."""
        flat = jax.tree_util.tree_leaves_with_path(self.rule, is_leaf=lambda x: x is None or _is_spec(x))
        specs = {names(path): PartitionSpec() if spec is None else spec for path, spec in flat}
        if specs.keys() != leaves.keys() and all(path[:1] == ("params",) for path in specs if len(path) > 1):
            specs = {path[1:]: spec for path, spec in specs.items() if path[:1] == ("params",)}
        for path in leaves.keys() - specs.keys():
            raise ValueError(f"sharding names no PartitionSpec for the parameter {'/'.join(path)}")
        for path in specs.keys() - leaves.keys():
            raise ValueError(
                f"sharding has a PartitionSpec for {'/'.join(path)}, which the host has not; its parameters are "
                f"{', '.join(sorted('/'.join(path) for path in leaves))}"
            )
        return specs

    def _seeds(self, morph: Morph, host: Places) -> Places:
        """The place of each seed's arrays, by their path in `Morph.seeds`."""
        places: Places = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(morph.seeds):
            shape, keys = tuple(leaf.shape), names(path)
            whole = self.seeds == "replicated" or (self.seeds == "auto" and math.prod(shape) < self.least)
            site = morph.spec.by_path[keys[0]]
            places[keys] = shape, PartitionSpec() if whole else self._like_site(site, shape, host)
        return places

    def _like_site(self, site: Site, shape: tuple[int, ...], host: Places) -> PartitionSpec:
        """A seed's array divided where it has the site's input or output features as the site's own arrays are."""
        into = out = None
        prefix = split_path(site.path)
        for path, (own, spec) in host.items():
            if path[: len(prefix)] == prefix and own:
                entries = tuple(spec) + (None,) * (len(own) - len(spec))
                if len(own) >= 2 and own[-2] == site.in_features:
                    into = into or entries[-2]
                if own[-1] == site.out_features:
                    out = out or entries[-1]
        entries_of: list[Any] = [None] * len(shape)
        if len(shape) >= 2 and shape[-2] == site.in_features:
            entries_of[-2] = into
        if shape and shape[-1] == site.out_features and (out is None or out not in entries_of):
            entries_of[-1] = out  # a mesh axis divides an array once
        while entries_of and entries_of[-1] is None:
            entries_of.pop()
        return PartitionSpec(*entries_of)

    def _named(self, places: Places, path: Any) -> NamedSharding:
        return NamedSharding(self.mesh, places[names(path)][1])

    def _follows(self, places: Places, path: Any, leaf: Any) -> NamedSharding:
        """The sharding of the parameter in whose path this one ends, if it has its shape."""
        keys = names(path)
        for start in range(len(keys)):
            shape, spec = places.get(keys[start:], (None, PartitionSpec()))
            if shape == tuple(leaf.shape):
                return NamedSharding(self.mesh, spec)
        return self.whole

    def _check_specs(self) -> None:
        specs = jax.tree.leaves(self.rule, is_leaf=lambda x: x is None or _is_spec(x))
        wrong = [spec for spec in specs if spec is not None and not _is_spec(spec)]
        if wrong or not specs or not isinstance(self.rule, Mapping):
            found = f"a {type(wrong[0] if wrong else self.rule).__name__}"
            raise TypeError(f"sharding must be 'dp', 'fsdp' or a mapping of PartitionSpecs, got {found}")
        for spec in specs:
            for axis in [axis for entry in spec or () for axis in _axes(entry)]:
                if axis not in self.mesh.axis_names:
                    raise ValueError(f"{spec} names the axis {axis!r}; the mesh has {', '.join(self.mesh.axis_names)}")

    @property
    def _patterns(self) -> bool:
        """Whether the user's specs are by regular expression: one level, and no name of a parameter is in it."""
        return not isinstance(self.rule, str) and all(map(_is_spec, self.rule.values()))

    def _check_fit(self, path: str, shape: tuple[int, ...], spec: PartitionSpec) -> None:
        if len(spec) > len(shape):
            raise ValueError(f"{spec} for the parameter {path} has more entries than its shape {shape}")
        for size, entry in zip(shape, spec, strict=False):
            parts = math.prod(self.mesh.shape[axis] for axis in _axes(entry))
            if size % parts:
                raise ValueError(f"{spec} divides an axis of {size} of the parameter {path} {shape} by {parts}")

    def __repr__(self) -> str:
        rule = self.rule if isinstance(self.rule, str) else "PartitionSpecs"
        sizes = " x ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        return f"Layout({rule} on {sizes}, seeds as {self.seeds})"


def make_layout(sharding: Any, mesh: Mesh | None, seeds: str) -> Layout | None:
    """The layout that `Tolaria(sharding=, mesh=, seed_sharding=)` asks for; None where nothing is said of devices.

    A mesh alone is "dp", and so are several processes.
    """
    if sharding is None and mesh is None and alone():
        if seeds != "host":
            raise ValueError(f"seed_sharding={seeds!r} needs sharding= or mesh=")
        return None
    return Layout(mesh, "dp" if sharding is None else sharding, seeds)


def names(path: Any) -> tuple[str, ...]:
    """The keys of a tree path as text."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a `PartitionSpec` names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _is_spec(spec: Any) -> bool:
    return isinstance(spec, PartitionSpec)
