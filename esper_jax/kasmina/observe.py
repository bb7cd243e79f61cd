"""What is measured of seeds: gradient statistics and faults after a step, contributions by switching seeds off."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._checks import function, number
from . import lifecycle
from .bank import Tap
from .morph import Morph, check_morph, count
from .operate import chosen, planted_state
from .stages import Stage
from .state import SeedState, computes, is_in, learns

SMALL, LARGE = 1e-7, 10.0


def observe(morph: Morph, grads: Mapping[str, Any]) -> Morph:
    """Note what one step's gradients say of the seeds, for those who own their loop (`make_train_step` does it).

    Updates each learning seed's health, gradient ratio and share of exploding entries (running means, which gate G2
    reads), and counts a fault for each seed whose gradient is not finite; the third fault prunes it.

    Args:
      morph: the morph that the gradients were taken at.
      grads: gradients in the form of `Morph.params`.

    Returns:
      The morph with its state brought up to date. Works under `jit`.

    Raises:
      TypeError: `morph` is no `Morph`, or `grads` are not in that form. ValueError: they are those of other seeds.
    """
    check_morph(morph, "observe")
    if not isinstance(grads, Mapping) or not {"host", "seeds"} <= set(grads):
        raise TypeError(f"grads must be in the form of Morph.params, {{'host': ..., 'seeds': ...}}, got {grads!r}")
    if jax.tree.structure(grads["seeds"]) != jax.tree.structure(morph.seeds):
        raise ValueError("grads['seeds'] are not of this morph's seeds; take them at the same morph's params")
    norm = tree_norm(grads["host"])
    states, _ = observed_states(morph, grads, norm, {}, jnp.isfinite(norm))
    return morph.replace(state=states)


def silence(morph: Morph, site: str, slot: int = 0, *, layer: int | None = None) -> Morph:
    """The morph with that seed's alpha at 0, to measure what it contributes; stage and ramp stay as they are.

    Args:
      morph: the morph; it is not changed.
      site: the site's path.
      slot: the seed's slot.
      layer: one of the site's stacked layers; None is all of them.

    Raises:
      KeyError: unknown site. ValueError: the slot is empty, or there is no such layer.
    """
    state = planted_state(morph, site, slot)
    muted = state.replace(alpha=jnp.where(chosen(morph, site, slot, layer), 0.0, state.alpha))
    return morph.replace(state={**morph.state, site: muted})


def contributions(morph: Morph, score: Callable[[Morph], Any]) -> tuple[dict[tuple[Any, ...], float], Morph]:
    """Measure what each seed in BLENDING or HOLDING contributes: the score with it minus the score at its alpha 0.

    Args:
      morph: the morph, with concrete arrays.
      score: `score(morph)`, higher is better, in 0 to 1 (as accuracy is); called once, and once for each seed. Give a
        jitted function: silencing a seed recompiles nothing.

    Returns:
      `{(site, slot): points}` (`(site, slot, layer)` at stacked layers), and the morph with these noted, which gate G5
      reads.

    Raises:
      TypeError: `morph` is no `Morph`, or `score` is no function that gives one number.
    """
    check_morph(morph, "contributions")
    function("score", score, "jax.jit(lambda morph: accuracy(morph))")
    found: dict[tuple[Any, ...], float] = {}
    whole = _scored(score, morph)
    state = dict(morph.state)
    for plant in morph.spec.plants:
        site, slot = plant.site, plant.slot
        entered = np.asarray(is_in(state[site].stage, Stage.BLENDING, Stage.HOLDING))
        for layer in range(morph.spec.by_path[site].layers) or (None,):
            name, at = ((site, slot), (slot,)) if layer is None else ((site, slot, layer), (layer, slot))
            if entered[at]:
                found[name] = 100 * (whole - _scored(score, silence(morph, site, slot, layer=layer)))
                noted = state[site].contribution.at[at].set(found[name])
                state[site] = state[site].replace(contribution=noted)
    return found, morph.replace(state=state)


def _scored(score: Callable[[Morph], Any], morph: Morph) -> float:
    """What a score function says of a morph."""
    found = score(morph)
    number("what score gives", found)
    return float(found)


def tree_norm(tree: Any) -> Float[Array, ""]:
    """The Euclidean norm of all leaves together, float32."""
    return norm_of(squared_norms(tree))


def squared_norms(tree: Any) -> Any:
    """Each leaf's squared Euclidean norm, float32; written as a product, which XLA's CPU backend sums fastest."""

    def square(leaf: Array) -> Array:
        x = leaf.reshape(-1)
        return jnp.vdot(x, x, precision="highest", preferred_element_type=jnp.float32).real

    return jax.tree.map(square, tree)


def norm_of(squares: Any) -> Float[Array, ""]:
    """The Euclidean norm of everything whose `squared_norms` are given."""
    return jnp.sqrt(sum(jax.tree.leaves(squares), jnp.zeros((), jnp.float32)))


def gradient_health(grads: Any) -> tuple[Float[Array, ""], Float[Array, ""], Bool[Array, ""]]:
    """A seed's gradient health in [0, 1], its share of exploding entries, and whether all are finite (contract 8)."""
    leaves = [jnp.abs(g.astype(jnp.float32)) for g in jax.tree.leaves(grads)]
    total = sum(g.size for g in leaves)
    small = sum(jnp.sum(g < SMALL, dtype=jnp.float32) for g in leaves) / total
    large = sum(jnp.sum(g > LARGE, dtype=jnp.float32) for g in leaves) / total
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in leaves]))
    health = jnp.clip(1 - 0.5 * small - 0.8 * large, 0, 1)
    return jnp.where(finite, health, 0.0), jnp.where(finite, large, 1.0), finite


