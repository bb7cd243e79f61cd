"""Plain arguments that cannot be meant are refused at once, in one sentence that names them."""

from __future__ import annotations

import http.client
import math
import pathlib
import socket
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import optax
import pytest

from esper_jax import Tamiyo, TamiyoClient, Tolaria, Urza, UrzaError, cli
from esper_jax.nissa import PrometheusSink
from esper_jax.tamiyo.serve import make_controller, serve

from .urza.world import by_hand

URL = "http://127.0.0.1:9"


def trainer(**options: Any) -> Tolaria:
    return Tolaria(nn.Dense(2), optax.l2_loss, optax.sgd(0.1), **options)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a class for a controller": (lambda: trainer(controller=Tamiyo), r"is the class Tamiyo; give an object of it"),
    "a number for a sink": (lambda: trainer(sinks=[5]), r"a sink 5 has no emit\(\)"),
    "a word for a flag": (lambda: trainer(oona_optional="no"), r"oona_optional must be True or False, got 'no'"),
    "a fraction of bytes": (lambda: trainer(resident_bytes=1.5), r"resident_bytes must be a whole number .* got 1.5"),
    "a timeout of True": (lambda: TamiyoClient(URL, timeout=True), r"timeout must be .* seconds above 0, got True"),
    "an endless timeout": (lambda: TamiyoClient(URL, timeout=math.inf), r"timeout must be a finite number"),
    "half a failure": (lambda: TamiyoClient(URL, failures=1.5), r"failures must be a whole number"),
    "a word for the mock": (lambda: TamiyoClient(URL, allow_mock="no"), r"allow_mock must be True or False"),
    "an unknown blueprint": (lambda: Tamiyo(blueprints=("zap",)), r"unknown blueprint 'zap'; known: .*lora"),
    "a number for a script": (lambda: make_controller("mock", ["script=5"]), r"controller mock cannot be made"),
    "port 70000": (lambda: PrometheusSink(70_000), r"port must be 65535 or less, got 70000"),
    "port -1": (lambda: PrometheusSink(-1), r"port must be a whole number of 0 or more, got -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_cannot_be_meant_is_refused(name: str) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises((ValueError, TypeError, KeyError), match=sentence):
        make()


def test_a_library_refuses_files_counts_below_zero_and_times_that_are_none(tmp_path: pathlib.Path) -> None:
    urza = Urza(tmp_path)
    (tmp_path / "file").write_text("")
    for wrong, sentence in (
        (lambda: Urza(tmp_path / "file"), "is a file; a library of seeds is a directory"),
        (lambda: Urza("ftp://nohost.invalid/x"), "cannot be opened as a library of seeds"),
        (lambda: urza.find(limit=-1), "limit must be a whole number of 0 or more, got -1"),
        (lambda: urza.gc(grace=math.nan), "grace must be a finite number of seconds"),
        (lambda: urza.put(by_hand(0), flops=-1.0), "flops must be 0 or more"),
    ):
        with pytest.raises((ValueError, UrzaError), match=sentence):
            wrong()


@pytest.mark.parametrize("token", ["", "a b", "sécret", "a\nb"])
def test_service_and_client_refuse_the_same_tokens_and_show_none(token: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII without spaces") as client:
        TamiyoClient(URL, token=token)
    with pytest.raises(ValueError, match="printable ASCII without spaces") as service:
        serve(Tamiyo(), token=token, max_bytes=1)
    assert str(client.value) == str(service.value) and (not token or token not in str(client.value))


def test_a_port_that_is_taken_leaves_the_run_directory_free(tmp_path: pathlib.Path, capsys: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port, run_dir = taken.getsockname()[1], tmp_path / "run"
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "--task", "mnist1d", "--quiet", "--prometheus", str(port), "--run-dir", str(run_dir)])
    assert stop.value.code == 2 and "cannot serve metrics" in capsys.readouterr().err
    assert not (run_dir / "config.json").exists()


def test_a_warning_on_the_command_line_is_one_clean_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "blueprints", lambda: warnings.warn("a \x1b[2J note", stacklevel=1))
    cli.main(["blueprints"])
    assert capsys.readouterr().err == "esper-jax: a  [2J note\n"


def test_connections_that_send_no_whole_request_are_hung_up_on_and_others_are_served() -> None:
    """As many idle ones as the service takes at once, some with half a request, would otherwise shut it off."""
    uvicorn = pytest.importorskip("uvicorn")
    from esper_jax.tamiyo.patience import Patient
    from esper_jax.tamiyo.server import service

    class Hasty(Patient):
        patience = 0.3

    config = uvicorn.Config(
        service(Tamiyo(), token=None, max_bytes=1 << 20), http=Hasty, log_level="error", limit_concurrency=8
    )
    server = uvicorn.Server(config)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    address = listener.getsockname()
    idle: list[socket.socket] = []
    try:
        for number in range(12):
            one = socket.create_connection(address)
            one.settimeout(10.0)
            one.sendall(
                (b"", b"GET /hea", b"POST /v1/decide HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")[number % 3]
            )
            idle.append(one)
        until = time.monotonic() + 10.0
        status = 0
        while status != 200 and time.monotonic() < until:
            good = http.client.HTTPConnection(*address, timeout=5.0)
            good.request("GET", "/health")
            status = good.getresponse().status
            good.close()
            time.sleep(0.05)
        assert status == 200
        for one in idle:  # each is at its end: what was answered, if anything, then nothing
            while one.recv(4096):
                pass
    finally:
        for one in idle:
            one.close()
        server.should_exit = True
        thread.join(10.0)
    assert not thread.is_alive()
