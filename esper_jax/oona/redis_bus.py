"""A run's events on a Redis stream, each once and in order, whatever the server does meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import tempfile
import threading
import time
import warnings
from typing import Any, Self

from ..nissa import events as make
from ..nissa.backlog import Backlog
from ..nissa.event import Event
from ..nissa.spool import Spool
from ..recovery import Breaker, BreakerState, retrying
from .address import RUNS, Address, OonaError, package

BATCH = 500
GATHER = 0.01
"""Seconds that the thread waits for more before it sends: a tick tells several events at once."""
PAGE = 500
"""Entries looked at together where the stream does not end with one of ours."""


class RedisBus:
    """A sink that publishes. `emit` writes one line to a spool on disk and returns; a thread does the rest.

    The thread sends batches in pipelined transactions. Before each it reads, under `WATCH`, which of our events the
    stream ends with, and goes on from there: an answer that was lost is no duplicate, and what a server lost in a crash
    is sent again. While the server is away there is one outage notice, a breaker between attempts, and the spool grows.
    Where the stream holds other events under our ids (a run directory was copied and both go on, or a power cut took
    the spool's end), ours from there on get new ids, and a warning says so.

    Args:
      address: the server and, in `run`, the stream; a run without a name is called `name-token`.
      spool: a directory of its own; None makes a temporary one that is deleted when all was delivered.
      name: the start of the run's name where the address has none.
      optional: a server that cannot be reached at the start is one warning and not an error.
      linger: seconds that `close` waits for the rest.
      cooldown, max_cooldown: seconds between attempts while the server is away.
    """

    def __init__(
        self,
        address: str | Address,
        *,
        spool: str | os.PathLike[str] | None = None,
        name: str = "run",
        optional: bool = False,
        linger: float = 5.0,
        cooldown: float = 0.5,
        max_cooldown: float = 15.0,
    ) -> None:
        self.address = Address.of(address)
        self.optional, self.linger, self.name = optional, linger, name
        self._redis = package()
        self._spool_at = None if spool is None else pathlib.Path(spool)
        self._spool: Spool | None = None
        self._client: Any = None
        self._ready = threading.Condition()
        self._thread: threading.Thread | None = None
        self._acked = self._last = 0
        self._names: Spool | None = None  # the spool, also when it is closed
        self._closing = self._idle = False
        self._backlog = Backlog(self._to_disk, "the bus's disk")
        self._newest = (0, "")  # number and line of what we sent last
        self.sent = 0
        """Events written to the stream by this object, those that the server lost and was sent again counted twice."""
        self.lost = 0
        """Events that neither disk nor memory had room for, of sessions that ended."""
        self._notices: list[Event] = []
        self._at = (0, 0)
        self._missed_at = 0.0
        watch_error = self._redis.WatchError
        self._breaker = Breaker(
            self.address.shown,
            failures=1,
            cooldown=cooldown,
            max_cooldown=max_cooldown,
            counts=lambda error: not isinstance(error, watch_error),
            on_change=self._changed,
        )

    @property
    def run(self) -> str:
        """The run's name; known once the bus is open."""
        if self.address.run is None:
            raise ValueError("the bus is not open yet, so its run has no name")
        return self.address.run

    @property
    def published(self) -> int:
        """Events emitted so far, over all sessions of the run."""
        return self._last

    @property
    def delivered(self) -> int:
        """Of these, the events that the server has confirmed."""
        return self._acked

    @property
    def outages(self) -> int:
        """How often the server went away."""
        return self._breaker.outages

    def ids(self) -> list[str]:
        """The ids of all events emitted, in order; known once the bus was open."""
        return [] if self._names is None else [self._names.id(number) for number in range(1, self._last + 1)]

    def open(self) -> None:
        """Open the spool, reach the server, and start the thread.

        Raises:
          OonaError: the server cannot be reached (unless `optional`), or another process publishes this run.
        """
        if self._thread is not None:
            return
        where = self._spool_at if self._spool_at is not None else tempfile.mkdtemp(prefix="esper-oona-")
        try:
            self._spool = spool = Spool(where)
        except BlockingIOError as error:
            raise OonaError(str(error), transient=False) from error
        try:
            self._take_name(spool)
            self._acked, self._last, self._names, self._closing = spool.noted(), spool.last, spool, False
            self._client = self.address.client()
            self._greet()
        except BaseException:
            self._release(remove=self._spool_at is None or spool.last == 0)
            raise
        self._thread = threading.Thread(target=self._work, args=(spool,), name="oona", daemon=True)
        self._thread.start()

    def _take_name(self, spool: Spool) -> None:
        """The run's name: the address's, or the one it had before, or a new one; kept beside the events."""
        path = spool.directory / "run"
        run = self.address.run
        if run is None:
            known = path.read_text(errors="replace").strip() if path.is_file() else ""
            run = known or f"{self.name}-{spool.token}"
            self.address = dataclasses.replace(self.address, run=run)
        path.write_text(run + "\n")

    def emit(self, event: Event) -> None:
        """Publish the event: it is on disk when this returns, and on the stream soon."""
        if self._thread is None:
            self.open()
        event.to_json()  # raises for what is no JSON
        with self._ready:
            self._at = (event.epoch, event.step)
            self._backlog.put(event)
            if self._idle:  # or else the thread looks again by itself
                self._ready.notify()

    def notices(self) -> list[Event]:
        """Events to tell the other sinks: an outage, a recovery, what was left undelivered."""
        with self._ready:
            found, self._notices = [*self._notices, *self._backlog.notices()], []
            return found

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until the server has confirmed everything; whether it has."""
        until = time.monotonic() + timeout
        while self._acked < self.published and time.monotonic() < until:
            time.sleep(0.005)
        return self._acked >= self.published

    def close(self) -> None:
        """Wait up to `linger` seconds for the rest, and let go of the server; what is left stays on disk."""
        with self._ready:
            thread, spool = self._thread, self._spool
            if thread is None or spool is None:
                return
            self._backlog.drain()
            self._closing = True
            self._ready.notify()
        thread.join(self.linger)
        with self._ready:
            self._thread = None
            self._backlog.drain()
            left, lost = spool.last - self._acked, len(self._backlog) + self._backlog.lost + self._backlog.dropped
            self.lost += lost
            self._notices += self._backlog.notices()
            self._backlog = Backlog(self._to_disk, self._backlog.service)
            spool.note(self._acked)
            texts = []
            if left:
                texts.append(
                    f"{left} events of {self.run} were not delivered to {self.address.shown}; they are kept in "
                    f"{spool.directory} and are sent when the run goes on, or by esper_jax.oona.deliver(that, url)"
                )
            if lost:
                texts.append(f"{lost} events of {self.run} are lost to the bus: there was no room for them on disk")
            self._notices += [make.warning(*self._at, text) for text in texts]
            self._release(remove=self._spool_at is None and not left)
        for text in texts:
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _to_disk(self, event: Event) -> None:
        assert self._spool is not None
        self._last = self._spool.append(event.to_json())

    def _release(self, *, remove: bool) -> None:
        client, self._client = self._client, None
        spool, self._spool = self._spool, None
        if client is not None:
            with contextlib.suppress(Exception):
                client.close()
        if spool is not None:
            spool.close(remove=remove)

    def _greet(self) -> None:
        """Find out whether the server is there and takes writes from us."""
        try:
            announce = {self.run: time.time()}
            retrying(self._client.zadd, RUNS, announce, attempts=3, timeout=self.address.timeout, wait=0.1)
        except Exception as error:
            trouble = self.address.trouble(error)
            if not self.optional:
                raise OonaError(
                    f"{trouble}. Start or correct the server, or allow training without it with oona_optional=True "
                    "(--oona-optional)",
                    transient=trouble.transient,
                ) from error
            self._breaker.failed(error)
        else:
            self._breaker.succeeded()

    def _work(self, spool: Spool) -> None:
        """Deliver until closed."""
        looked = False  # at what the server has, after closing began
        while True:
            with self._ready:
                while self._acked >= spool.last and not self._closing:
                    self._idle = True
                    self._ready.wait()
                    self._idle = False
                if self._spool is not spool or (self._closing and looked and self._acked >= spool.last):
                    return
                if not self._breaker.allows() and not self._closing:
                    self._ready.wait(self._breaker.retry_in)
                    continue
                closing = self._closing
            if not closing:
                time.sleep(GATHER)
            try:
                retrying(self._deliver, spool, attempts=3, timeout=self.address.timeout, wait=0.02)
            except Exception as error:
                if self._spool is not spool:
                    return
                if self._breaker.counts(error):
                    self._breaker.failed(error)
                if closing:
                    return
            else:
                self._breaker.succeeded()
                looked = closing

    def _deliver(self, spool: Spool) -> None:
        """One batch, exactly what the stream lacks; nothing of it where anything of it fails."""
        stream = self.address.stream
        with self._client.pipeline(transaction=True) as pipe:
            pipe.watch(stream)
            top, ours, taken = self._end_of(pipe, spool)
            if taken:
                self._fork(spool, ours)
            batch = spool.read(ours, BATCH)
            if batch:
                pipe.multi()
                for number, line in batch:
                    entry = {"id": spool.id(number), "event": line}
                    place = f"{top + number - ours}-0"
                    pipe.xadd(stream, entry, id=place, maxlen=self.address.maxlen, approximate=True)
                pipe.zadd(RUNS, {self.run: time.time()})
                pipe.zremrangebyrank(RUNS, 0, -1001)  # the newest thousand
                pipe.execute()
        with self._ready:
            if batch:
                self._newest = batch[-1]
            self._acked = batch[-1][0] if batch else ours
            self.sent += len(batch)
            spool.forget(self._acked - self.address.maxlen)

    def _fork(self, spool: Spool, after: int) -> None:
        """New ids for our events behind that number, and a warning."""
        spool.fork(after)
        text = (
            f"{self.address.stream} holds events under the ids of {self.run} that are not in {spool.directory} (the "
            "run directory was copied and both go on, or a crash took the spool's end); from its event number "
            f"{after + 1} on this run publishes under new ids. For a stream of its own give ?run=NAME in the URL"
        )
        with self._ready:
            self._notices.append(make.warning(*self._at, text))

    def _end_of(self, pipe: Any, spool: Spool) -> tuple[int, int, bool]:
        """The stream's last entry id, the number of our last event in it, and whether others stand under our ids."""
        stream = self.address.stream
        try:
            about = pipe.xinfo_stream(stream)
        except self._redis.ResponseError as error:
            if "no such key" not in str(error):
                raise
            return 0, 0, False
        top = int(about["last-generated-id"].split(b"-")[0])
        entries = [about["last-entry"]] if about["last-entry"] else []
        taken = False
        while entries:  # more than one look only where another run of the same name wrote meanwhile
            for _, entry in entries:
                number = self._ours(entry, spool)
                if number is not None and number >= 0:
                    return top, number, taken
                taken = taken or number is not None
            entries = pipe.xrevrange(stream, max=b"(" + entries[-1][0], count=PAGE)
        # None of ours: trimmed away behind what others wrote, or the server lost them.
        trimmed = about["length"] >= self.address.maxlen
        return top, min(self._acked, spool.last) if trimmed else 0, taken

    def _ours(self, entry: dict[bytes, bytes], spool: Spool) -> int | None:
        """The number of the event there if it is ours, -1 if it is another under an id of ours, None otherwise."""
        name = entry.get(b"id", b"").decode(errors="replace")
        token, _, digits = name.rpartition("-")
        if token not in spool.tokens or not digits.isdecimal():
            return None
        number = int(digits)
        if number <= spool.last:
            if spool.id(number) != name:
                return None  # it was found out before, and ours have other ids
            known = [self._newest] if self._newest[0] == number else spool.read(number - 1, 1)
            if not known or known[0][0] != number or known[0][1] == entry.get(b"event", b"").decode(errors="replace"):
                return number  # the same, or forgotten because it was delivered
        return -1 if token == spool.token else None

    def _changed(self, before: BreakerState, after: BreakerState, error: Exception | None) -> None:
        with self._ready:
            if before == BreakerState.CLOSED and after == BreakerState.OPEN:
                self._missed_at = time.monotonic()
                then = "events wait on disk and training goes on"
                said = self.address.said(error)
                self._notices.append(make.outage(*self._at, service=self.address.shown, error=said, then=then))
            elif after == BreakerState.CLOSED:
                seconds = time.monotonic() - self._missed_at
                waiting = self.published - self._acked
                self._notices.append(
                    make.recovery(*self._at, service=self.address.shown, seconds=seconds, replayed=max(0, waiting))
                )

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RedisBus({self.address!r}, {self.delivered} of {self.published} delivered, {self._breaker.state})"


def deliver(spool: str | os.PathLike[str], address: str | Address, *, timeout: float = 60.0) -> int:
    """Send what a run that is over left in its spool; how many events the stream lacked.

    Raises:
      OonaError: the server cannot be reached, or did not take everything within `timeout` seconds.
      FileNotFoundError: there is no spool in that directory.
    """
    where = pathlib.Path(spool)
    if not (where / "token").is_file():
        raise FileNotFoundError(f"{where} is no spool of a bus; give the directory that the warning named")
    with RedisBus(address, spool=where) as bus:
        if not bus.flush(timeout):
            raise OonaError(f"{bus.address.shown} took {bus.delivered} of {bus.published} events", transient=True)
    return bus.sent
