"""One step of a checkpoint, read from its folder and verified to the bit."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from . import manifest as manifests
from .arrays import FOLDER, read_arrays
from .leaves import Damaged
from .manifest import Manifest


def load(path: pathlib.Path) -> tuple[Manifest, dict[str, np.ndarray]]:
    """The manifest of the step in `path`, and its leaves by their paths.

    Raises:
      Damaged: a leaf cannot be read, or is not what was saved (it is named, with the number of others), or a file is
        missing or has another size (named too). CheckpointError: a later format.
    """
    manifest = manifests.read(path)
    changed = [text for text in manifests.changed_files(path, manifest) if text.startswith(f"file {FOLDER}")]
    wanted: dict[str, dict[tuple[str, int], Any]] = {}
    for record in manifest.leaves:
        for number, (folder, name, part) in enumerate(record.places(FOLDER)):
            wanted.setdefault(folder, {})[record.path, number] = (name, part)
    stored: dict[tuple[str, int], Any] = {}
    for folder, some in wanted.items():
        stored.update(read_arrays(path / folder, some))
    whole: dict[str, np.ndarray] = {}
    broken = []
    for record in manifest.leaves:
        try:
            whole[record.path] = record.check([stored[record.path, n] for n in range(len(record.places(FOLDER)))])
        except Damaged as damage:
            broken.append(str(damage))
    if broken or changed:
        leaves = broken[:1] or ["every leaf is whole"]
        more = [f"and {len(broken) - 1} more leaves"] if len(broken) > 1 else []
        raise Damaged("; ".join([*leaves, *more, *changed]))
    return manifest, whole
