"""Training batches on their way to the device: several at a time, from arrays that stay there or from the host."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from ..kasmina.morph import Morph
from .data import Batches, form_of, nbytes, out_of_step
from .dispatch import Dispatch
from .peers import InStep, alone, put
from .sharding import Layout
from .step import Calls

Chunk = tuple[Any, int]


class Feed:
    """Batches in groups of as many as one call of the train program takes.

    Arrays of at most `resident_bytes`, and those that are there already, stay on the device, and each group is gathered
    there by a compiled program; larger ones are gathered on the host, in the same order. How unrolled batches are
    grouped follows from their position in the epoch and the steps until the next tick, so an epoch gone on with is
    grouped as one gone through; scanned ones may be grouped in any way.

    Args:
      batches: the training data.
      calls, dispatch: how the model is called, and how steps are to be grouped.
      resident_bytes: the most that arrays may take up on a device.
      layout: the mesh that the batches go to; None is one device.

    Raises:
      ValueError: the mesh's devices do not divide a batch.
    """

    def __init__(
        self, batches: Batches, calls: Calls, dispatch: Dispatch, resident_bytes: int, layout: Layout | None = None
    ) -> None:
        self.batches, self.calls, self.dispatch, self.layout = batches, calls, dispatch, layout
        if layout is not None and batches.arrays is not None:
            layout.check_batch(batches.batch_size)
        arrays = batches.arrays
        there = arrays is not None and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(arrays))
        self.resident = there or (arrays is not None and nbytes(arrays) <= resident_bytes)
        self.arrays = arrays
        if self.resident:
            put_one = jax.device_put if layout is None else functools.partial(put, sharding=layout.whole)
            self.arrays = jax.tree.map(put_one, arrays)
        self.mode, self.places = "", 0
        self.ahead: dict[int, Array] = {}

    def epoch(self, morph: Morph, epoch: int, start: int) -> Epoch:
        """The rest of an epoch from position `start` on. `morph` tells, the first time, which mode suits its host."""
        if self.arrays is None:
            stream = self.batches.epoch(epoch, start)
            first = next(stream, None)
            if first is not None:
                self._settle(morph, first, None)
            return Streamed(self, epoch, start, itertools.chain(() if first is None else (first,), stream))
        n = self.batches.batch_size
        batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype), self.arrays)
        self._settle(morph, batch, self.batches.size // n)
        order = self.ahead.pop(epoch, None)
        order = self.batches.order(epoch) if order is None else order
        return Resident(self, start, order) if self.resident else Gathered(self, start, np.asarray(order))

    def look_ahead(self, epoch: int) -> None:
        """Compute the order of that epoch, the next one, while the device still trains on this one."""
        if self.arrays is not None:
            self.ahead = {epoch: self.batches.order(epoch)}

    @property
    def paced(self) -> bool:
        """Whether calls make as many steps as the clock tells, which several processes would read differently."""
        return self.mode == "scan" and self.dispatch.steps is None and alone()

    @property
    def parts(self) -> bool:
        """Whether steps in which all planted seeds rest are calls of another program."""
        return bool(self.mode) and self.dispatch.parts(self.mode)

    def _settle(self, morph: Morph, batch: Any, length: int | None) -> None:
        """Choose mode and places by the first batch and the number of batches."""
        if not self.mode:
            batch = jax.tree.map(_shape, batch)
            self.mode = self.dispatch.chosen(self.calls, morph, batch)
            self.places = self.dispatch.size(self.mode, batch, length)


class Epoch:
    """What is left of one epoch; `position` is that of the next batch."""

    def __init__(self, feed: Feed, position: int) -> None:
        self.feed, self.position = feed, position

    def take(self, most: int) -> Chunk | None:
        """The next batches, stacked, and how many of them are to be trained on: at most `most`; None at the end."""
        count = min(most, self._left())
        if count == 0:
            return None
        places = self.feed.places
        if self.feed.mode != "scan":  # all of them, from a multiple of their number on, or one
            places = places if count >= places and self.position % places == 0 else 1
        chunk = self._stacked(places, min(count, places))
        self.position += chunk[1]
        return chunk

    def _left(self) -> int:
        raise NotImplementedError

    def _stacked(self, places: int, count: int) -> Chunk:
        raise NotImplementedError


class Resident(Epoch):
    """Batches gathered on the device."""

    def __init__(self, feed: Feed, position: int, order: Any) -> None:
        super().__init__(feed, position)
        self.order = order

    def _left(self) -> int:
        return len(self.order) - self.position

    def _stacked(self, places: int, count: int) -> Chunk:
        layout = self.feed.layout
        sharding = None if layout is None else layout.batch_sharding(self.order.shape[1], axis=1)
        return gathered(self.feed.arrays, self.order, np.int32(self.position), places, sharding), count


class Gathered(Resident):
    """Batches of arrays that do not fit on the device, gathered on the host."""

    def _stacked(self, places: int, count: int) -> Chunk:
        chosen = self.order[self.position : self.position + count]

        def placed(array: Any) -> Any:
            """The batches, in as many places; what is in those behind them is not trained on."""
            found = np.zeros((places, *chosen.shape[1:], *array.shape[1:]), array.dtype)
            np.take(array, chosen, axis=0, out=found[:count], mode="clip")
            return found

        batches = jax.tree.map(placed, self.feed.arrays)
        return batches if self.feed.layout is None else self.feed.layout.put_batch(batches, axis=1), count


class Streamed(Epoch):
    """Batches of an iterable. One of another shape than the one before it starts a group of its own.

    Where several processes read iterables of their own, a group is read ahead, so that they can tell each other what
    comes before they meet in a step for it: one that has no more would leave the others there for ever.
    """

    def __init__(self, feed: Feed, epoch: int, position: int, source: Iterator[Any]) -> None:
        super().__init__(feed, position)
        self.epoch, self.source = epoch, source
        self.ahead: list[Any] = []
        self.step = InStep()
        if not alone():
            self.step.say(self._next())

    def _left(self) -> int:
        count, form = self._next()
        if not self.step.agreed():
            several = f"batches {self.position} to {self.position + self.feed.places - 1}"
            these = several if self.feed.places > 1 else f"batch {self.position}"
            raise out_of_step(f"{these} of epoch {self.epoch} of the training data", form, count)
        return count

    def _next(self) -> tuple[int, Any]:
        """How many batches of one form come next, at most as many as a call takes, and that form."""
        while len(self.ahead) < self.feed.places and (batch := next(self.source, None)) is not None:
            self.ahead.append(batch)
        form = form_of(next(iter(self.ahead), None))
        return sum(1 for _ in itertools.takewhile(lambda batch: form_of(batch) == form, self.ahead)), form

    def _stacked(self, places: int, count: int) -> Chunk:
        taken, self.ahead = self.ahead[:count], self.ahead[count:]
        if not alone():
            self.step.say(self._next())
        padded = taken + taken[-1:] * (places - count)
        layout = self.feed.layout
        if layout is None and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(padded)):
            return stacked(padded), count
        batches = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *padded)
        return batches if layout is None else layout.join_batch(batches, axis=1), count


@functools.partial(jax.jit, static_argnums=(3, 4))
def gathered(
    arrays: Any, order: Int[Array, "N B"], position: Any, places: int, sharding: NamedSharding | None = None
) -> Any:
    """`places` batches from `position` on, stacked; past the end of the order the last one is repeated."""
    rows = order[jnp.minimum(position + jnp.arange(places), order.shape[0] - 1)]
    batches = jax.tree.map(lambda array: array.at[rows].get(mode="promise_in_bounds"), arrays)
    return batches if sharding is None else jax.lax.with_sharding_constraint(batches, sharding)


@jax.jit
def stacked(batches: list[Any]) -> Any:
    """Batches on the device, stacked there."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    dtype = leaf.dtype if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else np.asarray(leaf).dtype
    return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(dtype))
