"""What a scenario saw, and what scenarios share."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax import Gates
from tests.tolaria import growing

ROOT = pathlib.Path(__file__).parents[2]
GATES = Gates(min_training_ticks=1, min_health=0.0)


def examples(number: int) -> int:
    """How many examples hypothesis draws: the full form says by `FAULTS_EXAMPLES` how many times as many."""
    return number * int(os.environ.get("FAULTS_EXAMPLES", "1"))


@dataclasses.dataclass
class Found:
    """What a scenario saw: how many trials it made, what happened how often, and what should not have."""

    trials: int = 0
    seen: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failures: list[str] = dataclasses.field(default_factory=list)

    def note(self, what: str) -> None:
        """One more trial, which ended so."""
        self.trials += 1
        self.seen[what] += 1

    @staticmethod
    def from_json(text: str) -> Found:
        """What another process found, whose `vars` were written."""
        data = json.loads(text)
        return Found(data["trials"], collections.Counter(data["seen"]), data["failures"])

    def expect(self, holds: bool, what: str) -> None:
        """`what` is a failure unless it holds."""
        if not holds:
            self.failures.append(what)


def bits(tree: Any) -> list[bytes]:
    """Every leaf to the bit, keys by their data."""
    typed = lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(jax.random.key_data(x) if typed(x) else x).tobytes() for x in jax.tree.leaves(tree)]


def fit(made: Any, epochs: int, state: Any = None) -> Any:
    """Train the small run."""
    state = growing.start(made) if state is None else state
    return made.fit(state, growing.TRAIN, growing.VALIDATION, epochs=epochs)
