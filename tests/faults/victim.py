"""The small growing run as a process to be killed (DIRECTORY CACHE): it begins, or goes on from the newest step."""

from __future__ import annotations

import pathlib
import sys

from tests.tolaria import growing

if __name__ == "__main__":
    directory = pathlib.Path(sys.argv[1])
    made = growing.trainer(directory, compile_cache=sys.argv[2])
    there = directory / "checkpoints"
    begun = there.is_dir() and any(path.name.isdigit() for path in there.iterdir())
    state = made.restore() if begun else growing.start(made)
    made.fit(state, growing.TRAIN, growing.VALIDATION, epochs=growing.EPOCHS)
