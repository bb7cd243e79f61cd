"""Arrays on disk by Orbax, in one step's folder: the only file that imports it."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

ITEM = "default"
"""The folder Orbax gives a single item."""


def write_arrays(root: pathlib.Path, step: int, arrays: dict[str, np.ndarray]) -> None:
    """Store a flat dict of arrays as `root/step` and return when it is on disk.

    The manager lives for one save in an empty folder: it reads every step it finds, and one damaged file of Orbax's own
    in an old step would make it fail. OCDBT without zarr3 was the fastest layout measured for many small leaves.
    """
    options = ocp.CheckpointManagerOptions(
        create=False, max_to_keep=None, enable_async_checkpointing=False, multiprocessing_options=_by_itself()
    )
    with _quiet(), ocp.CheckpointManager(root, options=options, item_handlers=_handler()) as manager:
        manager.save(step, args=ocp.args.PyTreeSave(arrays or {"none": np.zeros(1, np.uint8)}), force=True)
        manager.wait_until_finished()
    if not (root / str(step) / ITEM).is_dir():
        raise OSError(f"Orbax reported success but wrote no {ITEM}")


def read_arrays(path: pathlib.Path, names: list[str]) -> dict[str, Any]:
    """Read the named arrays of the step in `path` as numpy, touching nothing outside it."""
    arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names or ["none"]}
    with _quiet(), ocp.Checkpointer(_handler(), multiprocessing_options=_by_itself()) as reader:
        return reader.restore(path / ITEM, args=ocp.args.PyTreeRestore(restore_args=arguments))


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, multiprocessing_options=_by_itself())


def _by_itself() -> ocp.options.MultiprocessingOptions:
    """This process reads and writes without waiting for the others of its job, if there are any."""
    me = jax.process_index()
    alone = jax.process_count() == 1
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes=None if alone else {me}, barrier_sync_key_prefix=None if alone else f"p{me}"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop Orbax's log lines: what matters in them becomes our warning or error."""
    logger = logging.getLogger("absl")

    def mute(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger.addFilter(mute)
    try:
        yield
    finally:
        logger.removeFilter(mute)
