"""What the tests of the bridge share: models imported once, seeds at every site, one SGD step in both worlds."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

import esper_jax
from esper_jax.bridge.comparison import verify as compare
from esper_jax.bridge.convert import numpy_of
from esper_jax.bridge.graph import flatten
from esper_jax.bridge.layout import get
from esper_jax.kasmina.blueprints import get_blueprint, make_plant, registered
from esper_jax.kasmina.morph import with_spec

from ..kasmina.hosts import in_stage, stirred
from .zoo import MODELS, fresh, inputs

BATCH = 4
SMALL = {"hidden": 4, "rank": 2, "width": 4, "kernel": 3}


@dataclasses.dataclass(frozen=True)
class Case:
    """An imported model: torch's module, the pair that `from_torch` gave, and its inputs for torch and for JAX."""

    module: torch.nn.Module
    model: Any
    variables: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arrays: dict[str, Any]
    rate: float

    @functools.cached_property
    def report(self) -> Any:
        """What differs from torch, measured once."""
        return compare(self.model, self.variables, self.module, self.args, self.kwargs)

    def flat(self, output: Any) -> list[Any]:
        """The model's outputs in torch's order."""
        leaves = flatten(self.model.graph.evaluate.structure, output)
        return [leaves[i][1] for i in sorted(leaves) if leaves[i][1] is not None]


def split(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and named ones."""
    return ((), given) if isinstance(given, dict) else (given, {})


def to_arrays(case_names: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Named inputs as JAX arrays; constants are left out, the model knows them."""
    named = {**dict(zip(case_names, args, strict=False)), **kwargs}
    return {k: jnp.asarray(numpy_of(v)) for k, v in named.items() if isinstance(v, torch.Tensor)}


@functools.cache
def case(name: str) -> Case:
    """A model of the zoo, imported once."""
    torch.set_num_threads(1)
    module, given = fresh(name), inputs(name, BATCH)
    found = esper_jax.from_torch(module, given, verify=False)
    args, kwargs = split(given)
    arrays = to_arrays(found.model.graph.names, args, kwargs)
    return Case(module, found.model, found.variables, args, kwargs, arrays, MODELS[name].rate)


def outputs_of(module: torch.nn.Module, args: Any, kwargs: Any) -> list[np.ndarray]:
    """Torch's outputs in evaluation mode, flat."""
    module.eval()
    with torch.no_grad():
        found = module(*args, **kwargs)
    leaves = torch.utils._pytree.tree_leaves(found)
    return [numpy_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]


def close(got: Any, want: Any, limit: float) -> None:
    """All arrays of both within `limit` of the largest value of each of the second."""
    got, want = [x for x in got if x is not None], list(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        if not np.issubdtype(b.dtype, np.floating):
            assert np.array_equal(a, b)
            continue
        scale = float(np.abs(b).max(initial=0.0)) or 1.0
        assert float(np.abs(a - b).max(initial=0.0)) <= limit * scale


def morphed(given: Case) -> esper_jax.Morph:
    """The imported model as a morph, every layer a site."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that are no sites are in the report
        return esper_jax.morph(given.variables, model=given.model, example=(), **given.arrays)


def fully_planted(given: Case, *, only: Any = None) -> esper_jax.Morph:
    """One seed at every site, blueprints and blends in turn, none of its parameters zero."""
    morph = morphed(given)
    spec = morph.spec
    for i, site in enumerate(spec.sites):
        own = [b.name for b in registered() if b.fits(site) and b.init.__module__.startswith("esper_jax.kasmina")]
        names = [n for n in own if only is None or get_blueprint(n).merge is not None]
        names = [n for n in names if n != "norm" or site.out_features > 1] or own
        blueprint = names[i % len(names)]
        known = get_blueprint(blueprint).config
        config = {key: value for key, value in SMALL.items() if key in known}
        if only and blueprint == "affine":
            config = {"bias": bool(get(given.variables["params"], tuple(site.path.split("/"))).get("bias") is not None)}
        blend = "add" if only else ("add", "lerp", "gate", "multiply")[i % 4]
        spec = spec.with_plant(make_plant(site, 0, blueprint, config, blend, False))
    morph = with_spec(morph, spec)
    return morph.replace(seeds=stirred(morph.seeds, 0.05))


def grown(given: Case, **options: Any) -> esper_jax.Morph:
    """All those seeds in the output."""
    return in_stage(fully_planted(given, **options), esper_jax.Stage.FOSSILIZED)
