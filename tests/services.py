"""A controller's service in a process of its own, and a server that misbehaves on purpose, on free loopback ports."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Service:
    """`esper-jax tamiyo serve` in a real process; `kill` and `start` again on the same port."""

    def __init__(self, *arguments: str, token: str | None = None) -> None:
        self.arguments, self.token, self.port = arguments, token, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        environment.pop("ESPER_TAMIYO_TOKEN", None)
        if self.token is not None:
            environment["ESPER_TAMIYO_TOKEN"] = self.token
        command = [sys.executable, "-m", "esper_jax", "tamiyo", "serve", "--port", str(self.port), *self.arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_copy, args=(self.process.stdout, lines), daemon=True).start()
        said = []
        while True:
            line = lines.get(timeout=120)
            said.append(line)
            if "listens on" in line:
                return
            if not line:
                raise AssertionError(f"the service did not start: {''.join(said)}")

    def kill(self) -> None:
        """SIGKILL, as the machine might."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(30)
        self.process = None

    def request(
        self, method: str, path: str, body: bytes | None = None, token: str | None = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            if token is not None:
                headers["Authorization"] = f"Bearer {token}"
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.headers)

    def health(self) -> dict[str, Any]:
        return json.loads(self.request("GET", "/health")[1])


def _copy(pipe: Any, lines: queue.Queue[str]) -> None:
    for line in pipe:
        lines.put(line)
    lines.put("")


@contextlib.contextmanager
def misbehaving(serve: Callable[[socket.socket], object]) -> Iterator[str]:
    """The URL of a server that hands each connection to `serve`, in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        over = threading.Event()

        def accept() -> None:
            while not over.is_set():
                try:
                    connection, _ = listener.accept()
                except OSError:
                    continue
                threading.Thread(target=handle, args=(connection,), daemon=True).start()

        def handle(connection: socket.socket) -> None:
            connection.settimeout(10)
            with connection, contextlib.suppress(OSError):
                serve(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            thread.join(5)


def read_request(connection: socket.socket) -> bytes:
    """The body of the request that comes in."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    while len(body) < length:
        body += _more(connection)
    return body


def _more(connection: socket.socket) -> bytes:
    chunk = connection.recv(65536)
    if not chunk:
        raise ConnectionError("the client went away")
    return chunk


def respond(connection: socket.socket, body: bytes, status: str = "200 OK", headers: str = "") -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
    connection.sendall(head.encode() + body)
