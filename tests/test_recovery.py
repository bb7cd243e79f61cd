"""Retry, breaker and classification: the one place that decides whether a failure is worth another try."""

from __future__ import annotations

import email.message
import errno
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_jax.recovery import Breaker, BreakerOpen, BreakerState, classify, describe, retrying

CLOSED, OPEN, TRIAL = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.TRIAL


def http(status: int) -> Exception:
    return urllib.error.HTTPError("http://x", status, "said", email.message.Message(), None)


class Speaking(Exception):
    def __init__(self, transient: bool) -> None:
        self.transient = transient


class Stored(Exception):
    response: ClassVar = {"ResponseMetadata": {"HTTPStatusCode": 503}}


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (ConnectionRefusedError(), "transient"),
        (ConnectionResetError(), "transient"),
        (BrokenPipeError(), "transient"),
        (TimeoutError(), "transient"),
        (OSError(errno.EHOSTUNREACH, "no route"), "transient"),
        (OSError(errno.ENOSPC, "full"), "permanent"),
        (FileNotFoundError(errno.ENOENT, "x"), "permanent"),
        (PermissionError(errno.EACCES, "x"), "permanent"),
        (socket.gaierror(socket.EAI_AGAIN, "later"), "transient"),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), "permanent"),
        (ssl.SSLCertVerificationError("bad"), "permanent"),
        (http(503), "transient"),
        (http(429), "transient"),
        (http(404), "permanent"),
        (http(501), "permanent"),
        (Stored(), "transient"),
        (Speaking(True), "transient"),
        (Speaking(False), "permanent"),
        (ValueError("x"), "permanent"),
        (KeyboardInterrupt(), "permanent"),
        (RuntimeError("who knows"), "permanent"),
    ],
)
def test_passing_trouble_is_told_from_lasting(error: BaseException, verdict: str) -> None:
    assert classify(error) == verdict


def test_an_unknown_error_is_judged_by_its_cause_and_a_circle_of_causes_ends() -> None:
    wrapped = RuntimeError("could not fetch")
    wrapped.__cause__ = ConnectionResetError()
    assert classify(wrapped) == "transient"
    first, second = RuntimeError(), RuntimeError()
    first.__cause__, second.__cause__ = second, first
    assert classify(first) == "permanent"


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("ConnectionError", "transient"),
        ("TimeoutError", "transient"),
        ("BusyLoadingError", "transient"),
        ("OutOfMemoryError", "transient"),
        ("AuthenticationError", "permanent"),  # a ConnectionError by inheritance
        ("NoPermissionError", "permanent"),
        ("ResponseError", "permanent"),
    ],
)
def test_errors_of_redis_are_known_by_name(name: str, verdict: str) -> None:
    exceptions = pytest.importorskip("redis.exceptions")
    assert classify(getattr(exceptions, name)("said")) == verdict


def test_errors_of_httpx_are_known_by_name() -> None:
    httpx = pytest.importorskip("httpx")
    request = httpx.Request("GET", "http://x")
    assert classify(httpx.ConnectTimeout("late", request=request)) == "transient"
    assert classify(httpx.RemoteProtocolError("cut off", request=request)) == "transient"
    assert classify(httpx.UnsupportedProtocol("gopher", request=request)) == "permanent"
    for status, verdict in ((503, "transient"), (401, "permanent")):
        answer = httpx.Response(status, request=request)
        assert classify(httpx.HTTPStatusError("x", request=request, response=answer)) == verdict


class Failing:
    """Fails `times` times, then answers."""

    def __init__(self, times: int, error: Exception) -> None:
        self.times, self.error, self.calls = times, error, 0

    def __call__(self, answer: str = "done") -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return answer


def test_a_passing_failure_is_tried_again_with_growing_pauses() -> None:
    slept: list[float] = []
    told: list[tuple[str, int]] = []
    failing = Failing(4, TimeoutError("late"))
    options = {"attempts": 5, "wait": 1.0, "max_wait": 3.0, "jitter": 0.0, "sleep": slept.append}
    told_of = lambda error, attempt, pause: told.append((str(error), attempt))  # noqa: E731
    assert retrying(failing, "yes", on_retry=told_of, **options) == "yes"
    assert slept == [1.0, 2.0, 3.0, 3.0]
    assert told == [("late", 1), ("late", 2), ("late", 3), ("late", 4)]


def test_the_last_error_comes_out_as_it_was_and_a_permanent_one_at_once() -> None:
    failing = Failing(9, ConnectionResetError("gone"))
    with pytest.raises(ConnectionResetError, match="gone"):
        retrying(failing, attempts=3, wait=0.0)
    assert failing.calls == 3
    failing = Failing(9, ValueError("bad request"))
    with pytest.raises(ValueError, match="bad request"):
        retrying(failing, attempts=3, wait=0.0)
    assert failing.calls == 1


