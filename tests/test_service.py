"""A controller behind a real port: who may ask, what is refused and how it is said, what is counted."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from esper_jax import Decision, Feedback, FixedSchedule, Gates, RandomSchedule, Spec, Tamiyo, TamiyoClient
from esper_jax.tamiyo import MockController, packing, wire
from esper_jax.tamiyo.serve import make_controller, serve

from .control_world import SITES, report
from .services import ROOT, Service, misbehaving

SPEC = Spec(SITES, 2)
KEY = np.array([0, 7], np.uint32)
TOKEN = "s3cret-Token"


def question(epoch: int = 3, leaves: Any = None, feedback: tuple[Feedback, ...] = ()) -> bytes:
    return packing.ask(SPEC, KEY, leaves, report(epoch=epoch), packing.feedback_lines(feedback))[1]


@pytest.fixture(scope="module")
def hosted() -> Iterator[Service]:
    service = Service(
        "--controller", "fixed", "--set", 'plan={"3": [["a", "lora"]]}', "--max-bytes", "20000", token=TOKEN
    )
    yield service
    service.stop()


def test_the_right_token_is_answered_and_a_wrong_or_absent_one_is_not(hosted: Service) -> None:
    status, body, _ = hosted.request("POST", "/v1/decide", question(), TOKEN)
    answer = wire.decode(body, wire.Answer)
    assert status == 200 and [line.site for line in answer.decisions] == ["a"] and not answer.mock
    for token in (None, "", TOKEN[:-1], TOKEN + "x", "Bearer", "\xe9"):
        for method, path in (("POST", "/v1/decide"), ("GET", "/metrics"), ("GET", "/v1/schema")):
            status, body, headers = hosted.request(method, path, question() if method == "POST" else None, token)
            assert status == 401 and "token" in json.loads(body)["error"] and headers["www-authenticate"] == "Bearer"
    assert hosted.request("GET", "/v1/schema", token=TOKEN)[0] == 200


def test_health_is_open_and_names_the_controller(hosted: Service) -> None:
    health = hosted.health()
    assert health["status"] == "ok" and health["controller"] == "FixedSchedule" and health["mock"] is False


def test_questions_that_are_none_get_an_error_in_a_sentence_and_the_service_goes_on(hosted: Service) -> None:
    good = json.loads(question())
    leaf = {"path": "", "dtype": "int32", "shape": [], "data": "AAAAAA=="}
    twice = {**good, "sites": good["sites"] * 2}
    for status, wrong in (
        (400, b""),
        (400, b"\xff\xfe"),
        (400, b"[" * 10_000),
        (400, {**good, "v": 2}),
        (400, {**good, "sudo": 1}),
        (400, {**good, "sites": []}),
        (400, twice),
        (400, {**good, "report": {}}),
        (422, {**good, "state": [leaf]}),
        (422, {**good, "sites": good["sites"][1:]}),  # the plan names a site that is not there
        (413, b" " * 20_001),
    ):
        body = wrong if isinstance(wrong, bytes) else json.dumps(wrong).encode()
        found, said, _ = hosted.request("POST", "/v1/decide", body, TOKEN)
        assert found == status and json.loads(said)["error"], (wrong, said)
    assert hosted.request("GET", "/v1/decide", token=TOKEN)[0] == 405
    assert hosted.request("GET", "/nothing", token=TOKEN)[0] == 404
    assert hosted.request("POST", "/v1/decide", question(), TOKEN)[0] == 200


def test_a_body_without_end_is_cut_off_at_the_limit(hosted: Service) -> None:
    with socket.create_connection(("127.0.0.1", hosted.port), timeout=20) as connection:
        lines = "POST /v1/decide HTTP/1.1", "Host: h", f"Authorization: Bearer {TOKEN}", "Transfer-Encoding: chunked"
        connection.sendall("\r\n".join((*lines, "", "")).encode())
        sent = 0
        answer = b""
        connection.settimeout(0.05)
        while not answer and sent < 10**7:
            try:
                connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                sent += 4096
                answer = connection.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                break
    assert answer.startswith(b"HTTP/1.1 413") and sent < 10**6


def test_the_state_travels_and_the_service_remembers_nothing(hosted: Service) -> None:
    def ask(epoch: int, leaves: Any) -> wire.Answer:
        return wire.decode(hosted.request("POST", "/v1/decide", question(epoch, leaves), TOKEN)[1], wire.Answer)

    first = ask(3, None)
    assert len(first.decisions) == 1 and ask(4, first.state).decisions == []
    assert len(ask(4, None).decisions) == 1  # another run, that has not begun


def test_many_may_ask_at_once_and_each_gets_its_own_answer(hosted: Service) -> None:
    with ThreadPoolExecutor(8) as pool:
        bodies = [question(epoch) for epoch in range(40)]
        answers = list(pool.map(lambda body: hosted.request("POST", "/v1/decide", body, TOKEN), bodies))
    for body, (status, data, _) in zip(bodies, answers, strict=True):
        answer = wire.decode(data, wire.Answer)
        assert status == 200 and answer.question == json.loads(body)["id"]
        assert len(answer.decisions) == (json.loads(body)["report"]["epoch"] >= 3)


def test_metrics_are_prometheus_text_and_count_what_happened(hosted: Service) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def read() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        status, body, headers = hosted.request("GET", "/metrics", token=TOKEN)
        assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
        families = text_string_to_metric_families(body.decode())
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}

    before = read()
    decision = Decision("prune", "a", 0)
    hosted.request("POST", "/v1/decide", question(feedback=(Feedback(decision, "refused", "r", 1, 2, 3, 4),)), TOKEN)
    hosted.request("POST", "/v1/decide", b"no", TOKEN)
    after = read()
    grew = {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)}
    assert grew["esper_tamiyo_decisions_total", (("action", "germinate"),)] == 1
    assert grew["esper_tamiyo_feedback_total", (("action", "prune"), ("outcome", "refused"))] == 1
    assert grew["esper_tamiyo_requests_total", (("path", "/v1/decide"), ("status", "200"))] == 1
    assert grew["esper_tamiyo_requests_total", (("path", "/v1/decide"), ("status", "400"))] == 1
    assert grew["esper_tamiyo_decide_seconds_count", ()] == 1 and grew["esper_tamiyo_decide_seconds_sum", ()] > 0
    assert (
        after["esper_tamiyo_decide_seconds_bucket", (("le", "+Inf"),)] == after["esper_tamiyo_decide_seconds_count", ()]
    )


def test_a_client_with_a_wrong_token_goes_without_and_is_told_why(hosted: Service) -> None:
    for token, kinds in ((TOKEN, ["answer"]), ("wrong", ["outage"]), (None, ["outage"])):
        client = TamiyoClient(hosted.url, token=token, lag=0, timeout=60)
        decisions, _ = client.decide(client.init(SPEC, KEY), report(epoch=3), ())
        notices = client.notices()
        assert [notice.kind for notice in notices] == kinds and len(decisions) == (kinds == ["answer"])
        assert kinds == ["answer"] or "401" in notices[0].message and "token" in notices[0].message


def test_a_question_too_large_for_the_service_is_an_outage_that_says_so(hosted: Service) -> None:
    client = TamiyoClient(hosted.url, token=TOKEN, lag=0, timeout=60)
    large = report(seeds=[])
    wide = large.__class__(3, 300, 1.0, 1.0, 50.0, large.sites * 40, ())
    client.decide(client.init(SPEC, KEY), wide, ())
    (notice,) = client.notices()
    assert "413" in notice.message and "larger than 20000 bytes" in notice.message


def test_a_killed_service_that_comes_back_goes_on_where_the_state_is(hosted: Service) -> None:
    client = TamiyoClient(hosted.url, token=TOKEN, lag=0, timeout=60, attempts=1, cooldown=0)
    state = client.init(SPEC, KEY)
    decisions, state = client.decide(state, report(epoch=3), ())
    assert len(decisions) == 1
    hosted.kill()
    for epoch in (4, 5):
        decisions, state = client.decide(state, report(epoch=epoch), ())
        assert decisions == ()
    hosted.start()
    decisions, state = client.decide(state, report(epoch=6), ())
    assert decisions == ()  # the plan's one germination was answered before the kill
    assert [notice.kind for notice in client.notices()] == ["answer", "outage", "recovery", "answer"]


class Broken:
    """A controller that fails, or gives what no run could use."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def init(self, spec: Spec, key: Any) -> Any:
        return {"n": np.array(0)}

    def decide(self, state: Any, report: Any, feedback: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (RuntimeError("no idea"), "the controller failed: RuntimeError: no idea"),
        (((Decision("grow", "a"),), {"n": np.array(0)}), "Invalid enum value 'grow'"),
        (((Decision("prune", "a", 0, confidence=float("nan")),), {"n": np.array(0)}), "confidence"),
        (((), {"n": np.zeros(2)}), "the state is not this controller's"),
        (None, "TypeError"),
    ],
)
def test_a_controller_that_fails_is_an_error_500_in_a_sentence(answer, sentence) -> None:
    from esper_jax.tamiyo.server import Host, Metrics, Refusal

    with pytest.raises(Refusal) as refused:
        Host(Broken(answer), Metrics()).answer(question())
    assert refused.value.status == 500 and sentence in str(refused.value)


