"""A run's directory: whose it is, and what the run is called after it."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator

from .._holding import hold
from .checkpoint import CheckpointError

LOCK = "run.lock"
"""What tells in a run directory that a process trains there."""


@contextlib.contextmanager
def held(directory: pathlib.Path) -> Iterator[None]:
    """The run directory, for this process alone."""
    try:
        lock = hold(directory / LOCK, "one run writes to a directory; end the other, or choose another checkpoint_dir")
    except OSError as error:
        raise CheckpointError(str(error)) from None
    with lock:
        yield


def run_name(directory: pathlib.Path | None) -> str:
    """The directory's name in letters that a run's name may have."""
    return "run" if directory is None else re.sub(r"[^A-Za-z0-9_.-]+", "-", directory.name).strip("-")[:100] or "run"
