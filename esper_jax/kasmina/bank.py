"""A site's seed bank: the pure function that every adapter calls with a layer's input and output."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from . import state as _state
from ._pytree import Struct, pytree, static
from .blend import BLENDS, LEASHED, apart, blended, join, no_gradient, open_input, parted, sum_of_squares
from .blueprints import get_blueprint, seed_apply
from .layout import from_stack, to_stack
from .probe import tap
from .spec import Plant, Site
from .state import SeedState


@pytree
class Tap(Struct):
    """Zeros whose *gradients* are what one site measured in a step: `faults` a slot, and the probe's `stats`."""

    faults: Float[Array, " S"]
    stats: Float[Array, " P"]


@pytree
class Bank(Struct):
    """All that one site needs in a forward pass. Adapters carry it to the layer; `plants` and `site` are static.

    `sample` says whether the tap measures in this call; with `always` nobody asks, and there is no branch. A bank
    without `state` is that of a finished network: its seeds are part of the output for good, by a constant alpha each
    (`constants`, in the order of `plants`; at stacked layers `alphas` by slot, an array of a layer's each).
    """

    seeds: dict[str, Any]
    state: SeedState | None
    tap: Tap | None
    sample: Bool[Array, ""] | None
    site: Site = static()
    plants: tuple[Plant, ...] = static()
    alphas: dict[str, Any] = dataclasses.field(default_factory=dict)
    constants: tuple[float, ...] = static(default=())
    places: tuple[Site, ...] = static(default=())
    read: bool = static(default=False)
    notes: Any = static(default=None)
    always: bool = static(default=False)

    def place(self, index: int) -> Site:
        """Where a plant's seed stands (see `Spec.place`)."""
        return self.places[index] if self.places else self.site


def stacked(bank: Bank) -> Bank:
    """The bank of a site whose layers a lifted transform stacked, in the form in which it slices it a layer."""
    if not bank.site.layers:
        return bank
    sample = None if bank.sample is None else jnp.broadcast_to(bank.sample, (bank.site.layers,))
    return to_stack(dataclasses.replace(bank, sample=sample), dict(bank.site.geometry)["stack"])  # type: ignore[no-any-return]


def unstacked(bank: Bank) -> Bank:
    """One layer's bank, from the slice that it was given of a `stacked` one."""
    return from_stack(bank, dict(bank.site.geometry)["stack"]) if bank.site.layers else bank


def apply_bank(
    bank: Bank,
    u: Float[Array, "... I"],
    h: Float[Array, "... O"],
    linear: tuple[Array, Array | None] | None = None,
    inputs: dict[str, Array] | None = None,
    call: tuple[Any, ...] | None = None,
) -> Float[Array, "... O"]:
    """The site's output: the host's output `h`, with the seeds that have entered blended in (the forward rule).

    Args:
      bank: the site's seeds.
      u: the layer's input, features last; at a convolution `[N, *spatial, I]`.
      h: the layer's own output, likewise.
      linear: kernel `[I, O]` and bias of a layer that is `u @ kernel + bias` and no more; probes are cheaper with it.
      inputs: what layers were given that spans read; this one's input is noted there if one reads it.
      call: queries, keys, values and mask of an attention layer's call.

    Raises:
      ValueError: at trace time, if a seed's output does not have `h`'s shape, or a span's source was not called yet.
    """
    if bank.read and inputs is not None:
        inputs[bank.site.path] = u
    if bank.notes is not None:
        h = bank.notes(bank.site.path, u, h)
    if bank.tap is not None and (bank.always or bank.sample is not None):
        read, weights = jax.lax.stop_gradient((u, linear))
        h = tap((bank.site.in_shape, bank.site.out_shape), read, h, bank.tap.stats, bank.sample, weights)
    for index, plant in enumerate(bank.plants):
        source = _source(plant, u, inputs, call)
        h = (_slot if bank.state is not None else _baked)(bank, index, source, h)
    return h


def _source(plant: Plant, u: Array, inputs: dict[str, Array] | None, call: tuple[Any, ...] | None) -> Any:
    """What a seed reads, arrays; None is the layer's own output."""
    if not plant.source:
        return {"input": u, "output": None, "call": call}[get_blueprint(plant.blueprint).reads]
    if inputs is None or plant.source not in inputs:
        raise ValueError(
            f"the span from {plant.source!r} to {plant.site!r} reads a layer that was not called before it in this "
            "forward pass, or in another body of a lifted transform"
        )
    return inputs[plant.source]


def _baked(bank: Bank, index: int, source: Any, h: Array) -> Array:
    """The output with a seed of a finished network in it."""
    plant = bank.plants[index]
    f, gate = _seed(plant, bank.place(index), bank.seeds[plant.key], h if source is None else source, h)
    alpha = bank.constants[index] if bank.constants else bank.alphas[plant.key].astype(h.dtype)
    if plant.blend == "add" and isinstance(alpha, float) and alpha == 1:
        return h + f
    return BLENDS[plant.blend](h, f, gate, alpha)  # type: ignore[arg-type]


def _slot(bank: Bank, index: int, source: Any, h: Array) -> Array:
    assert bank.state is not None
    plant, place = bank.plants[index], bank.place(index)
    stage, alpha = bank.state.stage[plant.slot], bank.state.alpha[plant.slot]
    pulse = jnp.zeros(()) if bank.tap is None else bank.tap.faults[plant.slot]
    computes, enters = _state.computes(stage), _state.blends(stage)
    variables = bank.seeds[plant.key]
    if plant.resident:
        return _resident((plant, place), variables, source, h, alpha, enters, computes, pulse)
    is_open = enters & (alpha > 0)
    seed_input = jax.tree.map(lambda x: open_input(x, is_open) if _moves(x) else x, h if source is None else source)
    f, gate = _seed(plant, place, variables, seed_input, h)
    return join(plant.blend, h, f, gate, alpha, enters, computes, pulse)


