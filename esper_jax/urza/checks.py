"""What is asked of a seed before it is stored, and of a stored one before it is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _versions
from ..kasmina.blueprints import registered
from ..kasmina.spec import Site, freeze_config
from ..kasmina.stored import misfit
from .encode import rebuild
from .program import signature
from .record import Entry


def fits(entry: Entry, site: Site, answers: dict[Any, bool]) -> bool:
    """Whether `germinate` would take the seed at the site; each kind of seed is traced once."""
    if not known(entry.blueprint):
        return entry.program is not None and signature(entry.site) == signature(site)
    question = (entry.blueprint, freeze_config(entry.config), entry.blend, entry.arrays)
    if question not in answers:
        shapes = {spec.name: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype)) for spec in entry.arrays}
        seed = _Shapes(entry.id, entry.blueprint, entry.config, entry.blend, rebuild(entry.layout, shapes))
        answers[question] = misfit(seed, site) is None
    return answers[question]


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """A stored seed of shapes only."""

    id: str
    blueprint: str
    config: Mapping[str, Any]
    blend: str
    params: Any


def known(blueprint: str) -> bool:
    """Whether a blueprint of that name is registered."""
    return any(b.name == blueprint for b in registered())


def check_finite(blueprint: str, arrays: Mapping[str, Any]) -> None:
    """ValueError for arrays that are not finite or none at all, TypeError for those that are not concrete."""
    if not arrays:
        raise ValueError(f"a seed of {blueprint!r} without parameters cannot be stored")
    for name, array in arrays.items():
        if isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise TypeError(f"{name} of {blueprint!r} is {type(array).__name__}; put() stores concrete arrays")
        if not np.all(np.isfinite(np.asarray(array, np.float64))):
            raise ValueError(f"{name} of {blueprint!r} is not finite; such a seed is not worth keeping")


def measured(name: str, value: Any, least: float = -math.inf) -> float | None:
    """A measured number, None for NaN; TypeError or ValueError for anything that cannot have been measured."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}")
    if math.isinf(float(value)):
        raise ValueError(f"{name} must be finite, or NaN where it was not measured, got {value!r}")
    if float(value) < least:
        raise ValueError(f"{name} must be {least:g} or more, or NaN where it was not measured, got {value!r}")
    return None if math.isnan(float(value)) else float(value)


def versions() -> dict[str, str]:
    """The versions that a note names."""
    return _versions.versions("esper_jax", "jax", "safetensors")
