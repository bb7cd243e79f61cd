"""Where events go: a file of JSON lines, a list, or several sinks at once. No sink can stop the training."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self, runtime_checkable

from .._checks import objects, place
from .._files import replace
from . import events as make
from .backlog import Backlog
from .clean import clean
from .event import ENDINGS, Event, Kind

_START = b'{"v": '


@runtime_checkable
class Sink(Protocol):
    """Anything that takes events.

    A sink may also have `open()`, called before the first event, which raises where it cannot work;
    `rewind(step, count=None)`, called when a run resumes; `notices()`, events of its own that others should get, asked
    for after each event; `slow = True`, for one that waits on a network: `Tolaria` puts a `Background` before it; and
    `record = True`, for one that is to hold what the others say as they close.
    """

    def emit(self, event: Event) -> None:
        """Take one event. Raise when it cannot be kept."""
        ...

    def close(self) -> None:
        """Write out what is held back and release files; calling it twice is fine."""
        ...


def rewound(events: Iterable[Event], step: int, count: int | None = None, *, epoch: float = math.inf) -> list[Event]:
    """The events of `step` and before, without those that say that the run is over.

    What is told late, as a save is once it is on disk, belongs to its own step. `epoch` leaves out those of a later
    epoch too, where the step was saved before its tick. `count` keeps the first `count` events instead: the exact form
    where steps ran twice.
    """
    kept = list(events)
    kept = [event for event in kept if event.step <= step and event.epoch <= epoch] if count is None else kept[:count]
    return [event for event in kept if event.kind not in ENDINGS]


class _Closing:
    """`with sink:` closes it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to do."""


class ListSink(_Closing):
    """Keeps events in `events`, a list: for notebooks and tests."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        """Append the event."""
        self.events.append(event)

    def rewind(self, step: int, count: int | None = None, *, epoch: float = math.inf) -> None:
        """Drop the events after `step`; see `rewound`."""
        self.events[:] = rewound(self.events, step, count, epoch=epoch)


class JsonlSink(_Closing):
    """Appends events to a file, one JSON line each, flushed at once, so that a crash costs one line at most.

    An existing file is continued: a last line torn by a crash is dropped first, so that the file is always valid.
    While the file takes no more (a full disk) events wait in memory and are written later, in order (see `Backlog`),
    with one outage and one recovery among the `notices`. `len(sink)` is the number of events in the file and waiting;
    a trainer may keep it in a checkpoint and hand it to `rewind`.
    """

    record = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        place("path", path)
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"path must be that of a file, {os.fspath(path)!r} is a directory")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._count = _mend(self.path)
        self._file: BinaryIO | None = self.path.open("ab", buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)  # of the last whole line
        self._failed = False
        self._closed = False
        self._backlog = Backlog(self._write, os.fspath(self.path))

    def __len__(self) -> int:
        return self._count + len(self._backlog)

    def emit(self, event: Event) -> None:
        """Write one line; keep it for later where that fails."""
        event.to_json()  # raises for what is no JSON
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.path} is closed: emit events before close()")
            self._backlog.put(event)

    def notices(self) -> list[Event]:
        """That the file takes no events now, and that it does again."""
        with self._lock:
            return self._backlog.notices()

    def _write(self, event: Event) -> None:
        """One whole line, or an OSError and nothing of it. After a failure the file is opened again."""
        line = _line(event)
        if self._failed:
            self._reopen()
        assert self._file is not None
        self._failed = True
        written = self._file.write(line)
        if written != len(line):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {self.path}")
        self._failed = False
        self._end += len(line)
        self._count += 1

    def _reopen(self) -> None:
        """The file without the half line that a failed write may have left."""
        if self._file is not None:
            self._file.close()
            self._file = None
        file = self.path.open("ab", buffering=0)
        try:
            if file.seek(0, os.SEEK_END) > self._end:
                file.truncate(self._end)
            self._end = file.seek(0, os.SEEK_END)
        except BaseException:
            file.close()
            raise
        self._file = file

    def rewind(self, step: int, count: int | None = None, *, epoch: float = math.inf) -> None:
        """Drop the events after `step` (see `rewound`); the file is replaced in one move, never half written.

        Called on resume, so that the resumed run's log equals an uninterrupted one. A trainer that emits all events of
        a step before it saves that step's checkpoint loses none and writes none twice.
        """
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.path} is closed: rewind it before close()")
            self._backlog.drain()
            if self._backlog.error is not None:
                raise self._backlog.error
            if self._file is not None:
                self._file.close()
                self._file = None
            try:
                kept = rewound(_salvaged(self.path), step, count, epoch=epoch)
                replace(self.path, (_line(event) for event in kept))
                self._count = len(kept)
            finally:
                self._file = self.path.open("ab", buffering=0)
                self._end = self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Write what waits and close the file.

        Raises:
          OSError: events could not be written until the end; they are lost to the file.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._backlog.drain()
            with contextlib.suppress(OSError):  # no half line stays, if that can be had
                if self._failed:
                    self._reopen()
            file, self._file = self._file, None
            if file is not None:
                file.close()
            left = len(self._backlog) + self._backlog.lost
            if left:
                raise OSError(
                    f"{left} events are lost to {self.path}, which took none until the end "
                    f"({_said(self._backlog.error) if self._backlog.error else 'memory was full'})"
                )


class Fanout(_Closing):
    """Hands each event to every sink. A sink that raises is dropped with one warning, and the others go on.

    What sinks have to say themselves (`notices`: an outage, a recovery, dropped metrics) goes to all of them in turn;
    an outage is also a `RuntimeWarning`. `dropped` maps a dropped sink's name to the number of events it did not get.
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self.sinks: list[Sink] = list(objects("sinks", sinks, "emit", "close", example="ListSink()"))
        self.dropped: dict[str, int] = {}
        self._lock = threading.RLock()

    def open(self) -> None:
        """`open` every sink that can; what one of them raises comes out."""
        for sink in self.sinks:
            opening = getattr(sink, "open", None)
            if opening is not None:
                opening()

    def emit(self, event: Event) -> None:
        """Give the event to every sink that still works; never raises an `Exception`."""
        with self._lock:
            self._give(event, self.sinks)
            for notice in _notices(self.sinks):
                self._give(notice, self.sinks)

    def _give(self, event: Event, sinks: Iterable[Sink]) -> None:
        for name in self.dropped:
            self.dropped[name] += 1
        if event.kind == Kind.OUTAGE:
            _warn(event.message, stacklevel=5)
        for sink in tuple(sinks):
            if not any(sink is other for other in self.sinks):
                continue  # dropped meanwhile, by the warning about another one
            try:
                sink.emit(event)
            except Exception as error:
                self._drop(sink, event, error)

    def rewind(self, step: int, count: int | None = None) -> None:
        """`rewind` every sink that can; `count` is only right when all of them hold the same events."""
        with self._lock:
            for sink in self.sinks:
                rewind = getattr(sink, "rewind", None)
                if rewind is not None:
                    rewind(step, count)

    def close(self) -> None:
        """Close every sink; one that raises is named in a warning. The slow ones first: the others hear the outcome."""
        with self._lock:
            slow = [sink for sink in self.sinks if hasattr(sink, "notices") and not getattr(sink, "record", False)]
            others = [sink for sink in self.sinks if not any(sink is one for one in slow)]
            self._close(slow)
            for notice in _notices(slow):
                self._give(notice, others)
            for notice in _notices(others):
                self._give(notice, others)
            self._close(others)

    def _close(self, sinks: Iterable[Sink]) -> None:
        for sink in sinks:
            try:
                sink.close()
            except Exception as error:
                warnings.warn(f"{_name(sink)} could not be closed: {_said(error)}", RuntimeWarning, stacklevel=3)

    def _drop(self, sink: Sink, event: Event, error: Exception) -> None:
        self.sinks = [other for other in self.sinks if other is not sink]
        name = _name(sink)
        while name in self.dropped:
            name += "'"
        self.dropped[name] = 1
        text = f"{name} failed and gets no more events: {_said(error)}. Training goes on."
        with contextlib.suppress(Exception):
            sink.close()
        _warn(text, stacklevel=5)
        self.emit(make.warning(event.epoch, event.step, text))


