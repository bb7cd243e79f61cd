"""Events on disk in order, numbered from 1: what a sink or a bus that is slow or away has still to be given.

A spool is a directory of segments, files of JSON lines named by the number of their first event, so that what was
delivered is dropped by deleting whole files. It outlives the process. Only one process at a time may have it open.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import secrets
import threading
from typing import IO, Any, BinaryIO

SEGMENT = 4096


class Spool:
    """A queue of lines on disk. `append` is one write to the operating system, without waiting for the disk.

    Args:
      directory: where; made if it is missing, and gone on with if it is not.
      segment: events in a file.

    Attributes:
      token: eight random hex digits, made with the directory; `id(n)` names an event for ever.
      last: the number of the newest event, 0 when there never was one.

    Raises:
      BlockingIOError: another process has it open.
    """

    def __init__(self, directory: str | os.PathLike[str], *, segment: int = SEGMENT) -> None:
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._segment = segment
        self._lock = threading.Lock()
        self._held: IO[Any] | None = _hold(self.directory)
        try:
            self.token = self._token()
            self._starts = sorted(int(path.stem) for path in self.directory.glob("*.jsonl"))
            self.last = self._mend()
        except BaseException:
            self._release()
            raise
        self._file: BinaryIO | None = None
        self._cursor = (0, 0, 0)  # segment, number of the next line to read there, and its place in bytes

    @property
    def first(self) -> int:
        """The number of the oldest event that is still there; `last + 1` when there is none."""
        return self._starts[0] if self._starts else self.last + 1

    def id(self, number: int) -> str:
        """The event's name, the same however often it is delivered."""
        return f"{self.token}-{number}"

    def append(self, line: str) -> int:
        """Add an event, one line of JSON; its number. An `OSError` (a full disk) leaves the spool as it was."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            if self._held is None:
                raise ValueError(f"the spool {self.directory} is closed")
            file = self._open_last()
            place = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, f"no room for an event in {self.directory}")
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(place)
                raise
            self.last += 1
            return self.last

    def read(self, after: int, count: int = 500, size: int = 1 << 20) -> list[tuple[int, str]]:
        """Up to `count` events (and about `size` bytes) behind number `after`, oldest first, with their numbers.

        Events that were forgotten are left out, so the first number may be greater than `after + 1`.
        """
        with self._lock:
            wanted = max(after + 1, self.first)
            last = self.last
            start = max((start for start in self._starts if start <= wanted), default=None)
            if start is None or wanted > last:
                return []
            number, place = start, 0
            if self._cursor[0] == start and start <= self._cursor[1] <= wanted:
                _, number, place = self._cursor
            found: list[tuple[int, str]] = []
            with self._path(start).open("rb") as file:
                file.seek(place)
                while number <= last and len(found) < count and size > 0:
                    line = file.readline()
                    if not line.endswith(b"\n"):
                        break
                    if number >= wanted:
                        found.append((number, line[:-1].decode("utf-8")))
                        size -= len(line)
                    number += 1
                    place += len(line)
            self._cursor = (start, number, place)
            return found

    def forget(self, upto: int) -> None:
        """Events up to that number are not needed any more; segments that hold no others are deleted."""
        with self._lock:
            while self._starts:
                end = self._starts[1] - 1 if len(self._starts) > 1 else self.last
                full = len(self._starts) > 1 or end - self._starts[0] + 1 >= self._segment
                if end > upto or not full:
                    return
                if len(self._starts) == 1:
                    self._close_file()
                    self._begin(self.last + 1)  # keeps the count, whatever is deleted
                with contextlib.suppress(FileNotFoundError):
                    self._path(self._starts.pop(0)).unlink()

    def note(self, number: int) -> None:
        """Keep on disk that all events up to `number` were delivered, for whoever opens the spool next."""
        with self._lock, contextlib.suppress(OSError):
            (self.directory / "delivered").write_text(f"{number}\n")

    def noted(self) -> int:
        """The number that was noted last; 0 when none was."""
        with contextlib.suppress(OSError, ValueError):
            return min(int((self.directory / "delivered").read_text()), self.last)
        return 0

    def close(self, *, remove: bool = False) -> None:
        """Release the directory; `remove` deletes it with all that is in it."""
        with self._lock:
            self._close_file()
            if remove and self._held is not None:
                for path in self.directory.iterdir():
                    path.unlink()
                with contextlib.suppress(OSError):
                    self.directory.rmdir()
            self._release()

    def _open_last(self) -> BinaryIO:
        """The file that takes the next event, a new one when the last is full."""
        if not self._starts or self.last - self._starts[-1] + 1 >= self._segment:
            self._close_file()
            self._begin(self.last + 1)
        if self._file is None:
            self._file = open(self._path(self._starts[-1]), "ab", buffering=0)  # noqa: SIM115 - kept open
        return self._file

    def _begin(self, start: int) -> None:
        if start not in self._starts:
            self._path(start).touch()
            self._starts.append(start)

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _path(self, start: int) -> pathlib.Path:
        return self.directory / f"{start:012}.jsonl"

    def _token(self) -> str:
        path = self.directory / "token"
        with contextlib.suppress(FileNotFoundError):
            token = path.read_text().strip()
            if token:
                return token
        token = secrets.token_hex(4)
        path.write_text(token + "\n")
        return token

    def _mend(self) -> int:
        """Cut a line torn by a crash off the last segment; the number of the last event."""
        if not self._starts:
            return 0
        path = self._path(self._starts[-1])
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
        return self._starts[-1] - 1 + whole.count(b"\n")

    def _release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.close()


def _hold(directory: pathlib.Path) -> IO[Any]:
    """A lock on the directory that ends with the process."""
    file = open(directory / "lock", "a")  # noqa: SIM115 - it is the lock
    try:
        import fcntl
    except ImportError:  # no such locks on this platform
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise BlockingIOError(
            f"{directory} is in use by another process: two runs cannot share one spool; end the other, or give "
            "this one a directory of its own"
        ) from None
    return file
