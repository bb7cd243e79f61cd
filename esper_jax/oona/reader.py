"""Reading a run's events from Redis: alone, or several consumers that share the work in a group."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Self, TypeVar

from ..nissa.event import Event
from ..recovery import Breaker
from .address import Address, OonaError, package, runs
from .memory import Message

T = TypeVar("T")
REMEMBERED = 100_000


class Reader:
    """Reads a run from its first event that the stream still has, and each event once by its id.

    Without a group every reader sees every event. In a `group` each event goes to one consumer, which confirms it with
    `ack` when it has done its work; what a consumer took and did not confirm it gets again when it comes back, and
    another one after `claim_after` seconds. The group remembers its place on the server.

    Args:
      address: the server; its `run` says which, and without one it is the newest.
      group, consumer: the group's name and this consumer's; the latter is `host-process` when None.
      claim_after: seconds.

    Raises:
      OonaError: the server cannot be asked, or has no run.
    """

    def __init__(
        self,
        address: str | Address,
        *,
        group: str | None = None,
        consumer: str | None = None,
        claim_after: float = 60.0,
    ) -> None:
        address = Address.of(address)
        if address.run is None:
            known = runs(address)
            if not known:
                raise OonaError(f"{address.shown} has no runs yet", transient=True)
            address = dataclasses.replace(address, run=known[0])
        self.address, self.group = address, group
        self.consumer = consumer or f"{socket.gethostname()}-{os.getpid()}"
        self.claim_after = claim_after
        self.duplicates = 0
        """Messages that were delivered again and left out."""
        self.skipped = 0
        """Entries in the stream that are no events of ours."""
        self._redis = package()
        self._client = address.client()
        self._place = b"0-0"
        self._newest: dict[str, int] = {}  # of each spool's events, the number read last (alone)
        self._done: OrderedDict[str, None] = OrderedDict()  # ids confirmed (in a group)
        self._held: set[str] = set()  # ids given and not yet confirmed
        self._again: bytes | None = b"0-0"  # where to go on among our own unconfirmed entries
        self._claimed_at = -float("inf")

    def read(self, count: int = 100, block: float = 0.0) -> list[Message]:
        """Up to `count` new messages, waiting up to `block` seconds for the first.

        Raises:
          OonaError: the server does not answer; `read` may be called again.
        """
        wait = min(block, self.address.timeout / 2)
        until = time.monotonic() + block
        while True:
            found = self._ask(lambda: self._grouped(count, wait) if self.group else self._alone(count, wait))
            if found or time.monotonic() >= until:
                return found

    def ack(self, messages: Sequence[Message]) -> None:
        """Confirm messages to the group."""
        if self.group is None:
            raise ValueError("only a reader in a group confirms messages: Reader(address, group=...)")
        if messages:
            self._ask(lambda: self._client.xack(self.address.stream, self.group, *(m.place for m in messages)))
        for message in messages:
            self._done[message.id] = None
            self._held.discard(message.id)
        while len(self._done) > REMEMBERED:
            self._done.popitem(last=False)

    def follow(self) -> Iterator[Message]:
        """Every message for ever; while the server is away it is asked less and less often. Confirms after each yield.

        Raises:
          OonaError: a lasting one, e.g. a wrong password.
        """
        breaker = Breaker(self.address.shown, failures=1, cooldown=0.1, max_cooldown=5.0)
        while True:
            time.sleep(breaker.retry_in)
            try:
                found = breaker.call(self.read, 100, 1.0)
            except OonaError as error:
                if not error.transient:
                    raise
                continue
            for message in found:
                yield message
                if self.group:
                    self.ack([message])

    def close(self) -> None:
        """Let go of the server."""
        self._client.close()

    def _ask(self, what: Callable[[], T]) -> T:
        try:
            return what()
        except self._redis.RedisError as error:
            self._again = b"0-0"
            raise self.address.trouble(error) from error

    def _alone(self, count: int, wait: float) -> list[Message]:
        stream, found = self.address.stream, list[Message]()
        while not found:
            answer = self._client.xread({stream: self._place}, count=count, block=max(1, int(wait * 1000)))
            if not answer:
                if self._place != b"0-0" and self._lost():
                    self._place = b"0-0"
                    continue
                return []
            for place, entry in answer[0][1]:
                self._place = place
                message = self._message(place, entry)
                if message is None:
                    continue
                token, _, number = message.id.rpartition("-")
                if int(number) <= self._newest.get(token, 0):
                    self.duplicates += 1
                    continue
                self._newest[token] = int(number)
                found.append(message)
        return found

    def _lost(self) -> bool:
        """Whether the server's stream ends before the place we have read to: it lost data or was emptied."""
        if not self._client.exists(self.address.stream):
            return True
        last = self._client.xinfo_stream(self.address.stream)["last-generated-id"]
        return _order(last) < _order(self._place)

    def _grouped(self, count: int, wait: float) -> list[Message]:
        stream, group, me = self.address.stream, self.group, self.consumer
        try:
            if self._again is not None:
                answer = self._client.xreadgroup(group, me, {stream: self._again}, count=count)
                entries = answer[0][1] if answer else []
                self._again = entries[-1][0] if entries else None
                if fresh := self._new(entries):
                    return fresh
            if time.monotonic() >= self._claimed_at + self.claim_after:
                idle = int(self.claim_after * 1000)
                _, entries, *_ = self._client.xautoclaim(stream, group, me, idle, "0-0", count=count)
                if fresh := self._new(entries):
                    return fresh
                self._claimed_at = time.monotonic()
            answer = self._client.xreadgroup(group, me, {stream: ">"}, count=count, block=max(1, int(wait * 1000)))
            return self._new(answer[0][1]) if answer else []
        except self._redis.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self._make_group()
            return self._grouped(count, wait)

    def _make_group(self) -> None:
        """The group from the first event on, if nobody else made it meanwhile."""
        try:
            self._client.xgroup_create(self.address.stream, self.group, id="0", mkstream=True)
        except self._redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _new(self, entries: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> list[Message]:
        """The messages among a group's entries that this reader has not confirmed; the others are confirmed again."""
        found, useless = [], []
        for place, entry in entries:
            message = self._message(place, entry)
            if message is None:
                useless.append(place)
            elif message.id in self._done:
                self.duplicates += 1
                useless.append(place)
            elif message.id in self._held:
                self.duplicates += 1
            else:
                self._held.add(message.id)
                found.append(message)
        if useless:
            self._client.xack(self.address.stream, self.group, *useless)
        return found

    def _message(self, place: bytes, entry: dict[bytes, bytes] | None) -> Message | None:
        """The entry as a message; None, counted, when it is no event that this version reads."""
        try:
            assert entry is not None  # trimmed away while it was unconfirmed
            name = entry[b"id"].decode()
            int(name.rpartition("-")[2])
            return Message(name, place.decode(), Event.from_json(entry[b"event"]))
        except (AssertionError, KeyError, TypeError, ValueError):
            self.skipped += 1
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BusSource:
    """A run's events for `esper-jax watch`; while the server is away it says so and asks again.

    Raises:
      OonaError: lasting trouble at the start: a missing package, a wrong password.
    """

    def __init__(self, address: str | Address) -> None:
        self._address = Address.of(address)
        package()
        self._reader: Reader | None = None
        self._breaker = Breaker(self._address.shown, failures=1, cooldown=0.2, max_cooldown=5.0)
        self.name = self._address.run or self._address.shown
        self.trouble = ""
        try:
            self._connect()
        except OonaError as error:
            if not error.transient:
                raise
            self.trouble = str(error)

    def poll(self) -> tuple[bool, list[Event]]:
        """New events since the last call."""
        if not self._breaker.allows():
            return False, []
        try:
            found = self._connect().read(1000)
        except OonaError as error:
            self._breaker.failed(error)
            self.trouble = str(error)
            return False, []
        self._breaker.succeeded()
        self.trouble = ""
        return False, [message.event for message in found]

    def _connect(self) -> Reader:
        if self._reader is None:
            self._reader = Reader(self._address)
            self.name = self._reader.address.run or self.name
        return self._reader


def _order(place: bytes) -> tuple[int, int]:
    first, _, second = place.partition(b"-")
    return int(first), int(second or 0)
