"""The morph: a host, its seeds and their state in one pytree, and the calls that make and take it apart."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import INT32, one_of, whole
from . import linen, modules
from ._pytree import Struct, pytree, static
from .blend import check_blend
from .blueprints import UnknownBlueprintError, get_blueprint, make_plant, registered, seed_shapes
from .sites import Where, find_sites, matcher
from .spec import Plant, Site, Spec
from .state import SeedState, blends, stages_text


@pytree
class Morph(Struct):
    """A host and the seeds growing in it; a pytree that `jit`, `grad`, `vmap`, `scan` and Orbax take like any other.

    `host` holds the user's variables exactly as given; those of an nnx host are plain dicts by collection, and `form`
    knows what they were, so that `unmorph` gives an `nnx.State` back. `seeds` is `{site: {slot: variables}}` and
    `state` is `{site: SeedState}`, both for the sites with a planted seed only: a morph with empty slots has the
    host's leaves and no others. `spec` is the static structure; changing it changes the program, changing the arrays
    never does.
    """

    host: Any
    seeds: dict[str, dict[str, Any]]
    state: dict[str, SeedState]
    spec: Spec = static()
    form: Any = static(default=None)

    @property
    def params(self) -> dict[str, Any]:
        """What an optimizer trains: `{"host": the host's params, "seeds": the seeds' variables}`."""
        return {"host": self.host["params"] if is_variables(self.host) else self.host, "seeds": self.seeds}

    @property
    def variables(self) -> dict[str, Any]:
        """The host as a Linen variables dict, whichever form it was given in."""
        return dict(self.host) if is_variables(self.host) else {"params": self.host}

    def with_params(self, params: Mapping[str, Any]) -> Morph:
        """This morph with other parameters, in the form of `Morph.params`."""
        host = _like(self.host, {"params": params["host"]}) if is_variables(self.host) else params["host"]
        return self.replace(host=host, seeds=params["seeds"])

    def with_collections(self, collections: Mapping[str, Any]) -> Morph:
        """This morph with the host's other collections updated (`batch_stats`, ...), as `mutable=` returns them."""
        if not collections:
            return self
        return self.replace(host=_like(self.host if is_variables(self.host) else self.variables, collections))

    def alone(self) -> Morph:
        """The host with its sites and nothing planted, as if all slots were empty."""
        return self.replace(seeds={}, state={}, spec=self.spec.empty)

    def __repr__(self) -> str:
        if not isinstance(self.spec, Spec):  # a tree of other things in this shape, such as shardings
            return f"Morph(host={self.host}, seeds={self.seeds}, state={self.state})"
        spec, kinds = self.spec, [site.kind for site in self.spec.sites]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        planted = f"{len(spec.plants)} planted: {_plants_text(self)}" if spec.plants else "all slots empty"
        return (
            f"Morph({count(self.params['host']):,} host parameters, {len(spec.sites)} sites ({counts}) "
            f"x {spec.slots} slots, {planted})"
        )


