"""A run's directory: whose it is, and what the run is called after it."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator

from .._holding import hold
from .checkpoint import CheckpointError, Checkpoints

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


def check_ahead(checkpoints: Checkpoints, step: int, *, another: bool = False) -> None:
    """CheckpointError where the directory holds a run that is further than this step, or `another` as far."""
    first = step if another else step + 1
    later = [one for one in checkpoints.steps() if one >= first and not checkpoints.is_damaged(one)]
    if later:
        raise CheckpointError(
            f"{checkpoints.directory.parent} already holds a run up to step {later[-1]}, and this state is at step "
            f"{step}; go on with restore(), or choose another checkpoint_dir"
        )


def run_name(directory: pathlib.Path | None) -> str:
    """The directory's name in letters that a run's name may have."""
    return "run" if directory is None else re.sub(r"[^A-Za-z0-9_.-]+", "-", directory.name).strip("-")[:100] or "run"
