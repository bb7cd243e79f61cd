"""Several processes that train one model together: which of them acts, and how all of them come to one mind.

Every process runs the same loop on the same numbers. What could differ between them (a controller behind a network, a
signal, a compiler's error, the clock) is settled here: by the first process, or by asking all. With one process nothing
here costs anything.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from ..kasmina._pytree import is_key

T = TypeVar("T")
LAG = 2
"""Votes that may be under way: what one finds is known when the next but one is cast."""
SLOW = 0.5
"""Seconds between two votes from which on they are waited for."""
HEARTBEAT = 20
"""Seconds after which a process that is not heard of counts as lost, and the others end."""
JOINING = 300
"""Seconds for which a process waits for the others when a job begins: pods and nodes start one after another."""
LEAVING = 30
"""Seconds for which a process that ends waits for the others to do so; then they are told that it is gone."""
SAMPLE = 1 << 20
"""Bytes of each array by which processes tell whether they were given the same data."""


def alone() -> bool:
    """Whether this is the only process."""
    return jax.process_count() == 1


def first() -> bool:
    """Whether this process writes files, shows progress and asks the controller."""
    return jax.process_index() == 0


def on_host(leaf: Any) -> np.ndarray:
    """A copy of an array on the host, gathered where its parts lie with several processes (all of them must ask)."""
    if spread(leaf):
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.array(leaf)


def soon(tree: Any) -> Any:
    """The tree itself; the copies of its arrays to the host begin, and nothing waits for them."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not is_key(leaf):
            leaf.copy_to_host_async()
    return tree


def gathered(tree: Any) -> Any:
    """The tree, with arrays whose parts lie with several processes brought to the host; all of them must ask."""
    return jax.tree.map(lambda leaf: on_host(leaf) if spread(leaf) else leaf, tree)


def spread(leaf: Any) -> bool:
    """Whether parts of an array lie with other processes alone."""
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def told(value: T) -> T:
    """What the first process holds, on every process: anything JSON keeps, or where alone the value itself."""
    if alone():
        return value
    text = json.dumps(value, default=lambda x: x.tolist()).encode() if first() else b""  # numpy's numbers are plain
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    letters = np.frombuffer(text.ljust(size, b"\0")[:size], np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(letters))))  # type: ignore[no-any-return]


