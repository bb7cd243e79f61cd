"""Files under one root, on a directory or any fsspec URL: whole or absent, listed, locked where a lock is possible.

On a local directory a file is written beside its place, synced and renamed, and writers and the sweeper exclude each
other by a lock on `.lock`. Elsewhere a file is put in one request, transient errors are tried again, and there is no
lock: what protects a writer there is that nothing younger than the sweeper's grace is removed.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..recovery import describe, retrying
from .errors import UrzaError, needed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
TEMPORARY = "tmp"


class Store:
    """Bytes by relative names such as `seeds/ab12.json`.

    Args:
      url: a directory, or any URL that fsspec understands (`s3://bucket/seeds`, `memory://seeds`).
      attempts, wait: calls in all after transient errors of a remote store, and seconds before the second.
      options: storage options for fsspec.
    """

    def __init__(self, url: str | os.PathLike[str], attempts: int, wait: float, options: dict[str, Any]) -> None:
        fsspec = needed("fsspec")
        self.url, self._attempts, self._wait = os.fspath(url), attempts, wait
        try:
            self.fs, root = fsspec.core.url_to_fs(self.url, **options)
        except Exception as error:  # whatever the file system behind the URL raises
            raise UrzaError(f"{self.url} cannot be opened as a library of seeds ({describe(error)})") from error
        self.root = root.rstrip("/")
        protocol = self.fs.protocol
        self.local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)
        if self.local and os.path.exists(self.root) and not os.path.isdir(self.root):
            raise UrzaError(f"{self.url} is a file; a library of seeds is a directory, or any fsspec URL")

    def exists(self) -> bool:
        """Whether there is anything at the root."""
        return bool(self._call(self.fs.exists, self.root))

    def read(self, name: str) -> bytes:
        """A file's bytes; FileNotFoundError where there is none."""
        return bytes(self._call(self.fs.cat_file, self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file in its place, over any that is there."""
        if not self.local:
            self._call(self.fs.pipe_file, self._path(name), data)
            return
        temporary = self._path(f"{TEMPORARY}/{uuid.uuid4().hex}")
        target = self._path(name)
        try:
            for path in (temporary, target):
                os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise UrzaError(f"cannot write {target} ({describe(error)})") from error

    def remove(self, name: str) -> None:
        """Delete a file, and its directory where that leaves it empty and it can be locked; none there is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._call(self.fs.rm_file, self._path(name))
        if self.local and fcntl is not None and name.count("/") > 1:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(self._path(name)))

    def names(self, folder: str) -> list[str]:
        """The names of all files below a folder, in order; none where there is no such folder."""
        self.fs.invalidate_cache()
        try:
            found = self._call(self.fs.find, self._path(folder))
        except FileNotFoundError:
            return []
        return sorted(path[len(self.root) + 1 :] for path in found)

    def age(self, name: str) -> float:
        """Seconds since a file was written; 0 where the store does not tell, infinite where it is gone."""
        try:
            written = self._call(self.fs.modified, self._path(name))
        except FileNotFoundError:
            return float("inf")
        except (NotImplementedError, KeyError, AttributeError):
            return 0.0
        return time.time() - written.timestamp()

    @contextlib.contextmanager
    def locked(self, *, alone: bool = False, create: bool = False) -> Iterator[None]:
        """Hold the directory's lock: shared, or `alone`; a process that dies lets go of it. Nothing on other stores.

        A directory that is not there is made only to `create` something in it.
        """
        if not self.local or fcntl is None or not (create or os.path.isdir(self.root)):
            yield
            return
        path = self._path(".lock")
        try:
            os.makedirs(self.root, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if alone:
                raise UrzaError(f"cannot lock {path} ({describe(error)})") from error
            yield  # a directory that can only be read has no writers to wait for
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """On a remote store again after passing trouble; what stays wrong is one sentence."""
        try:
            if self.local or "memory" in self.fs.protocol:
                return function(*arguments)
            return retrying(function, *arguments, attempts=self._attempts, wait=self._wait)
        except (FileNotFoundError, NotImplementedError, KeyError, AttributeError, ImportError):
            raise
        except Exception as error:
            tried = "" if self.local else f" after up to {self._attempts} attempts"
            raise UrzaError(f"{self.url}: {describe(error)}{tried}") from error
