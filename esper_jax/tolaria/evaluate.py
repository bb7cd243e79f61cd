"""Validation, and what each seed contributes to it, in compiled programs whose alphas are inputs (contract 24)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..kasmina.morph import Morph
from ..kasmina.spec import Plant
from ..kasmina.stages import Stage
from .data import Check, Data, validation_batches
from .peers import soon
from .programs import Program
from .sharding import Layout
from .step import Calls

Score = Callable[[Any, Any], Array]
Pause = Callable[[], None]
ROWS = 4
MAX_PAIRED = 4
IN_FLIGHT = 2
"""Batches that may wait on the device behind the one that computes."""


def nothing() -> None:
    """A pause in which nothing is to be done."""


def default_score(outputs: Any, targets: Any) -> Float[Array, "..."]:
    """Correct predictions where the targets are class indices of the outputs' last axis."""
    if jnp.issubdtype(targets.dtype, jnp.integer) and outputs.ndim == targets.ndim + 1:
        return jnp.argmax(outputs, -1) == targets
    raise ValueError(
        f"no default score for outputs {outputs.shape} and targets {targets.dtype}{targets.shape}; give score=, a "
        "function (outputs, targets) -> higher is better"
    )


@dataclasses.dataclass(frozen=True)
class Contributions:
    """`single[plant]` and `pairs[plant, plant]` in points, measured in one program on the same batches."""

    single: dict[tuple[str, int], float]
    pairs: dict[tuple[tuple[str, int], tuple[str, int]], float]


class Evaluator:
    """Loss and score of a morph on validation data; one compiled program for each, for each spec."""

    def __init__(
        self,
        calls: Calls,
        score: Score | None,
        batch_size: int,
        layout: Layout | None = None,
        check: Check | None = None,
    ) -> None:
        self.batch_size, self.layout, self.check, self.checked = batch_size, layout, check, False
        score = score or default_score
        self.plain = Program("evaluate", functools.partial(_measure, calls, score))
        self.rows = Program(
            "contributions", functools.partial(_measure_rows, calls, score), extra=_all_on, extras=1, late=True
        )

    def __call__(self, morph: Morph, data: Data, pause: Pause = nothing) -> tuple[float, float]:
        """Mean loss, and mean score in points (x 100), over the validation data; `pause()` after every batch."""

        def measure(batch: Any) -> Any:
            self.rows.expect(batch)
            return self.plain(morph, batch)

        found = self._over(data, measure, pause)
        if not found:
            raise ValueError("the validation data gave no batch")
        loss, score = _weighted(found)
        return float(loss), 100 * float(score)

    def contributions(self, morph: Morph, data: Data, plants: Sequence[Plant], pause: Pause = nothing) -> Contributions:
        """What each of `plants` adds to the score: all seeds as they are, minus that seed's alpha at 0.

        For 2 to 4 plants also the interaction of each pair, f(ij) - f(i) - f(j) + f(0), where f(s) is the score with
        only the plants in s switched on. The state is not touched: alphas are an input of the program.
        """
        if not plants:
            return Contributions({}, {})
        everyone = frozenset(range(len(plants)))
        subsets = {everyone} | {everyone - {i} for i in everyone}
        paired = 2 <= len(plants) <= MAX_PAIRED
        if paired:
            subsets |= {frozenset(s) for size in range(3) for s in itertools.combinations(everyone, size)}
        rows = sorted(subsets, key=lambda s: (-len(s), sorted(s)))
        score = dict(zip(rows, self._scores(morph, data, plants, rows, pause), strict=True))
        name = [(plant.site, plant.slot) for plant in plants]
        single = {name[i]: score[everyone] - score[everyone - {i}] for i in everyone}
        pairs = {}
        for i, j in itertools.combinations(sorted(everyone), 2) if paired else ():
            f = [score[frozenset(s)] for s in ((i, j), (i,), (j,), ())]
            pairs[name[i], name[j]] = f[0] - f[1] - f[2] + f[3]
        return Contributions(single, pairs)

    def _scores(
        self, morph: Morph, data: Data, plants: Sequence[Plant], rows: list[frozenset[int]], pause: Pause
    ) -> list[float]:
        """The score in points of each row, a set of the plants left on; `ROWS` of them a call, the last one padded."""
        masks = [self._mask(morph, plants, row) for row in rows]
        masks += masks[-1:] * (-len(masks) % ROWS)
        groups = [
            jax.tree.map(lambda *rows: np.stack(rows), *masks[begin : begin + ROWS])
            for begin in range(0, len(masks), ROWS)
        ]
        found = self._over(data, lambda batch: [self.rows(morph, group, batch) for group in groups], pause)
        means = _weighted([(values.ravel(), n) for values, n in found])
        return list(100 * means[: len(rows)])

    def _over(self, data: Data, measure: Callable[[Any], Any], pause: Pause) -> list[tuple[np.ndarray, int]]:
        """What was measured on each batch, float64, and its size; copied to the host while later batches compute."""
        found = []
        check = None if self.check is None else functools.partial(self.check, epoch=0, values=not self.checked)
        for batch, n in validation_batches(data, self.batch_size, self.layout, check):
            found.append((soon(measure(batch)), n))
            if len(found) > IN_FLIGHT:
                jax.block_until_ready(found[-1 - IN_FLIGHT][0])
            pause()
        self.checked = True
        return [(np.asarray(jax.device_get(values), np.float64), n) for values, n in found]

    @staticmethod
    def _mask(morph: Morph, plants: Sequence[Plant], on: frozenset[int]) -> dict[str, np.ndarray]:
        masks = {path: np.ones(state.stage.shape, bool) for path, state in morph.state.items()}
        for index, plant in enumerate(plants):
            site, layer = morph.spec.locate(plant.site)
            masks[site][slice(None) if layer is None else layer, ...][..., plant.slot] = index in on
        return masks


def _measure(calls: Calls, score: Score, morph: Morph, batch: Any) -> tuple[Array, Array]:
    outputs, targets = calls.evaluate(morph, batch)
    points = jnp.mean(jnp.asarray(score(outputs, targets)).astype(jnp.float32))
    return calls.mean_loss(outputs, targets), points


def _measure_rows(
    calls: Calls, score: Score, morph: Morph, masks: dict[str, Bool[Array, "R S"]], batch: Any
) -> Float[Array, " R"]:
    def one(mask: dict[str, Bool[Array, " S"]]) -> Array:
        state = {p: s.replace(alpha=jnp.where(mask[p], s.alpha, 0.0)) for p, s in morph.state.items()}
        return _measure(calls, score, morph.replace(state=state), batch)[1]

    return jax.vmap(one)(masks)


def _all_on(morph: Morph) -> tuple[dict[str, np.ndarray]]:
    return ({path: np.ones((ROWS, *state.stage.shape), bool) for path, state in morph.state.items()},)


def _weighted(found: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """The mean of the values, each batch's counting by its size."""
    sums = np.zeros_like(found[0][0])
    for values, n in found:
        sums += n * values
    return sums / sum(n for _, n in found)


def measured_plants(morph: Morph) -> tuple[Plant, ...]:
    """The plants whose contribution is measured at a validation: those in BLENDING and HOLDING.

    In a stack each layer's is one, as in `Spec.unrolled`.
    """
    spec = morph.spec
    stages = spec.by_layer(jax.device_get({path: state.stage for path, state in morph.state.items()}))
    return tuple(p for p in spec.unrolled.plants if stages[p.site][p.slot] in (Stage.BLENDING, Stage.HOLDING))
