"""A directory held by one process: a lock that ends with the process and says who has it."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import warnings
from typing import IO, Any


def hold(file: pathlib.Path, what: str) -> IO[Any]:
    """Lock `file` until what is returned is closed, or the process ends.

    Args:
      file: the lock; it is made where there is none, and holds the pid and host of who has it.
      what: what is held, and what to do if another has it; for the message.

    Where the platform or the file system has no locks, nothing is held, and a warning says so.

    Raises:
      BlockingIOError: another has it; the message names its process and host. OSError: no such file can be made.
    """
    held = open(file, "a+")  # noqa: SIM115 - it is the lock
    try:
        import fcntl
    except ImportError:
        return _unlocked(held, file, "this platform has no file locks")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = _holder(held)
        held.close()
        raise BlockingIOError(f"{file.parent} is in use by {who}: {what}") from None
    except OSError as error:
        return _unlocked(held, file, f"its file system gives no locks ({error.strerror or error})")
    held.truncate(0)
    held.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    held.flush()
    return held


def _unlocked(held: IO[Any], file: pathlib.Path, why: str) -> IO[Any]:
    text = f"{file.parent} is not kept from a second process, since {why}: start no other there yourself"
    warnings.warn(text, RuntimeWarning, stacklevel=3)
    return held


def _holder(file: IO[Any]) -> str:
    try:
        file.seek(0)
        found = json.loads(file.read())
        return f"process {int(found['pid'])} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
