"""Stored seeds as the body sees them: anything with a blueprint's name, a config, a blend and parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from .blueprints import make_plant, seed_shapes
from .spec import Plant, Site


@runtime_checkable
class Stored(Protocol):
    """A seed at rest, ready to be germinated with its own parameters; `urza.get(id)` gives one, and others may."""

    @property
    def blueprint(self) -> str:
        """The registered blueprint's name."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The blueprint's config."""

    @property
    def blend(self) -> str:
        """How it meets the host's output."""

    @property
    def params(self) -> Any:
        """Its variables: a pytree of arrays in the blueprint's shapes and dtypes."""


def label(stored: Any) -> str:
    """How messages name a stored seed: by the start of its id where it has one."""
    name = str(getattr(stored, "id", ""))
    return f"stored seed {name[:12]} ({stored.blueprint!r})" if name else f"stored seed of {stored.blueprint!r}"


def misfit(stored: Stored, site: Site) -> str | None:
    """Why a stored seed cannot germinate at a site, in words, or None where it can. `params` may be shapes only."""
    try:
        plant = make_plant(site, 0, stored.blueprint, stored.config, stored.blend, resident=False)
        fit_params(plant, site, stored.params, label(stored))
    except (KeyError, TypeError, ValueError) as error:
        return str(error)
    return None


def fit_params(plant: Plant, site: Site, params: Any, name: str) -> Any:
    """Stored parameters in the blueprint's own tree, leaves matched by their paths; of one layer, at a stack of them.

    Raises:
      ValueError: other leaves, shapes or dtypes than the plant's; it names the seed, what was found and what is needed.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(seed_shapes(plant, dataclasses.replace(site, layers=0)))
    wanted = {_path(path): leaf for path, leaf in leaves}
    found = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    where = f"{plant.blueprint!r} at {site.path!r}"
    if set(found) != set(wanted):
        have, need = (", ".join(sorted(names)) or "nothing" for names in (found, wanted))
        raise ValueError(f"{name}: its parameters have another structure: it holds {have}; {where} needs {need}")
    for path, want in wanted.items():
        shape, dtype = _signature(found[path])
        if shape != want.shape or dtype != want.dtype:
            raise ValueError(f"{name}: stored {path} is {dtype}{shape}, {where} needs {want.dtype}{want.shape}")
    return jax.tree_util.tree_unflatten(structure, [found[path] for path in wanted])


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _signature(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype as they are: a float64 of numpy stays one, so that nothing is cast in silence."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return tuple(leaf.shape), jnp.dtype(leaf.dtype)
    return jnp.shape(leaf), jnp.result_type(leaf)
