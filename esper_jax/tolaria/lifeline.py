"""How the processes of a job learn that one of them is gone: a connection of each to the first, held while they train.

A collective that one process never joins waits for ever, and Python cannot interrupt it. What can be done about it is
done here: a thread sees the connection of a process break, or is told by the process that an error ended its training,
says so, and ends this process with `LOST`. Where no connection could be made, or a machine falls silent, there is still
JAX's own watch, which aborts (see `peers.HEARTBEAT`).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import jax

from . import peers
from .interruption import SAVE

LOST = 75
"""The exit status of a process that ends because another of its job did: try again (`EX_TEMPFAIL` of sysexits.h)."""
GRACE = 10.0
"""Seconds in which a process may come to the end by itself that another one has met as an error."""
_MEET = 15.0
_PAUSE = 2.0
_LONGEST = 400
_END, _ERROR, _LOST = "end", "error", "lost"
"""What a process says: its training has ended, or ended with an error, or it ends because another one did."""


class Lifeline:
    """Holds the connections to the other processes of the job within its block; with one process it does nothing.

    Args:
      directory: the run's, to be named as what to go on from; None where nothing is saved.
      tell: is given the sentence before this process ends, for a log; it may hang or fail.
      gone: is called with the number of a process that is gone, also after its training and this one's have ended.
    """

    def __init__(
        self,
        directory: pathlib.Path | None,
        tell: Callable[[str], None],
        gone: Callable[[int], None] = lambda process: None,
    ) -> None:
        self.directory, self.tell, self.gone = directory, tell, gone
        self.missing = ""
        self._left = threading.Event()
        self._ending = threading.Lock()
        self._links: dict[int, socket.socket] = {}
        self._watchers: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if not peers.alone():
            problem = self._listen() if peers.first() else self._call(*peers.told([]))
            self.missing = peers.any_of(problem)
            for process, link in self._links.items():
                self._watchers.append(threading.Thread(target=self._watch, args=(process, link), daemon=True))
                self._watchers[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Within this block no process can go on without the others; the others hear how it ended."""
        said = _END
        try:
            yield
        except BaseException as error:
            if self._links and isinstance(error, Exception):
                time.sleep(_PAUSE)  # a collective may fail before the loss that is the reason is heard of
            said = f"{_ERROR} {type(error).__name__}: {error}"
            raise
        finally:
            self._left.set()
            self._say(said)

    def _listen(self) -> str:
        """The first process: wait for the others to call; what went wrong, or ""."""
        ask, answer = secrets.token_hex(16), secrets.token_hex(16)
        try:
            server = socket.create_server(("", 0))
        except OSError as error:
            peers.told([[], 0, ask, answer])
            return str(error)
        with server:
            server.settimeout(_MEET)
            peers.told([_addresses(), server.getsockname()[1], ask, answer])
            strangers = 0
            while len(self._links) < jax.process_count() - 1 and strangers < 100:
                try:
                    link, _ = server.accept()
                except OSError:  # nobody came in time
                    break
                try:
                    link.settimeout(3)
                    word, _, process = link.recv(100).decode(errors="replace").partition(" ")
                    if not secrets.compare_digest(word.encode(), ask.encode()):
                        raise OSError("a stranger")
                    link.sendall(answer.encode())
                    self._links[int(process)] = _lasting(link)
                except (OSError, ValueError):
                    strangers += 1
                    link.close()
        return "" if len(self._links) == jax.process_count() - 1 else "not every process could be reached"

    def _call(self, hosts: list[str], port: int, ask: str, answer: str) -> str:
        """Another process: call the first at any of its addresses; what went wrong, or ""."""
        for host in hosts:
            with contextlib.suppress(OSError):
                link = socket.create_connection((host, port), timeout=3)
                link.sendall(f"{ask} {jax.process_index()}".encode())
                if link.recv(100) == answer.encode():
                    self._links[0] = _lasting(link)
                    return ""
                link.close()
        return f"process {jax.process_index()} cannot reach the first one at {' or '.join(hosts)}, port {port}"

    def _watch(self, process: int, link: socket.socket) -> None:
        who, heard, spoken = f"process {process} of {jax.process_count()}", b"", False
        with contextlib.suppress(OSError):
            while part := link.recv(1000):
                heard += part
                said, whole, heard = heard.rpartition(b"\n")
                for line in said.decode(errors="replace").splitlines() if whole else ():
                    kind, _, text = line.partition(" ")
                    if kind == _LOST and not self._left.is_set():
                        self._end(text)
                    elif kind == _ERROR:
                        self._after(GRACE, f"{who} ended with {text}")
                    spoken = True
        self.gone(process)
        if not spoken and not self._left.is_set():
            self._end(f"{who} was lost")

    def _after(self, seconds: float, what: str) -> None:
        """End too, unless this process's training ends by itself in that time."""

        def follow() -> None:
            if not self._left.wait(seconds):
                self._end(what)

        threading.Thread(target=follow, daemon=True).start()

    def _end(self, what: str) -> None:
        """Say it, have the log say it if it can, and end this process: its training thread waits for ever.

        The first process ends last: with it goes JAX's coordinator, at which JAX aborts the others.
        """
        if not self._ending.acquire(blocking=False):
            return
        self._say(f"{_LOST} {what}")
        where = "nothing was saved (no checkpoint_dir)"
        if self.directory is not None:
            where = f"go on with fit(restore(), ...) or with: esper-jax train --resume {self.directory}"
        sentence = f"{what}, so no further step can be made and this process ends too (exit status {LOST}); {where}"
        try:
            teller = threading.Thread(target=self.tell, args=(sentence,), daemon=True)
            teller.start()
            for stream, text in ((sys.stderr, f"esper_jax: {sentence}\n"), (sys.stdout, "")):
                with contextlib.suppress(Exception):
                    stream.write(text)
                    stream.flush()
            teller.join(SAVE + 2)
            until = time.monotonic() + (SAVE + 5 if peers.first() else 0)
            for watcher in self._watchers:
                if watcher is not threading.current_thread():
                    watcher.join(max(0.0, until - time.monotonic()))
        finally:
            os._exit(LOST)

    def _say(self, what: str) -> None:
        line = " ".join(what.splitlines()).encode()[:_LONGEST] + b"\n"
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.sendall(line)


def _addresses() -> list[str]:
    """Where this machine may be reached: its name, its address on the way out, and itself for a job on one machine."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect(("192.0.2.1", 9))  # an address of no host; a datagram socket sends nothing by connecting
        found.append(way.getsockname()[0])
    return [*found, "127.0.0.1"]


def _lasting(link: socket.socket) -> socket.socket:
    """The connection, without a time limit, and breaking within half a minute where the other machine falls silent."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link
