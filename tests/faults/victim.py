"""The small growing run as a process to be killed (DIRECTORY CACHE): it begins, or goes on from the newest step.

With WHAT and N besides it kills itself, as `kill -9` would, at the Nth call of a function within its swaps of programs,
fossilisations or ticks.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

from esper_jax.kasmina import operate
from esper_jax.tolaria.change import Changes
from esper_jax.tolaria.ticker import Ticker
from tests.tolaria import growing

WITHIN: dict[str, tuple[Any, str]] = {
    "a swap": (Changes, "make"),
    "a fossilisation": (operate, "fossilize"),
    "a tick": (Ticker, "__call__"),
}


def kill_within(what: str, after: int) -> None:
    """Have this process die at that many calls of Python functions in `what`, counted over all of them."""
    owner, name = WITHIN[what]
    real: Callable[..., Any] = getattr(owner, name)
    called = 0

    def count(frame: Any, event: str, given: Any) -> None:
        nonlocal called
        called += event == "call"
        if called >= after:
            os.kill(os.getpid(), signal.SIGKILL)

    def within(*args: Any, **options: Any) -> Any:
        sys.setprofile(count)
        try:
            return real(*args, **options)
        finally:
            sys.setprofile(None)

    setattr(owner, name, within)


if __name__ == "__main__":
    directory = pathlib.Path(sys.argv[1])
    if len(sys.argv) > 3:
        kill_within(sys.argv[3], int(sys.argv[4]))
    made = growing.trainer(directory, compile_cache=sys.argv[2])
    there = directory / "checkpoints"
    begun = there.is_dir() and any(path.name.isdigit() for path in there.iterdir())
    state = made.restore() if begun else growing.start(made)
    made.fit(state, growing.TRAIN, growing.VALIDATION, epochs=growing.EPOCHS)
