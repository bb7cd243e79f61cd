"""Depth growth: a host whose layers a lifted transform stacked gets twice as many, as a function of its variables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._checks import inputs, together
from .blueprints import DENSE
from .graft import graft
from .layout import change_at
from .morph import Morph, check_morph, is_variables
from .sites import join_path, matcher, split_path
from .spec import Site, Spec
from .stages import Stage
from .state import SeedState

ORDERS = ("identity", "copy", "g_stack")
TIGHT = 1e-6


@dataclasses.dataclass(frozen=True)
class Stack:
    """One stack of layers in a host: its path, how many layers it has, and the axis of its arrays."""

    path: str
    layers: int
    axis: int


@dataclasses.dataclass(frozen=True)
class Deepened:
    """What `stack` made. `morph` is for the host's model built with as many more layers.

    `rows` says for each stack which old layer each new one is taken from, and `fresh` which of them are added ones;
    `zeroed` names the layers whose kernel and bias are zero in those, so that they begin as the identity.
    """

    morph: Morph
    stacks: tuple[Stack, ...]
    rows: Mapping[str, tuple[int, ...]]
    fresh: Mapping[str, tuple[bool, ...]]
    zeroed: tuple[str, ...]

    def like_host(self, tree: Any, *, blank: bool) -> Any:
        """A tree in the structure of the old host's params (a gradient, a moment) in the new host's.

        `blank` puts zeros where a layer is an added one.
        """
        for place in self.stacks:
            take = functools.partial(self.taken, place, place.axis, blank)
            tree = change_at(tree, split_path(place.path), functools.partial(jax.tree.map, take))
        return tree

    def like_seeds(self, tree: Any, site: str, *, blank: bool) -> Any:
        """The same for a tree `[layers, ...]` of one site's seed."""
        place = next((p for p in self.stacks if _under(site, p.path)), None)
        if place is None:
            return tree
        return jax.tree.map(functools.partial(self.taken, place, 0, blank), tree)

    def taken(self, place: Stack, axis: int, blank: bool, leaf: Any) -> Any:
        """An array of a stack with its new rows along `axis`, those of added layers at zero where `blank`."""
        taken = jnp.take(leaf, jnp.asarray(self.rows[place.path]), axis=axis)
        if not blank:
            return taken
        fresh = jnp.asarray(self.fresh[place.path])
        shape = [1] * taken.ndim
        shape[axis] = fresh.size
        return jnp.where(fresh.reshape(shape), jnp.zeros_like(taken), taken)


def stack(
    morph: Morph,
    order: str = "identity",
    *,
    where: Any = None,
    zero: Any = None,
    model: Any = None,
    example: Any = None,
    **call_kwargs: Any,
) -> Deepened:
    """Grow a scanned host from L to 2L layers.

    Args:
      morph: a morph whose host has layers under `nn.scan` (sites with `layers`).
      order: how the new layers lie. "identity": an added layer after each old one that passes its input on, so that
        the deeper host computes what the old one did (needs residual layers). "copy": each layer twice in a row
        (Chang et al., ICLR 2018). "g_stack": the whole stack on top of itself (Du et al., NeurIPS 2024).
      where: which stacks, a regex or predicate on the site's path and kind; None is all of them.
      zero: for "identity": the layers within the stack (a regex or predicate on path and kind) whose kernel and bias
        are zero in added layers, each the last before its sum with the residual, e.g. `"out$|Dense_1$"`. None finds
        them by trying, which needs `model` and `example`.
      model: the host's module with L layers, with `example` one input: an added "identity" layer is checked with them.
      example: one input, an array or a tuple of arguments.
      **call_kwargs: keyword arguments of the checking call.

    Returns:
      A `Deepened`, whose `morph` is for the model with 2L layers (`model.clone(depth=2 * L)`, whatever its field is).
      Seeds of the old layers stay. An added layer has a copy of its source's fossils, and no other seed; in
      "identity" order it has none. `growable(...).deepen(opt_state, deepened)` brings the optimizer's state along.

    Raises:
      ValueError: no stack, an unknown order, layers that no zeros turn into the identity, or only one of `model` and
      `example`. TypeError: `morph` is no `Morph`, or an argument of another kind than the above.
    """
    check_morph(morph, "stack")
    together("stack()", model, example)
    matcher(zero, "zero")
    if model is not None:
        graft(model), inputs("example", example)
    if not isinstance(order, str) or order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; choose one of {', '.join(ORDERS)}")
    stacks = _stacks(morph, where)
    if not stacks:
        have = ", ".join(site.path for site in morph.spec.sites if site.layers) or "none"
        raise ValueError(f"stack() found no stacked layers that where={where!r} admits; stacked sites: {have}")
    rows, fresh = {}, {}
    for place in stacks:
        old = range(place.layers)
        rows[place.path] = (*old, *old) if order == "g_stack" else tuple(n for n in old for _ in range(2))
        second = [n >= place.layers if order == "g_stack" else n % 2 == 1 for n in range(2 * place.layers)]
        fresh[place.path] = tuple(second)
    draft = Deepened(morph, stacks, rows, fresh, ())
    zeroed: tuple[str, ...] = ()
    if order == "identity":
        zeroed = _ends(morph, stacks, zero, model, example, call_kwargs)
    return dataclasses.replace(draft, morph=_deeper(draft, zeroed, order), zeroed=zeroed)


