"""Files that are there whole or not at all, whatever ends the process or fills the disk."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a file in the place of the one that may be there. OSError: it could not be; the old one is as it was."""
    replace(path, (text.encode(),))


def replace(path: pathlib.Path, parts: Iterable[bytes]) -> None:
    """As `replace_text`, with what comes part by part."""
    with _beside(path, parts) as written:
        os.replace(written, path)


def new_text(path: pathlib.Path, text: str) -> None:
    """Write a file that is not there yet; of several that try, one does. FileExistsError: it is there already."""
    with _beside(path, (text.encode(),)) as written:
        try:
            os.link(written, path)
        except FileExistsError:
            raise
        except OSError as error:  # a file system without links
            if path.exists():
                raise FileExistsError(*error.args) from None
            os.replace(written, path)


@contextlib.contextmanager
def _beside(path: pathlib.Path, parts: Iterable[bytes]) -> Iterator[str]:
    """A file of those parts beside `path`, on disk, for the time of the block, with the mode of the one there."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~mask)
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
