"""Grafting: the host's own `apply`, taking a Morph where it took variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from . import linen
from .bank import Bank, Tap
from .morph import Morph, is_variables
from .probe import SIZE


class Graft:
    """A host's forward function that takes a `Morph` first and passes everything else through; see `graft`."""

    def __init__(self, apply: Callable[..., Any], model: Any) -> None:
        self.apply = apply
        self.model = model

    def __call__(self, morph: Morph, *args: Any, **kwargs: Any) -> Any:
        """The grown model's output: what the host's `apply` returns for the same arguments."""
        _check_morph(morph)
        return self._run(morph, {path: _bank(morph, path) for path in morph.spec.planted_at}, args, kwargs)

    def tapped(self, morph: Morph, taps: Mapping[str, Tap], sample: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """The same output, with `taps` (see `zero_taps`) whose gradients are the step's faults and measurements."""
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


def graft(apply: Any) -> Graft:
    """Let seeds into a model's forward pass without touching the model.

    Args:
      apply: a Linen module, its `apply` method (also jitted or partial), or any function of the host's variables
        that calls it. A plain function gets the host in the form `morph()` was given; the module's own `apply` always
        gets a variables dict.

    Returns:
      A callable `forward(morph, *args, **kwargs)` with `apply`'s signature; `mutable`, `rngs`, `method` and all
      others pass through. With empty slots it traces to the host's own jaxpr.

    Raises:
      TypeError: `apply` cannot be called.
    """
    if isinstance(apply, Graft):
        return apply
    model = linen.model_of(apply)
    if model is apply:
        apply = model.apply
    if not callable(apply):
        raise TypeError(f"graft() needs a Flax module or its apply function, got {type(apply).__name__}")
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


def _bank(morph: Morph, path: str, tap: Tap | None = None, sample: jax.Array | None = None) -> Bank:
    plants = morph.spec.planted_at.get(path, ())
    state = morph.state[path] if plants else None
    return Bank(dict(morph.seeds.get(path, {})), state, tap, sample, morph.spec.by_path[path], plants)
