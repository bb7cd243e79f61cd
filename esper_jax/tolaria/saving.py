"""Checkpoints written beside the training: copied at once, written by a thread, one after the other."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from .checkpoint import CheckpointError, Checkpoints, Prepared
from .leaves import one_line


class Saved(NamedTuple):
    """What became of a save: the tick and step it was of, whether it was the best, and the error or None."""

    tick: int
    step: int
    best: bool
    error: CheckpointError | None


class Saver:
    """Saves one step at a time in a thread; the state that was given may be donated as soon as `save` returns.

    The step that was stored last, before its tick, is replaced by what is after it.
    Nothing is lost in silence: what became of each save is told by `told`, and an error that is no failure to write is
    raised there or by `wait`.
    """

    def __init__(self, store: Checkpoints) -> None:
        self.store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="esper_jax saver")
        self._writing: Future[Saved] | None = None
        self._told: list[Saved] = []
        latest = store.latest()
        self.last: tuple[int | None, int] | None = None if latest is None else (None, latest)
        """Tick and step of what was stored last, or lay there at the beginning (of whose tick nothing is known)."""
        self.gone: set[int] = set()
        """Processes of the job that are gone: their parts of a step are waited for no more."""

    def save(
        self,
        tick: int,
        step: int,
        tree: Any,
        meta: dict[str, Any],
        score: float | None,
        best: bool,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Copy the tree and begin to write it, once the save before it has ended; a score of NaN is none.

        `before` is called in the thread, ahead of that; where it raises OSError the save has failed.
        """
        self.wait()
        try:
            prepared = self.store.prepare(step, tree, meta, score=score, copy=True)
        except CheckpointError as error:
            self._told.append(Saved(tick, step, best, error))
            return
        self._writing = self._thread.submit(self._write, tick, step, best, prepared, before)

    def wait(self) -> None:
        """Until no save is under way; raises what went wrong with it, a failure to write excepted."""
        if self._writing is None:
            return
        try:
            self._told.append(self._writing.result())
        except Exception:
            self._writing = None
            raise
        self._writing = None  # not before: an interrupt of the wait leaves the save to be waited for

    def finish(self, seconds: float) -> bool:
        """Wait for a save under way, but no longer than that; whether none is any more. From any thread."""
        writing = self._writing
        return writing is None or bool(concurrent.futures.wait([writing], timeout=seconds).done)

    def close(self) -> None:
        """Wait, and end the thread."""
        self.wait()
        self._thread.shutdown()

    def told(self) -> list[Saved]:
        """What became of the saves that have ended since the last call, in order."""
        if self._writing is not None and self._writing.done():
            self.wait()
        told, self._told = self._told, []
        return told

    def _write(self, tick: int, step: int, best: bool, prepared: Prepared, before: Callable[[], None] | None) -> Saved:
        error: CheckpointError | None = None
        try:
            if before is not None:
                before()
            replaces = self.last is not None and self.last[1] == step
            self.store.write(prepared, force=replaces, gone=self.gone.__contains__)
        except OSError as failure:
            error = CheckpointError(f"step {step} could not be saved ({one_line(failure)}); the next save tries again")
        except CheckpointError as failure:
            error = failure
        else:
            self.last = (tick, step)
        return Saved(tick, step, best, error)
