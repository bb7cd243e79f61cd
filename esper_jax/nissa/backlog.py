"""Events that a disk has no room for now: kept in memory, in order, and written as soon as there is room."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..recovery import describe
from . import events as make
from .event import DROPPABLE, Event

ROOM = 64 << 20
"""Bytes of events that may wait in memory: a hundred thousand and more, where a run has a few hundred."""


class Backlog:
    """Writes events, and keeps those that could not be written; each later event tries again first. Not thread-safe.

    Measurements (`DROPPABLE`) may take half the room, all other events the whole of it.

    Args:
      write: writes one event; an `OSError` means not now, and that nothing of it was written.
      service: what is written to, for messages.
      room: bytes that may wait.
    """

    def __init__(self, write: Callable[[Event], Any], service: str, room: int = ROOM) -> None:
        self._write, self.service, self._room = write, service, room
        self._waiting: deque[Event] = deque()
        self._bytes = 0
        self._since: float | None = None  # when writing began to fail
        self._told: list[Event] = []
        self._said = 0
        self.error: OSError | None = None
        """Why the last attempt failed; None where it did not."""
        self.dropped = 0
        """Measurements that there was no room for, neither on disk nor in memory."""
        self.lost = 0
        """Other events of which the same is true."""

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, event: Event) -> bool:
        """Write the event behind those that wait; whether nothing waits now."""
        self._waiting.append(event)
        self._bytes += len(event.to_json())
        if self.drain():
            return True
        metric = event.kind in DROPPABLE
        if self._bytes > (self._room // 2 if metric else self._room):
            self._waiting.pop()
            self._bytes -= len(event.to_json())
            self.dropped += metric
            self.lost += not metric
        return False

    def drain(self) -> bool:
        """Write what waits; whether nothing waits now."""
        count = len(self._waiting)
        while self._waiting:
            event = self._waiting[0]
            try:
                self._write(event)
            except OSError as error:
                self.error = error
                if self._since is None:
                    self._since = time.monotonic()
                    then = "its events wait in memory and training goes on"
                    said = describe(error)
                    self._told.append(make.outage(event.epoch, event.step, service=self.service, error=said, then=then))
                return False
            self.take()
            if self._since is not None and not self._waiting:
                self._recovered(event, count)
        return True

    def take(self) -> Event:
        """The oldest that waits, which then does not wait any more."""
        event = self._waiting.popleft()
        self._bytes -= len(event.to_json())
        return event

    def notices(self) -> list[Event]:
        """One outage when writing began to fail, one recovery when everything was written, and what was lost."""
        told, self._told = self._told, []
        return told

    def _recovered(self, event: Event, count: int) -> None:
        assert self._since is not None
        seconds, self._since, self.error = time.monotonic() - self._since, None, None
        at = (event.epoch, event.step)
        self._told.append(make.recovery(*at, service=self.service, seconds=seconds, replayed=count))
        if self.dropped + self.lost > self._said:
            self._said = self.dropped + self.lost
            self._told.append(make.warning(*at, self.missing))

    @property
    def missing(self) -> str:
        """What never got there, in a sentence."""
        return (
            f"{self.service} lacks {self.dropped} metrics and {self.lost} other events: there was no room for them on "
            "disk nor in memory"
        )
