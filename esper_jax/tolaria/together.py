"""One step that several processes store side by side: each the parts of arrays that it holds, the first one the step.

They meet in the step's folder, which all of them must see: each writes its parts with Orbax into a folder of its own,
and then says which they are in a file, by which the first knows that they are whole. Nothing here is a collective, so a
thread may do it beside the training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from .arrays import FOLDER, write_arrays
from .leaves import LeafRecord, Piece, one_line

PATIENCE = 300
"""Seconds for which the first process waits for the parts of another."""


def folder_of(process: int) -> str:
    """The name of a process's folder in a step."""
    return f"{FOLDER}.{process}" if process else FOLDER


def hand_in(step: pathlib.Path, records: tuple[LeafRecord, ...], arrays: dict[str, Any]) -> None:
    """Store this process's parts and say so; one that cannot says that, and the first process fails for both."""
    me = jax.process_index()
    done, failed = _answers(step, me)
    try:
        pieces = {record.path: [dataclasses.asdict(piece) for piece in record.pieces] for record in records}
        names = {piece["name"] for parts in pieces.values() for piece in parts}
        write_arrays(step / folder_of(me), {name: array for name, array in arrays.items() if name in names})
        written = done.with_suffix(".tmp")
        written.write_text(json.dumps(pieces))
        os.replace(written, done)
    except Exception as error:
        reason = failed.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            reason.touch()  # an empty file may be made on a full disk
            reason.write_text(one_line(error))
        with contextlib.suppress(OSError):
            os.replace(reason, failed)


def nobody(process: int) -> bool:
    """That no process is gone."""
    return False


def collect(
    step: pathlib.Path, records: tuple[LeafRecord, ...], gone: Callable[[int], bool] = nobody
) -> tuple[LeafRecord, ...]:
    """The records with the pieces of all processes, once all have stored theirs; OSError where one could not.

    What a process has not stored once it is `gone` is waited for no more.
    """
    pieces = {record.path: list(record.pieces) for record in records}
    for process in range(1, jax.process_count()):
        done, failed = _answers(step, process)
        began = time.monotonic()
        while not done.exists():
            lost = gone(process)  # asked before the last look at what it stored
            if failed.exists():
                raise OSError(f"process {process} could not store its part: {failed.read_text()}")
            if lost and not done.exists():
                raise OSError(f"process {process} is gone and has stored no part")
            if time.monotonic() - began > PATIENCE:
                raise OSError(
                    f"process {process} stored no part within {PATIENCE} s; all processes must see {step.parent.parent}"
                )
            time.sleep(0.01)
        for path, parts in json.loads(done.read_text()).items():
            pieces[path] += map(Piece.from_json, parts)
        done.unlink()
    return tuple(dataclasses.replace(record, pieces=tuple(pieces[record.path])) for record in records)


def _answers(step: pathlib.Path, process: int) -> tuple[pathlib.Path, pathlib.Path]:
    """The files by which a process says that its parts are stored, or that they could not be."""
    return step / f"stored.{process}.json", step / f"failed.{process}"
