"""Freed memory that a process on a CPU keeps for its next step."""

from __future__ import annotations

import ctypes
import os

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1
"""The parameters of glibc's `mallopt`."""
_KEPT = 1 << 30
_ENVIRONMENT = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_memory() -> bool:
    """Let this process keep the memory that it frees for what it allocates next. For training on a CPU.

    XLA's CPU backend allocates the temporary arrays of a program anew in each call. glibc returns blocks of that size
    to the system when they are freed, so that each of their pages costs a page fault in every step. Where they are
    larger than 32 MiB that was 7 to 33% of the train steps of `benchmarks/bridge.py`. From this call on one arena
    serves all threads, and returns blocks of more than 1 GiB and what is free over 1 GiB at its end: the process may
    stay as large as it once was.

    Call it before JAX computes anything: threads that have allocated keep their arenas. Steps that allocate little
    take longer with it, since their threads share the arena: measure. Arrays on an accelerator are not concerned.

    Returns:
      Whether it took. Where the allocator is another than glibc's, or an old one that keeps no block over 32 MiB, or
      environment variables speak of it (`MALLOC_ARENA_MAX`, `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_`,
      `GLIBC_TUNABLES`, `LD_PRELOAD`), nothing changes.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or "malloc" in os.environ.get("LD_PRELOAD", "") or any(name in os.environ for name in _ENVIRONMENT):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function, or no such way to look for it
        return False
    # the one that may be refused comes first, and ends it
    given = (_MMAP_THRESHOLD, _KEPT), (_TRIM_THRESHOLD, _KEPT), (_ARENA_MAX, 1)
    return all(mallopt(name, value) == 1 for name, value in given)
