"""How train steps are handed to the device: one at a time, several in a loop of the program, or several unrolled."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._checks import flag, whole
from ..kasmina.morph import Morph
from ..kasmina.observe import any_computes
from .data import nbytes
from .optim import Growable
from .peers import alone
from .programs import Program
from .sharding import Layout
from .state import TrainState
from .step import METRICS, Calls, convolves, one_step, sampled

MODES = ("auto", "scan", "loop", "unroll")
SCANNED, TOGETHER, UNROLLED = 128, 32, 4
ROUND = 16
CHUNK_BYTES = 64 << 20
CALL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """What a run does in one call of its train program.

    Args:
      mode: "scan" puts the steps of a call in a loop inside the program; "loop" makes one call a step; "unroll" writes
        several steps out one after the other. "auto" scans, but not convolutional hosts on the CPU, where XLA computes
        the weight gradient of a convolution inside control flow 10 to 30 times slower than outside: they "loop".
      steps: steps a call. None, for data given as arrays: scanned as many as take half a second, up to 128 (fewer where
        their batches would exceed 64 MiB), and 4 unrolled; 1 for other data. "auto" with a number above 1 unrolls where
        it would have looped.
      rest_alone: steps in which every planted seed rests are those of the host with empty slots and cost no more:
        scanned, a loop of their own in the program; otherwise calls of another program, while that with the seeds is
        built in the background. A host's bits are then those of another program as long as no seed computes, and may
        differ by rounding from those that it has beside seeds.

    Raises:
      ValueError: an unknown mode, steps below 1, or several steps a call with "loop". TypeError: `rest_alone` is no
        bool.
    """

    mode: str = "auto"
    steps: int | None = None
    rest_alone: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"dispatch must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.steps is not None:
            whole("steps_per_dispatch", self.steps, 1)
        if self.mode == "loop" and self.steps not in (None, 1):
            raise ValueError(f"dispatch='loop' makes one step a call; got steps_per_dispatch={self.steps}")
        flag("rest_alone", self.rest_alone)

    def chosen(self, calls: Calls, morph: Morph, batch: Any) -> str:
        """The mode for this host on this platform, told from the shapes of a morph and of one batch."""
        if self.mode != "auto":
            return self.mode
        if jax.default_backend() != "cpu" or not convolves(calls, morph, batch):
            return "scan"
        return "loop" if self.steps in (None, 1) else "unroll"

    def parts(self, mode: str) -> bool:
        """Whether steps in that mode in which all planted seeds rest are calls of another program."""
        return self.rest_alone and mode != "scan"

    def size(self, mode: str, batch: Any, length: int | None) -> int:
        """Places for batches in a call in that mode, for batches of the shape of `batch`.

        `length` is that of an epoch, which calls of one size then share out, in places that data of nearly the same
        length has too; None where the data is no arrays.
        """
        if mode == "loop":
            return 1
        if self.steps is not None:
            return self.steps
        if length is None:
            return 1
        fit = max(1, CHUNK_BYTES // max(1, nbytes(batch)))
        if mode != "scan":
            return min(UNROLLED, fit)
        most = min(SCANNED if alone() else TOGETHER, fit)  # several processes keep no pace
        calls = max(1, -(-length // most))
        share = -(-length // calls)
        return min(most, max(1, -(-share // ROUND)) * ROUND)


class Pace:
    """How many steps a call may make for it to last about half a second, and at most `SCANNED`.

    Ctrl-C is answered between calls. Only how scanned steps are grouped follows the clock, which no bit of a run
    depends on. The number doubles while calls are short, and is halved where one takes long.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.steps = 4
        self._clock, self._last = clock, math.nan

    def began(self) -> None:
        """A call begins now, and no other is under way."""
        self._last = self._clock()

    def ended(self, count: int) -> None:
        """A call of `count` steps has ended; the next one, where it was handed over, has begun."""
        now = self._clock()
        took, self._last = now - self._last, now
        if took > CALL_SECONDS:
            self.steps = min(self.steps, max(1, count // 2))
        elif took < CALL_SECONDS / 2 and count == self.steps:
            self.steps = min(2 * count, SCANNED)


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
        def step(sample: Any, i: Any, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
            return one_step(calls, tx, sample, state, jax.tree.map(lambda leaf: leaf[i], batches))

        first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batches)
        if dispatch.chosen(calls, state.morph, first) == "scan":
            state = state.replace(opt_state=tx.grow(state.opt_state, state.morph))
            rest_alone = dispatch.rest_alone and state.morph.spec.has_residents
            return _scanned(step, probe_every, rest_alone, count, state)
        for i in range(jax.tree.leaves(batches)[0].shape[0]):
            state, metrics = step(sampled(state, probe_every), i, state)
        return state, metrics

    return Program("train", train_steps, donate=(0,))


Carry = tuple[Array, TrainState, dict[str, Array]]
"""What goes from step to step of a loop: how many were made, the state, and the metrics of the last."""


def _scanned(
    step: Any, probe_every: int, rest_alone: bool, count: Int[Array, ""], state: TrainState
) -> tuple[TrainState, Any]:
    """`count` steps in loops of their own kinds, entered in turn.

    There are steps that measure, steps that know nothing of probes, and, with `rest_alone`, steps that know nothing of
    seeds either, as long as all of these rest.
    """

    def stretch(name: str, sample: bool, here: Callable[[Carry], Any], carry: Carry) -> Carry:
        def on(carry: Carry) -> Any:
            return (carry[0] < count) & (sampled(carry[1], probe_every) == sample) & here(carry)

        with jax.named_scope(name):
            return jax.lax.while_loop(on, lambda carry: (carry[0] + 1, *step(sample, *carry[:2])), carry)  # type: ignore[no-any-return]

    def measuring(carry: Carry) -> Carry:
        return stretch("sampled", True, lambda _: True, carry)

    def resting(carry: Carry) -> Carry:
        done, state, metrics = carry
        rests = ~any_computes(state.morph)  # and no step of the host wakes a seed
        done, after, metrics = stretch("resting", False, lambda _: rests, (done, state.alone(), metrics))
        return done, after.beside(state), metrics

    def growing(carry: Carry) -> Carry:
        return stretch("unsampled", False, lambda carry: any_computes(carry[1].morph) if rest_alone else True, carry)

    kinds = [measuring] * (probe_every > 0) + ([resting] * rest_alone + [growing]) * (probe_every != 1)

    def turn(carry: Carry) -> Carry:
        return functools.reduce(lambda carry, kind: kind(carry), kinds, carry)

    carry = jnp.int32(0), state, {name: jnp.zeros((), jnp.float32) for name in METRICS}
    if len(kinds) > 1:
        return jax.lax.while_loop(lambda carry: carry[0] < count, turn, carry)[1:]  # type: ignore[no-any-return]
    return turn(carry)[1:]
