"""Optimizers whose state grows with the morph: the host's and each seed's are partitions of their own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from ..kasmina._pytree import Struct, pytree
from ..kasmina.depth import Deepened
from ..kasmina.morph import Morph
from ..kasmina.observe import when_seeds_compute
from ..kasmina.spec import Plant
from ..kasmina.state import learns
from ..kasmina.widen import joined

Learnt = Callable[[Any, Any], Any]
"""What comes of a seed's params and updates when it learns."""
Kept = Callable[[Any], Any]
"""What comes of its params when it does not."""


@pytree
class SeedOptState(Struct):
    """One seed's optimizer state, and the generation of the seed it belongs to."""

    inner: Any
    generation: Int[Array, ""]


@pytree
class GrowState(Struct):
    """The state of a `growable` optimizer: the host's, and `{site: {slot: SeedOptState}}`."""

    host: Any
    seeds: dict[str, dict[str, SeedOptState]]


class Growable:
    """An optax optimizer for a `Morph`; see `growable`."""

    def __init__(self, host: optax.GradientTransformation, seeds: optax.GradientTransformation) -> None:
        self.host = optax.with_extra_args_support(host)
        self.seeds = optax.with_extra_args_support(seeds)

    def init(self, morph: Morph) -> GrowState:
        """The first state: the host's as `tx.init(host params)` gives it, and one for each planted seed."""
        _check_morph(morph, "init")
        empty = GrowState(self.host.init(morph.params["host"]), {})
        return self.grow(empty, morph)

    def grow(self, state: GrowState, morph: Morph) -> GrowState:
        """The state for a morph whose spec has changed: every leaf of a part that is still there is kept as it is."""
        seeds = {
            path: {
                plant.key: self._known(state, plant, morph.seeds[path][plant.key], morph.spec.by_path[path].layers)
                for plant in morph.spec.planted_at[path]
            }
            for path in morph.spec.planted_at
        }
        return GrowState(state.host, seeds)

    def fold(self, state: GrowState, before: Morph, after: Morph) -> GrowState:
        """The state for a morph that `fold` made: all that is left keeps its own, and folded units take theirs along.

        A unit's moments come from its seed's state where host and seeds have one transformation, else they are zero.
        """
        host = state.host
        for plant in before.spec.plants:
            if plant.source and after.spec.plant(plant.site, plant.slot) is None:
                first, second = before.spec.by_path[plant.source], before.spec.by_path[plant.site]
                params = before.seeds[plant.site][plant.key]
                own = _params_trees(self.seeds, state.seeds[plant.site][plant.key].inner)
                alike = len(own) == len(_params_trees(self.host, host))
                trees = iter(own if alike and self.seeds is self.host else [])
                blank = jax.tree.map(jnp.zeros_like, params)

                def widen(
                    tree: Any, f: Any = first, s: Any = second, t: Any = trees, b: Any = blank, p: Any = plant
                ) -> Any:
                    return joined(tree, next(t, b), f, s, dict(p.config)["norm"], 1.0)

                host = _map_params_trees(self.host, host, widen)
        return self.grow(GrowState(host, state.seeds), after)

    def deepen(self, state: GrowState, deepened: Deepened) -> GrowState:
        """The state for a morph that `stack` made deeper: every moment stays, an added layer's begin at zero.

        Counts and whatever is not in the shape of the params are kept as they are.
        """
        like = lambda tree: deepened.like_host(tree, blank=True)  # noqa: E731
        host = _map_params_trees(self.host, state.host, like)
        seeds = {
            site: {slot: deepened.like_seeds(one, site, blank=False) for slot, one in slots.items()}
            for site, slots in state.seeds.items()
        }
        return GrowState(host, seeds)

    def update(self, grads: dict[str, Any], state: GrowState, params: Morph, **extra: Any) -> tuple[Any, GrowState]:
        """Updates for `Morph.params`, as `optax` transformations give them.

        Args:
          grads: gradients in the form of `Morph.params`: `{"host": ..., "seeds": ...}`.
          state: from `init` or the last `update`; it grows by itself when the morph has.
          params: the morph itself, because a seed's stage decides whether it learns.
          **extra: passed on to both transformations (`value=` for `reduce_on_plateau`, ...).

        Returns:
          `(updates, state)`. A seed that does not learn now, or whose gradient is not finite, gets zero updates and
          keeps its state; a newly germinated seed starts from a fresh one with step count 0.

        Raises:
          TypeError: `params` is no Morph.
        """
        _check_morph(params, "update")
        host, host_state = self._host(grads, state, params, extra)
        seeds, seed_states = self._seeds(grads, self.grow(state, params), params, extra, _updates, _no_updates)
        return {"host": host, "seeds": seeds}, GrowState(host_state, seed_states)

    def step(self, grads: dict[str, Any], state: GrowState, morph: Morph, **extra: Any) -> tuple[Any, GrowState]:
        """`update` and `optax.apply_updates` in one: `(params, state)` after the step.

        Seeds that do not learn now are passed by, where `update` has to write their zeros. The host gets the same bits;
        a learning seed may differ by a rounding error, where XLA fuses the addition with what comes before it.
        """
        _check_morph(morph, "step")
        updates, host_state = self._host(grads, state, morph, extra)
        host = optax.apply_updates(morph.params["host"], updates)
        state = self.grow(state, morph)

        def learn(seeds: Any, states: Any, grads: Any) -> tuple[Any, Any]:
            given = morph.replace(seeds=seeds)
            return self._seeds(grads, GrowState(None, states), given, extra, optax.apply_updates, _as_they_are)

        seeds, states = when_seeds_compute(
            morph, learn, lambda seeds, states, grads: (seeds, states), morph.seeds, state.seeds, grads
        )
        return {"host": host, "seeds": seeds}, GrowState(host_state, states)

    def _host(self, grads: dict[str, Any], state: GrowState, morph: Morph, extra: Any) -> tuple[Any, Any]:
        return self.host.update(grads["host"], state.host, morph.params["host"], **extra)

    def _seeds(
        self, grads: dict[str, Any], state: GrowState, morph: Morph, extra: Any, learnt: Learnt, kept: Kept
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        given: dict[str, Any] = {}
        states: dict[str, Any] = {}
        for path, plants in morph.spec.planted_at.items():
            life = morph.state[path]
            active = learns(life)
            given[path], states[path] = {}, {}
            one = functools.partial(self._seed, extra, learnt, kept)
            update = jax.vmap(one) if morph.spec.by_path[path].layers else one
            for plant in plants:
                given[path][plant.key], states[path][plant.key] = update(
                    grads["seeds"][path][plant.key],
                    state.seeds[path][plant.key],
                    morph.seeds[path][plant.key],
                    active[..., plant.slot],
                    life.generation[..., plant.slot],
                )
        return given, states

    def _seed(
        self,
        extra: Any,
        learnt: Learnt,
        kept: Kept,
        grads: Any,
        state: SeedOptState,
        params: Any,
        active: Bool[Array, ""],
        born: Int[Array, ""],
    ) -> tuple[Any, SeedOptState]:
        def begin(grads: Any, inner: Any, params: Any) -> tuple[Any, Any]:
            """A seed germinated since the last step starts afresh; one whose gradient is not finite stays."""
            fresh = self.seeds.init(params)
            inner = jax.tree.map(lambda old, new: jnp.where(state.generation == born, old, new), inner, fresh)
            finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
            return jax.lax.cond(finite, learn, rest, grads, inner, params)  # type: ignore[no-any-return]

        def learn(grads: Any, inner: Any, params: Any) -> tuple[Any, Any]:
            updates, after = self.seeds.update(grads, inner, params, **extra)
            return learnt(params, jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)), after

        def rest(grads: Any, inner: Any, params: Any) -> tuple[Any, Any]:
            return kept(params), inner

        given, inner = jax.lax.cond(active, begin, rest, grads, state.inner, params)
        return given, SeedOptState(inner, jnp.where(active, born, state.generation))

    def _known(self, state: GrowState, plant: Plant, params: Any, layers: int) -> SeedOptState:
        """The seed's state if its shapes are still right, else a fresh one; at stacked layers, one of each layer's."""
        old = state.seeds.get(plant.site, {}).get(plant.key)
        begin = lambda params: SeedOptState(self.seeds.init(params), jnp.zeros((), jnp.int32))  # noqa: E731
        fresh = jax.vmap(begin)(params) if layers else begin(params)
        if old is None:
            return fresh
        same = jax.tree.structure(old) == jax.tree.structure(fresh)
        alike = same and all(
            jnp.shape(a) == jnp.shape(b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(fresh), strict=True)
        )
        return old if alike else fresh


