"""A process that puts, reads or sweeps a library, to be run beside others: `python -m tests.urza.writer ROLE DIR`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator

from esper_jax import Urza
from esper_jax.urza import UnknownSeed

from .world import by_hand

SEEDS = 6
ROUNDS = 20


def passes(root: str) -> Iterator[None]:
    """Over and over until the file `<root>.stop` is there, and once more."""
    stopped = False
    while not stopped:
        stopped = os.path.exists(f"{root}.stop")
        yield
        time.sleep(0.02)  # locks are not fair: who asks again at once may have them all


def put(root: str, first: int) -> dict[str, int]:
    """Put seeds that others put and remove too, and seeds of one's own that nobody removes."""
    urza = Urza(root, cache_bytes=0)
    for turn in range(ROUNDS):
        urza.put(by_hand(turn % SEEDS), contribution=float(turn), measure=False)
        urza.put(by_hand(1000 * first + turn), measure=False)
    return {"put": 2 * ROUNDS}


def read(root: str) -> dict[str, int]:
    """Read what there is; a seed that was removed meanwhile is no error."""
    urza = Urza(root, cache_bytes=0)
    found, gone = 0, 0
    for _ in passes(root):
        for seed_id in urza.ids()[:20]:
            try:
                urza.get(seed_id)
                found += 1
            except UnknownSeed:
                gone += 1
    return {"found": found, "gone": gone}


def sweep(root: str) -> dict[str, int]:
    """Remove the shared seeds and free their files, over and over, with no grace at all."""
    urza = Urza(root)
    removed, freed = 0, 0
    for _ in passes(root):
        for entry in urza.entries()[0]:
            if entry.config["number"] < SEEDS:
                try:
                    urza.remove(entry)
                    removed += 1
                except UnknownSeed:
                    pass
        freed += len(urza.gc(grace=0).files)
    return {"removed": removed, "freed": freed}


def forever(root: str) -> dict[str, int]:
    """Put until killed."""
    urza = Urza(root)
    for number in range(10**6):
        urza.put(by_hand(number), measure=False)
        if number == 0:
            sys.stdout.write("started\n")
            sys.stdout.flush()
    return {}


if __name__ == "__main__":
    role, root, *rest = sys.argv[1:]
    work = {"put": put, "read": read, "sweep": sweep, "forever": forever}[role]
    sys.stdout.write(json.dumps(work(root, *map(int, rest))) + "\n")
