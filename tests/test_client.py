"""A client and services that fail it in every way: no decisions, one notice, no waiting; and runs repeated."""

from __future__ import annotations

import json
import pathlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jsonschema
import numpy as np
import pytest

from esper_jax import FixedSchedule, Gates, ReplayController, Spec, TamiyoClient, Tolaria
from esper_jax.nissa import course, read_events, schema
from esper_jax.nissa.event import Event

from .control_world import SITES, report
from .services import Service, free_port, misbehaving, read_request, respond
from .tolaria import growing

SPEC = Spec(SITES, 2)
KEY = np.array([0, 7], np.uint32)
Serve = Callable[[socket.socket], object]


def answer_to(body: bytes, **changes: Any) -> bytes:
    line = {"v": 1, "question": json.loads(body)["id"], "decisions": [], "state": [], "controller": "c", "mock": False}
    return json.dumps({**line, **changes}).encode()


def germination(body: bytes) -> bytes:
    return answer_to(body, decisions=[{"action": "germinate", "site": "b", "blueprint": "lora"}])


def ok(connection: socket.socket) -> None:
    respond(connection, germination(read_request(connection)))


def ticks(client: TamiyoClient, number: int, state: Any = None, wait: float = 10.0) -> tuple[list[Any], Any, list[Any]]:
    """Decisions and notices of so many ticks, with time for answers in between; and the state."""
    state = client.init(SPEC, KEY) if state is None else state
    decisions, notices = [], []
    for epoch in range(number):
        decided, state = client.decide(state, report(epoch=epoch), ())
        decisions += decided
        notices += client.notices()
        if wait:
            assert client.settle(wait)
    return decisions, state, notices


def drip(first: bytes, piece: bytes, pause: float = 0.05) -> Serve:
    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(first)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return serve


def says(make: Callable[[bytes], bytes], status: str = "200 OK", headers: str = "") -> Serve:
    return lambda connection: respond(connection, make(read_request(connection)), status, headers)


def raw(data: bytes) -> Serve:
    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(data)

    return serve


HEAD = b"HTTP/1.1 200 OK\r\n"
BAD: dict[str, tuple[Serve, str]] = {
    "silence": (lambda connection: time.sleep(5), "no whole answer within 0.6 seconds"),
    "closes": (read_request, "RemoteDisconnected"),
    "not http": (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "no HTTP answer: BadStatusLine"),
    "garbage": (says(lambda body: b"\x00\xff" * 50), "not an answer"),
    "json": (says(lambda body: b'{"decisions": "all"}'), "not an answer"),
    "html": (says(lambda body: b"<html>login</html>"), "not an answer"),
    "status 500": (says(lambda body: b'{"error": "no"}', "500 Internal Server Error"), "status 500"),
    "status 401": (says(lambda body: b'{"error": "token"}', "401 Unauthorized"), "status 401"),
    "redirect": (says(germination, "302 Found", "Location: http://127.0.0.1:1/\r\n"), "status 302"),
    "compressed": (says(germination, headers="Content-Encoding: gzip\r\n"), "compressed"),
    "another question": (says(lambda body: germination(body).replace(b'"question": "', b'"question": "0')), "question"),
    "stale": (says(lambda body: answer_to(body, question="0" * 32)), "it answers question 000"),
    "mock": (says(lambda body: answer_to(body, mock=True)), "the service hosts a mock"),
    "half": (raw(HEAD + b'Content-Length: 500\r\n\r\n{"v": 1'), "ended after 7 bytes"),
    "oversized": (says(lambda body: b" " * 5000 + germination(body)), "larger than 4096 bytes"),
    "announced": (raw(HEAD + b"Content-Length: 999999999999\r\n\r\n" + b"x" * 9000), "larger than 4096 bytes"),
    "endless": (drip(HEAD + b"\r\n", b"x" * 60_000, 0), "larger than 4096 bytes"),
    "endless chunks": (drip(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"4\r\nabcd\r\n", 0), "larger than 4096"),
    "endless headers": (drip(HEAD, b"X-A: " + b"b" * 900 + b"\r\n", 0), "no HTTP answer: HTTPException"),
    "long line": (drip(HEAD, b"b" * 60_000, 0), "no HTTP answer: LineTooLong"),
    "dripped headers": (drip(HEAD, b"X"), "no whole answer within 0.6 seconds"),
    "dripped body": (drip(HEAD + b"\r\n", b" "), "no whole answer within 0.6 seconds"),
    "continues": (drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001), "no whole answer within 0.6 seconds"),
}