def growable(tx: optax.GradientTransformation, *, seeds: optax.GradientTransformation | None = None) -> Growable:
    """Make an optax optimizer grow with the network.

    The host's parameters are updated exactly as `tx` alone would update them. Each seed has a state of its own, with
    its own step count that starts when it germinates, so that Adam's bias correction and schedules are right for it.
    Growth keeps every existing leaf.

    Args:
      tx: any optax transformation, for the host.
      seeds: another one for the seeds; None uses `tx` (also its masks and schedules, on the seed's own count).

    Returns:
      An object with `init(morph)`, `update(grads, state, morph)` and `grow(state, morph)`.

    >>> import esper_jax, optax
    >>> tx = esper_jax.growable(optax.adamw(1e-3))
    """
    for given, name in ((tx, "tx"), (seeds, "seeds")):
        whole = not isinstance(given, type) and callable(getattr(given, "init", None))
        if not (whole and callable(getattr(given, "update", None)) or given is None and name == "seeds"):
            got = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
            raise TypeError(f"growable() needs an optax transformation for {name}, got {got}")
    if isinstance(tx, Growable):
        if seeds is not None:
            raise TypeError("growable() was given seeds= beside a growable optimizer, which has its seeds' already")
        return tx
    return Growable(tx, tx if seeds is None else seeds)