def any_of(text: str) -> str:
    """The text of the first process that has one; where alone the text itself."""
    if alone():
        return text
    letters = np.frombuffer(text.encode()[:1000].ljust(1000, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(letters)).astype(np.uint8)
    return next((bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows if row.any()), "")


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A block that may fail on some processes only, a file of the first one say: where it does, it fails on all.

    Raises:
      FailedElsewhere: on the processes where it did not fail, with what the first of the others had to say.
    """
    try:
        yield
    except Exception as error:
        any_of(f"process {jax.process_index()}: {error or type(error).__name__}")
        raise
    if problem := any_of(""):
        raise FailedElsewhere(problem)


class FailedElsewhere(RuntimeError):
    """Another process of the job could not begin, so this one does not; the message is that process's."""


def largest(mine: int) -> int:
    """The largest number that any process says, waited for: all of them must ask."""
    return mine if alone() else int(_said(jnp.max)(mine))


def same_data(name: str, arrays: Any) -> None:
    """ValueError unless every process was given arrays of the same shapes, dtypes and (their beginning) values.

    None is an iterable, which every process or none must have been given.
    """
    if alone():
        return
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(arrays)]
    crc = 0
    for leaf in leaves:
        rows = leaf[: max(1, SAMPLE // max(1, leaf[:1].nbytes))]
        crc = zlib.crc32(np.ascontiguousarray(rows).tobytes(), zlib.crc32(f"{leaf.shape}{leaf.dtype}".encode(), crc))
    found = np.asarray(multihost_utils.process_allgather(np.uint32(crc)))
    if len(set(found.tolist())) > 1:
        raise ValueError(
            f"the processes were given different {name} data; arrays must be the same on all of them (for shares of "
            "its own, give each process an iterable of its part of every batch)"
        )


def put(leaf: Any, sharding: Sharding | None) -> Any:
    """An array or typed key on the devices of a sharding, of which all processes hold the same; None is one device.

    One that is there already is kept as it is; of the others nothing is aliased. (`jax.device_put` compares what the
    processes hold, for which NaN differs from NaN, and takes no keys over several processes.)
    """
    if isinstance(leaf, jax.Array):
        if leaf.committed and sharding is not None and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if is_key(leaf):
            data = put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if sharding is None or sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding, may_alias=False)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


class _Said:
    """Numbers that processes say, reduced over all of them; nobody waits for what comes of it before asking."""

    def __init__(self, reduce: Callable[[jax.Array], Any]) -> None:
        mesh = Mesh(np.asarray(jax.devices()), ("device",), axis_types=(AxisType.Auto,))
        self._each = NamedSharding(mesh, PartitionSpec("device"))
        self._reduce = jax.jit(reduce, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, mine: int) -> Any:
        mine_everywhere = np.full(jax.local_device_count(), mine, np.int32)
        return self._reduce(jax.make_array_from_process_local_data(self._each, mine_everywhere))


@functools.cache
def _said(reduce: Callable[[jax.Array], Any]) -> _Said:
    """One for each reduction: its program is compiled once in a process."""
    return _Said(reduce)


def _ends(said: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.min(said), jnp.max(said)


class Vote:
    """The largest number that any process says, without waiting for it: an answer comes `LAG` votes later.

    Where votes are far apart they are waited for (`waits`), which costs little then, and an answer comes at once. With
    its number each process says whether they were; so all of them begin and cease to wait at the same vote.
    """

    def __init__(self) -> None:
        self._cast: collections.deque[jax.Array] = collections.deque()
        self._last = time.monotonic()
        self.waits = False

    def __call__(self, mine: int) -> int:
        """Cast this process's vote; the largest one of `LAG` votes ago. Where alone, the answer is the vote itself."""
        if alone():
            return mine
        slow = time.monotonic() - self._last > SLOW
        self._cast.append(_said(jnp.max)(2 * mine + slow))
        number = 0
        while len(self._cast) > (0 if self.waits else LAG):
            said = int(self._cast.popleft())
            number, self.waits = max(number, said // 2), bool(said % 2)
        self._last = time.monotonic()
        return number


class InStep:
    """That all processes come with the same, where each reads data of its own: said ahead, asked when it matters."""

    def __init__(self) -> None:
        self._said: Any = None

    def say(self, what: Any) -> None:
        """What this process is to come with next, by its `repr`."""
        if not alone():
            self._said = _said(_ends)(zlib.crc32(repr(what).encode()) >> 1)

    def agreed(self) -> bool:
        """Whether all of them said the same the last time; where alone, or nothing was said, they did."""
        if self._said is None:
            return True
        low, high = jax.device_get(self._said)
        return bool(low == high)


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes of the job (`jax.distributed.initialize`), before anything else is asked of JAX.

    Args:
      coordinator: `host:port` of the first process; None finds out from SLURM, Open MPI, a TPU pod or Kubernetes.
      processes: how many there are.
      process: which of them this is, from 0.

    Raises:
      ValueError: only some of the three are given, or they make no sense; or none, where nothing tells JAX of a job.
    """
    given = (coordinator, processes, process)
    if any(value is None for value in given) and any(value is not None for value in given):
        raise ValueError("--coordinator, --processes and --process belong together; give all three or none")
    if processes is not None and processes < 1:
        raise ValueError(f"--processes must be 1 or more, got {processes}")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"--process must be from 0 to {processes - 1} (of {processes} processes), got {process}")
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
            raise ValueError(f"--coordinator must be host:port with a port from 1 to 65535, got {coordinator!r}")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=HEARTBEAT,
            initialization_timeout=JOINING,
            shutdown_timeout_seconds=LEAVING,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"this process could not join a job: {' '.join(str(error).split())[:300]}") from None
