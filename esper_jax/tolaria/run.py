"""One call of `fit`: the loop over steps, ticks, checkpoints, Ctrl-C and SIGTERM."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..nissa import events
from . import persist
from .change import Changes
from .checkpoint import Checkpoints
from .data import Data, Held
from .dispatch import Pace
from .feed import Feed
from .interruption import ANSWER, GRACE, SAVE, Rest, Stop, ended_by
from .leaves import is_spread, is_there, parted
from .peers import Vote, alone, first, largest, told
from .programs import Program
from .records import FILE, HistoryFile
from .saving import Saver
from .session import Session
from .state import TrainState
from .step import RestAlone
from .ticker import Sink, Ticker, TrainingDiverged

IN_FLIGHT = 2
"""Calls of the train program that may wait on the device at once."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM between two steps.

    `state` is the state reached; `directory` the run's, or None where nothing is saved; `signal` what came.
    """

    def __init__(
        self, message: str, state: TrainState, directory: pathlib.Path | None, signal: int = signal.SIGINT
    ) -> None:
        super().__init__(message)
        self.state, self.directory, self.signal = state, directory, signal


class _Paused(BaseException):
    """A tick is left for the signal of that number before it has changed anything."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Before(NamedTuple):
    """A run as it was before a tick: its state and memory, of whose records there were so many."""

    state: TrainState
    session: Session
    records: int

    @classmethod
    def of(cls, state: TrainState, session: Session) -> Before:
        """As they are now."""
        return cls(state, dataclasses.replace(session, pending=list(session.pending)), len(session.records))

    def begun(self) -> tuple[TrainState, Session]:
        """The state and the memory."""
        return self.state, dataclasses.replace(self.session, records=self.session.records[: self.records])


