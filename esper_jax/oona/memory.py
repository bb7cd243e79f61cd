"""The bus inside the process: what a run has when no server is configured."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from ..nissa.event import Event


class Message(NamedTuple):
    """An event on a bus. `id` is the event's own, however often it is delivered; `place` where it was read."""

    id: str
    place: str
    event: Event


class MemoryBus:
    """Keeps the newest `maxlen` events for readers in other threads. `emit` never waits.

    >>> from esper_jax.nissa import events
    >>> bus = MemoryBus()
    >>> bus.emit(events.warning(0, 0, "careful"))
    >>> [message.event.message for message in bus.read()]
    ['careful']
    """

    def __init__(self, maxlen: int = 10_000) -> None:
        self._token = secrets.token_hex(4)
        self._kept: deque[Message] = deque(maxlen=maxlen)
        self._ready = threading.Condition()
        self._last = 0
        self._closed = False

    def emit(self, event: Event) -> None:
        """Publish the event to this process."""
        with self._ready:
            self._last += 1
            self._closed = False
            self._kept.append(Message(f"{self._token}-{self._last}", str(self._last), event))
            self._ready.notify_all()

    def read(self, after: str = "0", count: int = 100, block: float = 0.0) -> list[Message]:
        """Up to `count` messages behind the place `after`, waiting up to `block` seconds for the first."""
        until, last = time.monotonic() + block, int(after)
        with self._ready:
            while self._last <= last and not self._closed and (left := until - time.monotonic()) > 0:
                self._ready.wait(left)
            return [message for message in self._kept if int(message.place) > last][:count]

    def follow(self) -> Iterator[Message]:
        """Every message from the oldest kept on, until the bus is closed."""
        after = "0"
        while True:
            found = self.read(after, block=1.0)
            yield from found
            if found:
                after = found[-1].place
            elif self._closed:
                return

    def close(self) -> None:
        """The run is over: `follow` ends. A later event opens it again."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
