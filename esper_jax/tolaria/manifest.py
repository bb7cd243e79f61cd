"""The manifest of a checkpoint: one record per leaf and what else is known of a step, written as its last file.

Nothing here knows Orbax. A `Manifest` is written atomically and carries its own checksum.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import zlib
from typing import Any

from .. import _versions
from .leaves import CheckpointError, Damaged, LeafRecord

FORMAT = 2  # raised when an older reader could no longer read what is written
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything that is known of one step without opening its arrays; see `LeafRecord` for `leaves`.

    `files` maps each file of the step (relative path) to its size in bytes: it names the culprit when a read fails.
    """

    step: int
    score: float | None
    meta: dict[str, Any]
    leaves: tuple[LeafRecord, ...]
    versions: dict[str, str]
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    format: int = FORMAT


def write(directory: pathlib.Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a step's directory: to a temporary name, synced, renamed, the directory synced."""
    body = dataclasses.asdict(manifest)
    text = json.dumps({"checksum": _text_checksum(body), "manifest": body}, indent=1)
    temporary = directory / (MANIFEST + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / MANIFEST)
    sync_directory(directory)


def read(directory: pathlib.Path) -> Manifest:
    """Read and check a step's manifest.

    Raises:
      Damaged: it is missing, unreadable, fails its checksum or belongs to another step.
      CheckpointError: it is whole but written in a later format.
    """
    try:
        data = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        body, stated = data["manifest"], data["checksum"]
    except FileNotFoundError:
        raise Damaged(
            f"{MANIFEST} is missing: it is written last, so the save was cut short or the file deleted"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if _text_checksum(body) != stated:
        raise Damaged(f"{MANIFEST} has {_text_checksum(body)}, saved with {stated}")
    if body["format"] > FORMAT:
        raise CheckpointError(
            f"{directory / MANIFEST} has format {body['format']}, written by {body['versions']}; this esper_jax "
            f"reads up to format {FORMAT}: install that version or a later one."
        )
    body["leaves"] = tuple(LeafRecord.from_json(leaf) for leaf in body["leaves"])
    if str(body["step"]) != directory.name:
        raise Damaged(f"{MANIFEST} belongs to step {body['step']}")
    return Manifest(**body)


def versions() -> dict[str, str]:
    """The versions a manifest names: those of this library, jax and orbax."""
    return _versions.versions("esper_jax", "jax", "orbax-checkpoint")


def written_by_others(manifest: Manifest) -> str:
    """Which versions wrote a step, where they are not those of this process: " (written by ...; here are ...)"."""
    here = versions()
    other = sorted(
        name for name in here.keys() | manifest.versions.keys() if manifest.versions.get(name) != here.get(name)
    )
    named = lambda known: ", ".join(f"{name} {known.get(name, 'unknown')}" for name in other)  # noqa: E731
    return f" (written by {named(manifest.versions)}; here are {named(here)})" if other else ""


def sizes(directory: pathlib.Path) -> dict[str, int]:
    """Bytes of each file below a step's directory, the manifest excepted."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in sorted(files)}


def changed_files(directory: pathlib.Path, manifest: Manifest) -> list[str]:
    """One sentence for each file that is missing or has another size than when it was saved."""
    now = sizes(directory)
    return [
        f"file {name} is missing" if name not in now else f"file {name} has {now[name]} bytes, saved with {size}"
        for name, size in manifest.files.items()
        if now.get(name) != size
    ]


def check_meta(meta: Any, path: str = "meta") -> None:
    """Raise TypeError, naming the place, where JSON could not hold `meta` or would silently change a key."""
    if isinstance(meta, dict):
        for key, value in meta.items():
            if not isinstance(key, str):
                raise TypeError(f"{path} has the key {key!r}: JSON keeps only str keys, so write it as a str")
            check_meta(value, f"{path}[{key!r}]")
    elif isinstance(meta, (list, tuple)):
        for index, value in enumerate(meta):
            check_meta(value, f"{path}[{index}]")
    elif not (meta is None or isinstance(meta, (str, bool, int, float))):
        raise TypeError(
            f"{path} is a {type(meta).__name__}: meta holds only dict, list, str, bool, int, float and None"
        )


def clean_score(score: Any) -> float | None:
    """A score as a finite float, or None: a score that is not finite is never the best."""
    return None if score is None or not math.isfinite(float(score)) else float(score)


def sync_directory(directory: pathlib.Path) -> None:
    """Make a directory's entries (renames in it) survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _text_checksum(body: Any) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return f"crc32:{zlib.crc32(text.encode()):08x}"
