"""Checkpoints written beside the training: copied at once, written by a thread, one after the other."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from .checkpoint import CheckpointError, Prepared


class Store(Protocol):
    """Where steps are written: a `Checkpoints`."""

    def prepare(self, step: int, tree: Any, meta: dict[str, Any], *, score: float | None, copy: bool) -> Prepared:
        """A step on its way, holding nothing of the tree's own memory."""
        ...

    def write(self, prepared: Prepared) -> None:
        """Put it on disk."""
        ...


class Saved(NamedTuple):
    """What became of a save: the tick and step it was of, whether it was the best, and the error or None."""

    tick: int
    step: int
    best: bool
    error: CheckpointError | None


class Saver:
    """Saves one step at a time in a thread; the state that was given may be donated as soon as `save` returns.

    Nothing is lost in silence: what became of each save is told by `told`, and an error that is no failure to write is
    raised there.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="esper_jax saver")
        self._writing: Future[None] | None = None
        self._told: list[Saved] = []
        self._strange: BaseException | None = None

    def save(self, tick: int, step: int, tree: Any, meta: dict[str, Any], score: float | None, best: bool) -> None:
        """Copy the tree and begin to write it, once the save before it has ended; a score of NaN is none."""
        self.wait()
        prepared = self.store.prepare(step, tree, meta, score=score, copy=True)
        self._writing = self._thread.submit(self._write, tick, step, best, prepared)

    def wait(self) -> None:
        """Until no save is under way."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Wait, and end the thread."""
        self.wait()
        self._thread.shutdown()

    def told(self) -> list[Saved]:
        """What became of the saves that have ended since the last call, in order."""
        if self._strange is not None:
            strange, self._strange = self._strange, None
            raise strange
        told, self._told = self._told, []
        return told

    def _write(self, tick: int, step: int, best: bool, prepared: Prepared) -> None:
        error: CheckpointError | None = None
        try:
            self.store.write(prepared)
        except CheckpointError as failure:
            error = failure
        except BaseException as strange:
            self._strange = strange
            return
        self._told.append(Saved(tick, step, best, error))