def morph(
    params: Any,
    *,
    where: Where = None,
    slots: int = 4,
    planted: str | list[str] | Mapping[str, Mapping[str, Any]] | None = None,
    blend: str = "add",
    model: Any = None,
    example: Any = None,
    **call_kwargs: Any,
) -> Morph:
    """Make a host's supported layers into sites where seeds can grow.

    Args:
      params: the host: Linen variables (`{"params": ..., "batch_stats": ...}`), the bare params tree, or an
        `nnx.Module` or `nnx.State` (a module knows its layers, so nothing need be traced; but those of Linen modules
        inside, under `nnx.bridge.ToNNX`, are traced with `example` alone).
      where: which layers become sites: a regex searched in the path, or a predicate `(path, kind) -> bool`.
      slots: places for seeds at each site.
      planted: blueprints to allocate ahead at every site they fit, so that growing them recompiles nothing:
        a name, a list of names, or `{name: config}`. They are dormant until `germinate` gives them parameters.
      blend: how planted seeds meet the host's output: add, lerp, multiply or gate.
      model: the Linen module; with `example`, kinds, shapes and dtypes are traced exactly instead of read from the
        parameters' names and shapes.
      example: one input, an array or a tuple of arguments; only its shape matters.
      **call_kwargs: keyword arguments of the traced call.

    Returns:
      The `Morph`. Empty slots add nothing to it: its forward pass is the host's own program.

    Raises:
      TypeError: `params` is no parameter tree, or an argument of another kind than the above. ValueError: no site
      found, too many blueprints for the slots, or a blueprint that fits nowhere. KeyError: an unknown blueprint.

    >>> m = morph({"Dense_0": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}})
    >>> [site.path for site in m.spec.sites]
    ['Dense_0']
    """
    wanted, blend = check_options(where, slots, planted, blend)
    if call_kwargs and model is None and example is None:
        name = next(iter(call_kwargs))
        raise TypeError(f"morph() has no argument {name!r}, and keywords of the traced call go with example=")
    form, given = None, params
    if (nnx := nnx_adapter(params)) is not None:
        params, form = nnx.take(params)
    host, embedded = modules.take_seeds(check_host(params))
    embedded |= {} if nnx is None else nnx.embedded(given)
    variables = linen.unboxed(host if is_variables(host) else {"params": host})
    if nnx is None and (model is None) != (example is None):
        raise ValueError("morph() traces shapes from model= and example= together; only one of them was given")
    if nnx is not None:
        sites = nnx.sites_of(given, variables, where, example, call_kwargs)
    elif model is not None:
        linen_model = linen.model_of(model)
        if linen_model is None:
            raise TypeError(f"model= must be a flax.linen.Module, got {type(model).__name__}")
        sites = linen.trace_sites(linen_model, variables, example, where, call_kwargs)
    else:
        sites = find_sites(variables["params"], variables.get("batch_stats", {}), where)
    spec = Spec(sites, max([int(slots), *(given.bank.state.stage.shape[-1] for given in embedded.values())]))
    if left_out := [path for path in embedded if path not in spec.by_path]:
        raise ValueError(
            f"{', '.join(left_out)} carry seeds of their own, which where={where!r} would drop; let it admit them"
        )
    plants = [plant for given in embedded.values() for plant in given.bank.plants]
    for plant in plants or _ahead(spec, wanted, blend):
        spec = spec.with_plant(plant)
    result = with_spec(Morph(host, {}, {}, Spec(spec.sites, spec.slots), form), spec)
    return result.replace(**modules.give_seeds(result, embedded)) if embedded else result


def with_spec(morph: Morph, spec: Spec) -> Morph:
    """The morph under another spec: new plants get zero parameters and a dormant slot, vanished ones are dropped."""
    seeds: dict[str, dict[str, Any]] = {}
    state: dict[str, SeedState] = {}
    for path, plants in spec.planted_at.items():
        site, old = spec.by_path[path], morph.seeds.get(path, {})
        kept = {plant.key for plant in plants if morph.spec.plant(path, plant.slot) == plant}
        seeds[path] = {p.key: old[p.key] if p.key in kept else blank(p, spec.place(p)) for p in plants}
        state[path] = morph.state[path] if path in morph.state else SeedState.empty(spec.slots, site.layers)
    return morph.replace(seeds=seeds, state=state, spec=spec)


def blank(plant: Plant, site: Site) -> Any:
    """Zero parameters in the shape of the plant's, of each layer where the site has a stack of them."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), seed_shapes(plant, site))


def unmorph(morph: Morph) -> Any:
    """The host's own variables back, in the form they were given; seeds that are part of the output are left behind.

    Warns when a seed is BLENDING, HOLDING or FOSSILIZED, because the host alone then computes something else.
    """
    check_morph(morph, "unmorph")
    left = [f"{p.site} {p.key}" for p in morph.spec.plants if _blended(morph.state[p.site], p.slot)]
    if left:
        warnings.warn(
            f"unmorph() returns the host without its seeds; {', '.join(left)} had entered the output, which is now "
            "different",
            stacklevel=2,
        )
    return morph.host if morph.form is None else morph.form.state(morph.host)


def nnx_adapter(host: Any) -> Any:
    """The nnx adapter if `host` is an nnx module or state; nnx is not imported for any other."""
    if "flax.nnx" not in sys.modules:
        return None
    from . import nnx_hosts

    return nnx_hosts if nnx_hosts.is_host(host) else None


def sites(params: Any, *, where: Where = None) -> tuple[Site, ...]:
    """The sites that `morph(params)` would make, or those of a `Morph`."""
    if isinstance(params, Morph):
        return params.spec.sites
    return morph(params, where=where).spec.sites


def is_variables(host: Any) -> bool:
    """Whether the host was given as a variables dict rather than the bare params tree."""
    return isinstance(host, Mapping) and isinstance(host.get("params"), Mapping)


def check_host(params: Any) -> Any:
    """`params` itself if it is a nested mapping of arrays; a TypeError that says what to give otherwise."""
    if isinstance(params, Morph):
        raise TypeError("morph() got a Morph; give it the host's variables (unmorph() returns them)")
    if not isinstance(params, Mapping):
        raise TypeError(
            f"morph() needs a model's variables or params (nested dicts of arrays), got {type(params).__name__}. "
            "For a Linen model pass model.init(...), for an nnx model the module itself"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(params)):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(f"morph() needs arrays, but {name} is {type(leaf).__name__}")
    return params


def check_morph(morph: Any, call: str, what: str = "first") -> None:
    """TypeError, saying how to make one, where `morph` is no `Morph`; `what` says which argument it is."""
    if not isinstance(morph, Morph):
        raise TypeError(f"{call}() needs a Morph {what}, got {type(morph).__name__}; make one with morph(params)")


def count(tree: Any) -> int:
    """The number of scalars in a tree of arrays."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


