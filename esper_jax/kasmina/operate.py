"""The hand-held lifecycle calls on a Morph: germinate, advance, set_alpha, prune, fossilize.

With concrete arrays an illegal call raises and changes nothing. Under a trace it leaves the state unchanged; ask for
`with_ok=True` to get `(morph, ok)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import lifecycle
from .blend import check_blend
from .blueprints import get_blueprint, make_plant, seed_init
from .lifecycle import Moved
from .morph import Morph, check_morph, with_spec
from .spec import Plant, Site, freeze_config
from .stages import EDGES, LIVE, NEXT, Stage
from .state import SeedState, choose, live
from .stored import Stored, fit_params, label, misfit

NAN = float("nan")


def germinate(
    morph: Morph,
    site: str,
    blueprint: str | Stored,
    *,
    key: jax.Array | None = None,
    slot: int | None = None,
    blend: str | None = None,
    params: Any = None,
    score: float = NAN,
    with_ok: bool = False,
    **config: Any,
) -> Any:
    """Put a new seed in a slot of a site.

    A dormant seed planted ahead with the same blueprint (and config and blend, where given) is used first: only data
    changes and nothing recompiles. Otherwise an empty slot is used and the spec grows by one plant.

    Args:
      morph: the morph; it is not changed.
      site: the site's path, e.g. `"block_0/Dense_1"`.
      blueprint: a registered blueprint's name, or a stored seed (`urza.get(id)`), which brings config, blend and
        parameters.
      key: a PRNG key for the fresh parameters; needed unless `params` or a stored seed is given.
      slot: a slot; None takes the first that is free.
      blend: add, lerp, multiply or gate; None is add, or what the planted seed has.
      params: stored parameters instead of fresh ones, in the blueprint's shapes and dtypes.
      score: the validation score now, noted as the score at the start of the stage.
      with_ok: return `(morph, ok)` instead of raising for a stage that does not allow it.
      **config: the blueprint's config.

    Returns:
      The morph with the seed GERMINATED. Where an empty slot was used its structure is new: jitted functions compile
      once more (call `growable(...).grow(opt_state, morph)` first, or they do so twice).

    Raises:
      KeyError: unknown site or blueprint. TypeError: unknown config key, no key, or config beside a stored seed.
      ValueError: the slot is taken or does not exist, no slot is free, or the blueprint or the stored parameters do
      not fit the site.
    """
    place = _site(morph, site)
    name = f"parameters for {blueprint!r}"
    if not isinstance(blueprint, str):
        name, blueprint, config, blend, params = _unpack(blueprint, place, config, blend, params)
    get_blueprint(blueprint).full_config(config)
    if blend is not None:
        check_blend(blend)
    if key is None and params is None:
        raise TypeError(f"germinate() at {site!r} needs key= for fresh parameters, or params= for stored ones")
    if slot is not None and (isinstance(slot, bool) or not 0 <= slot < morph.spec.slots):
        raise ValueError(f"site {site!r} has slots 0 to {morph.spec.slots - 1}, got slot {slot!r}")
    resident = _dormant_plant(morph, site, blueprint, slot, blend, config)
    if resident is not None:
        plant, grown = resident, morph
    else:
        free = morph.spec.free_slots(site)
        if slot is None and not free or slot is not None and slot not in free:
            raise ValueError(_taken(morph, site, blueprint, slot))
        chosen = free[0] if slot is None else slot
        plant = make_plant(place, chosen, blueprint, config, blend or "add", resident=False)
        grown = with_spec(morph, morph.spec.with_plant(plant))
    old, life, now = grown.seeds[site][plant.key], grown.state[site], jnp.asarray(score, jnp.float32)
    if params is not None:
        placed, state, ok = _placed(plant.slot, fit_params(plant, place, params, name), life, old, now)
    else:
        placed, state, ok = _born(get_blueprint(blueprint).init, plant, place, key, life, old, now)
    seeds = {**grown.seeds, site: {**grown.seeds[site], plant.key: placed}}
    return _answer(grown.replace(seeds=seeds, state={**grown.state, site: state}), ok, with_ok)


def advance(morph: Morph, site: str, slot: int = 0, *, score: float = NAN, with_ok: bool = False) -> Any:
    """Move a seed to the next stage of its life: DORMANT has none (germinate), FOSSILIZED has none.

    TRAINING to BLENDING begins a ramp from 0 to 1 of the default tempo; ticks move it.

    Raises:
      KeyError: unknown site. ValueError: the slot is empty, or its stage has no next one.
    """
    state = planted_state(morph, site, slot)
    stage = state.stage[slot]
    if _concrete(stage) and Stage(int(stage)) in (Stage.DORMANT, Stage.FOSSILIZED):
        raise ValueError(f"{site} slot {slot} is {Stage(int(stage)).name}; advance() has no next stage for it")
    following = np.array([NEXT.get(s, s) for s in Stage], np.int32)
    config = lifecycle.Lifecycle()

    def move(state: SeedState, mask: jax.Array) -> Moved:
        held = mask & (state.stage != Stage.DORMANT)
        target = jnp.asarray(following)[state.stage]
        moved, ok = lifecycle.transition(state, held, target, score)
        moved, _ = lifecycle.start_ramp(moved, ok & (target == Stage.BLENDING), 1.0, config.tempo, config.curve)
        return moved, ok

    return _apply(morph, site, slot, move, with_ok, "advance")


def set_alpha(
    morph: Morph, site: str, slot: int, alpha: float, *, steps: int = 5, curve: str = "sigmoid", with_ok: bool = False
) -> Any:
    """Start a ramp of a BLENDING or HOLDING seed to `alpha` over `steps` ticks; `curve` linear, cosine or sigmoid.

    Lowering alpha in HOLDING returns the seed to BLENDING. A ramp that is under way must end first.

    Raises:
      KeyError: unknown site. ValueError: empty slot, wrong stage, a ramp under way, or a value out of range.
    """
    return _apply(morph, site, slot, lambda s, m: lifecycle.start_ramp(s, m, alpha, steps, curve), with_ok, "set_alpha")


def prune(morph: Morph, site: str, slot: int = 0, *, steps: int = 0, score: float = NAN, with_ok: bool = False) -> Any:
    """Prune a live seed: at once, or with `steps` > 0 after a ramp of alpha to 0 with its parameters frozen.

    Raises:
      KeyError: unknown site. ValueError: empty slot, or a stage that cannot be pruned (FOSSILIZED is for good).
    """

    def move(state: SeedState, mask: jax.Array) -> Moved:
        if steps > 0:
            return lifecycle.schedule_prune(state, mask, steps, score=score)
        return lifecycle.transition(state, mask, Stage.PRUNED, score)

    return _apply(morph, site, slot, move, with_ok, "prune")


def fossilize(morph: Morph, site: str, slot: int = 0, *, score: float = NAN, with_ok: bool = False) -> Any:
    """Keep a HOLDING seed for good.

    Raises:
      KeyError: unknown site. ValueError: empty slot, or another stage than HOLDING.
    """
    to_fossil = lambda s, m: lifecycle.transition(s, m, Stage.FOSSILIZED, score)  # noqa: E731
    return _apply(morph, site, slot, to_fossil, with_ok, "fossilize")


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
    state, report, seeds = {}, {}, {}
    for path, plants in morph.spec.planted_at.items():
        finite = jnp.ones(morph.spec.slots, bool)
        for plant in plants:
            finite = finite.at[plant.slot].set(_finite(morph.seeds[path][plant.key]))
        state[path], report[path] = lifecycle.tick(morph.state[path], score=score, finite=finite, config=config)
        asleep = state[path].stage == Stage.DORMANT
        seeds[path] = {p.key: _emptied(morph.seeds[path][p.key], asleep[p.slot]) for p in plants}
    return morph.replace(seeds=seeds, state=state), report


def shed(morph: Morph) -> Morph:
    """The morph without its dormant seeds that were not planted ahead: their slots are empty, the program leaner.

    Call `growable(...).grow(opt_state, morph)` after it, so that the next seed in such a slot finds no old moments.
    """
    stages = {path: np.asarray(state.stage) for path, state in morph.state.items()}
    spec = morph.spec
    for plant in morph.spec.plants:
        if not plant.resident and stages[plant.site][plant.slot] == Stage.DORMANT:
            spec = spec.without(plant.site, plant.slot)
    return morph if spec is morph.spec else with_spec(morph, spec)


def unload(morph: Morph, site: str, slot: int = 0, *, with_ok: bool = False) -> Any:
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
      with_ok: return `(morph, ok)` instead of raising for a stage that does not allow it.

    Raises:
      KeyError: unknown site. ValueError: the slot is empty, or its stage does not allow it; a lean seed under a trace.
    """
    state = planted_state(morph, site, slot)
    plant = morph.spec.plant(site, slot)
    assert plant is not None
    ok = live(state.stage)[slot]
    if not plant.resident and not _concrete(ok):
        raise ValueError(f"{site} slot {slot}: unload() of a lean seed changes the structure; call it outside jit")
    if _concrete(ok) and not bool(ok):
        if not with_ok:
            raise ValueError(_not_live(state, site, slot))
        return morph, ok
    mask = ok & (jnp.arange(state.stage.shape[0]) == slot)
    blank = SeedState.empty(state.stage.shape[0]).replace(generation=state.generation)
    seeds = {**morph.seeds[site], plant.key: _emptied(morph.seeds[site][plant.key], ok)}
    life = {**morph.state, site: choose(mask, blank, state)}
    emptied = morph.replace(seeds={**morph.seeds, site: seeds}, state=life)
    return _answer(emptied if plant.resident else shed(emptied), ok, with_ok)


