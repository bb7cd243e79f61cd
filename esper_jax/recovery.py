"""What to do when something outside fails: tell passing trouble from lasting, try again, and stop trying for a while.

Nothing here knows a subsystem or imports a package on its own: `classify` knows other libraries' errors by their names,
and only `retrying` needs `tenacity`. Nothing here decides anything about the training itself, so clocks are allowed.
"""

from __future__ import annotations

import enum
import errno
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Verdict = Literal["transient", "permanent"]

_PASSING_STATUS = {408, 421, 425, 429, 500, 502, 503, 504}
_PASSING_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.EMFILE,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOTCONN,
    errno.EPIPE,
    errno.ETIMEDOUT,
}
# By `package.ClassName`, looked up along the class's bases, nearest first: a password error of redis is a connection
# error by inheritance, and yet no retry will help.
_KNOWN: dict[str, Verdict] = {
    "redis.AuthenticationError": "permanent",
    "redis.AuthorizationError": "permanent",
    "redis.NoPermissionError": "permanent",
    "redis.BusyLoadingError": "transient",
    "redis.ClusterDownError": "transient",
    "redis.MasterDownError": "transient",
    "redis.OutOfMemoryError": "transient",
    "redis.ReadOnlyError": "transient",
    "redis.TryAgainError": "transient",
    "redis.WatchError": "transient",
    "redis.ConnectionError": "transient",
    "redis.TimeoutError": "transient",
    "redis.RedisError": "permanent",
    "httpx.UnsupportedProtocol": "permanent",
    "httpx.LocalProtocolError": "permanent",
    "httpx.ProxyError": "transient",
    "httpx.TransportError": "transient",
    "requests.ConnectionError": "transient",
    "requests.Timeout": "transient",
    "requests.ChunkedEncodingError": "transient",
    "aiohttp.ClientConnectionError": "transient",
    "aiohttp.ClientPayloadError": "transient",
    "botocore.HTTPClientError": "transient",
    "botocore.ConnectionError": "transient",
}


