"""Checkpoints that are whole or named as damaged: Orbax for the arrays, a manifest of ours for the truth.

It stores an arbitrary pytree plus a JSON-able dict and knows nothing of models; `arrays` alone imports Orbax.
Orbax alone restores a flipped bit silently, casts silently and never falls back; so every step carries a manifest
(`manifest.json`, written last) with a checksum, shape and dtype for each leaf, and `restore` believes only that.

    <directory>/<step>/manifest.json    ours: without it a step does not exist
    <directory>/<step>/default/         Orbax: a flat dict of arrays
    <directory>/<step>/default.1/ ...   and the parts of arrays that other processes held
    <directory>/.saving/<step>/         a save under way; renamed to its place as its last act
    <directory>/replaced/<step>/        the old copy of a step while `save(force=True)` renames the new one
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import pathlib
import re
import shutil
import uuid
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from . import leaves
from . import manifest as manifests
from .arrays import FOLDER, write_arrays
from .leaves import CheckpointError, Damaged, StructureMismatch
from .loading import load
from .manifest import Manifest
from .peers import first, soon, told
from .together import collect, folder_of, hand_in, nobody

__all__ = ["CheckpointError", "CheckpointWarning", "Checkpoints", "Restored", "Skipped", "StructureMismatch"]

_SAVING = ".saving"
_TRASH = ".trash-"
_REPLACED = "replaced"


class CheckpointWarning(UserWarning):
    """A step was passed over, or old steps could not be removed; training can go on."""


class Skipped(NamedTuple):
    """A step that `restore` passed over, and why (naming the leaf or file)."""

    step: int
    reason: str


class Prepared(NamedTuple):
    """A step on its way to disk."""

    step: int
    tree: Any
    meta: dict[str, Any]
    score: float | None


class Restored(NamedTuple):
    """What `restore` returns: the step, the tree, the dict saved with it, and the newer steps passed over.

    `where` names the step for messages: its directory, and the versions that wrote it where they are others.
    """

    step: int
    tree: Any
    meta: dict[str, Any]
    skipped: tuple[Skipped, ...]
    where: str


class Checkpoints:
    """Saves pytrees under step numbers in one directory and restores the newest whole one.

    When `save` returns, the step is on disk and the tree's buffers may be donated. One process writes to a directory;
    any number may read it.

    Args:
      directory: where the steps live.
      keep: how many of the newest steps to keep, at least 1.
      keep_best: how many of the highest-scored steps to keep besides.
      create: make the directory if it is absent; False for who only reads.

    Raises:
      ValueError: `keep` below 1 or `keep_best` below 0.
      CheckpointError: the directory cannot be created, or the path is a file.

    >>> import jax.numpy as jnp, tempfile
    >>> with Checkpoints(tempfile.mkdtemp(), keep=2) as checkpoints:
    ...     checkpoints.save(10, {"w": jnp.ones(3)}, {"epoch": 1}, score=0.9)
    ...     restored = checkpoints.restore({"w": jnp.zeros(3)})
    >>> restored.step, restored.meta, restored.tree["w"].tolist()
    (10, {'epoch': 1}, [1.0, 1.0, 1.0])
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int = 3, keep_best: int = 1, create: bool = True
    ) -> None:
        if keep < 1 or keep_best < 0:
            raise ValueError(
                f"keep must be at least 1 and keep_best at least 0, got keep={keep}, keep_best={keep_best}"
            )
        self.directory = pathlib.Path(directory).expanduser().absolute()
        self.keep = keep
        self.keep_best = keep_best
        self._damaged: set[int] = set()  # found by a restore of this object: retention does not count on them
        self._closed = False
        try:
            if create:
                self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot use {self.directory} for checkpoints ({error}): name a writable one"
            ) from error

    def steps(self) -> list[int]:
        """The steps that have a manifest, ascending, read from the disk now."""
        return sorted(self._listing())

    def found(self) -> dict[int, pathlib.Path]:
        """Every step that lies there, damaged ones too, and where."""
        return {**self._partial(), **self._listing()}

    def latest(self) -> int | None:
        """The newest step with a manifest, or None. Whether it is whole is only known once it is restored."""
        return max(self._listing(), default=None)

    def best(self) -> int | None:
        """The step with the highest score (the later one of equals), or None if no step has a score."""
        scored = [(score, step) for step, score in self._scores().items() if score is not None]
        return max(scored, default=(0.0, None))[1]

    def save(
        self, step: int, tree: Any, meta: dict[str, Any], *, score: float | None = None, force: bool = False
    ) -> None:
        """Store `tree` and `meta` as `step`, then remove steps that need not be kept.

        A kill at any moment leaves every older step, and with `force=True` the old or the new copy of this one.

        Args:
          step: the step's number, not negative.
          tree: a pytree of jax arrays, typed PRNG keys, numpy arrays and scalars, and Python numbers.
          meta: dict, list, str, bool, int, float and None only; tuples come back as lists.
          score: higher is better; None or a value that is not finite is never the best.
          force: replace the step if it exists whole. (A damaged one is replaced in any case, with a warning.)

        Raises:
          TypeError: a leaf or an entry of `meta` cannot be stored; nothing was written.
          ValueError: a negative step; nothing was written.
          CheckpointError: the step exists, or writing failed (disk full, no permission); other steps are untouched.
        """
        self.write(self.prepare(step, tree, meta, score=score), force=force)

    def prepare(
        self, step: int, tree: Any, meta: dict[str, Any], *, score: float | None = None, copy: bool = False
    ) -> Prepared:
        """What `write` takes, which may run in another thread. Arguments and errors are those of `save`.

        With `copy` nothing of it is the caller's memory: arrays may be donated at once, and `meta` may change. Where
        parts of the tree's arrays lie with several processes, all of them must call this, and then `write`.
        """
        step = self._check(step)
        if not isinstance(meta, dict):
            raise TypeError(f"meta is a {type(meta).__name__}, expected a dict")
        manifests.check_meta(meta)
        tree = leaves.parted(tree)
        if copy:
            tree, meta = jax.tree.map(leaves.copied, soon(tree)), json.loads(json.dumps(meta))
        if leaves.is_spread(tree) and (problem := told(self._stage(step) if first() else "")):
            raise self._unsaved(step, problem)
        return Prepared(step, tree, meta, manifests.clean_score(score))

    def is_damaged(self, step: int) -> bool:
        """Whether a step that is listed is damaged; all of it is read. (One of a later format is not.)"""
        try:
            with contextlib.suppress(CheckpointError):
                load(self._listing()[step])
        except Damaged:
            return True
        return False

    def write(self, prepared: Prepared, *, force: bool = False, gone: Callable[[int], bool] = nobody) -> None:
        """Store what `prepare` gave, and return when it is on disk; processes that are `gone` are not waited for."""
        step, tree, meta, score = prepared
        records, arrays = leaves.flatten(tree, folder_of(jax.process_index()))
        together = leaves.is_spread(tree)
        staged = self.directory / _SAVING / str(step)
        if together and not first():
            return hand_in(staged, records, arrays)
        existing = self._listing().get(step)
        if existing is not None and not force:
            try:
                load(existing)
            except Damaged as damage:
                self._warn(f"step {step} in {self.directory} is damaged and is replaced: {damage}")
            else:
                raise CheckpointError(
                    f"step {step} exists in {self.directory}: save under another step, or pass force=True to replace it"
                )
        target = self.directory / str(step)
        try:
            if not together and (problem := self._stage(step)):
                raise OSError(problem)
            write_arrays(staged / FOLDER, arrays)
            records = collect(staged, records, gone) if together else records
            manifest = Manifest(step, score, meta, records, manifests.versions(), manifests.sizes(staged))
            manifests.write(staged, manifest)
            self._make_room(target)
            os.rename(staged, target)
            manifests.sync_directory(self.directory)
        except Exception as error:
            shutil.rmtree(staged.parent, ignore_errors=True)
            raise self._unsaved(step, leaves.one_line(error)) from error
        self._damaged.discard(step)
        try:
            staged.parent.rmdir()
            self._prune(step)
        except OSError as error:
            self._warn(f"step {step} is saved, but old steps in {self.directory} could not be removed: {error}")

    def _stage(self, step: int) -> str:
        """Make the folder that a step is written into, empty; what went wrong with that, or ""."""
        try:
            shutil.rmtree(self.directory / _SAVING, ignore_errors=True)
            (self.directory / _SAVING / str(step)).mkdir(parents=True)
        except OSError as error:
            return leaves.one_line(error)
        return ""

    def _unsaved(self, step: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"step {step} could not be saved in {self.directory} ({reason}). "
            "No other step was touched; free space or fix the directory and save again."
        )

    def _make_room(self, target: pathlib.Path) -> None:
        """Empty the place of a step: a whole copy moves to `replaced/`, where listings still find it."""
        if not target.exists():
            return
        if not (target / manifests.MANIFEST).exists():
            if not _is_partial(target):
                raise OSError(f"{target} is not a checkpoint: move it away or use another directory")
            self._discard(target)
            return
        aside = self.directory / _REPLACED / target.name
        aside.parent.mkdir(exist_ok=True)
        if aside.exists():
            self._discard(aside)
        os.rename(target, aside)

    def _prune(self, saved: int) -> None:
        """Remove all but the newest, the best and the just saved step, and what cut-short saves left behind."""
        listing = self._listing()
        sound = {step: score for step, score in self._scores().items() if step not in self._damaged}
        ranked = sorted(((score, step) for step, score in sound.items() if score is not None), reverse=True)
        kept = {saved, *sorted(sound)[-self.keep :], *(step for _, step in ranked[: self.keep_best])}
        for step, path in listing.items():
            if step not in kept and (step in sound or step < saved):  # a damaged newer step stays, as evidence
                self._discard(path)
        for path in self.directory.iterdir():
            if path.name.startswith(_TRASH):
                shutil.rmtree(path, ignore_errors=True)
        for step, path in self._partial().items():
            if step < max(kept):
                self._discard(path)
        aside = self.directory / _REPLACED
        if aside.is_dir():
            for path in list(aside.iterdir()):
                if path not in listing.values():
                    self._discard(path)
            with contextlib.suppress(OSError):
                aside.rmdir()

    def _discard(self, path: pathlib.Path) -> None:
        """Remove a step: first one rename, so that a kill never leaves half a step under its number."""
        trash = self.directory / f"{_TRASH}{path.name}-{uuid.uuid4().hex[:8]}"
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)

    def restore(self, template: Any | Callable[[dict[str, Any]], Any], *, step: int | None = None) -> Restored:
        """Restore a step, every leaf verified to the bit.

        Args:
          template: a pytree of arrays or `jax.ShapeDtypeStruct`s with the structure to restore (values are ignored),
            or a function that builds one from the step's meta. Numpy leaves come back as numpy, others as jax arrays
            with the template's sharding.
          step: the step to restore; None walks back from the newest to the newest whole one.

        Returns:
          `Restored(step, tree, meta, skipped, where)`. Each newer step passed over is in `skipped`, and warned of.

        Raises:
          StructureMismatch: the step is whole but its leaves are not the template's, or the function cannot build one
          of its meta; never walks back for this.
          CheckpointError: there is no checkpoint, the named step is damaged or absent, or every step is damaged.
        """
        manifest, arrays, skipped = self._newest(step, load)
        is_function = callable(template) and jax.tree_util.all_leaves([template])
        where = self._where(manifest)
        with leaves.fitting(where):
            wanted = template(manifest.meta) if is_function else template
        tree = leaves.unflatten(wanted, manifest.leaves, arrays, where)
        return Restored(manifest.step, tree, manifest.meta, skipped, where)

    def read(self, step: int | None = None) -> Restored:
        """As `restore` without a template: the tree is `{path: numpy array}`, PRNG keys as their `key_data`."""
        manifest, arrays, skipped = self._newest(step, load)
        return Restored(manifest.step, arrays, manifest.meta, skipped, self._where(manifest))

    def restore_flat(self, step: int | None = None) -> dict[str, np.ndarray]:
        """The leaves of a step by path, verified; `read` without its step and meta."""
        return self.read(step).tree

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """The dict saved with a step. Its arrays are not read, so the step may still prove damaged.

        For meta and arrays of one step use `read`, or `restore` with a function; both may walk further back than this.
        """
        return self._newest(step, lambda path: (manifests.read(path), {}))[0].meta

    def _newest(
        self, step: int | None, load: Callable[[pathlib.Path], tuple[Manifest, dict[str, np.ndarray]]]
    ) -> tuple[Manifest, dict[str, np.ndarray], tuple[Skipped, ...]]:
        """`load` the named step, or walk back from the newest to the first that loads."""
        named = self._check(0 if step is None else step)
        listing = self.found()
        if not listing:
            raise CheckpointError(
                f"no checkpoint in {self.directory}: check the path, or start a new run, which saves there"
            )
        if step is not None:
            if named not in listing:
                raise CheckpointError(f"no step {named} in {self.directory}: it has the steps {sorted(listing)}")
            try:
                return *load(listing[named]), ()
            except Damaged as damage:
                self._damaged.add(named)
                raise CheckpointError(
                    f"step {named} in {self.directory} is damaged: {damage}. "
                    f"Name another step of {sorted(listing)}, or none to get the newest whole one."
                ) from damage
        skipped: list[Skipped] = []
        for candidate in sorted(listing, reverse=True):
            try:
                return *load(listing[candidate]), tuple(skipped)
            except Damaged as damage:
                self._damaged.add(candidate)
                skipped.append(Skipped(candidate, str(damage)))
                self._warn(f"skipped step {candidate} in {self.directory}: {damage}", stacklevel=4)
        tried = "\n  ".join(f"step {item.step}: {item.reason}" for item in skipped)
        raise CheckpointError(
            f"every step in {self.directory} is damaged:\n  {tried}\n"
            "Restore the directory from a backup, or start anew in another directory."
        )

    def close(self) -> None:
        """End use of this object; later saves and restores raise."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _where(self, manifest: Manifest) -> str:
        return f"step {manifest.step} in {self.directory}{manifests.written_by_others(manifest)}"

    def _check(self, step: int) -> int:
        if self._closed:
            raise CheckpointError(f"the checkpoints in {self.directory} were closed: make a new Checkpoints object")
        number = operator.index(step)
        if number < 0:
            raise ValueError(f"step must not be negative, got {number}")
        return number

    def _listing(self) -> dict[int, pathlib.Path]:
        """Each step with a manifest and where it lies; `replaced/` counts where the step's own place has none."""
        found = {}
        for root in (self.directory / _REPLACED, self.directory):
            found.update({s: path for s, path in _numbered(root) if (path / manifests.MANIFEST).is_file()})
        return found

    def _partial(self) -> dict[int, pathlib.Path]:
        """Orbax steps without a manifest: somebody deleted the file."""
        return {s: p for s, p in _numbered(self.directory) if not (p / manifests.MANIFEST).exists() and _is_partial(p)}

    def _scores(self) -> dict[int, float | None]:
        """The score of each step whose manifest can be read; None for a step without one or of a later format."""
        scores: dict[int, float | None] = {}
        for step, path in self._listing().items():
            with contextlib.suppress(Damaged):
                try:
                    scores[step] = manifests.read(path).score
                except CheckpointError:
                    scores[step] = None
        return scores

    def _warn(self, message: str, stacklevel: int = 3) -> None:
        warnings.warn(message, CheckpointWarning, stacklevel=stacklevel)


def _numbered(root: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    if not root.is_dir():
        return []
    return [(int(path.name), path) for path in root.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", path.name)]


def _is_partial(path: pathlib.Path) -> bool:
    """Whether a folder without a manifest is the rest of a checkpoint, and not something of the user's."""
    return path.is_dir() and any((path / name).exists() for name in ("_CHECKPOINT_METADATA", FOLDER))
