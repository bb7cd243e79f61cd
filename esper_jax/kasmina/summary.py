"""What a person looks at: a table of a morph, one of the blueprints, and a measured comparison with the host."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import INT32, by_name, inputs, number, one_of, whole
from ._pytree import is_key
from .blueprints import CONVS, Blueprint, example_input, registered, seed_apply, seed_shapes
from .graft import Graft, NnxGraft, graft
from .morph import Morph, count
from .spec import Plant, Site, freeze_config
from .stages import Stage

EXAMPLE_FEATURES = 64


class Table(str):
    """Text in columns. Its `repr` is the text itself, so a REPL or notebook shows it as a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def summary(morph: Morph, health: Mapping[str, float] | None = None) -> Table:
    """A table of a morph: every site, and every planted seed with its stage and what was measured of it.

    At a site of stacked layers each layer's seed has a line (`0.3` is slot 0 of layer 3); those that are dormant share
    one. Values that were not measured yet show as `-`; inside `jit` and for a tree of shapes the life of a seed shows
    as `?`, and for a `vmap`ped population the values of its members differ, so they show as `*`.

    Args:
      morph: the morph.
      health: `{path: health}` of its sites, for a column of their own: a tick measures it, and `report.sites` and the
        last record of a `History` have it.

    Raises:
      TypeError: `morph` is no `Morph`, or `health` is no mapping of numbers.

    >>> import esper_jax
    >>> m = esper_jax.morph({"Dense_0": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}, slots=2)
    >>> print(summary(m).splitlines()[1].rstrip())
    Dense_0  dense  4 -> 3    2 empty
    """
    if not isinstance(morph, Morph):
        raise TypeError(f"summary() needs a Morph, got {type(morph).__name__}; make one with morph(params)")
    if health is not None:
        by_name("health", health, '{"Dense_0": 0.5}')
        for path, value in health.items():
            number(f"health[{path!r}]", value)
    of_site = () if health is None else ("site health",)
    heads = ("site", "kind", "features", *of_site, "slot", "blueprint", "stage", "alpha", "health", "contribution")
    rows: list[tuple[str, ...]] = []
    for site in morph.spec.sites:
        well = () if health is None else (_real(health.get(site.path, float("nan"))),)
        kind = f"{site.layers} x {site.kind}" if site.layers else site.kind
        named: tuple[str, ...] = (site.path, kind, _features(site), *well)
        for plant in morph.spec.planted_at.get(site.path, ()):
            for place, *life in _lives(morph, plant, site.layers):
                rows.append((*named, place, _recipe(plant), *life))
                named = ("",) * len(named)
        empty = len(morph.spec.free_slots(site.path))
        if empty:
            rows.append((*named, f"{empty} empty", "", "", "", "", ""))
    stages = [stage for plant in morph.spec.plants for stage in _stages(morph, plant)]
    by_stage = ", ".join(f"{stages.count(stage)} {stage}" for stage in dict.fromkeys(stages)) or "none planted"
    grown = count(morph.seeds)
    last = (
        f"{count(morph.params['host']):,} host parameters, {grown:,} seed parameters, {len(morph.spec.sites)} sites "
        f"x {morph.spec.slots} slots; seeds: {by_stage}"
    )
    return Table(f"{align(heads, rows)}\n{last}")