def _map_params_trees(tx: optax.GradientTransformation, state: Any, change: Callable[[Any], Any]) -> Any:
    """An optimizer state with `change` applied to each of its trees that has the structure of the params."""
    leaves = optax.tree_map_params(tx, lambda leaf: _Param(leaf), state)
    held = lambda node: isinstance(node, Mapping) and bool(jax.tree.leaves(node, is_leaf=_is_param))  # noqa: E731

    def swap(node: Any) -> Any:
        if held(node) and all(_is_param(leaf) for leaf in jax.tree.leaves(node, is_leaf=_is_param)):
            return change(jax.tree.map(lambda leaf: leaf.value, node, is_leaf=_is_param))
        return node

    return jax.tree.map(swap, leaves, is_leaf=held)


def _params_trees(tx: optax.GradientTransformation, state: Any) -> list[Any]:
    """The trees of an optimizer state that have the structure of the params, in order."""
    found: list[Any] = []

    def note(tree: Any) -> Any:
        found.append(tree)
        return tree

    _map_params_trees(tx, state, note)
    return found


@dataclasses.dataclass
class _Param:
    """A leaf of an optimizer state that belongs to a parameter."""

    value: Any


def _is_param(leaf: Any) -> bool:
    return isinstance(leaf, _Param)


def _updates(params: Any, updates: Any) -> Any:
    return updates


def _no_updates(params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


def _as_they_are(params: Any) -> Any:
    return params


def _check_morph(morph: Any, call: str) -> None:
    if not isinstance(morph, Morph):
        raise TypeError(
            f"growable(...).{call} takes the Morph itself where optax takes params, got {type(morph).__name__}"
        )
