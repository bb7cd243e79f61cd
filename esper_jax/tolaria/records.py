"""A run's history on disk: a line of JSON for each tick, in one file beside the checkpoints.

A checkpoint says only how much of the file it counts on, and with which checksum, so that a save costs the same however
long the run is. Lines are appended before the checkpoint that counts on them; what lies behind them, of a save that was
cut short or a run that went on from an earlier step, is written over.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import warnings
import zlib
from collections.abc import Callable
from typing import Any

from .leaves import one_line
from .manifest import sync_directory

FILE = "history.jsonl"
Mark = dict[str, Any]
"""How much of which `file` counts: `ticks`, `bytes`, and their `crc32`."""


class HistoryFile:
    """The file of one `fit`, where what is there of the run's records already need not be written again."""

    def __init__(self, path: pathlib.Path, records: list[dict[str, Any]]) -> None:
        """Where the file holds other lines, of another `fit` or damaged ones, it is left as it is for a new one."""
        self._mark: Mark = {"ticks": 0, "bytes": 0, "crc32": 0}
        mark, text = self._after(records)
        self.path, number = path, 1
        while self.path.exists():
            if text and _begins_with(self.path, text):
                self._mark = mark
                break
            number += 1
            self.path = path.with_stem(f"{path.stem}-{number}")

    def up_to_now(self, records: list[dict[str, Any]]) -> tuple[Mark, Callable[[], None]]:
        """How much a checkpoint with these records counts on, and what writes it; OSError where that fails."""
        mark, text = self._after(records)
        size, ticks = self._mark["bytes"], mark["ticks"]

        def write() -> None:
            new = not self.path.exists()
            with open(self.path, "w+b" if new else "r+b") as file:
                there = os.fstat(file.fileno()).st_size >= size
                file.seek(size if there else 0)
                file.write(text if there else _lines(records[:ticks]))  # all again, where somebody took it away
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync_directory(self.path.parent)
            self._mark = mark

        return {**mark, "file": self.path.name}, write

    def _after(self, records: list[dict[str, Any]]) -> tuple[Mark, bytes]:
        """The mark with these records, and the lines behind the present one."""
        old = self._mark
        text = _lines(records[old["ticks"] :])
        crc = zlib.crc32(text, old["crc32"])
        return {"ticks": len(records), "bytes": old["bytes"] + len(text), "crc32": crc}, text


def _lines(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def read_history(directory: pathlib.Path, mark: Mark) -> list[dict[str, Any]] | None:
    """The records that a checkpoint counts on; None, with a warning, where the file does not hold them any more."""
    path = directory / mark.get("file", FILE)
    try:
        text = path.read_bytes()[: mark["bytes"]]
        if len(text) == mark["bytes"] and zlib.crc32(text) == mark["crc32"]:
            return [json.loads(line) for line in text.splitlines()]
        why = f"its first {mark['bytes']} bytes are not those that were saved"
    except OSError as error:
        why = one_line(error)
    lost = f"the history of the first {mark['ticks']} ticks is lost: {path}: {why}. Nothing else hangs on it"
    warnings.warn(lost, RuntimeWarning, stacklevel=4)
    return None


def _begins_with(path: pathlib.Path, text: bytes) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(len(text)) == text
    return False