def _moves(leaf: Array) -> bool:
    """Whether an array has a gradient: ids and masks have none."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def _seed(plant: Plant, site: Site, variables: Any, source: Any, h: Array) -> tuple[Array, Array]:
    """The seed's output and gate in the dtype of the layer's output `h`."""
    f, gate = seed_apply(plant, site, variables, source)
    if f.shape != h.shape:
        raise ValueError(
            f"site {plant.site!r}: blueprint {plant.blueprint!r} gives shape {f.shape}, the layer's output is "
            f"{h.shape}. Give morph() model= and example= so that the layer is traced, or choose another blueprint"
        )
    return f.astype(h.dtype), gate.astype(h.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _resident(
    where: tuple[Plant, Site],
    variables: Any,
    source: Any,
    h: Float[Array, "... O"],
    alpha: Float[Array, ""],
    enters: Bool[Array, ""],
    computes: Bool[Array, ""],
    pulse: Float[Array, ""],
) -> Float[Array, "... O"]:
    """What `open_input`, the seed and `join` are together, behind one branch in each direction.

    `source` is what the seed reads, None where that is `h`. The backward branch runs the seed once more instead of
    keeping its activations: a branch that is not taken fills what it keeps with zeros, and those cost a dormant seed
    more than all else. What needs no branch (the cotangent of `h`, as a rule) goes past it, for a branch copies.
    """
    return _resident_fwd(where, variables, source, h, alpha, enters, computes, pulse)[0]


def _resident_fwd(
    where: tuple[Plant, Site],
    variables: Any,
    source: Any,
    h: Array,
    alpha: Array,
    enters: Array,
    computes: Array,
    pulse: Array,
) -> tuple[Array, tuple[Any, ...]]:
    plant, site = where

    def run(variables: Any, source: Any, h: Array) -> tuple[Array, ...]:
        f, gate = _seed(plant, site, variables, h if source is None else source, h)
        return *blended(plant.blend, h, f, gate, alpha, enters), sum_of_squares(h)

    def rest(variables: Any, source: Any, h: Array) -> tuple[Array, ...]:
        return h, jnp.zeros((), bool), jnp.ones((), bool), jnp.zeros((), jnp.float32)

    y, entered, sound, weight = jax.lax.cond(computes, run, rest, variables, source, h)
    kept = h if source is None or plant.blend == "multiply" else None
    return y, (variables, source, kept, weight, alpha, enters, computes, entered, sound)


def _resident_bwd(where: tuple[Plant, Site], residuals: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    plant, site = where
    variables, source, kept, weight, alpha, enters, computes, entered, sound = residuals
    past = source is not None and plant.blend in LEASHED  # these blends add to h: its cotangent is the output's
    leaves, structure = jax.tree.flatten(source)

    def run(variables: Any, source: Any, kept: Array | None, cotangent: Array) -> tuple[Any, ...]:
        h = cotangent if kept is None else kept  # of its shape; the value is needed only where it was kept
        given = jax.tree.leaves(h if source is None else source)

        def seed(variables: Any, moving: list[Array]) -> tuple[Array, Array]:
            parts = iter(moving)
            read = [next(parts) if _moves(leaf) else leaf for leaf in given]
            return _seed(plant, site, variables, read[0] if source is None else jax.tree.unflatten(structure, read), h)

        (f, gate), back = jax.vjp(seed, variables, [leaf for leaf in given if _moves(leaf)])
        to_host, *to_seed = parted(plant.blend, h, weight, f, gate, alpha, entered, computes & sound, cotangent)
        to_variables, to_read = back(tuple(to_seed))
        opens = enters & (alpha > 0)
        for leaf in to_read:
            opens &= jnp.all(jnp.isfinite(leaf))
        to_read = [jnp.where(opens, leaf, 0) for leaf in to_read]
        if source is None:
            return to_variables, None, jnp.where(opens, to_host + to_read[0], to_host)
        return to_variables, to_read, None if past else to_host

    def rest(variables: Any, source: Any, kept: Array | None, cotangent: Array) -> tuple[Any, ...]:
        moving = None if source is None else [leaf for leaf in jax.tree.leaves(source) if _moves(leaf)]
        return *jax.tree.map(jnp.zeros_like, (variables, moving)), None if past else cotangent

    to_variables, to_source, to_host = jax.lax.cond(computes, run, rest, variables, source, kept, cotangent)
    if to_source is not None:
        to_source = [apart(computes, leaf, jnp.zeros_like(leaf)) for leaf in to_source]
    if to_host is not None:
        to_host = apart(computes, to_host, cotangent)
    fault = (computes & ~sound).astype(jnp.float32)
    parts = iter(to_source or [])
    to_all = jax.tree.unflatten(structure, [next(parts) if _moves(leaf) else no_gradient(leaf) for leaf in leaves])
    return (
        to_variables,
        to_all,
        cotangent if past else to_host,
        jnp.zeros_like(alpha),
        no_gradient(enters),
        no_gradient(computes),
        fault,
    )


_resident.defvjp(_resident_fwd, _resident_bwd)
