"""What passes between this process and the one that compiles for it: framed bytes, and trees that share one spec."""

from __future__ import annotations

import io
import pickle
import struct
from typing import Any, BinaryIO

from ..kasmina.spec import Spec

_LENGTH = struct.Struct("<Q")
_MOST = 1 << 34


def write(stream: BinaryIO | Any, data: bytes) -> None:
    """Send one frame."""
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def read(stream: BinaryIO | Any) -> bytes:
    """Receive one frame.

    Raises:
      EOFError: the other side has ended.
    """
    (size,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    if size > _MOST:
        raise EOFError("what came is no frame (something else was written to the stream)")
    return _exactly(stream, size)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("the stream ended")
    return data


def dumps(tree: Any, spec: Spec) -> bytes:
    """A tree pickled with `spec` left out, for an `Unpickler` that puts its own equal one in its place.

    Calls compare the structure of their arguments with the program's; one shared spec makes that a comparison of
    identities.
    """

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> str | None:
            return "spec" if isinstance(obj, Spec) and obj == spec else None

    stream = io.BytesIO()
    Pickler(stream).dump(tree)
    return stream.getvalue()


class Unpickler(pickle.Unpickler):
    """Reads what `dumps` wrote."""

    def __init__(self, data: bytes, spec: Spec) -> None:
        super().__init__(io.BytesIO(data))
        self._spec = spec

    def persistent_load(self, name: Any) -> Spec:
        """The spec of this side."""
        return self._spec
