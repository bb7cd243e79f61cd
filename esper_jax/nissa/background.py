"""A thread and a bounded queue before a slow sink, so that training never waits for it."""

from __future__ import annotations

import os
import pathlib
import tempfile
import threading
import time as clock
import warnings
from collections import deque
from collections.abc import Iterable

from .._checks import instance, place, seconds, whole
from ..recovery import Breaker, BreakerState, describe
from . import events as make
from .backlog import Backlog
from .event import DROPPABLE, Event
from .sinks import Sink, _Closing
from .spool import Spool

UNSPOOLED = -1
"""Instead of a number in the spool: an event that the disk had no room for."""
REPORT_EVERY = 10.0
"""Seconds between two reports of dropped metrics."""


class Background(_Closing):
    """Gives events to `sink` from a thread of its own. `emit` never waits for the sink and never raises because of it.

    Measurements (`events.DROPPABLE`) are dropped when the queue is full, counted in `dropped` and reported. All other
    events are first written to a spool on disk; those that found no room in the queue are read back from there, in
    order. An event that the sink refuses is given again, less and less often while refusals go on; what is left at the
    end stays in the spool and is delivered first when a `Background` with the same directory is made again (an event
    may then reach the sink twice, none is lost). While the disk has no room, events wait in memory and reach the sink
    from there. A line in the spool that is no event is left out, counted in `spoilt` and told.

    Args:
      sink: the slow one.
      size: events in the queue.
      spool: a directory of its own for this sink; None makes a temporary one, which stays only if something is left.
      linger: seconds that `close` waits for the rest, while the sink takes events.
      cooldown: seconds without an attempt after three refusals in a row; doubled each time up to a minute.
    """

    slow = False  # this one is quick

    def __init__(
        self,
        sink: Sink,
        *,
        size: int = 1000,
        spool: str | os.PathLike[str] | None = None,
        linger: float = 10.0,
        cooldown: float = 1.0,
    ) -> None:
        instance("sink", sink, "emit", "close", example="one such as ListSink()")
        whole("size", size, 1)
        if spool is not None:
            place("spool", spool)
        seconds("linger", linger, zero=True)
        seconds("cooldown", cooldown, zero=True)
        self.sink, self.size, self.linger = sink, size, linger
        self.name = type(sink).__name__
        self.dropped = 0
        """Measurements that the sink did not get."""
        self.spoilt = 0
        """Lines in the spool that were no events: another program or the disk had changed them."""
        self._spool_at = None if spool is None else pathlib.Path(spool)
        self._spool: Spool | None = None
        self._ready = threading.Condition()
        self._queue: deque[tuple[Event, int]] = (
            deque()
        )  # with its number in the spool, 0 for a measurement, or UNSPOOLED
        self._backlog = Backlog(self._to_spool, f"the spool of {self.name}")
        self._read = self._done = 0  # numbers of the spool: last taken into the queue, last delivered
        self._notices: list[Event] = []
        self._at = (0, 0)  # epoch and step of the last event
        self._reported, self._reported_at = 0, -float("inf")
        self._missed_at = 0.0
        self._closing: float | None = None
        self._idle = False
        self._thread: threading.Thread | None = None
        self._breaker = Breaker(self.name, cooldown=cooldown, max_cooldown=60.0, on_change=self._changed)

    def open(self) -> None:
        """Open the sink, here and now, so that what it cannot do is an error at the start."""
        opening = getattr(self.sink, "open", None)
        if opening is not None:
            opening()
        with self._ready:
            self._start()

    def emit(self, event: Event) -> None:
        """Queue the event."""
        with self._ready:
            self._start()
            spool = self._spool
            assert spool is not None
            self._at = (event.epoch, event.step)
            room = len(self._queue) < self.size and self._read == spool.last and not self._backlog
            if event.kind in DROPPABLE:
                if room:
                    self._queue.append((event, 0))
                else:
                    self.dropped += 1
            elif self._backlog.put(event) and room:
                self._read = spool.last
                self._queue.append((event, self._read))
            if self._idle:  # or else the thread looks again by itself
                self._ready.notify()

    def notices(self) -> list[Event]:
        """Events to tell the other sinks: outages, recoveries, and how many measurements were dropped."""
        with self._ready:
            found, self._notices = [*self._notices, *self._backlog.notices()], []
            late = clock.monotonic() >= self._reported_at + REPORT_EVERY or self._closing is not None
            if self.dropped > self._reported and late:
                new, self._reported, self._reported_at = self.dropped - self._reported, self.dropped, clock.monotonic()
                found.append(make.dropped(*self._at, service=self.name, dropped=new, total=self.dropped))
            return found

    @property
    def pending(self) -> int:
        """How many events wait, in the queue and on disk."""
        with self._ready:
            waiting = 0 if self._spool is None else self._spool.last - self._read
            return len(self._queue) + waiting + len(self._backlog)

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until everything was given to the sink; whether it was."""
        until = clock.monotonic() + timeout
        while self.pending and clock.monotonic() < until:
            clock.sleep(0.005)
        return self.pending == 0

    def close(self) -> None:
        """Give the sink what is left for up to `linger` seconds, then end the thread and close the sink."""
        with self._ready:
            thread, spool = self._thread, self._spool
            if thread is None or spool is None:
                self.sink.close()
                return
            self._closing = clock.monotonic() + self.linger
            self._ready.notify()
        thread.join(self.linger + 1.0)
        with self._ready:
            self._backlog.drain()
            left = spool.last - self._done
            lost = len(self._backlog) + self._backlog.lost + sum(number == UNSPOOLED for _, number in self._queue)
            self._backlog = Backlog(self._to_spool, self._backlog.service)
            self.dropped += sum(number == 0 for _, number in self._queue)
            self._queue.clear()
            self._thread = self._spool = None
            spool.note(self._done)
            spool.close(remove=left == 0)
            texts = []
            if left:
                texts.append(
                    f"{left} events did not reach {self.name}; they are kept in {spool.directory} and are delivered "
                    "when the run goes on with the same sink"
                )
            if lost:
                texts.append(f"{lost} events did not reach {self.name} and are lost to it: there was no room on disk")
            for text in texts:
                self._notices.append(make.warning(*self._at, text))
                warnings.warn(text, RuntimeWarning, stacklevel=3)
        if thread.is_alive():
            raise TimeoutError(f"{self.name} took an event and did not come back within {self.linger} s")
        self.sink.close()

    def _to_spool(self, event: Event) -> None:
        assert self._spool is not None
        self._spool.append(event.to_json())

    def _start(self) -> None:
        if self._thread is not None:
            return
        where = self._spool_at if self._spool_at is not None else tempfile.mkdtemp(prefix="esper-spool-")
        self._spool = Spool(where)
        self._read = self._done = self._spool.noted()
        self._closing = None
        self._thread = threading.Thread(target=self._run, args=(self._spool,), name=f"to-{self.name}", daemon=True)
        self._thread.start()

    def _run(self, spool: Spool) -> None:
        while True:
            with self._ready:
                try:
                    item = self._next(spool)
                except Exception as error:  # the spool cannot be read
                    self._breaker.failed(error)
                    if self._closing is not None or self._spool is not spool:
                        return
                    self._ready.wait(1.0)
                    continue
                if item is None:
                    return
            event, number = item
            try:
                self.sink.emit(event)
            except Exception as error:
                self._breaker.failed(error)
                given = number == 0  # a measurement is not given again
                refused = 1
            else:
                self._breaker.succeeded()
                given, refused = True, 0
            with self._ready:
                if self._spool is not spool:
                    return  # closed meanwhile: this event counts as left
                if given:
                    self._queue.popleft()
                    self.dropped += refused
                    self._done = max(self._done, number)
                    if number and number % 256 == 0:
                        spool.forget(number)

    def _next(self, spool: Spool) -> tuple[Event, int] | None:
        """The next event to give, as soon as there is one and the sink may be asked; None at the end."""
        while True:
            if self._spool is not spool or (self._closing is not None and clock.monotonic() >= self._closing):
                return None
            if not self._queue and self._read < spool.last:
                self._fetch(spool)
                if not self._queue and self._read < spool.last:
                    continue
            if not self._queue and self._backlog and not self._backlog.drain():
                self._queue.append((self._backlog.take(), UNSPOOLED))
            elif not self._queue and self._read < spool.last:
                continue  # the backlog went to the disk
            if not self._queue:
                self._done = max(self._done, self._read)
                if self._closing is not None:
                    return None
                self._idle = True
                self._ready.wait()
                self._idle = False
            elif self._breaker.allows():
                return self._queue[0]
            elif self._closing is not None:
                return None
            else:
                self._ready.wait(self._breaker.retry_in)

    def _fetch(self, spool: Spool) -> None:
        """Events from the spool into the queue, without lines that are none."""
        lines = spool.read(self._read, min(self.size, 100))
        spoilt = 0
        for number, line in lines:
            try:
                self._queue.append((Event.from_json(line), number))
            except (ValueError, TypeError, RecursionError):
                spoilt += 1
            spoilt += number - self._read - 1
            self._read = number
        if not lines:  # the end of the spool was cut off by another program
            spoilt += spool.last - self._read
            self._read = spool.last
        if spoilt:
            self.spoilt += spoilt
            text = f"{spoilt} lines in {spool.directory} are no events or are gone; {self.name} does not get them"
            self._notices.append(make.warning(*self._at, text))

    def _changed(self, before: BreakerState, after: BreakerState, error: Exception | None) -> None:
        if before == BreakerState.CLOSED and after == BreakerState.OPEN:
            self._missed_at = clock.monotonic()
            then = "events wait on disk meanwhile and training goes on"
            notice = make.outage(*self._at, service=self.name, error=describe(error), then=then)
        elif before == BreakerState.TRIAL and after == BreakerState.CLOSED:
            notice = make.recovery(*self._at, service=self.name, seconds=clock.monotonic() - self._missed_at)
        else:
            return
        with self._ready:
            self._notices.append(notice)


def behind_slow(sinks: Iterable[Sink], folder: pathlib.Path | None) -> list[Sink]:
    """The sinks, those that say that they are slow with a `Background` before them; the spools go into `folder`."""
    found: list[Sink] = []
    names: set[str] = set()
    for sink in sinks:
        if getattr(sink, "slow", False):
            name = type(sink).__name__
            name = next(one for one in (name, *(f"{name}-{n}" for n in range(2, 10**6))) if one not in names)
            names.add(name)
            sink = Background(sink, spool=None if folder is None else folder / name)
        found.append(sink)
    return found
