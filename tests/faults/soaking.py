"""Seeds germinate and are pruned over and over, in a process of its own (DIRECTORY TRIALS): it holds no more for it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import pathlib
import resource
import subprocess
import sys
import threading
import time
import types
from typing import Any

import jax
import jax.extend
import numpy as np

from esper_jax import Decision, Lifecycle
from tests.faults.found import GATES, ROOT, Found, fit
from tests.tolaria import growing

FILES = 2  # what may be open beside: the event log is written, an old save removed


def _files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Cycler:
    """A controller that plants a seed wherever there is none, and prunes it once it trains."""

    def init(self, spec: Any, key: Any) -> Any:
        """How many seeds it has planted."""
        return np.int32(0)

    def decide(self, state: Any, report: Any, feedback: Any) -> Any:
        """Germinate or prune."""
        if not report.seeds:
            return (Decision("germinate", "Dense_0", None, "lora", {"rank": 1}, reason="nothing there"),), state + 1
        seed = report.seeds[0]
        if seed.stage.name == "TRAINING":
            return (Decision("prune", seed.site, seed.slot, reason="its turn is over"),), state
        return (), state


class Soaked:
    """A sink that notes, at each germination, what the process holds.

    A save that is under way opens a dozen files and lasts, on a slow disk, from one germination to the next: the sink
    first waits for the files to be closed. Files that are never given back stay, however long it waits.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def quiet(self, seconds: float = 10.0) -> None:
        """Wait, `seconds` at most, until no more files are open than at the germinations before."""
        least = min((row["files"] for row in self.rows), default=float("inf"))
        end = time.monotonic() + seconds
        while _files() > least + FILES and time.monotonic() < end:
            time.sleep(0.02)

    def emit(self, event: Any) -> None:
        """One row a germination."""
        if event.kind == "germinated":
            self.quiet()
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps of memory that was given back
            resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            self.rows.append(
                {
                    "MiB": resident / 2**20,
                    "threads": threading.active_count(),
                    "files": _files(),
                    "arrays": len(jax.live_arrays()),
                    "programs": len(jax.extend.backend.get_backend().live_executables()),
                }
            )

    def close(self) -> None:
        """Nothing."""


def size_of(*things: Any) -> int:
    """Bytes of dicts, lists, numbers and the like, each object once; classes and code are nobody's."""
    seen: set[int] = set()
    total, todo = 0, list(things)
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(thing))
        total += sys.getsizeof(thing)
        todo.extend(gc.get_referents(thing))
    return total


def soak(folder: pathlib.Path, random: np.random.Generator, trials: int) -> Found:
    """Seeds germinate and are pruned over and over: nothing grows but the run's history, memory neither."""
    command = [sys.executable, "-m", "tests.faults.soaking", str(folder), str(trials)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return Found(trials=1, failures=[f"the soaked process ended with {done.returncode}: {done.stderr[-2000:]}"])
    return Found.from_json(done.stdout.splitlines()[-1])


def soaked(folder: pathlib.Path, trials: int) -> Found:
    """What one run of so many cycles held at its beginning and at its end.

    Compared are the least of the first and of the last few: what is under way for a while (an evaluation, the end of a
    save) only adds to them, and what is never given back is in all of the last.
    """
    found, noted = Found(), Soaked()
    made = growing.trainer(
        folder,
        controller=Cycler(),
        lifecycle=Lifecycle(GATES),
        sinks=(noted,),
        checkpoint_every=10 + trials // 8,
        keep=2,
    )
    _, history = fit(made, 10 * trials + 1)
    made_once = 4 + trials // 32  # germinations, of one in eight epochs or ten, until the second save
    rows = noted.rows[made_once:]
    least = max(trials, made_once + 5 + 5)  # so that the first and the last five below are different ones
    found.expect(len(noted.rows) >= least, f"{len(noted.rows)} germinations in {trials} cycles")
    kept = size_of(history.records, history.events, made.bus.read(count=1 << 30)) / 2**20
    # What is under way differs by one or two from one germination to the next; what each germination, save or tick
    # leaves behind is eight and more from the first rows to the last, in the short form too.
    # A save leaks 0.5 KiB a leaf in tensorstore (0.1.86, `Spec.to_json`), and sizes of small objects are those without
    # what the allocator rounds up.
    limits = {"threads": 2, "files": FILES, "arrays": 2, "programs": 2, "MiB": 10 + 1.5 * kept}
    found.seen[f"history and events that the run keeps: {kept:.0f} MiB"] += 1
    for name, most in limits.items():
        first, last = (min(row[name] for row in part) for part in (rows[:5], rows[-5:]))
        found.expect(last - first <= most, f"{name}: {first:g} grew to {last:g}")
        found.seen[f"{name} {first:.0f} to {last:.0f}"] += 1
    found.trials = len(noted.rows)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(vars(soaked(pathlib.Path(sys.argv[1]), int(sys.argv[2])))) + "\n")