def live_seeds(morph: Morph) -> tuple[Plant, ...]:
    """The plants on trial (GERMINATED to HOLDING); needs concrete arrays."""
    stages = {path: np.asarray(live(state.stage)) for path, state in morph.state.items()}
    return tuple(plant for plant in morph.spec.plants if stages[plant.site][plant.slot])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _born(
    init: Callable[..., Any], plant: Plant, site: Site, key: jax.Array, life: SeedState, old: Any, score: jax.Array
) -> tuple[Any, SeedState, jax.Array]:
    """A germination as one program, which is compiled once; `init` tells a blueprint from its replacement."""
    return _placed(plant.slot, seed_init(plant, site, key), life, old, score)


@functools.partial(jax.jit, static_argnums=0)
def _placed(slot: int, fresh: Any, life: SeedState, old: Any, score: jax.Array) -> tuple[Any, SeedState, jax.Array]:
    """The seed's parameters and its site's state after germination in that slot, and whether that was legal."""
    state, ok = _move(life, slot, lambda s, m: lifecycle.transition(s, m, Stage.GERMINATED, score))
    return jax.tree.map(lambda new, kept: jnp.where(ok, new, kept), fresh, old), state, ok


def _apply(
    morph: Morph, site: str, slot: int, move: Callable[[SeedState, jax.Array], Moved], with_ok: bool, call: str
) -> Any:
    state = planted_state(morph, site, slot)
    moved, ok = _move(state, slot, move)
    if _concrete(ok) and not bool(ok) and not with_ok:
        raise ValueError(_illegal(state, site, slot, call))
    return _answer(morph.replace(state={**morph.state, site: moved}), ok, with_ok)


