"""One call of `fit`: the loop over steps, ticks, checkpoints and Ctrl-C."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ..nissa import events
from . import persist
from .checkpoint import Checkpoints
from .data import Batches, Data
from .session import Session
from .state import TrainState
from .ticker import Sink, Ticker


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C between two steps. `state` is the state reached; `directory` the run's, or None where nothing is saved."""

    def __init__(self, message: str, state: TrainState, directory: pathlib.Path | None) -> None:
        super().__init__(message)
        self.state, self.directory = state, directory


class Run:
    """The state on its way, and what is due when.

    Args:
      step, ticker: the compiled train step, and the tick.
      state: where the run begins; its arrays are copied, since steps donate theirs.
      session: the run's memory, brought up to date at each tick.
      sink, checkpoints: receivers of events and of states (None keeps none).
      tick_every, checkpoint_every, patience: as for `Tolaria`.
    """

    def __init__(
        self,
        step: Callable[[TrainState, Any], Any],
        ticker: Ticker,
        state: TrainState,
        session: Session,
        sink: Sink,
        checkpoints: Checkpoints | None,
        *,
        tick_every: int | None,
        checkpoint_every: int,
        patience: int | None,
    ) -> None:
        self.step, self.ticker, self.session, self.sink, self.checkpoints = step, ticker, session, sink, checkpoints
        self.tick_every, self.checkpoint_every, self.patience = tick_every, checkpoint_every, patience
        self.epoch, self.batch = int(state.epoch), int(state.batch)
        self.control = (state.governor, state.control)
        self.state = jax.tree.map(jnp.array, state.replace(governor=None, control=None))
        self.saved: int | None = None
        self.unticked = int(state.meters.batches)

    def whole(self) -> TrainState:
        """The full state, with the host-side counts and the controllers' states in their places."""
        governor, control = self.control
        return self.state.replace(
            epoch=jnp.int32(self.epoch), batch=jnp.int32(self.batch), governor=governor, control=control
        )

    def until(self, epochs: int, batches: Batches, validation: Data, stop: threading.Event) -> str:
        """Train; why it ended."""
        while self.epoch < epochs:
            for batch in batches.epoch(self.epoch, self.batch):
                self.state, _ = self.step(self.state, batch)
                self.batch += 1
                self.unticked += 1
                due = self.tick_every is not None and self.unticked >= self.tick_every
                if due and self.tick(validation):
                    return "stopped early"
                if stop.is_set():
                    self.interrupt()
            if self.batch == 0:
                raise ValueError(f"epoch {self.epoch} of the training data gave no batch")
            self.epoch, self.batch = self.epoch + 1, 0
            if self.tick_every is None and self.tick(validation):
                return "stopped early"
        return "finished"

    def tick(self, validation: Data) -> bool:
        """One tick, and a checkpoint where it is due; whether to stop early."""
        session = self.session
        state = self.ticker(self.whole(), session, validation, self.sink)
        self.control = (state.governor, state.control)
        self.state = state.replace(governor=None, control=None)
        self.unticked = 0
        ticks = int(state.ticks)
        if ticks % self.checkpoint_every == 0:
            self.save()
        waited = ticks - session.best_tick
        if self.patience is not None and waited >= self.patience:
            reason = f"no new best score for {waited} ticks (best {session.best_score:.2f} at tick {session.best_tick})"
            self.sink(events.early_stop(ticks, int(state.step), reason=reason, patience=self.patience))
            return True
        return False

    def save(self) -> None:
        """A checkpoint of this very step, unless there is one."""
        if self.checkpoints is None:
            return
        state = self.whole()
        step = int(state.step)
        if self.saved == step or step in self.checkpoints.steps():
            return
        score = self.session.records[-1]["score"] if self.session.records else float("nan")
        persist.save(self.checkpoints, state, self.session, score)
        self.saved = step
        best = self.session.best_tick == int(state.ticks)
        self.sink(events.checkpoint(int(state.ticks), step, path=self.checkpoints.directory / str(step), best=best))

    def interrupt(self) -> None:
        """Save and raise."""
        self.save()
        state = self.whole()
        step = int(state.step)
        where = None if self.checkpoints is None else self.checkpoints.directory.parent
        how = (
            f"saved step {step} in {where}; go on with fit(restore(), ...)"
            if where is not None
            else "nothing was saved (no checkpoint_dir); the state is in this exception's .state"
        )
        raise TrainingInterrupted(f"interrupted at step {step}: {how}", state, where)


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step is never torn; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