def _like(host: Any, changes: Mapping[str, Any]) -> Any:
    """The host's variables with some collections changed, in the mapping type they were given in."""
    return type(host)({**host, **changes})


def check_options(where: Any, slots: Any, planted: Any, blend: Any) -> tuple[dict[str, Mapping[str, Any]], str]:
    """What `planted` and `blend` ask for, where these can be options of `morph`; its errors, naming one, otherwise."""
    whole("slots", slots, 1, INT32)
    matcher(where)
    return _wanted(planted), check_blend(blend)


def _wanted(planted: Any) -> dict[str, Mapping[str, Any]]:
    """What `planted=` asks for, as `{name: config}`; TypeError or KeyError, naming it, for what no blueprint is."""
    if planted is None:
        return {}
    several = not isinstance(planted, str) and isinstance(planted, Iterable)
    names = tuple(planted) if several else (planted,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"planted must be a blueprint's name, a list of names, or {{name: config}}, got {planted!r}")
    wanted = {name: planted[name] if isinstance(planted, Mapping) else {} for name in names}
    for name, config in wanted.items():
        one_of(f"planted[{name!r}]", config, Mapping, '{"rank": 4}')
        try:
            get_blueprint(name)
        except UnknownBlueprintError as error:
            raise UnknownBlueprintError(f"planted: {error}") from None
    return wanted


def _ahead(spec: Spec, wanted: Mapping[str, Mapping[str, Any]], blend: str) -> list[Plant]:
    """The resident plants that are asked for at every site they fit."""
    plants: list[Plant] = []
    for name, config in wanted.items():
        blueprint = get_blueprint(name)
        fitting = [site for site in spec.sites if blueprint.fits(site)]
        if not fitting:
            have = ", ".join(dict.fromkeys(site.kind for site in spec.sites))
            raise ValueError(f"planted blueprint {name!r} fits {', '.join(blueprint.kinds)}; the sites are {have}")
        for site in fitting:
            slot = sum(plant.site == site.path for plant in plants)
            if slot >= spec.slots:
                raise ValueError(
                    f"site {site.path!r} has {spec.slots} slots; planting {name!r} needs one more: raise slots="
                )
            plants.append(make_plant(site, slot, name, config, blend, resident=True))
    return plants


def _blended(state: SeedState, slot: int) -> bool:
    if isinstance(state.stage, jax.core.Tracer):
        return False
    return bool(np.any(blends(state.stage)[..., slot]))


def _plants_text(morph: Morph) -> str:
    shown = []
    for plant in morph.spec.plants[:4]:
        state = morph.state[plant.site]
        known = isinstance(state.stage, jax.Array | np.ndarray) and not isinstance(state.stage, jax.core.Tracer)
        alike = known and state.stage.ndim == (2 if morph.spec.by_path[plant.site].layers else 1)
        name = stages_text(state, plant.slot) if alike else ""
        shown.append(f"{plant.blueprint} at {plant.site} {name}".rstrip())
    return ", ".join(shown) + (", ..." if len(morph.spec.plants) > 4 else "")


__all__ = ["Morph", "morph", "registered", "sites", "unmorph", "with_spec"]