@pytest.mark.parametrize("how", BAD)
def test_whatever_a_service_does_there_are_no_decisions_and_one_notice(how: str) -> None:
    serve, reason = BAD[how]
    with misbehaving(serve) as url:
        client = TamiyoClient(url, timeout=0.6, attempts=1, max_bytes=4096)
        decisions, state, notices = ticks(client, 4, wait=5)
    assert decisions == [] and [notice.kind for notice in notices] == ["outage"]
    assert reason in notices[0].data["error"], notices[0].data["error"]
    assert state.remote.size == 0 and int(state.missed) == 3


def test_where_nobody_listens_the_notice_says_so_and_no_step_waits() -> None:
    client = TamiyoClient(f"http://127.0.0.1:{free_port()}")
    decisions, _, notices = ticks(client, 3)
    assert decisions == [] and "ConnectionRefusedError" in notices[0].message and len(notices) == 1


def test_a_tick_does_not_wait_for_a_slow_service() -> None:
    began = threading.Event()

    def slow(connection: socket.socket) -> None:
        began.set()
        time.sleep(8)

    with misbehaving(slow) as url:
        client = TamiyoClient(url, timeout=10)
        state = client.init(SPEC, KEY)
        _, state = client.decide(state, report(epoch=0), ())
        assert began.wait(5)
        started = time.perf_counter()
        for epoch in range(1, 51):
            decisions, state = client.decide(state, report(epoch=epoch), ())
            assert decisions == ()
        took = time.perf_counter() - started
        told = client.notices()
    assert took < 4.0  # 50 ticks within half an answer's time; they take about 0.05 s
    assert [notice.kind for notice in told] == ["outage"] and "none had come after a lag of 1 tick(s)" in told[
        0
    ].message


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_an_answer_is_used_exactly_lag_ticks_after_its_question(lag: int) -> None:
    with misbehaving(ok) as url:
        client = TamiyoClient(url, lag=lag)
        state = client.init(SPEC, KEY)
        for epoch in range(lag + 1):
            decisions, state = client.decide(state, report(epoch=epoch), ())
            assert len(decisions) == (epoch == lag)
            assert client.settle(10)
    (notice,) = client.notices()
    assert notice.kind == "answer" and notice.data["asked_epoch"] == 0
    assert notice.data["decisions"][0]["action"] == "germinate"


def test_no_question_is_asked_while_decisions_wait_for_their_feedback_and_then_it_carries_the_feedback() -> None:
    from esper_jax import Feedback

    asked: list[Any] = []

    def serve(connection: socket.socket) -> None:
        body = read_request(connection)
        asked.append(json.loads(body))
        respond(connection, germination(body))

    with misbehaving(serve) as url:
        client = TamiyoClient(url)
        state = client.init(SPEC, KEY)
        _, state = client.decide(state, report(epoch=0), ())
        assert client.settle(10)
        (decision,), state = client.decide(state, report(epoch=1), ())
        assert client.settle(10) and len(asked) == 1
        feedback = Feedback(decision, "applied", "", 1.0, 2.5, float("nan"), 0.1)
        _, state = client.decide(state, report(epoch=2), (feedback,))
        assert client.settle(10) and len(asked) == 2
    (line,) = asked[1]["feedback"]
    assert line["outcome"] == "applied" and line["score_after"] == 2.5 and line["contribution"] == "NaN"


