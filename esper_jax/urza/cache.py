"""A cache of files that never change: least recently used goes first, within a budget of bytes."""

from __future__ import annotations

import collections
import dataclasses
import threading


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """What a cache did: files found (`hits`), not found (`misses`), dropped for room; and what it holds now."""

    hits: int
    misses: int
    evictions: int
    files: int
    bytes: int
    budget: int


class Cache:
    """`{digest: bytes}` within `budget` bytes. A file larger than the budget is not kept. Safe between threads."""

    def __init__(self, budget: int) -> None:
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
            raise ValueError(f"a cache's budget is a whole number of bytes, 0 or more, got {budget!r}")
        self.budget = budget
        self._held: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = self._evictions = self._bytes = 0

    def get(self, digest: str) -> bytes | None:
        """The file, now the most recently used, or None."""
        with self._lock:
            data = self._held.get(digest)
            if data is None:
                self._misses += 1
                return None
            self._hits += 1
            self._held.move_to_end(digest)
            return data

    def add(self, digest: str, data: bytes) -> None:
        """Keep a file, and drop the least recently used ones until all fit."""
        with self._lock:
            self._drop(digest)
            if len(data) > self.budget:
                return
            self._held[digest] = data
            self._bytes += len(data)
            while self._bytes > self.budget:
                self._drop(next(iter(self._held)))
                self._evictions += 1

    def remove(self, digest: str) -> None:
        """Forget a file; that is no eviction."""
        with self._lock:
            self._drop(digest)

    @property
    def stats(self) -> CacheStats:
        """The counts so far."""
        with self._lock:
            return CacheStats(self._hits, self._misses, self._evictions, len(self._held), self._bytes, self.budget)

    def _drop(self, digest: str) -> None:
        data = self._held.pop(digest, None)
        if data is not None:
            self._bytes -= len(data)