def read_events(path: str | os.PathLike[str], *kinds: str) -> list[Event]:
    """The events of a file written by `JsonlSink`, all or only those of the given kinds.

    A last line without its line end is still being written, or torn, and is left out. Any other line that is not an
    event is a `ValueError` that names the file and the line.
    """
    found = []
    for number, line in enumerate(_lines(Path(path)), 1):
        try:
            event = Event.from_json(line)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}, line {number}: {error}") from error
        if not kinds or event.kind in kinds:
            found.append(event)
    return found


def _salvaged(path: Path) -> list[Event]:
    """The events of a file; where lines of it are damaged, a copy of it is kept, and a warning says so."""
    try:
        return read_events(path)
    except ValueError as error:
        kept = path.with_name(f"{path.name}.damaged")
        shutil.copyfile(path, kept)
        found = []
        for line in _lines(path):
            with contextlib.suppress(ValueError):
                found.append(Event.from_json(line))
        text = f"{error}; it is kept as {kept}, and the log goes on without what cannot be read"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return found


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def _mend(path: Path) -> int:
    """Cut torn lines off the end of the file; the number of lines left. A file that is no log of ours is left alone."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return 0
    whole = content[: content.rfind(b"\n") + 1]
    while whole and not _readable(whole[whole.rfind(b"\n", 0, -1) + 1 :]):  # e.g. zeros after a power cut
        whole = whole[: whole.rfind(b"\n", 0, -1) + 1]
    start = content.rstrip(b"\0")[: len(_START)]
    if not whole and not _START.startswith(start):
        raise ValueError(f"{path} is not a log of events: give the log another path, or move that file away")
    if whole != content:
        os.truncate(path, len(whole))
    return whole.count(b"\n")


def _readable(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and "v" in record


def _line(event: Event) -> bytes:
    return event.to_json().encode("utf-8", "backslashreplace") + b"\n"


def _notices(sinks: Iterable[Sink]) -> list[Event]:
    """What the sinks themselves have to say."""
    found: list[Event] = []
    for sink in sinks:
        notices = getattr(sink, "notices", None)
        if notices is not None:
            with contextlib.suppress(Exception):
                found += notices()
    return found


def _warn(text: str, stacklevel: int) -> None:
    with contextlib.suppress(RuntimeWarning):  # also where warnings are errors
        warnings.warn(clean(text), RuntimeWarning, stacklevel=stacklevel)


def _name(sink: Sink) -> str:
    path = getattr(sink, "path", None)
    return f"{type(sink).__name__}({path})" if path is not None else type(sink).__name__


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
