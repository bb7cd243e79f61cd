"""Spans: pairs of layers with an elementwise function between, where new hidden units can grow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from .._checks import inputs
from .blueprints import DENSE
from .graft import Graft, graft
from .morph import Morph, check_morph
from .seeds.units import UNIT_ACTIVATIONS
from .spec import Site
from .watch import watched


@dataclasses.dataclass(frozen=True)
class Span:
    """Two layers between which units can grow: `second` reads `activation` of `first`'s output and nothing else.

    `norm` is the path of a BatchNorm between them, or empty. `alone` says that nothing but `second` reads the units, so
    that they can be folded into a wider model. `units` is how many there are.
    """

    first: str
    second: str
    activation: str
    norm: str
    alone: bool
    units: int

    @property
    def ends(self) -> tuple[str, str]:
        """What `germinate(span=)` takes."""
        return self.first, self.second

    @property
    def config(self) -> dict[str, Any]:
        """The config of `units` that fits between: its activation, and the norm that folding widens too."""
        return {"activation": self.activation, "norm": self.norm}


def spans(model: Any, morph: Morph, example: Any, **kwargs: Any) -> tuple[Span, ...]:
    """Find the pairs of layers between which hidden units can grow: Dense-act-Dense and Conv-[BatchNorm]-act-Conv.

    The model is run on the example in evaluation mode, and what each layer was given is compared with what the layers
    before it gave, through each activation of `units` (`relu`, `gelu`, `tanh`, `silu`, ...; "identity" where there is
    none). Whether something else reads the units is tried too: they are changed for all but the second layer.

    Args:
      model: the Linen or nnx module, as for `graft`.
      morph: its morph; layers that are no sites of it are not looked at.
      example: one input, an array or a tuple of arguments, of real numbers (not zeros: they tell nothing).
      **kwargs: keyword arguments of the call.

    Returns:
      The spans, in order of the second layer's path. Layers in stacks (`nn.scan`) are not looked into.

    Raises:
      TypeError: `morph` is no `Morph`, `model` cannot be called, or `example` has no array.
    """
    check_morph(morph, "spans", "second")
    forward = graft(model)
    args, options = inputs("example", example), {**forward.mode(False), **kwargs}
    output, seen = watched(forward, morph, args, options)
    sites = [s for s in morph.spec.sites if s.path in seen and not s.layers]
    linear = [site for site in sites if site.kind in (*DENSE, "conv")]
    norms = [site for site in sites if site.kind == "batch_norm"]
    found = []
    for second in linear:
        for first in linear:
            match = _between(first, second, norms, seen)
            if match is not None and first.path != second.path:
                alone = _alone(forward, morph, args, options, first.path, second.path, seen, output)
                found.append(Span(first.path, second.path, *match, alone, first.out_features))
    return tuple(found)


def _between(first: Site, second: Site, norms: list[Site], seen: Mapping[str, Any]) -> tuple[str, str] | None:
    """The activation's name and the norm's path between two layers; None where it is something else."""
    given, made = seen[second.path][0], seen[first.path][1]
    if given.shape != made.shape or first.spatial != second.spatial:
        return None
    middle = [(made, "")] + [(seen[n.path][1], n.path) for n in norms if _same(seen[n.path][0], made)]
    for value, norm in middle:
        for name, function in UNIT_ACTIVATIONS.items():
            if _same(function(value), given):
                return name, norm
    return None


def _same(a: Any, b: Any) -> bool:
    return bool(a.shape == b.shape and np.allclose(np.float32(a), np.float32(b), rtol=1e-5, atol=1e-6))


def _alone(
    forward: Graft,
    morph: Morph,
    inputs: Any,
    options: Mapping[str, Any],
    first: str,
    second: str,
    seen: Mapping[str, Any],
    output: Any,
) -> bool:
    """Whether the output stays when the first layer's output is changed for all but the second layer."""
    shift = jax.random.normal(jax.random.key(0), seen[first][1].shape, seen[first][1].dtype)
    changed = {first: seen[first][1] + shift, second: seen[second][1]}
    again, _ = watched(forward, morph, inputs, options, changed)
    close = lambda a, b: np.allclose(np.float32(a), np.float32(b), rtol=1e-4, atol=1e-5)  # noqa: E731
    return all(close(a, b) for a, b in zip(jax.tree.leaves(output), jax.tree.leaves(again), strict=True))
