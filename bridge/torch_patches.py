"""Functions of torch that are others while a module is captured."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

CAPTURING = threading.RLock()
"""Held by whoever has put something in the place of torch's own: what was there is put back in turn."""


@contextlib.contextmanager
def instead(*ours: tuple[Any, str, Callable[..., Any]]) -> Iterator[None]:
    """Meanwhile each `(place, name, function)` stands in for what was there, in this thread: others notice nothing."""
    with CAPTURING:
        before = [getattr(place, name) for place, name, _ in ours]
        for (place, name, function), own in zip(ours, before, strict=True):
            setattr(place, name, _here(function, own))
        try:
            yield
        finally:
            for (place, name, _), own in zip(ours, before, strict=True):
                setattr(place, name, own)


def _here(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    thread = threading.get_ident()

    @functools.wraps(theirs)
    def called(*args: Any, **kwargs: Any) -> Any:
        return (ours if threading.get_ident() == thread else theirs)(*args, **kwargs)

    return called