def test_feedback_that_could_not_be_delivered_is_delivered_after_the_outage() -> None:
    from esper_jax import Decision, Feedback

    asked: list[Any] = []
    down = True

    def serve(connection: socket.socket) -> None:
        body = read_request(connection)
        asked.append(json.loads(body))
        if not down:
            respond(connection, answer_to(body))

    with misbehaving(serve) as url:
        client = TamiyoClient(url, attempts=1, cooldown=0)
        feedback = Feedback(Decision("prune", "a", 0), "refused", "rule", 1.0, 1.0, 1.0, 0.0)
        state = client.init(SPEC, KEY)
        _, state = client.decide(state, report(epoch=0), (feedback,))
        assert client.settle(10)
        _, state, notices = ticks(client, 3, state)
        down = False
        _, state, more = ticks(client, 3, state)
    assert [notice.kind for notice in notices + more] == ["outage", "recovery", "answer", "answer"]
    assert [len(question["feedback"]) for question in asked[-3:]] == [1, 0, 0] and state.owed.size == 0


def test_a_failure_that_passes_is_tried_again_and_one_that_lasts_is_not() -> None:
    for status, expected in (("503 Service Unavailable", 3), ("400 Bad Request", 2)):
        calls = []

        def serve(connection: socket.socket, status: str = status, calls: list[int] = calls) -> None:
            body = read_request(connection)
            calls.append(1)
            respond(connection, germination(body), "200 OK" if len(calls) == 3 else status)

        with misbehaving(serve) as url:
            decisions, _, _ = ticks(TamiyoClient(url), 2)
        # after the 400 the next tick asks a question of its own
        assert len(calls) == expected and len(decisions) == (expected == 3)


def test_the_breaker_stops_asking_what_keeps_failing_and_asks_again_after_its_cooldown() -> None:
    calls = []

    def serve(connection: socket.socket) -> None:
        read_request(connection)
        calls.append(1)

    with misbehaving(serve) as url:
        client = TamiyoClient(url, attempts=1, failures=2, cooldown=0.4)
        _, state, _ = ticks(client, 6)
        assert len(calls) == 2
        time.sleep(0.45)
        _, _, notices = ticks(client, 2, state)
    assert len(calls) == 3 and notices == []  # the outage was told already


def test_a_token_is_in_no_repr_and_wrong_arguments_are_one_sentence() -> None:
    assert "secret" not in repr(TamiyoClient("http://localhost:1", token="secret"))
    for arguments, sentence in (
        ({"url": "localhost:8700"}, "a service is http://host:port"),
        ({"url": "http://user:pw@host/"}, "a service is http://host:port"),
        ({"url": "http://h:1", "token": "a\r\nX: b"}, "printable ASCII"),
        ({"url": "http://h:1", "lag": -1}, "lag must be a whole number of 0 or more"),
        ({"url": "http://h:1", "timeout": 0}, "timeout must be a finite number of seconds above 0"),
        ({"url": "http://h:1", "attempts": 0}, "attempts must be a whole number of 1 or more"),
    ):
        with pytest.raises(ValueError, match=sentence):
            TamiyoClient(**arguments)


# Whole runs. One trainer, compiled once, runs under one controller after another.

PLAN = {3: [("Dense_0", "mlp", {"hidden": 8})], 12: [("Dense_1", "lora", {"rank": 2})]}
SETTINGS = [f"plan={json.dumps(PLAN)}", "keep=always", "gates.min_training_ticks=2", "gates.min_health=0.1"]


class Between:
    """A sink that lets answers arrive before the next epoch, and does something at events of given kinds and epochs."""

    def __init__(self) -> None:
        self.client: TamiyoClient | None = None
        self.at: dict[tuple[str, int], Callable[[], Any]] = {}

    def emit(self, event: Event) -> None:
        if event.kind == "epoch" and self.client is not None:
            assert self.client.settle(60)
        if action := self.at.get((event.kind, event.epoch)):
            action()

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def hosted() -> Iterator[Service]:
    service = Service("--controller", "fixed", "--set", *SETTINGS)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def made() -> tuple[Tolaria, Between]:
    between = Between()
    return growing.trainer(None, sinks=[between]), between


