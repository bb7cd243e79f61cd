"""The state of a client: everything that a run and a remote controller need to go on, in arrays of a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kasmina._pytree import Struct, pytree
from ..kasmina.spec import Spec


@pytree
class RemoteState(Struct):
    """What a client remembers: all of it, so that a checkpoint is enough to go on with, whatever the service forgot.

    `spec` (uint8, JSON of sites and slots) and `key` (uint32) are as at the start. `remote` (uint8, JSON) is the state
    of the service's controller, `question` (uint8, JSON) the question under way, `owed` (uint8, JSON) the feedback not
    yet delivered; each is empty where there is none. `waited` counts the ticks since the question was asked, `missed`
    the questions without an answer in a row (both int32).
    """

    spec: Any
    key: Any
    remote: Any
    question: Any
    owed: Any
    waited: Any
    missed: Any

    @staticmethod
    def first(spec: Spec, key: Any) -> RemoteState:
        """The state before the first question; `key` is uint32 words."""
        bare = Spec(spec.sites, spec.slots).to_json().encode()
        nothing, zero = pack(b""), np.array(0, np.int32)
        return RemoteState(pack(bare), np.array(key, np.uint32).reshape(-1), nothing, nothing, nothing, zero, zero)


def pack(data: bytes) -> np.ndarray:
    """Bytes as a uint8 array."""
    return np.frombuffer(data, np.uint8).copy()


def unpack(array: Any) -> bytes:
    """A uint8 array as bytes."""
    return np.asarray(array, np.uint8).tobytes()
