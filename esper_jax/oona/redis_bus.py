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
from ..nissa.event import Event
from ..nissa.spool import Spool
from ..recovery import Breaker, BreakerState, describe, retrying
from .address import RUNS, Address, OonaError, package

BATCH = 500
GATHER = 0.01
"""Seconds that the thread waits for more before it sends: a tick tells several events at once."""
HELD = 10_000


class RedisBus:
    """A sink that publishes. `emit` writes one line to a spool on disk and returns; a thread does the rest.

    The thread sends batches in pipelined transactions. Before each it reads, under `WATCH`, which of our events the
    stream ends with, and goes on from there: an answer that was lost is no duplicate, and what a server lost in a crash
    is sent again. While the server is away there is one outage notice, a breaker between attempts, and the spool grows.

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
        self._token = ""
        self._closing = self._idle = False
        self._held: list[str] = []  # lines that found no room on the disk
        self.sent = 0
        """Events written to the stream by this object, those that the server lost and was sent again counted twice."""
        self.lost = 0
        """Events that neither disk nor memory had room for."""
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
        """The ids of all events emitted, in order."""
        return [f"{self._token}-{number}" for number in range(1, self._last + 1)]

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
            self._acked, self._last, self._token, self._closing = spool.noted(), spool.last, spool.token, False
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
            run = path.read_text().strip() if path.is_file() else f"{self.name}-{spool.token}"
            self.address = dataclasses.replace(self.address, run=run)
        path.write_text(run + "\n")

    def emit(self, event: Event) -> None:
        """Publish the event: it is on disk when this returns, and on the stream soon."""
        if self._thread is None:
            self.open()
        line = event.to_json()
        with self._ready:
            self._at = (event.epoch, event.step)
            self._write(line)
            if self._idle:  # or else the thread looks again by itself
                self._ready.notify()

    def notices(self) -> list[Event]:
        """Events to tell the other sinks: an outage, a recovery, what was left undelivered."""
        with self._ready:
            found, self._notices = self._notices, []
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
            with contextlib.suppress(OSError):
                self._write(None)
            self._closing = True
            self._ready.notify()
        thread.join(self.linger)
        with self._ready:
            self._thread = None
            left, self.lost = spool.last - self._acked, self.lost + len(self._held)
            self._held = []
            spool.note(self._acked)
            texts = []
            if left:
                texts.append(
                    f"{left} events of {self.run} were not delivered to {self.address.shown}; they are kept in "
                    f"{spool.directory} and are sent when the run goes on, or by esper_jax.oona.deliver(that, url)"
                )
            if self.lost:
                texts.append(
                    f"{self.lost} events of {self.run} are lost to the bus: there was no room for them on disk"
                )
            self._notices += [make.warning(*self._at, text) for text in texts]
            self._release(remove=self._spool_at is None and not left)
        for text in texts:
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _write(self, line: str | None) -> None:
        """Lines that were held back, then this one, to the disk; what it has no room for is held back."""
        spool = self._spool
        assert spool is not None
        self._held += [] if line is None else [line]
        try:
            while self._held:
                self._last = spool.append(self._held[0])
                del self._held[0]
        except OSError as error:
            if len(self._held) == 1 and line is not None:
                then = "its events wait in memory and training goes on"
                self._notices.append(make.outage(*self._at, service="the bus's disk", error=describe(error), then=then))
            if len(self._held) > HELD:
                del self._held[-1]
                self.lost += 1

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
                    f"{trouble}. Start or correct the server, or allow training without it with oona_optional=True",
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
            top, ours = self._end_of(pipe, spool)
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
            self._acked = batch[-1][0] if batch else min(ours, spool.last)
            self.sent += len(batch)
            spool.forget(self._acked - self.address.maxlen)

    def _end_of(self, pipe: Any, spool: Spool) -> tuple[int, int]:
        """The stream's last entry id, and the number of the last event in it that is ours."""
        stream, mine = self.address.stream, f"{spool.token}-".encode()
        try:
            about = pipe.xinfo_stream(stream)
        except self._redis.ResponseError as error:
            if "no such key" not in str(error):
                raise
            return 0, 0
        top = int(about["last-generated-id"].split(b"-")[0])
        last = about["last-entry"]
        entries = [last] if last else []
        if last and not last[1].get(b"id", b"").startswith(mine):  # another run of the same name wrote meanwhile
            entries = pipe.xrevrange(stream, count=10_000)
        for _, entry in entries:
            if entry.get(b"id", b"").startswith(mine):
                return top, int(entry[b"id"][len(mine) :])
        return top, self._acked

    def _changed(self, before: BreakerState, after: BreakerState, error: Exception | None) -> None:
        with self._ready:
            if before == BreakerState.CLOSED and after == BreakerState.OPEN:
                self._missed_at = time.monotonic()
                then = "events wait on disk and training goes on"
                said = describe(error)
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
