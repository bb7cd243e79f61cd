"""JAX's settings where programs are built: the persistent cache, and those that hold in the training thread alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


def settings() -> dict[str, Any]:
    """JAX's settings as they hold in this thread, those of an enclosing `with` block included."""
    return dict(jax.config.values)


def sendable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that can be sent to another process."""
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}


@contextlib.contextmanager
def under(values: Mapping[str, Any]) -> Iterator[None]:
    """This thread's settings made those of another thread, as far as JAX has a context manager for them."""
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            setting = getattr(jax, name.removeprefix("jax_"), None)
            if jax.config.values.get(name) != value and callable(setting):
                with contextlib.suppress(TypeError, ValueError):
                    stack.enter_context(setting(value))
        yield


@contextlib.contextmanager
def compile_cache(directory: str | os.PathLike[str] | None) -> Iterator[None]:
    """JAX's persistent compilation cache in `directory` for the time of the block; None changes nothing."""
    if directory is None:
        yield
        return
    wanted = {
        "jax_compilation_cache_dir": os.fspath(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
