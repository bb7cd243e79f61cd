"""Ctrl-C and SIGTERM: a run ends between two steps; after SIGTERM it ends soon, whatever it is at."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from .compiler import under_way
from .peers import alone

GRACE = 3.0
"""Seconds that a run has after SIGTERM to come to the end of a step; then it is saved where it stands, if it rests."""
ANSWER = 7.0
"""Seconds after which it ends with the steps that are saved, where that could not be."""
SAVE = 15.0
"""Seconds that a save under way has then, before a process ends that hangs or has lost another."""
AFTER_SAVE = 1.0
"""Seconds that it has yet where a save was under way, which it may have waited for."""


def ended_by(number: int) -> str:
    """What a signal does to a run, in a word."""
    return "terminated" if number == signal.SIGTERM else "interrupted"


class Stop(threading.Event):
    """Set when the run is to end between two steps; `signal` says by what, `answered` that the run is at it."""

    signal: int = signal.SIGINT

    def __init__(self) -> None:
        super().__init__()
        self.answered = threading.Event()

    def number(self) -> int:
        """The number of the signal that came, or 0."""
        return self.signal if self.is_set() else 0


class Rest:
    """A block in which a run changes nothing of what is saved, so that another thread may: a batch that is waited for.

    Args:
      save: saves the run as it stands, and says whether it did.
    """

    def __init__(self, save: Callable[[], bool]) -> None:
        self._save, self._within, self._lock = save, False, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._within = True

    def __exit__(self, *_: object) -> None:
        with self._lock:  # held while the other thread saves: the run goes on from here no earlier
            self._within = False

    def save(self) -> bool:
        """Save the run, from another thread, where it is within the block; whether that was done."""
        with self._lock:
            return self._within and self._save()


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
def interrupts(
    save: Callable[[], bool] = lambda: False,
    finish: Callable[[float], object] = lambda seconds: None,
    overdue: Callable[[], None] = lambda: None,
) -> Iterator[Stop]:
    """Ctrl-C and SIGTERM set the event, so that a step is never torn; a second Ctrl-C interrupts at once.

    A SIGTERM that the program handles itself already is left to it, unless by `terminated`. One that is not answered
    within `GRACE` seconds finds the run in something that Python may not interrupt, as a compilation, a controller or
    a batch that is long in coming: `save()` is asked then to save it, and where it says after `ANSWER` seconds still
    that it cannot, `finish(seconds)` sees a save through that is under way, for so long. `overdue()` says what is
    saved, and the process ends with status 143; all of that in a thread. Processes that are forked meanwhile have none
    of it. A save that answers a signal takes as long as the disk does.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    watched = False

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set() and stop.signal == signal.SIGTERM and watched:
            return  # the process ends soon in any case, and is perhaps being saved
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number
        stop.set()

    taken = [n for n in before if n == signal.SIGINT or before[n] in (signal.SIG_DFL, terminated)]
    with _told_of(signal.SIGTERM) if signal.SIGTERM in taken else contextlib.nullcontext() as heard:
        watched = heard is not None
        if heard is not None:
            threading.Thread(target=_see_to_it, args=(heard, stop, save, finish, overdue), daemon=True).start()
        try:
            for number in taken:
                signal.signal(number, on_signal)
            _taken.update({number: before[number] for number in taken})
            yield stop
        finally:
            stop.answered.set()
            _taken.clear()
            for number in taken:
                signal.signal(number, before[number])


_taken: dict[int, Any] = {}
"""The handlers that those of a run stand in for, while it lasts."""


def _forked() -> None:
    """A child of a fork is no part of the run: signals to it are its own, and not written to the parent's socket."""
    if _taken:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            for number, handler in _taken.items():
                signal.signal(number, handler)
        _taken.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


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


def _see_to_it(
    heard: Callable[[], bool],
    stop: Stop,
    save: Callable[[], bool],
    finish: Callable[[float], object],
    overdue: Callable[[], None],
) -> None:
    """End the process where a signal is not answered in time."""
    if not heard() or stop.answered.wait(GRACE):
        return
    end = time.monotonic() + ANSWER - GRACE
    while not save():
        if stop.answered.wait(0.1):
            return
        if (late := time.monotonic() - end) > 0:
            finish(max(0.0, SAVE - late))
            if stop.answered.wait(AFTER_SAVE):
                return
            break
    try:
        overdue()
    finally:
        os._exit(128 + signal.SIGTERM)
