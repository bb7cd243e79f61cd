"""Ctrl-C and SIGTERM: a run ends between two steps; after SIGTERM it ends soon, whatever it is at."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from .compiler import under_way
from .peers import alone

ANSWER = 7.0
"""Seconds that a run has after SIGTERM to come to the end of a step; then it ends with the steps that are saved."""


class Stop(threading.Event):
    """Set when the run is to end between two steps; `signal` says by what, `answered` that the run is at it."""

    signal: int = signal.SIGINT

    def __init__(self) -> None:
        super().__init__()
        self.answered = threading.Event()

    def number(self) -> int:
        """The number of the signal that came, or 0."""
        return self.signal if self.is_set() else 0


class Terminated(KeyboardInterrupt):
    """SIGTERM where no step is under way."""


def terminated(number: int, frame: Any) -> None:
    """A handler of SIGTERM for before and after `fit`, which has its own: it raises `Terminated`, once."""
    signal.signal(number, signal.SIG_IGN)
    raise Terminated


def leave(status: int) -> NoReturn:
    """End the process with that status at once, also while a program that nobody waits for is still being compiled.

    That cannot be interrupted and may take minutes; the interpreter's own exit would wait for it.
    """
    if under_way():
        if not alone():
            jax.distributed.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def interrupts(overdue: Callable[[], None] = lambda: None) -> Iterator[Stop]:
    """Ctrl-C and SIGTERM set the event, so that a step is never torn; a second Ctrl-C interrupts at once.

    A SIGTERM that the program handles itself already is left to it, unless by `terminated`. After one that is not
    answered within `ANSWER` seconds `overdue()` is called in a thread and the process ends with status 143: it hangs in
    something that Python may not interrupt, as a compilation, a controller or a batch that is long in coming.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number
        stop.set()

    taken = [n for n in before if n == signal.SIGINT or before[n] in (signal.SIG_DFL, terminated)]
    for number in taken:
        signal.signal(number, on_signal)
    with _told_of(signal.SIGTERM) if signal.SIGTERM in taken else contextlib.nullcontext() as heard:
        if heard is not None:
            threading.Thread(target=_see_to_it, args=(heard, stop, overdue), daemon=True).start()
        try:
            yield stop
        finally:
            stop.answered.set()
            for number in taken:
                signal.signal(number, before[number])


@contextlib.contextmanager
def _told_of(number: int) -> Iterator[Callable[[], bool] | None]:
    """A function that waits, in any thread, until this signal comes (or the block ends: False).

    Python runs handlers between two of its own instructions only, and a compilation is none; the system's own handler
    writes the signal's number to a socket at once. Where a program has that socket already (asyncio) there is None.
    """
    ours, systems = socket.socketpair()
    systems.setblocking(False)
    with ours, systems:
        had = signal.set_wakeup_fd(systems.fileno(), warn_on_full_buffer=False)
        if had != -1:
            signal.set_wakeup_fd(had)
            yield None
            return

        def wait() -> bool:
            with contextlib.suppress(OSError):
                while come := ours.recv(1):
                    if come[0] == number:
                        return True
            return False

        try:
            yield wait
        finally:
            signal.set_wakeup_fd(-1)
            with contextlib.suppress(OSError):
                systems.shutdown(socket.SHUT_RDWR)


def _see_to_it(heard: Callable[[], bool], stop: Stop, overdue: Callable[[], None]) -> None:
    """End the process where a signal is not answered in time."""
    if heard() and not stop.answered.wait(ANSWER):
        try:
            overdue()
        finally:
            os._exit(128 + signal.SIGTERM)
