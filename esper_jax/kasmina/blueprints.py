"""The registry of blueprints: recipes of seeds. It holds recipes only, never a live seed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._checks import by_name, flag, function, line
from .spec import Plant, Site, freeze_config

Params = Any
DENSE = ("dense", "dense_general", "einsum")
CONVS = ("conv", "conv_transpose")
NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")
KINDS = (*DENSE, *CONVS, "embed", "attention", *NORMS)
READS = ("input", "output", "call")
SPAN = "span"
"""The kind of place a seed has that reads one layer's input and adds to a later one's output."""


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A recipe: `init(key, site, **config) -> params` and `apply(params, u, site=site, **config) -> f`.

    `reads` says what `u` is: the layer's `"input"` (parallel: in -> out features) or its `"output"` (residual:
    out -> out). `u` has any leading dimensions; at a convolution it is `[N, *spatial, features]`.

    `merge(host, params, alpha, site=site, **config) -> host` is given by a seed that folds away: the layer's own
    parameters with which it alone computes what layer and seed compute together, in the same shapes and dtypes.
    """

    name: str
    init: Callable[..., Params]
    apply: Callable[..., jax.Array]
    reads: str
    kinds: tuple[str, ...]
    config: Mapping[str, Any]
    about: str = ""
    citation: str = ""
    merge: Callable[..., Params] | None = None
    where: Callable[[Site], bool] | None = None

    def fits(self, site: Site) -> bool:
        """Whether the blueprint is made for that kind of site, and for this one among them."""
        return site.kind in self.kinds and (self.where is None or self.where(site))

    def full_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults with `config` over them; an unknown key raises a TypeError that lists the known ones."""
        unknown = sorted(set(config) - set(self.config))
        if unknown:
            known = ", ".join(f"{k}={v!r}" for k, v in self.config.items()) or "it takes none"
            raise TypeError(f"blueprint {self.name!r} has no config {', '.join(map(repr, unknown))}; known: {known}")
        return {**self.config, **config}


_REGISTRY: dict[str, Blueprint] = {}


def register_blueprint(
    name: str,
    *,
    init: Callable[..., Params] | None = None,
    apply: Callable[..., jax.Array] | None = None,
    module: Callable[..., Any] | None = None,
    reads: str = "output",
    kinds: Iterable[str] = KINDS,
    config: Mapping[str, Any] | None = None,
    about: str = "",
    citation: str = "",
    merge: Callable[..., Params] | None = None,
    where: Callable[[Site], bool] | None = None,
    replace: bool = False,
) -> Blueprint:
    """Add a blueprint under `name`, from a pair of functions or from a Flax module.

    Args:
      name: what `germinate` calls it.
      init: `init(key, site, **config) -> params`, a pytree of floating arrays.
      apply: `apply(params, u) -> f`; it is also given `site` and the config keywords that its signature names.
      module: instead of the pair, `module(site, **config) -> flax.linen.Module` with parameters only.
      reads: `"input"` for a seed parallel to the layer, `"output"` for one that follows it; `"call"` for one parallel
        to an attention layer that is given `(queries, keys, values, mask)`, the mask an array or None.
      kinds: the site kinds it is made for, of `dense, dense_general, einsum, conv, conv_transpose, embed, attention,
        layer_norm, rms_norm, group_norm, batch_norm`, or `span` (from one layer's
        input to a later one's output).
      config: config keys and their defaults; with functions, taken from `init`'s keyword defaults when None.
      about: what it is, in a line, shown by `blueprints()`.
      citation: the paper, shown likewise.
      merge: how the seed folds into its host (see `Blueprint`); None for one that cannot.
      where: `where(site) -> bool`, which sites of those kinds it is made for; None is all of them.
      replace: allow a name that is taken.

    Returns:
      The blueprint.

    Raises:
      ValueError: the name is taken, or is no text of one line; `reads` or a kind is unknown; neither or both forms are
      given. TypeError: an argument of another kind than the above.
    """
    line("name", name)
    flag("replace", replace)
    if name in _REGISTRY and not replace:
        raise ValueError(f"blueprint {name!r} exists already; give another name, or replace=True to take its place")
    if not isinstance(reads, str) or reads not in READS:
        raise ValueError(f"blueprint {name!r}: reads must be one of {', '.join(READS)}, got {reads!r}")
    if module is not None and not callable(module):
        raise TypeError(f"blueprint {name!r}: module must be a function, got {module!r}")
    for given, what, example in (
        (init, "init", 'lambda key, site: {"scale": jnp.zeros(site.out_shape)}'),
        (apply, "apply", 'lambda params, u: params["scale"] * u'),
        (merge, "merge", "that of a Blueprint"),
        (where, "where", "lambda site: not site.layers"),
    ):
        if given is not None:
            function(f"blueprint {name!r}: {what}", given, example)
    if config is not None:
        by_name(f"blueprint {name!r}: config", config, '{"rank": 4}')
    for text, what in ((about, "about"), (citation, "citation")):
        line(f"blueprint {name!r}: {what}", text, empty=True)
    if not isinstance(kinds, Iterable):
        raise TypeError(f"blueprint {name!r}: kinds must be site kinds such as ('dense', 'conv'), got {kinds!r}")
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if wrong := [kind for kind in kinds if not isinstance(kind, str) or kind not in (*KINDS, SPAN)]:
        raise ValueError(f"blueprint {name!r}: unknown site kind {wrong[0]!r}; choose from {', '.join(KINDS)}")
    if module is not None and init is None and apply is None:
        from .linen import blueprint_functions

        defaults = _keyword_defaults(module) if config is None else dict(config)
        init, apply = blueprint_functions(name, module, reads)
    elif module is None and init is not None and apply is not None:
        defaults = _keyword_defaults(init) if config is None else dict(config)
        apply = _taking(apply, ("site", *defaults))
    else:
        raise ValueError(f"blueprint {name!r} needs either init= and apply=, or module=")
    _REGISTRY[name] = Blueprint(name, init, apply, reads, kinds, defaults, about, citation, merge, where)
    return _REGISTRY[name]


def get_blueprint(name: str) -> Blueprint:
    """The blueprint of that name; a KeyError that lists the known ones otherwise."""
    if not isinstance(name, str) or name not in _REGISTRY:
        stored = "@" in name if isinstance(name, str) else False
        hint = f". It is a stored program: get {name.rsplit('@', 1)[1]!r} from its library first" if stored else ""
        raise UnknownBlueprintError(f"unknown blueprint {name!r}; known: {', '.join(sorted(_REGISTRY))}{hint}")
    return _REGISTRY[name]


class UnknownBlueprintError(KeyError):
    """No blueprint of that name; the message lists those that exist."""

    def __str__(self) -> str:
        return str(self.args[0])


def registered() -> tuple[Blueprint, ...]:
    """All blueprints, by name."""
    return tuple(_REGISTRY[name] for name in sorted(_REGISTRY))


def adopt(blueprints: Iterable[Blueprint]) -> None:
    """Take over recipes that another process registered, under their own names."""
    for blueprint in blueprints:
        _REGISTRY[blueprint.name] = blueprint


def make_plant(
    site: Site, slot: int, name: str, config: Mapping[str, Any], blend: str, resident: bool, source: str = ""
) -> Plant:
    """The plant of a blueprint in a slot, checked by shape against the site before anything is allocated.

    Raises:
      KeyError: unknown blueprint. TypeError: unknown config key. ValueError: a blueprint for other kinds of site, or
      one whose output does not fit.
    """
    blueprint = get_blueprint(name)
    full = blueprint.full_config(config)
    if site.kind not in blueprint.kinds:
        raise ValueError(
            f"blueprint {name!r} is made for {', '.join(blueprint.kinds)}; site {site.path!r} is {site.kind}. "
            f"Blueprints for it: {', '.join(b.name for b in registered() if b.fits(site)) or 'none'}"
        )
    plant = Plant(site.path, slot, name, freeze_config(full), blend, resident, source)
    _check_shapes(_Recipe(blueprint), plant, site, bool(jax.config.read("jax_enable_x64")))
    return plant


def seed_init(plant: Plant, site: Site, key: jax.Array) -> Params:
    """Fresh variables of the plant: the blueprint's params, with a gate beside them for the blend "gate".

    At a site of stacked layers each leaf has a leading axis of them, and each layer a key of its own.
    """
    if site.layers:
        one = dataclasses.replace(site, layers=0)
        return jax.vmap(lambda key: seed_init(plant, one, key))(jax.random.split(key, site.layers))
    blueprint = get_blueprint(plant.blueprint)
    if plant.blend != "gate":
        return blueprint.init(key, site, **dict(plant.config))
    features = site.out_features if blueprint.reads == "output" else site.in_features
    gate = {"kernel": jnp.zeros((features, 1), site.dtype), "bias": jnp.zeros((1,), site.dtype)}
    return {"gate": gate, "seed": blueprint.init(key, site, **dict(plant.config))}


def seed_apply(plant: Plant, site: Site, variables: Params, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The seed's output and its gate (1 for all blends but "gate")."""
    blueprint, config = get_blueprint(plant.blueprint), dict(plant.config)
    if plant.blend != "gate":
        f = blueprint.apply(variables, u, site=site, **config)
        return f, jnp.ones((), f.dtype)
    f = blueprint.apply(variables["seed"], u, site=site, **config)
    read = u[0] if blueprint.reads == "call" else u
    opens = _weighed(variables["gate"]["kernel"], read, site if blueprint.reads == "input" else None)
    return f, jax.nn.sigmoid(opens + variables["gate"]["bias"]).astype(f.dtype)


def _weighed(kernel: jax.Array, u: jax.Array, site: Site | None) -> jax.Array:
    """A gate's sum of what its seed reads; `site` is given where that is the layer's input.

    Ids pick a row. A convolution's output has other places than its input, so there one gate serves an image's whole.
    """
    if site is not None and site.kind == "embed":
        return kernel[u]
    if site is not None and site.spatial:
        u = jnp.mean(u, axis=tuple(range(1, 1 + site.spatial)), keepdims=True)
    return u @ kernel


def seed_shapes(plant: Plant, site: Site) -> Params:
    """The shapes and dtypes of the plant's variables."""
    return _seed_shapes(plant, site, _Recipe(get_blueprint(plant.blueprint)), bool(jax.config.read("jax_enable_x64")))


class _Recipe:
    """What a blueprint's name stands for now, as a key: another one registered under the name is another key."""

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint = blueprint

    def __hash__(self) -> int:
        return id(self.blueprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Recipe) and other.blueprint is self.blueprint


@functools.lru_cache(maxsize=1024)  # traced once, not at every germination: JAX keeps what it traces
def _seed_shapes(plant: Plant, site: Site, recipe: _Recipe, wide: bool) -> Params:
    return jax.eval_shape(lambda: seed_init(plant, site, jax.random.key(0)))


def example_input(blueprint: Blueprint, site: Site) -> Any:
    """Shapes of a small imaginary input of a seed: what it reads, two rows of it."""
    features = site.out_features if blueprint.reads == "output" else site.in_features
    form = dict(site.geometry)
    form = dict(form.get("first", ())) if site.kind == SPAN else form
    reach = [k * d for k, d in zip(form.get("kernel_size", ()), form.get("kernel_dilation", ()), strict=True)]
    space = (2,) + (8 + max(reach, default=0),) * site.spatial
    if blueprint.reads == "input" and site.kind == "embed":
        return jax.ShapeDtypeStruct(space, jnp.int32)
    if blueprint.reads != "call":
        return jax.ShapeDtypeStruct((*space, features), site.dtype)
    sizes = (features, *form.get("memory", (features, features)))
    return *(jax.ShapeDtypeStruct((*space, size), site.dtype) for size in sizes), None


@functools.lru_cache(maxsize=1024)
def _check_shapes(recipe: _Recipe, plant: Plant, site: Site, wide: bool) -> None:
    """Trace the seed on a small imaginary input and compare its output with the site's."""
    blueprint = recipe.blueprint
    u = example_input(blueprint, site)
    where = f"blueprint {plant.blueprint!r} with {dict(plant.config)} at site {site.path!r}"
    try:
        variables = seed_shapes(plant, dataclasses.replace(site, layers=0))
        f, _ = jax.eval_shape(lambda v, x: seed_apply(plant, site, v, x), variables, u)
    except Exception as error:
        raise ValueError(f"{where} cannot be built: {type(error).__name__}: {error}") from error
    if not jax.tree.leaves(variables):
        raise ValueError(f"{where} has no parameters; a seed needs some to learn")
    wrong = [
        f"{jax.tree_util.keystr(path)} is {leaf.dtype}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
        if not jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if wrong:
        raise ValueError(f"{where}: parameters must be floating arrays, but {', '.join(wrong)}")
    free = (blueprint.reads == "input" and site.spatial) or site.kind == SPAN
    read = u[0] if isinstance(u, tuple) else u
    space = read.shape if blueprint.reads == "input" and site.kind == "embed" else read.shape[:-1]
    expected = (*space, site.out_features)
    if f.ndim != len(expected) or f.shape[-1] != expected[-1] or (not free and f.shape != expected):
        raise ValueError(f"{where} gives shape {f.shape} for an input {read.shape}; the site needs {expected}")
    if not jnp.issubdtype(f.dtype, jnp.floating):
        raise ValueError(f"{where} gives dtype {f.dtype}; the site needs a floating dtype")


def _keyword_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        raise TypeError(f"the arguments of init= or module= {function!r} cannot be read; give config=") from None
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _taking(apply: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """`apply` called with only those of the keywords (the site and the config) that it takes."""
    parameters = inspect.signature(apply).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return apply
    taken = [name for name in names if name in parameters]
    return lambda params, u, **given: apply(params, u, **{name: given[name] for name in taken})
