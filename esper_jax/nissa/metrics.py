"""The numbers in an event, each with a name, a unit and labels: what TensorBoard, Prometheus and W&B are given.

Which fields are metrics follows from the types in `kinds`: those that say `Measure` in an epoch's data, in its seeds
(`seed_...`, labelled by site, slot and blueprint) and in its sites (`site_...`, labelled by site).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, NamedTuple, NotRequired, get_args, get_origin, get_type_hints

from . import kinds
from .event import Event, Kind
from .kinds import Measure


@dataclasses.dataclass(frozen=True)
class Metric:
    """One kind of number: `name` in snake case, and the names of its labels."""

    name: str
    field: str
    about: str
    unit: str
    labels: tuple[str, ...]


class Sample(NamedTuple):
    """One number of an event."""

    metric: Metric
    labels: tuple[str, ...]
    value: float

    @property
    def path(self) -> str:
        """A name with its labels, as TensorBoard and W&B group them: `seed_alpha/block_0/Dense_1/0/lora`."""
        return "/".join((self.metric.name, *self.labels))


def _measured(kind: type, prefix: str, labels: tuple[str, ...]) -> tuple[Metric, ...]:
    found = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner = get_args(hint)[0] if get_origin(hint) is NotRequired else hint
        for note in get_args(inner)[1:] if get_origin(inner) is Annotated else ():
            if isinstance(note, Measure):
                found.append(Metric(prefix + name, name, note.about, note.unit, labels))
    return tuple(found)


_EPOCH = _measured(kinds.Epoch, "", ())
_SEED = _measured(kinds.SeedRow, "seed_", ("site", "slot", "blueprint"))
_SITE = _measured(kinds.SiteRow, "site_", ("site",))
METRICS = (*_EPOCH, *_SEED, *_SITE)
"""Every metric there is."""


def samples(event: Event) -> list[Sample]:
    """The finite numbers of an epoch event; none for other kinds."""
    if event.kind != Kind.EPOCH:
        return []
    data = event.data
    found = [*_take(_EPOCH, data, ())]
    for seed in data.get("seeds", []):
        found += _take(_SEED, seed, (str(seed["site"]), str(seed["slot"]), str(seed["blueprint"])))
    for path, site in data.get("sites", {}).items():
        found += _take(_SITE, site, (path,))
    return found


def _take(metrics: tuple[Metric, ...], data: dict[str, Any], labels: tuple[str, ...]) -> list[Sample]:
    values = ((metric, data.get(metric.field)) for metric in metrics)
    return [
        Sample(metric, labels, float(value))
        for metric, value in values
        if isinstance(value, int | float) and math.isfinite(value)
    ]