def run(
    made: tuple[Tolaria, Between], controller: Any, directory: pathlib.Path, *, restore: bool = False, **at: Any
) -> tuple[Any, list[Event]]:
    """The final state and the log of a run, or of the rest of it; `epoch6=f` calls `f` at that event."""
    trainer, between = made
    between.client = controller if isinstance(controller, TamiyoClient) else None
    between.at = {
        (name.rstrip("0123456789"), int(name.lstrip("abcdefghijklmnopqrstuvwxyz"))): f for name, f in at.items()
    }
    trainer.controller = trainer._ticker.controller = controller
    trainer.checkpoint_dir = directory
    state = trainer.restore() if restore else growing.start(trainer)
    state, _ = trainer.fit(state, growing.TRAIN, growing.VALIDATION, epochs=growing.EPOCHS)
    return state, read_events(directory / "events.jsonl")


def bits(state: Any, *, control: bool = True) -> list[bytes]:
    tree = state if control else state.replace(control=None)
    leaves = [jax.random.key_data(leaf) if leaf is state.key else leaf for leaf in jax.tree.leaves(tree)]
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events if event.kind in ("outage", "recovery")]


@pytest.mark.slow
def test_a_remote_controller_without_lag_decides_exactly_as_at_home(made, hosted, tmp_path) -> None:
    home = FixedSchedule(PLAN, gates=Gates(min_training_ticks=2, min_health=0.1), keep="always")
    mine, story = run(made, home, tmp_path / "home")
    away, told = run(made, TamiyoClient(hosted.url, lag=0, timeout=60), tmp_path / "away")
    assert bits(mine, control=False) == bits(away, control=False)
    assert course(story) == course([event for event in told if event.kind != "answer"])
    assert sum(event.kind == "germinated" for event in told) == 2


@pytest.mark.slow
def test_a_run_with_an_outage_is_repeated_from_its_log_to_the_bit(made, hosted, tmp_path) -> None:
    client = TamiyoClient(hosted.url, timeout=60, cooldown=0)
    first, story = run(made, client, tmp_path / "first", epoch6=hosted.kill, epoch10=hosted.start)
    assert kinds(story) == ["outage", "recovery"]
    assert {event.epoch for event in story if event.kind == "answer"}.isdisjoint(range(8, 12))
    assert sum(event.kind == "germinated" for event in story) == 2
    replayed = ReplayController(story)
    second, told = run(made, replayed, tmp_path / "second")
    assert bits(first, control=False) == bits(second, control=False)
    assert course(story) == course(told) and kinds(told) == kinds(story)
    third, _ = run(made, ReplayController(told), tmp_path / "third")
    assert bits(second) == bits(third)
    strict = jsonschema.Draft202012Validator(schema(strict=True))
    for event in story:
        strict.validate(json.loads(event.to_json()))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits_with_a_new_client_and_a_restarted_service(
    made, hosted, tmp_path
) -> None:
    killed = tmp_path / "killed"
    copy = lambda: shutil.copytree(tmp_path / "whole", killed)  # noqa: E731  the disk as a kill would leave it
    whole, story = run(made, TamiyoClient(hosted.url, timeout=60), tmp_path / "whole", checkpoint9=copy)
    hosted.kill()
    hosted.start()
    rest, told = run(made, TamiyoClient(hosted.url, timeout=60), killed, restore=True)
    assert bits(whole) == bits(rest)
    assert course(story) == course(told) and kinds(told) == []


def test_a_replay_beyond_its_log_is_an_error_and_one_that_departs_says_so_once() -> None:
    from esper_jax.nissa import events

    log = [events.epoch(n, 10 * n, train_loss=1.0, loss=1.0, score=50.0) for n in (1, 2)]
    replayed = ReplayController(log)
    state = replayed.init(SPEC)
    _, state = replayed.decide(state, report(epoch=1).__class__(1, 10, 1.0, 1.0, 50.0, (), ()), ())
    assert replayed.notices() == ()
    for epoch in (1, 2):
        _, state = replayed.decide(state, report(epoch=1).__class__(epoch, 10 * epoch, 1.0, 1.0, 50.5, (), ()), ())
    (notice,) = replayed.notices()
    assert notice.kind == "warning" and "the score was 50.0 and is 50.5" in notice.message
    with pytest.raises(ValueError, match="the log knows no tick 10 at step 1000, its last is 2 at step 20"):
        replayed.decide(state, report(epoch=10), ())
