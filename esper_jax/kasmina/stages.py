"""The stages of a seed and the legal edges between them (contract 1)."""

from __future__ import annotations

import enum

import numpy as np


class Stage(enum.IntEnum):
    """Where a seed stands in its life; the integer is what `SeedState.stage` holds."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    BLENDING = 3
    HOLDING = 4
    FOSSILIZED = 5
    PRUNED = 6
    EMBARGOED = 7
    RESETTING = 8


EDGES: dict[Stage, tuple[Stage, ...]] = {
    Stage.DORMANT: (Stage.GERMINATED,),
    Stage.GERMINATED: (Stage.TRAINING, Stage.PRUNED),
    Stage.TRAINING: (Stage.BLENDING, Stage.PRUNED),
    Stage.BLENDING: (Stage.HOLDING, Stage.PRUNED),
    Stage.HOLDING: (Stage.FOSSILIZED, Stage.BLENDING, Stage.PRUNED),
    Stage.FOSSILIZED: (),
    Stage.PRUNED: (Stage.EMBARGOED,),
    Stage.EMBARGOED: (Stage.RESETTING,),
    Stage.RESETTING: (Stage.DORMANT,),
}

# The one forward edge `advance` takes; FOSSILIZED has none.
NEXT: dict[Stage, Stage] = {stage: edges[0] for stage, edges in EDGES.items() if edges}

LIVE = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)


def _table() -> np.ndarray:
    table = np.zeros((len(Stage), len(Stage)), bool)
    for stage, edges in EDGES.items():
        for target in edges:
            table[stage, target] = True
    return table


LEGAL: np.ndarray = _table()
