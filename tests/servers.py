"""Real servers for tests, on free ports of the loopback interface; they can be killed and started again."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from types import TracebackType
from typing import Any, Self

import pytest

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None and not os.environ.get("REQUIRE_REDIS"),
    reason="redis-server is not installed (apt-get install redis-server)",
)
"""Skips where there is no redis-server; where `REQUIRE_REDIS` is set, as in CI, it fails instead."""


def free_port() -> int:
    """A port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """A redis-server of one's own: `with RedisServer() as server: connect(server.url)`.

    Args:
      password: what clients must give; None asks for none.
      durable: keep data over `kill` and `restart` (an append-only file synced at each write).
      options: further settings, e.g. `maxmemory="3mb"`; underscores stand for dashes.

    `kill` is SIGKILL, `restart` starts it again on the same port and files, `stop` is an orderly end.
    """

    def __init__(self, *, password: str | None = None, durable: bool = False, **options: Any) -> None:
        self.password, self.durable, self.options = password, durable, options
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def url(self) -> str:
        """The address with the password, for `redis.from_url`."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0" if self.password else self.bare_url

    @property
    def bare_url(self) -> str:
        """The address without the password."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        """Start it and wait until it answers; on another port where the port was taken meanwhile."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="redis-test-")
        for _ in range(5):
            if self._try_start():
                return self
            self.port = free_port()
        log = pathlib.Path(self._folder.name, "log").read_text()
        raise RuntimeError(f"redis-server did not start:\n{log}")

    def _try_start(self) -> bool:
        assert self._folder is not None
        settings = {"port": self.port, "bind": "127.0.0.1", "dir": self._folder.name, "save": "", "daemonize": "no"}
        if self.durable:
            settings |= {"appendonly": "yes", "appendfsync": "always"}
        if self.password:
            settings["requirepass"] = self.password
        settings |= {name.replace("_", "-"): value for name, value in self.options.items()}
        command = ["redis-server", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]
        with open(pathlib.Path(self._folder.name, "log"), "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if self.process.poll() is not None:
                return False
            if self._answers():
                return True
            time.sleep(0.02)
        self.kill()
        return False

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0) as line:
            line.settimeout(1.0)
            line.sendall(b"PING\r\n")
            reply = line.recv(64)
            return reply.startswith((b"+PONG", b"-NOAUTH"))
        return False

    def client(self) -> Any:
        """A `redis.Redis` for the test itself, that decodes replies."""
        import redis

        return redis.Redis.from_url(self.url, decode_responses=True, socket_timeout=60)

    def kill(self) -> None:
        """SIGKILL, as a crash would be; nothing happens where it does not run."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM: redis writes out what it has and ends."""
        self._end(signal.SIGTERM)

    def restart(self) -> Self:
        """Kill it if it runs, and start it again on the same port with the files it left."""
        self.kill()
        port = self.port
        self.start()
        if self.port != port:
            raise RuntimeError(f"port {port} was taken by another process before redis-server could start on it again")
        return self

    def _end(self, number: int) -> None:
        process, self.process = self.process, None
        if process is not None:
            if process.poll() is None:
                process.send_signal(number)
            process.wait(timeout=20)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