def blueprints(site: Site | None = None) -> Table:
    """A table of the registered blueprints, with parameters and FLOPs.

    Args:
      site: a site (e.g. `morph.spec.by_path["Dense_0"]`): those that fit it, with their price there. None: all of
        them, each at a site from 64 to 64 features of the first kind it is made for.

    Returns:
      The table. "parameters" are those of one seed with the default config; "FLOPs" XLA's own count for one row of the
      input (at a convolution, for an image of 8 places a side; at attention, for 8 places), "-" where it has none.
    """
    if site is not None:
        one_of("site", site, Site, 'morph.spec.by_path["Dense_0"]')
    heads = ("name", "reads", "site kinds", "config", "parameters", "FLOPs", "folds", "about", "citation")
    rows = [
        (
            b.name,
            b.reads,
            ", ".join(b.kinds),
            ", ".join(f"{name}={value!r}" for name, value in b.config.items()) or "-",
            *_price(b, _example_site(b) if site is None else site),
            "yes" if b.merge is not None or b.name == "units" else "no",
            b.about or "-",
            b.citation or "-",
        )
        for b in registered()
        if site is None or b.fits(site)
    ]
    return Table(align(heads, rows))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The bare host against the grown model on one input. FLOPs are XLA's count for the compiled call (NaN: none).

    `difference` is the largest absolute difference of any output; `equal_bits` says whether all outputs are the same
    to the bit; `same_program` whether both trace to the same jaxpr; milliseconds are medians of warm calls in turn.
    """

    host_parameters: int
    grown_parameters: int
    host_flops: float
    grown_flops: float
    host_milliseconds: float
    grown_milliseconds: float
    difference: float
    equal_bits: bool
    same_program: bool

    def __repr__(self) -> str:
        rows = [
            ("parameters", f"{self.host_parameters:,}", f"{self.grown_parameters:,}"),
            ("FLOPs", _number(self.host_flops), _number(self.grown_flops)),
            ("ms per call", f"{self.host_milliseconds:.3f}", f"{self.grown_milliseconds:.3f}"),
        ]
        equal = "equal to the bit" if self.equal_bits else f"differ by up to {self.difference:.3g}"
        program = "the same program" if self.same_program else "another program"
        return f"{align(('', 'host', 'grown'), rows)}\noutputs {equal}; the grown model is {program}"

    __str__ = __repr__


def compare(model: Any, morph: Morph, x: Any, *, repeats: int = 20, **kwargs: Any) -> Comparison:
    """Run the bare host and the grown model on one input and measure both.

    Args:
      model: the Linen module, its `apply`, or a function of the host's variables.
      morph: the grown model; its host is what it is compared with.
      x: one input, an array or a tuple of arguments.
      repeats: timed calls of each, taken in turn after one warm call.
      **kwargs: keyword arguments of both calls. Where none is given, the model's own keyword for evaluation
        (`train=False`, `deterministic=True`, ...) is.

    Raises:
      TypeError: `morph` is no `Morph`, `model` cannot be called, or `x` has no array. ValueError: `repeats` is no whole
      number of 1 or more, or values are traced.
    """
    if not isinstance(morph, Morph):
        raise TypeError(f"compare() needs a Morph second, got {type(morph).__name__}; make one with morph(params)")
    whole("repeats", repeats, 1, INT32)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((morph, x))):
        raise ValueError("compare() measures real calls; it cannot run inside jit, grad or vmap")
    grown = graft(model)
    args = inputs("x", x)
    given = {**grown.mode(False), **kwargs}
    bare = morph.alone()

    def forward(morph: Morph, *args: Any) -> Any:
        return grown(morph, *args, **given)

    first, second = (jax.jit(forward).lower(m, *args).compile() for m in (bare, morph))
    host_output, grown_output = first(bare, *args), second(morph, *args)
    host_ms, grown_ms = _timed(lambda: first(bare, *args), lambda: second(morph, *args), repeats)
    return Comparison(
        host_parameters=count(morph.params["host"]),
        grown_parameters=count(morph.params),
        host_flops=flops(first),
        grown_flops=flops(second),
        host_milliseconds=host_ms,
        grown_milliseconds=grown_ms,
        difference=_difference(host_output, grown_output),
        equal_bits=equal_bits(host_output, grown_output),
        same_program=program(_host_call(grown, given), bare.host, *args) == program(forward, morph, *args),
    )


def program(function: Callable[..., Any], *args: Any) -> str:
    """The jaxpr of a call as text, without the memory addresses that primitives print: equal text, equal program."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*args)))


def flops(compiled: Any) -> float:
    """XLA's count of floating-point operations of a compiled function; NaN where the backend gives none."""
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return float(cost.get("flops", float("nan"))) if isinstance(cost, Mapping) else float("nan")