def _deeper(made: Deepened, zeroed: tuple[str, ...], order: str) -> Morph:
    """The morph with its stacks deepened, and `zeroed` layers zero in the added ones."""
    old, spec = made.morph, _deeper_spec(made)
    params = made.like_host(old.params["host"], blank=False)
    blank = made.like_host(old.params["host"], blank=True)
    for path in zeroed:
        params = change_at(params, split_path(path), functools.partial(_instead, _get(blank, split_path(path))))
    seeds, state = {}, {}
    for site, plants in old.spec.planted_at.items():
        life = made.like_seeds(old.state[site], site, blank=False)
        seeds[site] = {p.key: made.like_seeds(old.seeds[site][p.key], site, blank=False) for p in plants}
        if spec.by_path[site].layers != old.spec.by_path[site].layers:
            life = _without_trials(life, _fresh(made, site), order)
        state[site] = life
    host = old.with_params({"host": params, "seeds": {}}).host
    if is_variables(host):
        others = {name: part for name, part in host.items() if name != "params"}
        host = type(host)({**host, **{name: _others(made, part) for name, part in others.items()}})
    return old.replace(host=host, seeds=seeds, state=state, spec=spec)


def _without_trials(life: SeedState, fresh: Any, order: str) -> SeedState:
    """The state of deepened layers: an added one has no seed on trial, and in identity order none at all."""
    empty = SeedState.empty(life.stage.shape[-1], life.stage.shape[0])
    kept = life.stage == Stage.FOSSILIZED if order != "identity" else jnp.zeros_like(life.stage, bool)
    gone = jnp.asarray(fresh)[:, None] & ~kept
    return jax.tree.map(lambda new, old: jnp.where(gone, new, old), empty, life)


def _others(made: Deepened, tree: Any) -> Any:
    """A collection such as `batch_stats` with the rows of its stacks taken alike."""
    for place in made.stacks:
        parts = split_path(place.path)
        if _get(tree, parts) is not None:
            take = functools.partial(made.taken, place, place.axis, False)
            tree = change_at(tree, parts, functools.partial(jax.tree.map, take))
    return tree