def _move(state: SeedState, slot: int, move: Callable[[SeedState, jax.Array], Moved]) -> tuple[SeedState, jax.Array]:
    moved, ok = move(state, jnp.arange(state.stage.shape[0]) == slot)
    return moved, ok[slot]


def _answer(morph: Morph, ok: jax.Array, with_ok: bool) -> Any:
    return (morph, ok) if with_ok else morph


def _site(morph: Morph, site: str) -> Any:
    check_morph(morph, "this call")
    if site not in morph.spec.by_path:
        known = ", ".join(morph.spec.by_path)
        raise UnknownSiteError(f"unknown site {site!r}; this morph has: {known}")
    return morph.spec.by_path[site]


class UnknownSiteError(KeyError):
    """No site of that path; the message lists those that exist."""

    def __str__(self) -> str:
        return str(self.args[0])


def planted_state(morph: Morph, site: str, slot: int) -> SeedState:
    """The state of a site where that slot is planted; KeyError for another site, ValueError for an empty slot."""
    _site(morph, site)
    if morph.spec.plant(site, slot) is None:
        have = ", ".join(f"{p.slot} ({p.blueprint})" for p in morph.spec.planted_at.get(site, ())) or "none"
        raise ValueError(f"slot {slot!r} of site {site!r} is empty; planted slots: {have}")
    return morph.state[site]


