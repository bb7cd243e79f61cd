"""How train steps are handed to the device: one at a time, several in a loop of the program, or several unrolled."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._checks import whole
from ..kasmina.morph import Morph
from .data import nbytes
from .optim import Growable
from .programs import Program
from .sharding import Layout
from .state import TrainState
from .step import METRICS, Calls, convolves, one_step

MODES = ("auto", "scan", "loop", "unroll")
SCANNED, UNROLLED = 32, 4
CHUNK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """What a run does in one call of its train program.

    Args:
      mode: "scan" puts the steps of a call in a loop inside the program; "loop" makes one call a step; "unroll" writes
        several steps out one after the other. "auto" scans, but not convolutional hosts on the CPU, where XLA computes
        the weight gradient of a convolution inside control flow 10 to 30 times slower than outside: they "loop".
      steps: steps a call. None: 32 scanned (fewer where their batches would exceed 64 MiB) and 4 unrolled, for data
        given as arrays; 1 for other data. "auto" with a number above 1 unrolls where it would have looped.

    Raises:
      ValueError: an unknown mode, steps below 1, or several steps a call with "loop".
    """

    mode: str = "auto"
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"dispatch must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.steps is not None:
            whole("steps_per_dispatch", self.steps, 1)
        if self.mode == "loop" and self.steps not in (None, 1):
            raise ValueError(f"dispatch='loop' makes one step a call; got steps_per_dispatch={self.steps}")

    def chosen(self, calls: Calls, morph: Morph, batch: Any) -> str:
        """The mode for this host on this platform, told from the shapes of a morph and of one batch."""
        if self.mode != "auto":
            return self.mode
        if jax.default_backend() != "cpu" or not convolves(calls, morph, batch):
            return "scan"
        return "loop" if self.steps in (None, 1) else "unroll"

    def size(self, mode: str, batch: Any, *, arrays: bool) -> int:
        """Steps a call in that mode, for batches of the shape of `batch`; `arrays` says that the data is arrays."""
        if mode == "loop":
            return 1
        if self.steps is not None:
            return self.steps
        if not arrays:
            return 1
        fit = CHUNK_BYTES // max(1, nbytes(batch))
        return max(1, min(SCANNED if mode == "scan" else UNROLLED, fit))


def make_steps(
    calls: Calls, tx: Growable, probe_every: int, dispatch: Dispatch, layout: Layout | None = None
) -> Program:
    """The train program of a run, `steps(state, batches, count) -> (state, metrics of the last step)`.

    `batches` has a leading axis of places for batches, of which the first `count` are trained on, in turn. Scanned,
    any count up to the places is the same program, so the bits of a run do not depend on how its steps are grouped.
    Otherwise the places are all trained on, and another number of places is another program. `state` is donated, and
    stays where `layout` has it.
    """

    def train_steps(state: TrainState, batches: Any, count: Int[Array, ""]) -> tuple[TrainState, dict[str, Array]]:
        state, metrics = steps(state, batches, count)
        return (state if layout is None else layout.pinned(state)), metrics

    def steps(state: TrainState, batches: Any, count: Int[Array, ""]) -> tuple[TrainState, dict[str, Array]]:
        def step(i: Any, carry: tuple[TrainState, Any]) -> tuple[TrainState, dict[str, Array]]:
            return one_step(calls, tx, probe_every, carry[0], jax.tree.map(lambda leaf: leaf[i], batches))

        first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batches)
        carry = state, {name: jnp.zeros((), jnp.float32) for name in METRICS}
        if dispatch.chosen(calls, state.morph, first) == "scan":
            state = state.replace(opt_state=tx.grow(state.opt_state, state.morph))
            return jax.lax.fori_loop(0, count, step, (state, carry[1]))
        for i in range(jax.tree.leaves(batches)[0].shape[0]):
            carry = step(i, carry)
        return carry

    return Program("train", train_steps, donate=(0,))
