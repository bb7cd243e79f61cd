"""Freed memory that a process on a CPU keeps for its next step."""

from __future__ import annotations

import ctypes
import os

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1
"""The parameters of glibc's `mallopt`."""
_KEPT = 1 << 30
_ENVIRONMENT = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_memory() -> bool:
    """Let this process keep what it frees, up to 1 GiB, for what it allocates next. For training on a CPU.

    XLA's CPU backend allocates the temporary arrays of a program anew in each call. glibc returns blocks of that size
    to the system when they are freed, so that each of their pages costs a page fault in every step: 10 to 50% of it,
    where they are larger than 32 MiB. From this call on one arena serves all threads and gives nothing back below a
    gigabyte, so that the process stays as large as it once was.

    Call it before JAX computes anything: threads that have allocated keep their arenas. `esper-jax` calls it itself.
    Arrays on an accelerator are not concerned.

    Returns:
      Whether it took. Where the allocator is another than glibc's, or its environment variables are set
      (`MALLOC_ARENA_MAX`, `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_`, `GLIBC_TUNABLES`), nothing changes.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or any(name in os.environ for name in _ENVIRONMENT):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function, or no such way to look for it
        return False
    given = (_ARENA_MAX, 1), (_MMAP_THRESHOLD, _KEPT), (_TRIM_THRESHOLD, _KEPT)
    return all(mallopt(name, value) == 1 for name, value in given)