def _dormant_plant(
    morph: Morph, site: str, blueprint: str, slot: int | None, blend: str | None, config: dict[str, Any]
) -> Plant | None:
    """The first seed planted ahead that is asked for and free to germinate (or, under a trace, may be)."""
    for plant in morph.spec.planted_at.get(site, ()):
        stage = morph.state[site].stage[plant.slot]
        matches = (
            plant.blueprint == blueprint
            and slot in (None, plant.slot)
            and blend in (None, plant.blend)
            and set(freeze_config(config)) <= set(plant.config)
            and plant.resident
        )
        if matches and (not _concrete(stage) or int(stage) == Stage.DORMANT):
            return plant
    return None


def _taken(morph: Morph, site: str, blueprint: str, slot: int | None) -> str:
    state = morph.state.get(site)
    used = ", ".join(
        f"slot {p.slot}: {p.blueprint} {dict(p.config)}"
        + (f" {Stage(int(state.stage[p.slot])).name}" if state is not None and _concrete(state.stage) else "")
        for p in morph.spec.planted_at.get(site, ())
    )
    asked = "no slot is free" if slot is None else f"slot {slot} is taken"
    free = ", ".join(map(str, morph.spec.free_slots(site))) or "none"
    hint = ". shed() frees the slots of DORMANT seeds" if "DORMANT" in used else ""
    return f"cannot germinate {blueprint!r} at {site!r}: {asked}. Taken: {used}. Empty slots: {free}{hint}"


def _illegal(state: SeedState, site: str, slot: int, call: str) -> str:
    stage = Stage(int(state.stage[slot]))
    legal = ", ".join(target.name for target in EDGES[stage]) or "nothing"
    target = {"prune": "PRUNED", "fossilize": "FOSSILIZED"}.get(call)
    ramp = f"{int(state.ramp_done[slot])} of {int(state.ramp_steps[slot])} ticks"
    if target is not None and Stage[target] not in EDGES[stage]:
        return f"{site} slot {slot}: {stage.name} > {target} is not a legal edge; {stage.name} may go to {legal}"
    if bool(state.pruning[slot]):
        return (
            f"{site} slot {slot}: {call}() is not possible, a scheduled prune is taking the seed out (ramp at {ramp})"
        )
    return (
        f"{site} slot {slot}: {call}() is not possible in {stage.name} with alpha {float(state.alpha[slot]):g} and a "
        f"ramp at {ramp}; alpha moves in BLENDING and HOLDING only, when the last ramp has ended; "
        "prune() without steps goes at once"
    )


def _unpack(
    stored: Any, site: Site, config: dict[str, Any], blend: str | None, params: Any
) -> tuple[str, str, dict[str, Any], str | None, Any]:
    """A stored seed as `(name for messages, blueprint, config, blend, params)`, if it can live at the site."""
    if not isinstance(stored, Stored):
        raise TypeError(
            f"germinate() takes a blueprint's name or a stored seed such as urza.get(id), got {type(stored).__name__}"
        )
    if config or params is not None:
        given = ", ".join([*config, *(["params"] if params is not None else [])])
        raise TypeError(f"{label(stored)} brings its own config and parameters; germinate() was also given {given}")
    if (why := misfit(stored, site)) is not None:
        raise ValueError(f"{label(stored)} cannot germinate at {site.path!r}: {why.removeprefix(label(stored) + ': ')}")
    return label(stored), stored.blueprint, dict(stored.config), blend or stored.blend, stored.params


def _not_live(state: SeedState, site: str, slot: int) -> str:
    stage = Stage(int(state.stage[slot]))
    why = {
        Stage.DORMANT: "there is no seed to take out",
        Stage.FOSSILIZED: "a fossil is for good",
    }.get(stage, "it rests after a prune and comes out by itself")
    legal = ", ".join(s.name for s in LIVE)
    return f"{site} slot {slot}: unload() is not possible in {stage.name}, {why}; it is in {legal}"


def _emptied(variables: Any, asleep: jax.Array) -> Any:
    """Zeros where the seed is dormant."""
    return jax.tree.map(lambda leaf: jnp.where(asleep, 0, leaf), variables)


def _finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _concrete(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer)
