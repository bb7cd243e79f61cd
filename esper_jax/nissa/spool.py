"""Events on disk in order, numbered from 1: what a sink or a bus that is slow or away has still to be given.

A spool is a directory of segments, files of JSON lines named by the number of their first event, so that what was
delivered is dropped by deleting whole files. It outlives the process. Only one process at a time may have it open.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import secrets
import threading
from typing import IO, Any, BinaryIO

from .._holding import hold

SEGMENT = 4096
_SEGMENT = re.compile(r"\d{12,}\.jsonl")
_TOKEN = re.compile(r"[0-9a-f]{8}")
_OURS = ("lock", "token", "token.new", "delivered", "run")


class Spool:
    """A queue of lines on disk. `append` is one write to the operating system, without waiting for the disk.

    Args:
      directory: where; made if it is missing, and gone on with if it is not.
      segment: events in a file.

    Attributes:
      token: eight random hex digits, made with the directory, or by the last `fork`; `id(n)` names an event for ever.
      last: the number of the newest event, 0 when there never was one.

    Raises:
      BlockingIOError: another process has it open.
    """

    def __init__(self, directory: str | os.PathLike[str], *, segment: int = SEGMENT) -> None:
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._segment = segment
        self._lock = threading.Lock()
        self._held: IO[Any] | None = hold(
            self.directory / "lock",
            "two runs cannot share one spool; end the other, or give this one a directory of its own",
        )
        try:
            self._tokens = self._read_tokens()
            self._starts = sorted(int(path.stem) for path in self.directory.iterdir() if _SEGMENT.fullmatch(path.name))
            self.last = self._mend()
        except BaseException:
            self._release()
            raise
        self._file: BinaryIO | None = None
        self._torn: int | None = None  # where a line begins that was written in part and could not be cut off
        self._cursor = (0, 0, 0)  # segment, number of the next line to read there, and its place in bytes

    @property
    def first(self) -> int:
        """The number of the oldest event that is still there; `last + 1` when there is none."""
        return self._starts[0] if self._starts else self.last + 1

    @property
    def token(self) -> str:
        """Of the events that are appended now."""
        return self._tokens[-1][1]

    @property
    def tokens(self) -> frozenset[str]:
        """All that events of this spool have."""
        return frozenset(token for _, token in self._tokens)

    def id(self, number: int) -> str:
        """The event's name, the same however often it is delivered."""
        token = next((token for after, token in reversed(self._tokens) if after < number), self._tokens[0][1])
        return f"{token}-{number}"

    def fork(self, after: int) -> None:
        """Give the events behind number `after` new names, for ever: the old ones turned out to be taken."""
        with self._lock:
            tokens = [pair for pair in self._tokens if pair[0] < after] + [(after, secrets.token_hex(4))]
            self._write_tokens(tokens)
            self._tokens = tokens

    def append(self, line: str) -> int:
        """Add an event, one line of JSON; its number. An `OSError` (a full disk) leaves the spool as it was."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            if self._held is None:
                raise ValueError(f"the spool {self.directory} is closed")
            file = self._open_last()
            if self._torn is not None:
                file.truncate(self._torn)
                self._torn = None
            place = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, f"no room for an event in {self.directory}")
            except OSError:
                self._torn = place
                file.truncate(place)
                self._torn = None
                raise
            self.last += 1
            return self.last

    def read(self, after: int, count: int = 500, size: int = 1 << 20) -> list[tuple[int, str]]:
        """Up to `count` events (and about `size` bytes) behind number `after`, oldest first, with their numbers.

        Events that were forgotten are left out, so the first number may be greater than `after + 1`; so are those of
        a segment that another program cut short. Bytes that are not UTF-8 are read as U+FFFD.
        """
        with self._lock:
            wanted = max(after + 1, self.first)
            begin = max((start for start in self._starts if start <= wanted), default=None)
            if begin is None or wanted > self.last:
                return []
            for start in self._starts[self._starts.index(begin) :]:
                found = self._segment_from(start, wanted, count, size)
                if found:
                    return found
            return []

    def _segment_from(self, start: int, wanted: int, count: int, size: int) -> list[tuple[int, str]]:
        """`read` in one segment."""
        end = min([self.last, *(other - 1 for other in self._starts if other > start)])
        number, place = start, 0
        if self._cursor[0] == start and start <= self._cursor[1] <= wanted:
            _, number, place = self._cursor
        found: list[tuple[int, str]] = []
        with self._path(start).open("rb") as file:
            file.seek(place)
            while number <= end and len(found) < count and size > 0:
                line = file.readline()
                if not line.endswith(b"\n"):
                    break
                if number >= wanted:
                    found.append((number, line[:-1].decode("utf-8", "replace")))
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
        """Release the directory; `remove` deletes what the spool has in it, and it, if nothing else is there."""
        with self._lock:
            self._close_file()
            if remove and self._held is not None:
                with contextlib.suppress(OSError):
                    for path in self.directory.iterdir():
                        if path.name in _OURS or _SEGMENT.fullmatch(path.name):
                            path.unlink()
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

    def _read_tokens(self) -> list[tuple[int, str]]:
        """Each token with the number behind which it names events; a file that makes no sense is written anew."""
        path = self.directory / "token"
        if path.is_file():
            found = []
            for line in path.read_text(errors="replace").splitlines():
                token, _, after = line.partition(" ")
                if _TOKEN.fullmatch(token) and (after or "0").isdecimal():
                    found.append((int(after or 0), token))
            if found:
                return found
        tokens = [(0, secrets.token_hex(4))]
        self._write_tokens(tokens)
        return tokens

    def _write_tokens(self, tokens: list[tuple[int, str]]) -> None:
        path = self.directory / "token"
        beside = path.with_name("token.new")
        beside.write_text("".join(f"{token} {after}\n" if after else f"{token}\n" for after, token in tokens))
        os.replace(beside, path)

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