def observed_states(
    morph: Morph, grads: Mapping[str, Any], host_norm: Array, tapped: Mapping[str, Tap], ok: Bool[Array, ""]
) -> tuple[dict[str, Any], Int[Array, ""]]:
    """The seeds' states after a step with their running statistics and faults, and how many seeds faulted.

    Args:
      morph: the morph before the step.
      grads: gradients in the form of `Morph.params`.
      host_norm: `tree_norm` of the host's.
      tapped: the gradients of `Graft.tapped`'s taps, which tell of seeds that were not finite on the way forward.
      ok: whether the batch was good. One that breaks the host itself measures nothing, and no seed is to blame.
    """
    none = jnp.zeros((), jnp.int32)
    if not morph.spec.plants:
        return {}, none

    def look(states: Any, grads: Any) -> tuple[dict[str, Any], Array]:
        looked, faults = {}, none
        for path, state in states.items():
            looked[path], faulty = _looked_at(morph, path, state, grads, host_norm, tapped.get(path), ok)
            faults = faults + jnp.sum(faulty & computes(state.stage), dtype=jnp.int32)
        return looked, faults

    return when_seeds_compute(  # type: ignore[no-any-return]
        morph, look, lambda states, grads: (states, none), dict(morph.state), grads["seeds"]
    )


def when_seeds_compute(morph: Morph, do: Callable[..., Any], skip: Callable[..., Any], *args: Any) -> Any:
    """`do(*args)`, and `skip(*args)` while every seed rests, in one program: a branch, where any seed is planted."""
    if not morph.spec.has_residents:
        return do(*args)
    return jax.lax.cond(any_computes(morph), do, skip, *args)


def any_computes(morph: Morph) -> Bool[Array, ""]:
    """Whether the forward pass of any seed is needed; one must be planted."""
    return jnp.any(jnp.stack([jnp.any(computes(state.stage)) for state in morph.state.values()]))


def _looked_at(
    morph: Morph, path: str, state: SeedState, grads: Any, host_norm: Array, tapped: Tap | None, ok: Array
) -> tuple[SeedState, Bool[Array, " S"]]:
    """One site's seeds after the step, and which of them were not finite, forwards or backwards."""
    shape = state.stage.shape
    health, ratio, exploding = (jnp.zeros(shape, jnp.float32) for _ in range(3))
    faulty = jnp.zeros(shape, bool) if tapped is None else tapped.faults > 0
    n_host = count(morph.params["host"])

    def measure(own: Any) -> tuple[Array, ...]:
        return *gradient_health(own), tree_norm(own) / host_norm * math.sqrt(n_host / count(own))

    for plant in morph.spec.planted_at[path]:
        own = grads[path][plant.key]
        h, e, finite, r = jax.vmap(measure)(own) if morph.spec.by_path[path].layers else measure(own)
        at = (..., plant.slot)
        health, ratio = health.at[at].set(h), ratio.at[at].set(r)
        exploding = exploding.at[at].set(e)
        faulty = faulty.at[at].set(faulty[at] | ~finite)
    faulty = faulty & ok
    state = lifecycle.observe(state, learns(state) & ok, health, ratio, exploding)
    return lifecycle.count_faults(state, faulty), faulty
