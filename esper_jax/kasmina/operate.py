"""The hand-held calls on a Morph that has its seeds: advance, set_alpha, prune, fossilize, tick, unload, shed, awake.

With concrete arrays an illegal call raises and changes nothing. Under a trace it leaves the state unchanged; ask for
`with_ok=True` to get `(morph, ok)`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._checks import INT32, flag, number, one_of, whole
from . import lifecycle
from .lifecycle import Moved
from .morph import Morph, check_morph, with_spec
from .refusals import illegal, not_live
from .spec import Plant, Site
from .stages import NEXT, Stage
from .state import SeedState, choose, computes, layers_of, live, slot_of

NAN = float("nan")
Layers = int | Sequence[int] | None


def advance(
    morph: Morph, site: str, slot: int = 0, *, layer: Layers = None, score: float = NAN, with_ok: bool = False
) -> Any:
    """Move a seed to the next stage of its life: DORMANT has none (germinate), FOSSILIZED has none.

    TRAINING to BLENDING begins a ramp from 0 to 1 of the default tempo; ticks move it. At a site of stacked layers
    `layer` says which of them move (this holds for `set_alpha`, `prune`, `fossilize` and `unload` too); None is every
    layer that has a seed in the slot.

    Raises:
      KeyError: unknown site. ValueError: the slot is empty, or its stage has no next one.
    """
    number("score", score)
    state = planted_state(morph, site, slot)
    stages = state.stage[_seeded(morph, site, slot, layer)] if concrete(state.stage) else ()
    for stage in map(Stage, map(int, stages)):
        if stage in (Stage.DORMANT, Stage.FOSSILIZED):
            raise ValueError(f"{site} slot {slot} is {stage.name}; advance() has no next stage for it")
    following = np.array([NEXT.get(s, s) for s in Stage], np.int32)
    config = lifecycle.Lifecycle()

    def move(state: SeedState, mask: jax.Array) -> Moved:
        held = mask & (state.stage != Stage.DORMANT)
        target = jnp.asarray(following)[state.stage]
        moved, ok = lifecycle.transition(state, held, target, score)
        moved, _ = lifecycle.start_ramp(moved, ok & (target == Stage.BLENDING), 1.0, config.tempo, config.curve)
        return moved, ok

    return _apply(morph, site, slot, layer, move, with_ok, "advance")


def set_alpha(
    morph: Morph,
    site: str,
    slot: int,
    alpha: float,
    *,
    steps: int = 5,
    curve: str = "sigmoid",
    layer: Layers = None,
    with_ok: bool = False,
) -> Any:
    """Start a ramp of a BLENDING or HOLDING seed to `alpha` over `steps` ticks; `curve` linear, cosine or sigmoid.

    Lowering alpha in HOLDING returns the seed to BLENDING. A ramp that is under way must end first.

    Raises:
      KeyError: unknown site. ValueError: empty slot, wrong stage, a ramp under way, or a value out of range.
    """
    number("alpha", alpha)
    whole("steps", steps, 1, INT32)
    ramp = lambda s, m: lifecycle.start_ramp(s, m, alpha, steps, curve)  # noqa: E731
    return _apply(morph, site, slot, layer, ramp, with_ok, "set_alpha")


def prune(
    morph: Morph,
    site: str,
    slot: int = 0,
    *,
    steps: int = 0,
    layer: Layers = None,
    score: float = NAN,
    with_ok: bool = False,
) -> Any:
    """Prune a live seed: at once, or with `steps` > 0 after a ramp of alpha to 0 with its parameters frozen.

    Raises:
      KeyError: unknown site. ValueError: empty slot, or a stage that cannot be pruned (FOSSILIZED is for good).
    """
    number("score", score)
    whole("steps", steps, 0, INT32)

    def move(state: SeedState, mask: jax.Array) -> Moved:
        if steps > 0:
            return lifecycle.schedule_prune(state, mask, steps, score=score)
        return lifecycle.transition(state, mask, Stage.PRUNED, score)

    return _apply(morph, site, slot, layer, move, with_ok, "prune")


def fossilize(
    morph: Morph, site: str, slot: int = 0, *, layer: Layers = None, score: float = NAN, with_ok: bool = False
) -> Any:
    """Keep a HOLDING seed for good.

    Raises:
      KeyError: unknown site. ValueError: empty slot, or another stage than HOLDING.
    """
    number("score", score)
    to_fossil = lambda s, m: lifecycle.transition(s, m, Stage.FOSSILIZED, score)  # noqa: E731
    return _apply(morph, site, slot, layer, to_fossil, with_ok, "fossilize")


def tick(
    morph: Morph, *, score: float | jax.Array = NAN, config: lifecycle.Lifecycle = lifecycle.Lifecycle()
) -> tuple[Morph, dict[str, lifecycle.Ticked]]:
    """One tick for every seed (see `lifecycle.tick`): ramps move, gates open, pruned slots rest.

    Residents that reset to DORMANT get zero parameters; `shed` takes out the others. Works under `jit`
    where it is far faster than outside.

    Returns:
      The morph and, for each planted site, what moved and why not.
    """
    check_morph(morph, "tick")
    number("score", score)
    one_of("config", config, lifecycle.Lifecycle, "Lifecycle()")
    state, report, seeds = {}, {}, {}
    for path, plants in morph.spec.planted_at.items():
        finite = jnp.ones(morph.state[path].stage.shape, bool)
        sound = jax.vmap(_finite) if morph.spec.by_path[path].layers else _finite
        for plant in plants:
            finite = finite.at[..., plant.slot].set(sound(morph.seeds[path][plant.key]))
        state[path], report[path] = lifecycle.tick(morph.state[path], score=score, finite=finite, config=config)
        asleep = state[path].stage == Stage.DORMANT
        seeds[path] = {p.key: _emptied(morph.seeds[path][p.key], asleep[..., p.slot]) for p in plants}
    return morph.replace(seeds=seeds, state=state), report


def shed(morph: Morph) -> Morph:
    """The morph without its dormant seeds that were not planted ahead: their slots are empty, the program leaner.

    Call `growable(...).grow(opt_state, morph)` after it, so that the next seed in such a slot finds no old moments.
    """
    check_morph(morph, "shed")
    return _without(morph, lambda plant, stage: not plant.resident and np.all(stage == Stage.DORMANT))


def awake(morph: Morph) -> Morph:
    """The morph with the seeds that compute and no others: what it computes, at the cost of those.

    A seed that was planted ahead stays in the program while it rests, behind a branch, which small models and single
    calls feel. Without it they are the leaner program's; where no seed computes, the host's own, the jaxpr is the same:
    `jax.jit(graft(model))(awake(morph), x)`. Outputs are equal, but for what a compiler rounds otherwise in another
    program. Ask again after each operation and tick; a jitted function compiles once for each set of seeds that were
    ever awake together.

    It is for calls that change no seed's stage: what rests (DORMANT, GERMINATED, and after a prune PRUNED, EMBARGOED
    and RESETTING) has lost its slot and its time of rest in it. Go on growing with the morph itself; for training see
    `make_train_step(rest_alone=True)`, which keeps them.

    Args:
      morph: the morph, with concrete arrays; of a population a seed stays that computes in any member. Not changed.

    Raises:
      TypeError: no morph. ValueError: under a trace, or of shapes alone.
    """
    check_morph(morph, "awake")
    if not all(concrete(state.stage) and hasattr(state.stage, "__array__") for state in morph.state.values()):
        raise ValueError(
            "awake() takes seeds out of the structure as their stages say, and here these are no arrays yet; call it "
            "outside jit and vmap"
        )
    return _without(morph, lambda plant, stage: not np.any(computes(stage)))


def _without(morph: Morph, gone: Callable[[Plant, Any], Any]) -> Morph:
    """The morph without the plants of which `gone(plant, stages in its slot)` is true; the same object for none."""
    stages = jax.device_get({path: state.stage for path, state in morph.state.items()})
    spec = morph.spec
    for plant in morph.spec.plants:
        if gone(plant, stages[plant.site][..., plant.slot]):
            spec = spec.without(plant.site, plant.slot)
    return morph if spec is morph.spec else with_spec(morph, spec)


def unload(morph: Morph, site: str, slot: int = 0, *, layer: Layers = None, with_ok: bool = False) -> Any:
    """Take a seed on trial out of its slot at once, whatever it was germinated from; the slot is free again.

    Legal where the lifecycle lets a seed go to PRUNED: GERMINATED, TRAINING, BLENDING and HOLDING, a scheduled prune
    included. A fossil is for good, and a seed at rest after a prune comes out by itself. Unlike a prune it is no
    verdict, so the slot does not rest. A lean seed leaves the spec, and the next call compiles once; a seed planted
    ahead stays in it as DORMANT zeros, and nothing recompiles.

    Call `growable(...).grow(opt_state, morph)` after it, so that the next seed in the slot finds no old moments.

    Args:
      morph: the morph; it is not changed.
      site: the site's path.
      slot: the seed's slot.
      layer: which of a site's stacked layers; None is every one that has a seed in the slot.
      with_ok: return `(morph, ok)` instead of raising for a stage that does not allow it.

    Raises:
      KeyError: unknown site. ValueError: the slot is empty, or its stage does not allow it; a lean seed under a trace.
    """
    flag("with_ok", with_ok)
    state = planted_state(morph, site, slot)
    plant = morph.spec.plant(site, slot)
    assert plant is not None
    mask = _seeded(morph, site, slot, layer)
    ok = jnp.any(mask) & jnp.all(live(state.stage) | ~mask)
    if not plant.resident and not concrete(ok):
        raise ValueError(f"{site} slot {slot}: unload() of a lean seed changes the structure; call it outside jit")
    if concrete(ok) and not bool(ok):
        if not with_ok:
            raise ValueError(not_live(_first(state, mask & ~live(state.stage), slot), site, slot))
        return morph, ok
    mask = ok & mask
    blank = SeedState.empty(state.stage.shape[-1], layers_of(state)).replace(generation=state.generation)
    seeds = {**morph.seeds[site], plant.key: _emptied(morph.seeds[site][plant.key], jnp.any(mask, -1))}
    life = {**morph.state, site: choose(mask, blank, state)}
    emptied = morph.replace(seeds={**morph.seeds, site: seeds}, state=life)
    return answer(emptied if plant.resident else shed(emptied), ok, with_ok)


def live_seeds(morph: Morph) -> tuple[Plant, ...]:
    """The plants on trial (GERMINATED to HOLDING), in any layer; needs concrete arrays."""
    stages = {path: np.asarray(live(state.stage)) for path, state in morph.state.items()}
    return tuple(plant for plant in morph.spec.plants if np.any(stages[plant.site][..., plant.slot]))


def beside(flag: jax.Array, leaf: jax.Array) -> jax.Array:
    """A flag, or one a layer, to stand beside a leaf."""
    return flag.reshape(flag.shape + (1,) * (leaf.ndim - flag.ndim))


def chosen(morph: Morph, site: str, slot: int, layer: Layers) -> Bool[Array, "..."]:
    """The entries of a site's state that a slot and `layer=` name: `[S]`, or `[L, S]` at stacked layers.

    Raises:
      ValueError: there is no such layer, or the site's layer stands alone and a layer is named.
    """
    place = morph.spec.by_path[site]
    at_slot = jnp.arange(morph.state[site].stage.shape[-1]) == slot
    if not place.layers:
        if layer is not None:
            raise ValueError(f"site {site!r} is one layer, not a stack of them; leave out layer={layer!r}")
        return at_slot
    wanted = range(place.layers) if layer is None else _named(layer)
    known = lambda n: isinstance(n, int | np.integer) and not isinstance(n, bool)  # noqa: E731
    if wrong := [n for n in wanted if not known(n) or not 0 <= n < place.layers]:
        raise ValueError(f"site {site!r} has layers 0 to {place.layers - 1}, got layer {wrong[0]!r}")
    return jnp.isin(jnp.arange(place.layers), jnp.asarray(tuple(wanted), jnp.int32))[:, None] & at_slot


def _named(layer: Any) -> tuple[Any, ...]:
    """The layers that `layer=` names, each as it was given."""
    layer = layer.tolist() if hasattr(layer, "tolist") else layer
    several = isinstance(layer, Collection) and not isinstance(layer, str | bytes | Mapping)
    return tuple(layer) if several else (layer,)


def _seeded(morph: Morph, site: str, slot: int, layer: Layers) -> Any:
    """As `chosen`; where a stack's layers are not named, those that have a seed in the slot."""
    mask, place = chosen(morph, site, slot, layer), morph.spec.by_path[site]
    if not place.layers or layer is not None:
        return mask
    occupied = mask & (morph.state[site].stage != Stage.DORMANT)
    return jnp.where(jnp.any(occupied), occupied, mask)