def equal_bits(a: Any, b: Any) -> bool:
    """Whether two trees of arrays have the same structure, shapes, dtypes and bits (NaNs and signed zeros included)."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(map(_words, jax.tree.leaves(a)), map(_words, jax.tree.leaves(b)), strict=True)
    return all(p.shape == q.shape and p.dtype == q.dtype and p.tobytes() == q.tobytes() for p, q in pairs)


def _words(leaf: Any) -> np.ndarray:
    """An array, or the words of PRNG keys."""
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def _host_call(grown: Graft, given: dict[str, Any]) -> Callable[..., Any]:
    """The user's own call on the host's variables, with no morph anywhere."""

    def call(host: Any, *inputs: Any) -> Any:
        if isinstance(grown, NnxGraft):
            return grown.baked(host, {}, *inputs, **given)
        bare = grown.model is not None and not (isinstance(host, Mapping) and isinstance(host.get("params"), Mapping))
        return grown.apply({"params": host} if bare else host, *inputs, **given)

    return call


def _timed(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for call, times in zip((first, second), spent, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(spent[0]), statistics.median(spent[1])


def _difference(a: Any, b: Any) -> float:
    """The largest absolute difference; infinite where shapes or finiteness differ."""
    largest = 0.0
    if jax.tree.structure(a) != jax.tree.structure(b):
        return float("inf")
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        p, q = (np.asarray(jnp.asarray(leaf, jnp.float32), np.float64) for leaf in (p, q))
        if p.shape != q.shape:
            return float("inf")
        same = (p == q) | (np.isnan(p) & np.isnan(q))
        gap = np.where(same, 0.0, np.abs(np.where(same, 0.0, p) - np.where(same, 0.0, q)))
        largest = max(largest, float(np.max(np.nan_to_num(gap, nan=np.inf), initial=0.0)))
    return largest


def _example_site(blueprint: Blueprint) -> Site:
    """A 64 -> 64 site of the first kind that the blueprint is made for."""
    kind, width = blueprint.kinds[0], (EXAMPLE_FEATURES,)
    if kind not in CONVS:
        return Site("example", kind, width, width)
    form: dict[str, Any] = {"kernel_size": (3, 3), "strides": (1, 1), "padding": "SAME", "kernel_dilation": (1, 1)}
    form |= {"input_dilation": (1, 1), "groups": 1} if kind == "conv" else {"transpose_kernel": False}
    return Site("example", kind, width, width, spatial=2, geometry=freeze_config(form))


def _price(blueprint: Blueprint, site: Site) -> tuple[str, str]:
    """Parameters and FLOPs of a seed with default config at a site, as text."""
    site = dataclasses.replace(site, layers=0)
    plant = Plant(site.path, 0, blueprint.name, freeze_config(blueprint.config))
    try:
        shapes = seed_shapes(plant, site)
        u = example_input(blueprint, site)
        work = jax.jit(lambda v, x: seed_apply(plant, site, v, x)[0]).lower(shapes, u)
    except Exception as error:  # a user's blueprint may be made for other widths only
        return f"not here ({type(error).__name__})", "-"
    rows = jax.tree.leaves(u)[0].shape[0]
    return f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)):,}", _number(flops(work) / rows)


def _features(site: Site) -> str:
    return " -> ".join("x".join(map(str, shape)) for shape in (site.in_shape, site.out_shape))


def _recipe(plant: Plant) -> str:
    config = ", ".join(f"{name}={value}" for name, value in plant.config)
    blend = "" if plant.blend == "add" else f" [{plant.blend}]"
    return f"{plant.blueprint}({config}){blend}"


def _lives(morph: Morph, plant: Plant, layers: int) -> Iterator[tuple[str, str, str, str, str]]:
    """Slot, stage, alpha, health and contribution of a seed; of a stack, those of each layer where it is awake."""
    state = morph.state[plant.site]
    stages = _stages(morph, plant)
    awake = [layer for layer, stage in enumerate(stages) if stage != Stage.DORMANT.name]
    one_by_one = layers and len(stages) == layers
    for layer in awake if one_by_one else (None,):
        at = (plant.slot,) if layer is None else (layer, plant.slot)
        alpha, health, gain = (_value(field, at, _real) for field in (state.alpha, state.health, state.contribution))
        place = str(plant.slot) if layer is None else f"{plant.slot}.{layer}"
        yield place, stages[layer or 0], alpha, health, gain
    if one_by_one and len(awake) < layers:
        which = "all" if not awake else f"{layers - len(awake)} others"
        yield f"{plant.slot}, {which}", Stage.DORMANT.name, "0", "-", "-"


def _stages(morph: Morph, plant: Plant) -> list[str]:
    """The stage of a seed, or of each layer's where its site is a stack."""
    layers, stage = morph.spec.by_path[plant.site].layers, morph.state[plant.site].stage
    if layers and np.ndim(stage) == 2:
        found = [_value(stage, (layer, plant.slot), _stage) for layer in range(layers)]
        return found[:1] if found[0] == "?" else found
    return [_value(stage, (plant.slot,), _stage)]


def _value(field: Any, at: tuple[int, ...], show: Callable[[Any], str]) -> str:
    """A seed's value as text: `?` where it is traced or only a shape, `*` where a population's members may differ."""
    if isinstance(field, jax.core.Tracer) or not isinstance(field, jax.Array | np.ndarray):
        return "?"
    return show(np.asarray(field)[at]) if field.ndim == len(at) else "*"


def _stage(value: Any) -> str:
    return Stage(int(value)).name


def _real(value: Any) -> str:
    return "-" if np.isnan(value) else f"{float(value):.3g}"


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:,.0f}"


def align(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text in columns under their heads."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    return "\n".join(line.rstrip() for line in lines)
