"""A run's history on disk: a line of JSON for each tick, in one file beside the checkpoints.

A checkpoint says only how much of the file it counts on, and with which checksum, so that a save costs the same however
long the run is. Lines are appended before the checkpoint that counts on them; what lies behind them, of a save that was
cut short or a run that went on from an earlier step, is written over.
"""

from __future__ import annotations

import json
import os
import pathlib
import warnings
import zlib
from collections.abc import Callable
from typing import Any

from .leaves import one_line

FILE = "history.jsonl"
Mark = dict[str, int]
"""How much of the file counts: `ticks`, `bytes`, and their `crc32`."""


class HistoryFile:
    """The file of one `fit`, where what is there of the run's records already need not be written again."""

    def __init__(self, path: pathlib.Path, records: list[dict[str, Any]]) -> None:
        self.path = path
        self._mark: Mark = {"ticks": 0, "bytes": 0, "crc32": 0}
        mark, text = self._after(records)
        if text and _begins_with(path, text):
            self._mark = mark

    def up_to_now(self, records: list[dict[str, Any]]) -> tuple[Mark, Callable[[], None]]:
        """How much a checkpoint with these records counts on, and what writes it; OSError where that fails."""
        mark, text = self._after(records)
        size = self._mark["bytes"]

        def write() -> None:
            with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
                file.seek(size)
                file.write(text)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
            self._mark = mark

        return mark, write

    def _after(self, records: list[dict[str, Any]]) -> tuple[Mark, bytes]:
        """The mark with these records, and the lines behind the present one."""
        old = self._mark
        text = b"".join(json.dumps(record).encode() + b"\n" for record in records[old["ticks"] :])
        crc = zlib.crc32(text, old["crc32"])
        return {"ticks": len(records), "bytes": old["bytes"] + len(text), "crc32": crc}, text


def read_history(path: pathlib.Path, mark: Mark) -> list[dict[str, Any]] | None:
    """The records that a checkpoint counts on; None, with a warning, where the file does not hold them any more."""
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
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(text)) == text