def _apply(
    morph: Morph,
    site: str,
    slot: int,
    layer: Layers,
    move: Callable[[SeedState, jax.Array], Moved],
    with_ok: bool,
    call: str,
) -> Any:
    flag("with_ok", with_ok)
    state = planted_state(morph, site, slot)
    mask = _seeded(morph, site, slot, layer)
    moved, made = move(state, mask)
    ok = jnp.all(made | ~mask)
    if concrete(ok) and not bool(ok) and not with_ok:
        raise ValueError(illegal(_first(state, mask & ~made, slot), site, slot, call))
    return answer(morph.replace(state={**morph.state, site: moved}), ok, with_ok)


def _first(state: SeedState, mask: Any, slot: int) -> SeedState:
    """The state of a slot in the first of the layers that `mask` names."""
    one = slot_of(state, slot)
    if not layers_of(state):
        return one
    named = np.flatnonzero(np.any(np.asarray(mask), -1))
    layer = int(named[0]) if named.size else 0
    return jax.tree.map(lambda field: field[layer], one)


def answer(morph: Morph, ok: jax.Array, with_ok: bool) -> Any:
    """What a call returns."""
    return (morph, ok) if with_ok else morph


def find_site(morph: Morph, site: str) -> Site:
    """The site of that path; a KeyError that lists them otherwise."""
    check_morph(morph, "this call")
    if not isinstance(site, str) or site not in morph.spec.by_path:
        known = ", ".join(morph.spec.by_path)
        raise UnknownSiteError(f"unknown site {site!r}; this morph has: {known}")
    return morph.spec.by_path[site]


class UnknownSiteError(KeyError):
    """No site of that path; the message lists those that exist."""

    def __str__(self) -> str:
        return str(self.args[0])


def planted_state(morph: Morph, site: str, slot: int) -> SeedState:
    """The state of a site where that slot is planted; KeyError for another site, ValueError for an empty slot."""
    find_site(morph, site)
    whole("slot", slot, 0)
    if morph.spec.plant(site, slot) is None:
        have = ", ".join(f"{p.slot} ({p.blueprint})" for p in morph.spec.planted_at.get(site, ())) or "none"
        raise ValueError(f"slot {slot!r} of site {site!r} is empty; planted slots: {have}")
    return morph.state[site]


def _emptied(variables: Any, asleep: jax.Array) -> Any:
    """Zeros where the seed is dormant."""
    return jax.tree.map(lambda leaf: jnp.where(beside(asleep, leaf), 0, leaf), variables)


def _finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def concrete(value: Any) -> bool:
    """Whether it is no tracer."""
    return not isinstance(value, jax.core.Tracer)