def test_a_mock_is_said_to_be_one_and_refused_unless_asked_for() -> None:
    script = 'script={"2": [{"action": "germinate", "site": "b", "blueprint": "lora"}]}'
    service = Service("--controller", "mock", "--set", script)
    try:
        assert service.health()["mock"] is True
        for allow in (False, True):
            client = TamiyoClient(service.url, lag=0, timeout=60, allow_mock=allow)
            decisions, _ = client.decide(client.init(SPEC, KEY), report(epoch=2), ())
            (notice,) = client.notices()
            assert len(decisions) == allow and notice.kind == ("answer" if allow else "outage")
            assert "mock" in notice.message or notice.data["mock"]
    finally:
        service.stop()


def test_settings_make_the_controller_that_the_same_code_makes() -> None:
    made = make_controller("tamiyo", ["plateau=2", 'blueprints=["mlp","lora"]', "gates.strict=true"])
    assert made == Tamiyo(plateau=2, blueprints=("mlp", "lora"), gates=Gates(strict=True))
    assert make_controller("random", ["rate=0.5"]) == RandomSchedule(rate=0.5)
    fixed = make_controller("fixed", ['plan={"10": [["a", "lora", {"rank": 4}]]}'])
    assert isinstance(fixed, FixedSchedule) and fixed.plan == {10: (("a", "lora", {"rank": 4}),)}
    assert isinstance(make_controller("mock"), MockController)
    assert isinstance(make_controller("esper_jax.tamiyo:Tamiyo", ["max_live=1"]), Tamiyo)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--controller", "nobody"], "there is no controller 'nobody'; choose from tamiyo, fixed, random, mock"),
        (["--controller", "no.such:thing"], "cannot be loaded"),
        (["--controller", "json:dumps", "--set", "obj=1"], "has no init()"),
        (["--set", "plateau"], "a setting is key=value, got 'plateau'"),
        (["--set", "nosuch=1"], "unexpected keyword argument 'nosuch'"),
        (["--set", "plateau=0"], "plateau must be"),
        (["--host", "0.0.0.0"], "so a bearer token is needed: set ESPER_TAMIYO_TOKEN"),
        (["--port", "70000"], "cannot listen on 127.0.0.1, port 70000"),
        (["--token-file", "no/such/file"], "the token file no/such/file cannot be read"),
        (["--max-bytes", "0"], "--max-bytes must be 1 or more"),
    ],
)
def test_a_wrong_option_is_one_sentence(arguments, sentence, capsys, monkeypatch) -> None:
    from esper_jax import cli

    monkeypatch.delenv("ESPER_TAMIYO_TOKEN", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tamiyo", "serve", *arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in said and len(said.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_one_sentence(hosted: Service) -> None:
    with pytest.raises(ValueError, match=re.escape(f"cannot listen on 127.0.0.1, port {hosted.port}")):
        serve(Tamiyo(), port=hosted.port, max_bytes=100)


def test_the_library_imports_without_the_services_packages_and_says_what_is_missing() -> None:
    code = """
import sys
for name in ("msgspec", "starlette", "uvicorn", "tenacity"):
    sys.modules[name] = None
import esper_jax
from esper_jax.tamiyo.serve import serve
for call in (lambda: esper_jax.TamiyoClient("http://h:1"), lambda: serve(esper_jax.Tamiyo(), max_bytes=1)):
    try:
        call()
    except ImportError as error:
        assert 'pip install "esper_jax[service]"' in str(error), error
    else:
        raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_token_is_sent_and_to_nobody_else() -> None:
    heads: list[bytes] = []

    def serve_once(connection: socket.socket) -> None:
        original = connection.recv
        data = original(65536)
        heads.append(data)
        connection.sendall(b"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n")

    with misbehaving(serve_once) as url:
        client = TamiyoClient(url, token=TOKEN, lag=0, timeout=5, attempts=1)
        client.decide(client.init(SPEC, KEY), report(epoch=3), ())
    assert f"Authorization: Bearer {TOKEN}".encode() in heads[0] and len(heads) == 1
    (notice,) = client.notices()
    assert "307" in notice.message and TOKEN not in notice.message
