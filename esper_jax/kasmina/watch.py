"""What the sites of a host are given and give in one call, by banks that look on: for finding spans and for scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from .bank import Bank
from .graft import Graft
from .morph import Morph
from .spec import Spec


def watched(
    forward: Graft,
    morph: Morph,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    outputs: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, tuple[Any, Any]]]:
    """The host's output, and `{site: (input, output)}` of the first call of every layer outside stacks.

    `outputs` are put in the place of some sites' own.
    """
    seen: dict[str, tuple[Any, Any]] = {}
    spec = Spec(morph.spec.sites, 1)
    banks = {
        site.path: Bank({}, None, None, None, site, (), notes=Notes(seen, outputs or {}))
        for site in spec.sites
        if not site.layers
    }
    output = forward.baked(morph.variables, banks, *inputs, **kwargs)
    jax.effects_barrier()
    return output, seen


class Notes:
    """Where a bank notes what it sees; static, told apart by what it is."""

    def __init__(self, seen: dict[str, tuple[Any, Any]], outputs: Mapping[str, Any]) -> None:
        self.seen, self.outputs = seen, outputs

    def __call__(self, path: str, u: Any, h: Any) -> Any:
        """Note a layer's input and output; what to give in its place. Under a transform they are told when it runs."""
        if isinstance(h, jax.core.Tracer):
            jax.debug.callback(lambda u, h: self.seen.setdefault(path, (u, h)) and None, u, h)
        else:
            self.seen.setdefault(path, (u, h))
        return self.outputs.get(path, h)