def test_no_attempt_begins_after_the_timeout() -> None:
    failing = Failing(99, TimeoutError())
    with pytest.raises(TimeoutError):
        retrying(failing, attempts=99, timeout=0.05, wait=0.02, jitter=0.0)
    assert 2 <= failing.calls <= 3


@given(jitter=st.floats(0, 1), attempt=st.integers(2, 6))
def test_jitter_only_shortens_a_pause_and_by_no_more_than_its_share(jitter: float, attempt: int) -> None:
    slept: list[float] = []
    retrying(Failing(attempt - 1, TimeoutError()), attempts=attempt, wait=1.0, jitter=jitter, sleep=slept.append)
    for index, pause in enumerate(slept):
        whole = min(5.0, 2.0**index)
        assert whole * (1 - jitter) - 1e-9 <= pause <= whole


def test_nonsense_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="attempts >= 1.* got attempts=0"):
        retrying(lambda: 1, attempts=0)
    with pytest.raises(ValueError, match="failures >= 1"):
        Breaker(failures=0)


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def breaker(clock: Clock, **options: object) -> tuple[Breaker, list[str]]:
    changes: list[str] = []
    told = lambda before, after, error: changes.append(f"{before}>{after} {describe(error)}")  # noqa: E731
    made = Breaker("x", **{"failures": 2, "cooldown": 1.0, "max_cooldown": 3.0} | options, now=clock, on_change=told)
    return made, changes


def test_a_breaker_opens_after_failures_in_a_row_and_closes_after_one_good_trial() -> None:
    clock = Clock()
    made, changes = breaker(clock)
    made.failed(TimeoutError())
    made.succeeded()
    made.failed(TimeoutError())
    assert made.state == CLOSED and made.allows()
    made.failed(TimeoutError("late"))
    assert made.state == OPEN and not made.allows() and made.retry_in == 1.0
    clock.time = 1.0
    assert made.allows() and made.state == TRIAL
    assert not made.allows()  # one trial at a time
    made.succeeded()
    assert made.state == CLOSED and made.outages == 1
    assert changes == ["closed>open TimeoutError: late", "open>trial no error", "trial>closed no error"]


def test_each_failed_trial_doubles_the_pause_up_to_the_longest() -> None:
    clock = Clock()
    made, _ = breaker(clock, failures=1)
    made.failed(TimeoutError())
    seen = []
    for _ in range(4):
        seen.append(made.retry_in)
        clock.time += made.retry_in
        assert made.allows()
        made.failed(TimeoutError())
    assert seen == [1.0, 2.0, 3.0, 3.0]
    assert made.outages == 1  # one outage, however many trials


def test_a_trial_that_never_reports_does_not_block_for_ever() -> None:
    clock = Clock()
    made, _ = breaker(clock, failures=1)
    made.failed(TimeoutError())
    clock.time = 1.0
    assert made.allows()
    clock.time = 1.5
    assert not made.allows()
    clock.time = 2.0
    assert made.allows()


def test_a_call_through_an_open_breaker_is_not_made_and_says_when() -> None:
    clock = Clock()
    made, _ = breaker(clock, failures=1)
    failing = Failing(1, ConnectionRefusedError("refused"))
    with pytest.raises(ConnectionRefusedError):
        made.call(failing)
    with pytest.raises(BreakerOpen, match=r"x keeps failing \(ConnectionRefusedError: refused\).* in 1.0 s") as refused:
        made.call(failing)
    assert failing.calls == 1 and refused.value.retry_in == 1.0 and classify(refused.value) == "transient"
    clock.time = 1.0
    assert made.call(failing) == "done" and made.state == CLOSED


def test_an_error_that_does_not_count_shows_that_the_other_side_lives() -> None:
    made, _ = breaker(Clock(), failures=1, counts=lambda error: not isinstance(error, ValueError))
    with pytest.raises(ValueError, match="no"):
        made.call(Failing(1, ValueError("no")))
    assert made.state == CLOSED


def test_only_one_of_many_threads_gets_the_trial() -> None:
    clock = Clock()
    made, _ = breaker(clock, failures=1)
    made.failed(TimeoutError())
    clock.time = 1.0
    start, allowed = threading.Barrier(8), []

    def ask() -> None:
        start.wait()
        allowed.append(made.allows())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert allowed.count(True) == 1


def test_recovery_needs_no_package_until_something_is_tried_again() -> None:
    code = """if True:
        import sys
        sys.modules["tenacity"] = None
        import esper_jax.recovery as recovery
        recovery.Breaker().call(int)
        assert recovery.classify(TimeoutError()) == "transient"
        try:
            recovery.retrying(int)
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'trying again needs the package tenacity: pip install "esper_jax[recovery]"'