def classify(error: BaseException) -> Verdict:
    """Whether the same call may succeed later ("transient") or never will as it stands ("permanent").

    Transient are refused, reset and timed-out connections, a server that is loading, full or busy, and the HTTP answers
    408, 421, 425, 429, 500, 502, 503 and 504. Permanent are wrong passwords, certificates, addresses and requests,
    errors in the program, and everything unknown. An error with a boolean attribute `transient` speaks for itself; an
    unknown one raised `from` another is judged by that one.

    >>> classify(ConnectionRefusedError()), classify(PermissionError()), classify(ValueError())
    ('transient', 'permanent', 'permanent')
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        verdict = _judge(current)
        if verdict is not None:
            return verdict
        current = current.__cause__
    return "permanent"


def _judge(error: BaseException) -> Verdict | None:
    if not isinstance(error, Exception):
        return "permanent"  # Ctrl-C and exits are never tried again
    own = getattr(error, "transient", None)
    if isinstance(own, bool):
        return "transient" if own else "permanent"
    status = _status(error)
    if status is not None:
        return "transient" if status in _PASSING_STATUS else "permanent"
    for base in type(error).__mro__:
        known = _KNOWN.get(f"{base.__module__.split('.')[0]}.{base.__name__}")
        if known is not None:
            return known
    if isinstance(error, ssl.SSLCertVerificationError):
        return "permanent"
    if isinstance(error, socket.gaierror):
        return "transient" if error.errno == socket.EAI_AGAIN else "permanent"
    if isinstance(error, ConnectionError | TimeoutError):
        return "transient"
    if isinstance(error, OSError) and error.errno is not None:
        return "transient" if error.errno in _PASSING_ERRNO else "permanent"
    return None


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of httpx, requests, aiohttp, urllib or botocore carries."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        meta = answer.get("ResponseMetadata")
        found = meta.get("HTTPStatusCode") if isinstance(meta, dict) else None
        return found if isinstance(found, int) else None
    for holder in (error, answer):
        for name in ("status_code", "status", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599:
                return value
    return None


def retrying(
    function: Callable[..., T],
    *arguments: Any,
    attempts: int = 3,
    timeout: float | None = None,
    wait: float = 0.1,
    max_wait: float = 5.0,
    jitter: float = 1.0,
    on_retry: Callable[[BaseException, int, float], None] | None = None,
    classify: Callable[[BaseException], Verdict] = classify,
    sleep: Callable[[float], None] = time.sleep,
    **keywords: Any,
) -> T:
    """Call `function(*arguments, **keywords)`, again after a transient error, and return what it returns.

    Args:
      function: what to call.
      *arguments: its arguments.
      attempts: calls in all, 1 or more.
      timeout: seconds after which no further attempt begins; None sets no limit. A call that hangs is not interrupted:
        give the call itself a timeout too.
      wait: seconds before the second attempt; doubled each time, up to `max_wait`.
      max_wait: the longest pause.
      jitter: the share of each pause that is random, 0 to 1, so that many clients do not come back together.
      on_retry: called as `on_retry(error, attempt, seconds)` before each pause.
      classify: tells passing errors from lasting ones.
      sleep: how to pause.
      **keywords: keyword arguments of the function.

    Raises:
      The error of the last attempt, or at once one that is permanent. ImportError: `tenacity` is missing.

    >>> retrying(lambda: 7, attempts=2)
    7
    """
    if attempts < 1 or wait < 0 or max_wait < 0 or not 0 <= jitter <= 1:
        raise ValueError(
            f"retrying needs attempts >= 1, pauses >= 0 and jitter in [0, 1], got attempts={attempts}, wait={wait}, "
            f"max_wait={max_wait}, jitter={jitter}"
        )
    try:
        import tenacity
    except ImportError as error:
        raise ImportError('trying again needs the package tenacity: pip install "esper_jax[recovery]"') from error

    def pause(state: Any) -> float:
        whole = min(max_wait, wait * 2.0 ** min(state.attempt_number - 1, 60))
        return whole * (1 - jitter * random.random())

    def told(state: Any) -> None:
        if on_retry is not None:
            on_retry(state.outcome.exception(), state.attempt_number, state.next_action.sleep)

    stop: Any = tenacity.stop_after_attempt(attempts)
    if timeout is not None:
        stop = stop | tenacity.stop_before_delay(timeout)
    policy = tenacity.Retrying(
        stop=stop,
        wait=pause,
        retry=tenacity.retry_if_exception(lambda error: classify(error) == "transient"),
        before_sleep=told,
        sleep=sleep,
        reraise=True,
    )
    return policy(function, *arguments, **keywords)


class BreakerState(enum.StrEnum):
    """What a breaker does with the next call."""

    CLOSED = "closed"  # lets it through
    OPEN = "open"  # refuses it
    TRIAL = "trial"  # lets one through, to see


class BreakerOpen(RuntimeError):
    """A call was refused without being made; `retry_in` is the seconds until the next one may be tried."""

    transient = True

    def __init__(self, message: str, retry_in: float) -> None:
        super().__init__(message)
        self.retry_in = retry_in


class Breaker:
    """Stops calling what keeps failing: CLOSED > OPEN after `failures` in a row > TRIAL after `cooldown` seconds.

    A trial that succeeds closes it; one that fails opens it again, for twice as long, up to `max_cooldown`. All methods
    may be used from several threads; no lock is held during a call or a callback, and only one caller has the trial.

    Args:
      name: what is called, for messages.
      failures: how many in a row open it.
      cooldown, max_cooldown: seconds that it stays open.
      counts: which errors count; others pass through and say nothing about what is called (by default all count).
      on_change: called as `on_change(before, after, error)`; `error` is what opened it, and None otherwise.
      now: a monotonic clock.

    >>> breaker = Breaker("the service", failures=1, cooldown=60.0)
    >>> breaker.failed(ConnectionRefusedError())
    >>> breaker.state, breaker.allows()
    (<BreakerState.OPEN: 'open'>, False)
    """

    def __init__(
        self,
        name: str = "the service",
        *,
        failures: int = 3,
        cooldown: float = 1.0,
        max_cooldown: float = 60.0,
        counts: Callable[[Exception], bool] = lambda error: True,
        on_change: Callable[[BreakerState, BreakerState, Exception | None], None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if failures < 1 or not 0 <= cooldown <= max_cooldown:
            raise ValueError(
                f"a breaker needs failures >= 1 and 0 <= cooldown <= max_cooldown, got failures={failures}, "
                f"cooldown={cooldown}, max_cooldown={max_cooldown}"
            )
        self.name, self.failures, self.cooldown, self.max_cooldown = name, failures, cooldown, max_cooldown
        self.counts, self.on_change, self._now = counts, on_change, now
        self.error: Exception | None = None
        """The last error that counted, until the next success."""
        self.outages = 0
        """How often it went from CLOSED to OPEN."""
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED
        self._row = 0  # failures in a row
        self._until = 0.0  # when the next trial may begin
        self._pause = cooldown

    @property
    def state(self) -> BreakerState:
        """The state as it stands; OPEN becomes TRIAL when `allows` or `call` is next asked after the cooldown."""
        return self._state

    @property
    def retry_in(self) -> float:
        """Seconds until a call may be tried; 0 when one may be now."""
        with self._lock:
            return 0.0 if self._state == BreakerState.CLOSED else max(0.0, self._until - self._now())

    def allows(self) -> bool:
        """Whether a call may be made now. After a True, tell `succeeded` or `failed`."""
        with self._lock:
            if self._state == BreakerState.CLOSED:
                return True
            if self._now() < self._until:
                return False
            before, self._state = self._state, BreakerState.TRIAL
            self._until = self._now() + self._pause  # another trial, should this one never report
        self._tell(before, BreakerState.TRIAL, None)
        return True

    def succeeded(self) -> None:
        """The call worked: closes the breaker."""
        with self._lock:
            before, self._state = self._state, BreakerState.CLOSED
            self._row, self._pause, self.error = 0, self.cooldown, None
        self._tell(before, BreakerState.CLOSED, None)

    def failed(self, error: Exception) -> None:
        """The call failed: counts, and opens the breaker when that was one too many, or a trial."""
        with self._lock:
            self.error = error
            self._row += 1
            before = self._state
            if before == BreakerState.CLOSED and self._row < self.failures:
                return
            if before == BreakerState.OPEN:
                return  # a late answer to a call from before
            self._pause = self.cooldown if before == BreakerState.CLOSED else min(2 * self._pause, self.max_cooldown)
            self.outages += before == BreakerState.CLOSED
            self._state = BreakerState.OPEN
            self._until = self._now() + self._pause
        self._tell(before, BreakerState.OPEN, error)

    def call(self, function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        """Call through the breaker.

        Raises:
          BreakerOpen: it is open, and nothing was called. Otherwise what the function raises.
        """
        if not self.allows():
            pause = self.retry_in
            raise BreakerOpen(
                f"{self.name} keeps failing ({describe(self.error)}); the next attempt is in {pause:.1f} s", pause
            )
        try:
            result = function(*arguments, **keywords)
        except Exception as error:
            if self.counts(error):
                self.failed(error)
            else:
                self.succeeded()  # it answered
            raise
        self.succeeded()
        return result

    def __repr__(self) -> str:
        return f"Breaker({self.name!r}, {self._state}, {self._row} failures in a row, {self.outages} outages)"

    def _tell(self, before: BreakerState, after: BreakerState, error: Exception | None) -> None:
        if before != after and self.on_change is not None:
            self.on_change(before, after, error)


def describe(error: BaseException | None) -> str:
    """An error for people: its kind and what it says, on one line."""
    if error is None:
        return "no error"
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
