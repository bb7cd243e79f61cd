"""Batches: from arrays in memory, any re-iterable, or a function of the epoch; the order follows from the run's key."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .peers import InStep, alone
from .sharding import Layout

Data = Any
Check = Callable[..., Any]


class Batches:
    """Training data as epochs of batches.

    `data` is a pair of arrays or a mapping of arrays with one leading axis (shuffled anew each epoch by the run's key,
    a last partial batch left out), a function `epoch -> iterable of batches`, or a re-iterable of batches in its own
    order (a list, a grain or torch loader). `check(name, batch, epoch=, index=, values=, like=)` raises for a bad
    batch, and gives what the next one is to be like.
    """

    def __init__(self, data: Data, batch_size: int, key: jax.Array, check: Check | None = None) -> None:
        self.arrays, self.check, self.checked = readable("training", data), check, False
        self.like: Any = None
        self.data, self.batch_size, self.key = data, batch_size, key
        if self.arrays is not None:
            self.size = rows(self.arrays)
            if self.size == 0:
                raise ValueError("the training data is empty")
            self.batch_size = min(batch_size, self.size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of one epoch from position `start` on; the same for the same key, epoch and start."""
        if self.arrays is None:
            source = _iterated("training", self.data, epoch)
            for index, batch in enumerate(itertools.islice(source, start, None), start):
                if self.check is not None:
                    new = not self.checked
                    self.like = self.check("training", batch, epoch=epoch, index=index, values=new, like=self.like)
                yield batch
            self.checked = self.checked or start == 0
            return
        for chosen in np.asarray(self.order(epoch))[start:]:
            yield jax.tree.map(lambda array, chosen=chosen: array[chosen], self.arrays)

    def order(self, epoch: int) -> Int[Array, "N B"]:
        """Which examples make up each batch of an epoch, where the data is arrays; computed on the device."""
        return shuffled(self.key, np.uint32(epoch), self.size, self.batch_size)


@functools.partial(jax.jit, static_argnums=(2, 3))
def shuffled(key: jax.Array, epoch: Any, size: int, batch_size: int) -> Int[Array, "N B"]:
    """`size` examples in the order that key and epoch give, in whole batches; the examples left over are left out."""
    bits = jax.random.bits(jax.random.fold_in(key, epoch), (size,), jnp.uint32)
    whole = size // batch_size
    return jnp.argsort(bits)[: whole * batch_size].astype(jnp.int32).reshape(whole, batch_size)


def validation_batches(
    data: Data, batch_size: int, layout: Layout | None = None, check: Check | None = None
) -> Iterator[tuple[Any, int]]:
    """All batches of validation data in order with their sizes, on the layout's mesh; the last one may be smaller.

    `check(name, batch, index=, like=)` is as for `Batches`.
    """
    if isinstance(data, Held):
        yield from data.batches
        return
    arrays = as_arrays(data)
    if arrays is None:
        like = None
        for index, batch in enumerate(_in_step(_iterated("validation", data, 0))):
            if check is not None:
                like = check("validation", batch, index=index, like=like)
            batch = batch if layout is None else layout.join_batch(batch)
            yield batch, rows(batch)
        return
    size = rows(arrays)
    if size == 0:
        raise ValueError("the validation data is empty")
    for begin in range(0, size, batch_size):
        part = slice(begin, min(begin + batch_size, size))
        batch = jax.tree.map(lambda array, part=part: array[part], arrays)
        yield batch if layout is None else layout.put_batch(batch), part.stop - begin


def _in_step(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches; ValueError where another process's are not as many or of other shapes, before they are joined."""
    if alone():
        yield from batches
        return
    step, batch = InStep(), next(batches, None)
    step.say(form_of(batch))
    for index in itertools.count():
        if not step.agreed():
            raise out_of_step(f"batch {index} of the validation data", form_of(batch), 0 if batch is None else 1)
        if batch is None:
            return
        ahead = next(batches, None)
        step.say(form_of(ahead))  # a batch ahead, so that asking waits for no evaluation
        yield batch
        batch = ahead


def _iterated(name: str, data: Data, epoch: int) -> Iterator[Any]:
    """The batches of an epoch, of an iterable or a function of the epoch."""
    source = data(epoch) if callable(data) else data
    try:
        return iter(source)
    except TypeError:
        what = f"the function of the {name} data gave a {type(source).__name__} for epoch {epoch}"
        raise TypeError(f"{what}, and must give an iterable of batches") from None


def form_of(batch: Any) -> Any:
    """A batch's structure, and the shapes and dtypes of its arrays; None where there is no batch."""
    if batch is None:
        return None
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(np.shape(leaf), str(getattr(leaf, "dtype", ""))) for leaf in leaves]


def out_of_step(where: str, form: Any, count: int) -> ValueError:
    """The error of a process whose next `count` batches are of this form (None: it has no more), not as another's."""
    here = "no further one" if form is None else " ".join(f"{dtype}{list(shape)}" for shape, dtype in form[1])
    several = f" in the next {count} batches" if count > 1 else ""
    return ValueError(
        f"the processes' shares differ at {where}: this process has {here}{several}; every process must give as many "
        "batches as the others, in the same shapes"
    )


class Held:
    """Validation batches that stay on the device, each with its number of examples."""

    def __init__(self, batches: list[tuple[Any, int]]) -> None:
        self.batches = batches


def held(data: Data, batch_size: int, most: int, layout: Layout | None = None) -> Data:
    """The data as batches that stay on the device if it is arrays of at most `most` bytes, else the data itself."""
    arrays = as_arrays(data)
    if arrays is None or nbytes(arrays) > most:
        return data
    return Held(
        [
            (jax.device_put(batch) if layout is None else batch, size)
            for batch, size in validation_batches(arrays, batch_size, layout)
        ]
    )


def nbytes(tree: Any) -> int:
    """The bytes that a tree of arrays takes up."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def as_arrays(data: Data) -> Any:
    """The data as arrays if it is a pair or mapping of arrays with one leading axis, else None. Jax arrays stay so."""
    if isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "shape") for part in jax.tree.leaves(data)):
        arrays: Any = data
    elif isinstance(data, Mapping) and all(hasattr(part, "shape") for part in jax.tree.leaves(data)):
        arrays = dict(data)
    else:
        return None
    arrays = jax.tree.map(lambda part: part if isinstance(part, jax.Array) else np.asarray(part), arrays)
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(arrays)}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(str(leaf.shape) for leaf in jax.tree.leaves(arrays))
        raise ValueError(f"the data's arrays must share their first axis (examples), got shapes {shapes}")
    return arrays


def rows(tree: Any) -> int:
    """The number of examples in a batch or data set."""
    return int(np.shape(jax.tree.leaves(tree)[0])[0])


def readable(name: str, data: Data, *, once: bool = False) -> Any:
    """The data as arrays, or None where it is an iterable; TypeError where it cannot be read.

    Or read only once, unless `once` is enough. Nothing is read: a loader may start processes for it.
    """
    arrays = as_arrays(data)
    if arrays is not None or (callable(data) and not isinstance(data, type)):
        return arrays
    if isinstance(data, type) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(
            f"{name} data must be a pair or mapping of arrays, an iterable of batches or a function epoch -> batches, "
            f"got {type(data).__name__}"
        )
    if isinstance(data, Iterator) and not once:
        raise TypeError(
            f"{name} data of type {type(data).__name__} can be read only once; give arrays, a list or loader that can "
            "be iterated again, or a function epoch -> batches"
        )
    return None