class Run:
    """The state on its way, and what is due when.

    Args:
      steps, ticker: the train program of `make_steps`, and the tick.
      changes: changes of the program, and what waits for them.
      state: where the run begins; its arrays are copied, since steps donate theirs.
      session: the run's memory, brought up to date at each tick.
      sink, checkpoints: receivers of events and of states (None keeps none).
      tick_every, checkpoint_every, patience: as for `Tolaria`.
      resumed: whether the state is what was restored from its checkpoint.
    """

    def __init__(
        self,
        steps: Program,
        ticker: Ticker,
        changes: Changes,
        state: TrainState,
        session: Session,
        sink: Sink,
        checkpoints: Checkpoints | None,
        *,
        tick_every: int | None,
        checkpoint_every: int,
        patience: int | None,
        resumed: bool = False,
    ) -> None:
        self.steps, self.ticker, self.session, self.sink, self.checkpoints = steps, ticker, session, sink, checkpoints
        self.tick_every, self.checkpoint_every, self.patience = tick_every, checkpoint_every, patience
        self.epoch, self.batch = int(state.epoch), int(state.batch)
        self.changes = changes
        self.made = int(state.step)
        self.state = changes.enter(jax.tree.map(jnp.array, state.replace(governor=None, control=None)))
        self.control = (state.governor, state.control)
        self.saver = None if checkpoints is None else Saver(checkpoints)
        self.history = HistoryFile((self.directory or pathlib.Path()) / FILE, session.records)
        there = resumed and checkpoints is not None and self.made in checkpoints.steps()
        self.saved = (int(state.ticks), self.made) if there else None
        if self.saver is not None and self.saved is not None:
            self.saver.last = self.saved
        self.vote, self.vote_in_tick = Vote(), Vote()
        self.stop = Stop()
        self.unticked = int(state.meters.batches)
        self.running: collections.deque[tuple[jax.Array, int]] = collections.deque()
        self.pace, self.timed = Pace(), False
        self.rest = Rest(self.save_at_rest)
        self.before: Before | None = None
        self.rested = False
        self.step: Callable[..., Any] = steps
        self.prepared = 0

    @property
    def directory(self) -> pathlib.Path | None:
        """The run's directory; None where nothing is saved."""
        return None if self.checkpoints is None else self.checkpoints.directory.parent

    def whole(self) -> TrainState:
        """The full state, with the host-side counts and the controllers' states in their places."""
        governor, control = self.control
        return self.changes.whole(self.state).replace(
            epoch=jnp.int32(self.epoch), batch=jnp.int32(self.batch), governor=governor, control=control
        )

    def until(self, epochs: int, feed: Feed, validation: Data, stop: Stop) -> str:
        """Train; why it ended."""
        self.stop = stop
        if self.session.waiting is not None and not self.changes.programs.known():
            with self.rest:
                self.foresee(feed, validation)
        while self.epoch < epochs:
            if self.through(feed, validation, stop):
                return "stopped early"
            if self.batch == 0:
                raise ValueError(f"epoch {self.epoch} of the training data gave no batch")
            if self.epoch + 1 < epochs:
                feed.look_ahead(self.epoch + 1)
            if self.tick_every is None:
                self.restructure(stop, at_tick=True)
                if self.tick(validation, ends_epoch=True):
                    return "stopped early"
            else:
                self.epoch, self.batch = self.epoch + 1, 0
        return "finished"

    def through(self, feed: Feed, validation: Data, stop: Stop) -> bool:
        """Train on the rest of this epoch, with the ticks that fall into it; whether to stop early."""
        with self.rest:
            batches = feed.epoch(self.state.morph, self.epoch, self.batch)
        if feed.parts and self.step is self.steps:
            self.step = RestAlone(self.steps)
        while True:
            if self.tick_every is not None and self.unticked >= self.tick_every:
                self.restructure(stop, at_tick=True)
                if self.tick(validation):
                    return True
            self.restructure(stop, at_tick=False)
            room = min(self.room(), self.pace.steps if feed.paced else sys.maxsize)
            with self.rest:
                chunk = batches.take(room)
            if chunk is None:
                return False
            self.dispatch(*chunk)
            if number := self.vote(stop.number()):
                self.interrupt(number)

    def foresee(self, feed: Feed, validation: Data) -> None:
        """Ask for the next program by the shapes of batches that no program has met: this run was resumed in a wait."""
        first = feed.epoch(self.state.morph, self.epoch, 0)
        for most in (sys.maxsize, 1):
            if (chunk := first.take(most)) is not None:
                self.steps.expect(chunk[0], np.int32(chunk[1]))
        for batch, _ in validation.batches if isinstance(validation, Held) else ():
            self.ticker.evaluator.plain.expect(batch)
            self.ticker.evaluator.rows.expect(batch)
        self.ticker.move.expect(np.float32(0))
        self.changes.ask(self.state)

    def room(self) -> int:
        """How many steps may be made before something else is due: a number that follows from the state alone."""
        to_tick = None if self.tick_every is None else max(1, self.tick_every - self.unticked)
        bounds = (to_tick, self.changes.steps_left(self.made))
        return min((bound for bound in bounds if bound is not None), default=sys.maxsize)

    def dispatch(self, batches: Any, count: int) -> None:
        """Hand `count` steps to the device, and wait for the last call but one so that the queue stays short."""
        with self.rest:  # until the step is on its way: it may have to be compiled
            after = self.step(self.state, batches, np.int32(count))
        if not self.running:
            self.pace.began()
        self.state, metrics = after
        # so that no step waits for them when a seed wakes
        if self.step is not self.steps and (met := len(self.steps.shapes)) > self.prepared:
            self.prepared = met
            self.changes.programs.request(self.state)
        self.batch += count
        self.unticked += count
        self.made += count
        self.running.append((metrics["loss"], count))
        while len(self.running) > (0 if self.vote.waits else IN_FLIGHT):
            self.see_off()

    def see_off(self) -> None:
        """Wait for the oldest call under way."""
        loss, count = self.running.popleft()
        loss.block_until_ready()
        self.pace.ended(count)
        self.timed = True

    def forget_calls(self) -> None:
        """Before a tick, in which all calls under way end; one since the last tick was waited for, for the pace."""
        while self.running and not self.timed:
            self.see_off()
        self.running.clear()
        self.timed = False

    def tick(self, validation: Data, *, ends_epoch: bool = False) -> bool:
        """One tick, with which an epoch may end, and a checkpoint where it is due; whether to stop early."""
        session = self.session
        self.forget_calls()
        self.tell_saved()
        place = self.epoch, self.batch
        self.before = Before.of(self.whole(), session)
        if ends_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        number = 0
        try:
            with self.rest:
                state = self.ticker(self.whole(), session, validation, self.sink, self.pause)
                view = self.changes.enter(state.replace(governor=None, control=None))
                self.changes.guess(view, self.ticker.candidates)
        except _Paused as paused:
            number = paused.number
        if number:
            self.epoch, self.batch = place
            self.interrupt(number)
        self.before, self.state, self.control = None, view, (state.governor, state.control)
        self.unticked = 0
        ticks = int(state.ticks)
        self.changes.tell((ticks, int(state.step)))
        if ticks % self.checkpoint_every == 0:
            self.save()
        waited = ticks - session.best_tick
        if self.patience is not None and waited >= self.patience:
            reason = f"no new best score for {waited} ticks (best {session.best_score:.2f} at tick {session.best_tick})"
            self.sink(events.early_stop(ticks, int(state.step), reason=reason, patience=self.patience))
            return True
        if alone() and (number := self.stop.number()):  # several processes ask each other with the next steps
            self.interrupt(number)
        return False

    def pause(self) -> None:
        """Within a validation: leave the tick for a signal."""
        if number := self.vote_in_tick(self.stop.number()):
            raise _Paused(number)

    def restructure(self, stop: Stop, *, at_tick: bool) -> None:
        """Let a grown or leaner program take over where that is due; Ctrl-C ends a wait for it."""
        if self.changes.due(self.state, self.made, at_tick=at_tick):
            self.state, number = self.changes.make(self.state, self.made, stop.number)
            if number:
                self.interrupt(number)

    def save(self, *, wait: bool = False) -> bool:
        """Begin to save this very step, unless it is saved, and with `wait` see it through; whether it is (or may be).

        One that cannot be written, on a full disk say, is an `error` event; training goes on, and the next save tries
        again.
        Of several processes each writes the parts that it holds, and the first one what all of them hold.
        """
        if self.saver is None:
            return False
        self.settle()
        state = self.whole()
        now = (int(state.ticks), int(state.step))
        if told(self.saved != now):
            self.begin_save(self.saver, state, self.session)
        if wait:
            self.settle()
        return told(self.saved == now)

    def begin_save(self, saver: Saver, state: TrainState, session: Session) -> None:
        """Begin to save that state and session."""
        ticks, step = int(state.ticks), int(state.step)
        last = session.records[-1] if session.records else {}
        measured = (last.get("epoch"), last.get("step")) == (ticks, step)  # no step since the last tick
        score = last["score"] if measured else float("nan")
        mark, write = self.history.up_to_now(session.records)
        tree, meta = persist.described(state, session, mark)
        tree = parted(tree)
        if first() or is_spread(tree):
            best, before = measured and session.best_tick == ticks, write if first() else None
            saver.save(ticks, step, tree, meta, score, best, before)
        self.saved = (ticks, step)

    def save_at_rest(self) -> bool:
        """From another thread, while the run rests: save it as it stands, or stood before a tick; whether it did."""
        if self.saver is None or not alone():
            return False
        try:
            if not is_there(self.state) or not self.saver.finish(ANSWER - GRACE):  # a step or a save is on its way
                return False
            state, session = (self.whole(), self.session) if self.before is None else self.before.begun()
            now = (int(state.ticks), int(state.step))
            if self.saver.last != now:
                self.begin_save(self.saver, state, session)
            self.rested = self.saver.finish(SAVE) and self.saver.last == now
        except Exception:
            self.rested = False
        if not self.rested:
            self.saved = None
        return self.rested

    def settle(self) -> None:
        """Wait until no save is under way, and tell what became of it."""
        if self.saver is not None:
            self.saver.wait()
            self.tell_saved()

    def tell_saved(self) -> None:
        """Events for the saves that have ended; one that failed is due again."""
        for saved in self.saver.told() if self.saver is not None and first() else ():
            if saved.error is not None:
                self.sink(events.error(saved.tick, saved.step, str(saved.error), unsaved=saved.step))
                self.saved = None if self.saved == (saved.tick, saved.step) else self.saved
            elif self.checkpoints is not None:
                path = self.checkpoints.directory / str(saved.step)
                self.sink(events.checkpoint(saved.tick, saved.step, path=path, best=saved.best))

    def gone(self, process: int) -> None:
        """That process is gone: a save under way need not wait for what it has not stored."""
        if self.saver is not None:
            self.saver.gone.add(process)

    def lost(self, sentence: str) -> None:
        """Log that another process is lost, and see a save through; the state cannot be asked for any more."""
        if self.saver is not None:
            self.saver.finish(SAVE)
        self.sink(events.error(len(self.session.records), self.made, sentence))

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """However the block ends, no save is under way then, and what became of the last one is told."""
        try:
            yield
        except TrainingDiverged as diverged:
            diverged.directory = self.directory
            now = (int(self.state.ticks), self.made)
            self.sink(events.run_ended(*now, outcome="diverged", score=self.session.best_score))
            raise
        finally:
            self.settle()
            if self.saver is not None:
                self.saver.close()

    def answer(self, stop: Stop) -> None:
        """At the end of a run, saved as it is: raise, on all processes, for a signal that no step came after."""
        if number := largest(stop.number()):
            self.interrupt(number)

    def finish(self, seconds: float) -> None:
        """See a save through that is under way, for so long, from another thread."""
        if self.saver is not None:
            self.saver.finish(seconds)

    def overdue(self) -> None:
        """Say, from another thread, that the process ends in mid-step, and what is saved."""
        done = None
        if self.saver is not None and first():  # what it knows: the disk itself may hang
            done = None if self.saver.last is None else self.saver.last[1]
        elif self.checkpoints is not None:
            done = self.checkpoints.latest()
        what = (
            "terminated in something that takes long and cannot be interrupted (a compilation, a batch, a controller)"
        )
        how = "nothing is saved" if done is None else f"step {done} is saved in {self.directory}"
        how += "" if done is None or self.rested else ", later ones are lost"
        where = [] if self.directory is None else [self.directory, self.directory.parent]  # a run's, or its baseline's
        runs = [path for path in where if (path / "config.json").exists()]
        again = "; go on with fit(restore(), ...)" if done is not None else ""
        again = f"; resume with: esper-jax train --resume {runs[0]}" if runs else again
        sys.stderr.write(f"\nesper_jax: {what}: {how}{again}\n")
        sys.stderr.flush()

    def interrupt(self, number: int) -> None:
        """Save and raise, for the signal of that number."""
        self.stop.answered.set()
        saved = self.save(wait=True)
        state = self.whole()
        step = int(state.step)
        where = self.directory
        if saved:
            how = f"saved step {step} in {where}; go on with fit(restore(), ...)"
        elif where is not None:
            how = f"it could not be saved in {where}, but is in this exception's .state"
        else:
            how = "nothing was saved (no checkpoint_dir); the state is in this exception's .state"
        raise TrainingInterrupted(f"{ended_by(number)} at step {step}: {how}", state, where, number)
