"""The lives of a run's seeds, read back from its events: what the figure draws and reports count."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from .event import Event, Kind
from .events import stage_name

ON_TRIAL = ("GERMINATED", "TRAINING", "BLENDING", "HOLDING")
GONE = ("PRUNED", "EMBARGOED", "RESETTING")


@dataclasses.dataclass
class Life:
    """One seed from germination on. `stages` and `alphas` map an epoch to what held at its end.

    `kept` and `pruned` are the epochs of those milestones, `end` the first epoch without the seed; None where not yet.
    """

    site: str
    slot: int
    blueprint: str
    born: float
    stages: dict[float, str] = dataclasses.field(default_factory=dict)
    alphas: dict[float, float] = dataclasses.field(default_factory=dict)
    contribution: float = math.nan
    kept: float | None = None
    pruned: float | None = None
    end: float | None = None

    def record(self, epoch: float, stage: str, alpha: float) -> None:
        """Note where the seed stands at the end of `epoch`; of two records the later one counts."""
        self.stages[epoch] = stage
        if math.isfinite(alpha):
            self.alphas[epoch] = min(max(alpha, 0.0), 1.0)
        if stage == "FOSSILIZED" and self.kept is None:
            self.kept = epoch
        if stage in GONE and self.pruned is None:
            self.pruned = epoch

    @property
    def last(self) -> str:
        """The stage recorded last."""
        return next(reversed(self.stages.values()), "GERMINATED")

    def spans(self, until: float) -> list[tuple[float, float, str, float]]:
        """`(start, end, stage, alpha)` pieces that cover the life up to `until`; epochs are centred."""
        epochs = sorted(self.stages)
        pieces: list[tuple[float, float, str, float]] = []
        alpha = 0.0
        for index, epoch in enumerate(epochs):
            alpha = self.alphas.get(epoch, alpha)
            stop = epochs[index + 1] if index + 1 < len(epochs) else self.end if self.end is not None else until + 1
            pieces.append((epoch - 0.5, max(epoch + 0.5, stop - 0.5), self.stages[epoch], alpha))
        return pieces


def lives(events: Iterable[Event]) -> list[Life]:
    """Every seed that ever lived, by birth, from `germinated`, `stage` and `contribution` events and epochs' seeds.

    A slot that is planted again starts a new life. A fossilised seed that is no longer listed (it was folded) lives on.
    """
    found: list[Life] = []
    current: dict[tuple[str, int], Life] = {}

    def note(epoch: int, data: dict[str, Any], stage: str) -> None:
        key = str(data["site"]), int(data["slot"])
        life = current.get(key)
        if stage == "DORMANT":
            if life is not None:
                life.end = epoch
                del current[key]
            return
        reborn = life is not None and life.last in GONE and stage in ON_TRIAL
        if life is None or reborn or life.blueprint != str(data["blueprint"]):
            if life is not None and life.end is None:
                life.end = epoch
            life = Life(*key, str(data["blueprint"]), epoch)
            current[key] = life
            found.append(life)
        life.record(epoch, stage, _real(data.get("alpha")))
        if stage not in GONE and not data.get("pruning"):  # what it gives while it is being removed says nothing
            life.contribution = _real(data.get("contribution"), life.contribution)

    for event in events:
        data = event.data
        if event.kind == Kind.GERMINATED:
            note(event.epoch, data, "GERMINATED")
        elif event.kind == Kind.STAGE:
            note(event.epoch, data, stage_name(data["after"]))
        elif event.kind == Kind.CONTRIBUTION:
            life = current.get((str(data["site"]), int(data["slot"])))
            if life is not None:
                life.contribution = _real(data.get("value"), life.contribution)
        elif event.kind == Kind.EPOCH:
            listed = set()
            for seed in data.get("seeds", []):
                listed.add((str(seed["site"]), int(seed["slot"])))
                note(event.epoch, seed, stage_name(seed["stage"]))
            for key in [key for key in current if key not in listed]:
                life = current[key]
                if life.last != "FOSSILIZED" and event.epoch > max(life.stages):
                    life.end = event.epoch
                    del current[key]
    return sorted(found, key=lambda life: life.born)


def _real(value: Any, otherwise: float = math.nan) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else otherwise
