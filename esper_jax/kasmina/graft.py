"""Grafting: the host's own `apply`, taking a Morph where it took variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._checks import flag
from . import linen
from .bank import Bank, Tap
from .morph import Morph, is_variables, nnx_adapter
from .probe import SIZE


class Graft:
    """A host's forward function that takes a `Morph` first and passes everything else through; see `graft`."""

    def __init__(self, apply: Callable[..., Any], model: Any) -> None:
        self.apply = apply
        self.model = model

    def __call__(self, morph: Morph, *args: Any, **kwargs: Any) -> Any:
        """The grown model's output: what the host's `apply` returns for the same arguments."""
        _check_morph(morph)
        return self._run(morph, {path: _bank(morph, path) for path in morph.spec.read_at}, args, kwargs)

    def tapped(
        self, morph: Morph, taps: Mapping[str, Tap], sample: jax.Array | bool | None, *args: Any, **kwargs: Any
    ) -> Any:
        """The same output, with `taps` (see `zero_taps`) whose gradients are the step's faults and measurements.

        `sample` says whether the probes measure: a boolean array, behind a branch; True; or False and None for never.
        """
        _check_morph(morph)
        banks = {path: _bank(morph, path, tap, sample) for path, tap in taps.items()}
        return self._run(morph, banks, args, kwargs)

    def baked(self, host: Any, banks: Mapping[str, Bank], *args: Any, **kwargs: Any) -> Any:
        """The output for a variables dict, with these banks at its layers."""
        return linen.call(self.apply, host, banks, *args, **kwargs) if banks else self.apply(host, *args, **kwargs)

    def mode(self, train: bool) -> dict[str, bool]:
        """The keyword that tells this host whether it trains (`train`, `deterministic`, ...), or {}."""
        return linen.mode(self.model, train)

    def __repr__(self) -> str:
        inner = type(self.model).__name__ if self.model is not None else getattr(self.apply, "__name__", "function")
        return f"graft({inner})"

    def _run(self, morph: Morph, banks: Mapping[str, Bank], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(morph, Morph):
            raise TypeError(
                f"a grafted forward takes a Morph first, got {type(morph).__name__}; make one with morph(params)"
            )
        bare = not is_variables(morph.host)
        wraps = bare and self.model is None
        apply = (lambda variables, *a, **k: self.apply(variables["params"], *a, **k)) if wraps else self.apply
        if not banks:
            return apply(morph.variables if bare else morph.host, *args, **kwargs)
        return linen.call(apply, morph.variables, banks, *args, **kwargs)


class NnxGraft(Graft):
    """The graft of an nnx module: its own call, on a copy of it that holds the morph's variables."""

    def __init__(self, model: Any, adapter: Any, updates: bool = False) -> None:
        super().__init__(model, None)
        self.module, self.adapter, self.updates = model, adapter, updates

    @property
    def form(self) -> Any:
        """What the module's variables are beside their arrays."""
        return self.adapter.take(self.module)[1]

    def mode(self, train: bool) -> dict[str, bool]:
        """What sets the module's copy to training or evaluation mode, as its `train()` and `eval()` do."""
        return {"nnx_train": train}

    def __repr__(self) -> str:
        return f"graft({type(self.module).__name__})"

    def baked(self, host: Any, banks: Mapping[str, Bank], *args: Any, **kwargs: Any) -> Any:
        """The output for a host's collections, with these banks at its layers."""
        return self._call(host, banks, args, kwargs)

    def _run(self, morph: Morph, banks: Mapping[str, Bank], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._call(morph.host, banks, args, kwargs)

    def _call(self, host: Any, banks: Mapping[str, Bank], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        train, wanted = kwargs.pop("nnx_train", None), kwargs.pop("mutable", False)
        output, state = self.adapter.call(self.module, self.form, host, banks, train, args, kwargs)
        if wanted is not False:
            found = self.adapter.collections(state)
            return output, {
                name: found[name] for name in ([wanted] if isinstance(wanted, str) else wanted) if name in found
            }
        return (output, state) if self.updates else output


def graft(apply: Any, *, updates: bool = False) -> Graft:
    """Let seeds into a model's forward pass without touching the model.

    Args:
      apply: an nnx module; or a Linen module, its `apply` method (also jitted or partial), or any function of the
        host's variables that calls it. A plain function gets the host in the form `morph()` was given; the module's
        own `apply` always gets a variables dict.
      updates: for an nnx module: the forward returns `(outputs, nnx.State of the host after the call)`, with updated
        statistics, caches and counts of random numbers.

    Returns:
      A callable `forward(morph, *args, **kwargs)` with `apply`'s signature; `mutable`, `rngs`, `method` and all
      others pass through. With empty slots it traces to the host's own jaxpr.

    Raises:
      TypeError: `apply` cannot be called, or is a class; `updates` is no bool, or is True without an nnx module.
    """
    flag("updates", updates)
    if isinstance(apply, Graft):
        return apply
    if (adapter := nnx_adapter(apply)) is not None:
        return NnxGraft(apply, adapter, updates)
    if apply is None:
        raise TypeError("graft() needs a Flax module or its apply function, got None")
    if updates:
        raise TypeError("graft(updates=True) is for nnx modules; a Linen model returns updates for mutable=[...]")
    model = linen.model_of(apply)
    if model is apply:
        apply = model.apply
    if not callable(apply) or isinstance(apply, type):
        got = f"the class {apply.__name__}" if isinstance(apply, type) else type(apply).__name__
        raise TypeError(f"graft() needs a Flax module or its apply function, got {got}")
    return Graft(apply, model)


def zero_taps(morph: Morph) -> dict[str, Tap]:
    """Zeros for `Graft.tapped`, one for every site."""
    slots = morph.spec.slots
    rows = {site.path: (site.layers,) if site.layers else () for site in morph.spec.sites}
    return {path: Tap(jnp.zeros((*row, slots)), jnp.zeros((*row, SIZE))) for path, row in rows.items()}


def _check_morph(morph: Any) -> None:
    if not isinstance(morph, Morph):
        got = type(morph).__name__
        raise TypeError(f"a grafted forward takes a Morph first, got {got}; make one with morph(params)")


def _bank(morph: Morph, path: str, tap: Tap | None = None, sample: jax.Array | bool | None = None) -> Bank:
    plants = morph.spec.planted_at.get(path, ())
    state = morph.state[path] if plants else None
    places = tuple(morph.spec.place(plant) for plant in plants) if any(plant.source for plant in plants) else ()
    read = any(plant.source == path for plant in morph.spec.plants)
    seeds = dict(morph.seeds.get(path, {}))
    always = sample is True
    asked = None if isinstance(sample, bool) else sample
    site = morph.spec.by_path[path]
    return Bank(seeds, state, tap, asked, site, plants, places=places, read=read, always=always)
