"""Questions posted in the background and their answers: HTTP with hard limits, retries, and a circuit breaker.

It speaks HTTP through the standard library, because a limit that also holds against a hostile service needs the socket
itself: a timer shuts it down when the time is over, whatever part of the answer is being dripped at that moment. No
library at hand has such a total limit. Redirects, compression and proxies are not followed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import http.client
import math
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from ..recovery import Breaker, describe, retrying
from .wire import Answer, WireError, printable

Check = Callable[[bytes], Answer]


class ServiceError(Exception):
    """The service answered with an HTTP error; `status` is its number."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Superseded(Exception):
    """A newer question waits, so this one is not tried again."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """What became of a question: its checked answer, or the reason why there is none ("" where it is not there yet)."""

    answer: Answer | None
    reason: str
    seconds: float


class Mail:
    """One service, asked one question at a time by a thread of its own; a newer question takes a waiting one's place.

    Args:
      url: `http://host:port` or `https://...`, with a path before `/v1` where there is one.
      token: sent as a bearer token; None sends none.
      timeout: seconds for a question, all attempts together.
      max_bytes: the largest answer that is read.
      attempts: tries for a question whose failure may pass.
      breaker: stops asking for a while what keeps failing.
    """

    def __init__(
        self, url: str, *, token: str | None, timeout: float, max_bytes: int, attempts: int, breaker: Breaker
    ) -> None:
        self._connect, self._path = _target(url)
        self._token, self.timeout, self.max_bytes, self.attempts = token, timeout, max_bytes, attempts
        self.breaker = breaker
        self._changed = threading.Condition()
        self._waiting: tuple[str, bytes, Check] | None = None
        self._asking: str | None = None
        self._replies: collections.OrderedDict[str, Reply] = collections.OrderedDict()
        self._thread: threading.Thread | None = None
        self._lost = math.nan

    def post(self, name: str, body: bytes, check: Check) -> None:
        """Ask a question in the background; returns at once. `check` turns the bytes that come into an answer."""
        with self._changed:
            self._waiting = (name, body, check)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="tamiyo-client", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def take(self, name: str, wait: float = 0.0) -> Reply | None:
        """The reply to a question, waiting so many seconds at most for one under way; None: it was never posted."""
        with self._changed:
            if not self._knows(name):
                return None
            self._changed.wait_for(lambda: name in self._replies or not self._knows(name), wait)
            reply = self._replies.pop(name, None)
        return reply or Reply(None, "", wait)

    def lose(self) -> None:
        """Note that answers stay away from now on."""
        self._lost = time.monotonic()

    def since_lost(self) -> float:
        """Seconds since `lose`, for people; NaN where another process noted it."""
        lost, self._lost = self._lost, math.nan
        return time.monotonic() - lost

    def settle(self, seconds: float) -> bool:
        """Wait until nothing is under way, so many seconds at most; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and self._asking is None, seconds)

    def _knows(self, name: str) -> bool:
        waiting = self._waiting is not None and self._waiting[0] == name
        return waiting or self._asking == name or name in self._replies

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                assert self._waiting is not None
                (name, body, check), self._waiting = self._waiting, None
                self._asking = name
            began = time.monotonic()
            answer, reason = None, ""
            try:
                answer = self.breaker.call(self._ask, body, check)
            except Exception as error:  # whatever a service or its answer makes go wrong is its reason, never ours
                reason = printable(str(error) if isinstance(error, WireError | ServiceError) else describe(error))[:500]
            with self._changed:
                self._asking = None
                self._replies[name] = Reply(answer, reason, time.monotonic() - began)
                while len(self._replies) > 4:
                    self._replies.popitem(last=False)
                self._changed.notify_all()

    def _ask(self, body: bytes, check: Check) -> Answer:
        deadline = time.monotonic() + self.timeout
        once = functools.partial(self._once, body, check, deadline)
        return retrying(once, attempts=self.attempts, timeout=self.timeout, wait=0.1, max_wait=2.0, sleep=self._pause)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if self._changed.wait_for(lambda: self._waiting is not None, seconds):
                raise Superseded("a newer question was asked before it answered")

    def _once(self, body: bytes, check: Check, deadline: float) -> Answer:
        try:
            status, data = self._exchange(body, deadline)
        except http.client.HTTPException as error:
            if isinstance(error, ConnectionError) or time.monotonic() >= deadline:
                raise
            raise WireError(f"no HTTP answer: {printable(describe(error))[:300]}") from None
        finally:
            if time.monotonic() >= deadline:  # whatever went wrong then, this is why
                raise TimeoutError(f"no whole answer within {self.timeout:g} seconds")
        if status != 200:
            raise ServiceError(status, f"it answered with HTTP status {status}: {_excerpt(data)}")
        return check(data)

    def _exchange(self, body: bytes, deadline: float) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        connection = self._connect(timeout=max(deadline - time.monotonic(), 0.001))
        with contextlib.closing(connection):
            connection.connect()
            timer = threading.Timer(max(deadline - time.monotonic(), 0), _cut, [connection.sock])
            timer.daemon = True
            timer.start()
            try:
                connection.request("POST", self._path, body, headers)
                with connection.getresponse() as response:
                    return response.status, self._read(response)
            finally:
                timer.cancel()

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise WireError("the answer is compressed, which was not asked for")
        data = response.read(self.max_bytes + 1)
        if len(data) > self.max_bytes:
            raise WireError(f"the answer is larger than {self.max_bytes} bytes")
        if response.length:  # less came than was announced
            raise ConnectionResetError(f"the answer ended after {len(data)} bytes, {response.length} were to come")
        return data


def _target(url: str) -> tuple[Callable[..., http.client.HTTPConnection], str]:
    """How to connect to a service, and the path of its questions."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except (ValueError, AttributeError):
        host, port, parts = None, None, urllib.parse.SplitResult("", "", "", "", "")
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.query or parts.fragment:
        raise ValueError(f"a service is http://host:port or https://host:port, got {url!r}")
    kind: Any = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return functools.partial(kind, host, port), parts.path.rstrip("/") + "/v1/decide"


def _cut(connection: socket.socket) -> None:
    """End a connection from another thread: a shutdown wakes whoever reads from or writes to it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _excerpt(data: bytes) -> str:
    return printable(data[:200].decode("utf-8", "replace"))
