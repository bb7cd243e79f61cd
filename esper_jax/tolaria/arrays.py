"""Arrays on disk in Orbax's format, a folder for each flat dict of them: the only file that imports it."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

K = TypeVar("K")
FOLDER = "default"
"""The name Orbax gives a single item of a step."""


def write_arrays(folder: pathlib.Path, arrays: dict[str, Any]) -> None:
    """Store a flat dict of arrays as `folder`, which must not be there, and return when it is on disk.

    A checkpointer, not Orbax's manager of steps: that one reads every step it finds, and fails by a damaged file in an
    old one. OCDBT without zarr3 was the fastest layout measured for many small leaves.
    """
    options = _by_itself()
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        use_zarr3=False,
        multiprocessing_options=options,
        type_handler_registry=_kinds(options),
        array_metadata_validator=None,
    )
    with _quiet(), ocp.Checkpointer(handler, multiprocessing_options=options) as writer:
        writer.save(folder, args=ocp.args.PyTreeSave(arrays or {"none": np.zeros(1, np.uint8)}))
    if not folder.is_dir():
        raise OSError(f"Orbax reported success but wrote no {folder.name}")


def _kinds(options: ocp.options.MultiprocessingOptions) -> Any:
    """How arrays are written: of one that several processes hold, this one's parts (and no list of all its parts)."""
    divided = ocp.type_handlers.ArrayHandler(primary_host=options.primary_host, array_metadata_store=None)
    return ocp.type_handlers.create_type_handler_registry(
        (jax.Array, divided), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )


def read_arrays(
    folder: pathlib.Path, wanted: Mapping[K, tuple[str, tuple[slice, ...]]]
) -> dict[K, np.ndarray | Exception]:
    """Arrays of a folder, or parts of them (no slices: the whole); in the place of one that cannot be read, why.

    They are read by tensorstore, which Orbax stores them with: Orbax would read all or nothing, and not say which.
    """
    context = tensorstore.Context()
    base = folder.as_uri() + "/"

    def settled(futures: dict[Any, Any]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, future in futures.items():
            try:
                found[key] = future if isinstance(future, Exception) else future.result()
            except Exception as error:
                found[key] = error
        return found

    def opened(name: str) -> Any:
        store = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
        return tensorstore.open(store, open=True, context=context)

    stores = settled({name: opened(name) for name, _ in wanted.values()})
    read: dict[Any, Any] = {}
    for key, (name, part) in wanted.items():
        store = stores[name]
        try:
            read[key] = store if isinstance(store, Exception) else store[part].read() if part else store.read()
        except Exception as error:  # the part lies outside of what is stored
            read[key] = error
    return settled(read)


def _by_itself() -> ocp.options.MultiprocessingOptions:
    """This process writes without waiting for the others of its job, if there are any."""
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