def _ends(
    morph: Morph, stacks: tuple[Stack, ...], zero: Any, model: Any, example: Any, kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    """The layers to be zero in added ones: those that `zero` admits, or as few as make an added layer the identity."""
    inside = [s for s in morph.spec.sites if any(_under(s.path, p.path) for p in stacks) and _is_map(s)]
    tried = model is not None and example is not None
    passes = _trial(morph, stacks, inside, model, example, kwargs) if tried else None
    if zero is not None:
        admits = matcher(zero, "zero")
        chosen = tuple(site.path for site in inside if admits(site.path, site.kind))
        if not chosen:
            raise ValueError(f"zero={zero!r} admits none of the stack's layers: {', '.join(s.path for s in inside)}")
        if passes is not None and not passes(chosen):
            raise ValueError(f"with {', '.join(chosen)} at zero an added layer is not the identity")
        return chosen
    if passes is None or any(place.layers < 2 for place in stacks):
        raise ValueError(
            "stack() in identity order needs zero=, or model= and example= to find the layers by trying (in a stack of "
            "two layers or more)"
        )
    chosen = tuple(site.path for site in inside)
    if not passes(chosen):
        raise ValueError(
            "an added layer cannot be the identity: even with every dense layer and convolution of the stack at zero "
            "it changes its input. Are its layers residual? Orders copy and g_stack need no identity"
        )
    for path in tuple(chosen):  # as few zeros as possible, so that an added layer can learn
        fewer = tuple(other for other in chosen if other != path)
        if fewer and passes(fewer):
            chosen = fewer
    return chosen


def _trial(
    morph: Morph, stacks: tuple[Stack, ...], inside: list[Site], model: Any, example: Any, kwargs: Any
) -> Callable[[tuple[str, ...]], bool]:
    """A function of paths inside the stacks: whether a layer with those parts at zero passes its input on.

    The depth of the model is its own, so the old depth has to tell: the first layer's parameters are put into the first
    place and into the last, with layers that have zeros in all others. Only the identity makes no difference. One
    program serves all trials.
    """
    forward = graft(model)
    args, options = inputs("example", example), {**forward.mode(False), **kwargs}
    homes = {(place.path, s.path): place for place in stacks for s in inside if _under(s.path, place.path)}

    @jax.jit
    def run(params: Any, kept: Mapping[tuple[str, str], Array]) -> Any:
        for place in stacks:
            first = functools.partial(_first_row, place)
            params = change_at(params, split_path(place.path), functools.partial(jax.tree.map, first))
        for at, rows in kept.items():
            only = functools.partial(_rows_kept, homes[at], rows)
            params = change_at(params, split_path(at[1]), functools.partial(jax.tree.map, only))
        bare = Morph(morph.with_params({"host": params, "seeds": {}}).host, {}, {}, Spec(morph.spec.sites, 1))
        return jax.tree.leaves(forward(bare, *args, **options))

    def passes(zeroed: tuple[str, ...]) -> bool:
        outputs = []
        for last in (False, True):
            kept = {
                at: (np.arange(place.layers) == (place.layers - 1 if last else 0)) | (at[1] not in zeroed)
                for at, place in homes.items()
            }
            outputs.append([np.float64(leaf) for leaf in run(morph.params["host"], kept)])
        return all(np.allclose(a, b, rtol=TIGHT, atol=TIGHT) for a, b in zip(*outputs, strict=True))

    return passes


def _first_row(place: Stack, leaf: Any) -> Any:
    return jnp.take(leaf, jnp.zeros(place.layers, int), axis=place.axis)


def _rows_kept(place: Stack, rows: Array, leaf: Any) -> Any:
    shape = [1] * leaf.ndim
    shape[place.axis] = place.layers
    return jnp.where(rows.reshape(shape), leaf, 0)


def _instead(new: Any, old: Any) -> Any:
    return new


def _stacks(morph: Morph, where: Any) -> tuple[Stack, ...]:
    """The stacks that hold the admitted sites: each the highest path below which all arrays have its rows."""
    admits, found = matcher(where), {}
    for site in morph.spec.sites:
        if site.layers and admits(site.path, site.kind):
            axis = dict(site.geometry)["stack"]
            parts = split_path(site.path)
            for depth in range(len(parts) + 1):
                leaves = jax.tree.leaves(_get(morph.params["host"], parts[:depth]))
                below = [other.layers for other in morph.spec.sites if split_path(other.path)[:depth] == parts[:depth]]
                whole = all(-leaf.ndim <= axis < leaf.ndim and leaf.shape[axis] == site.layers for leaf in leaves)
                if whole and set(below) == {site.layers}:
                    break
            found[join_path(parts[:depth])] = Stack(join_path(parts[:depth]), site.layers, axis)
    return tuple(found.values())


def _deeper_spec(made: Deepened) -> Spec:
    spec = made.morph.spec

    def deeper(site: Site) -> Site:
        place = next((p for p in made.stacks if _under(site.path, p.path)), None)
        return site if place is None or not site.layers else dataclasses.replace(site, layers=2 * site.layers)

    return Spec(tuple(deeper(site) for site in spec.sites), spec.slots, spec.plants)


def _fresh(made: Deepened, site: str) -> tuple[bool, ...]:
    return next(made.fresh[place.path] for place in made.stacks if _under(site, place.path))


def _is_map(site: Site) -> bool:
    """Whether the layer's output is zero where its kernel and bias are."""
    return site.kind in (*DENSE, "conv", "conv_transpose")


def _under(path: str, root: str) -> bool:
    parts, above = split_path(path), split_path(root)
    return parts[: len(above)] == above


def _get(tree: Any, parts: tuple[str, ...]) -> Any:
    for part in parts:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
