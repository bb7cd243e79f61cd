"""Set before jax starts: tests run on the processor unless told otherwise."""

import gc
import itertools
import os
import pathlib
import signal

import pytest

gc.set_threshold(200_000, 50, 1000)  # traces and graphs are millions of objects, and few of them garbage
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# a shell has what it starts in the background ignore Ctrl-C, and so would every process of these tests
signal.signal(signal.SIGINT, signal.default_int_handler)

_TESTS = itertools.count(1)
_MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def room_for_programs():
    """What no test uses any more is let go before there is no room for more.

    Every compiled program holds several memory maps of the process, of which Linux allows 65,530, and XLA crashes
    where they run out. And `jax.jit` keeps 8,192 calls of all functions together: beyond them a function's
    `_cache_size()` can read 0 right after a call of it.
    """
    yield
    if next(_TESTS) % 20 == 0 and (_maps() > 30_000 or _calls_kept() > 4_096):
        import jax

        jax.clear_caches()
        gc.collect()


def _maps() -> int:
    """Memory maps of this process; 0 where the system does not tell."""
    return _MAPS.read_bytes().count(b"\n") if _MAPS.exists() else 0


def _calls_kept() -> int:
    """The most calls that one of the caches of `jax.jit` keeps, which jax tells in a private module alone."""
    from jax._src import pjit

    return max(cache.size() for cache in vars(pjit).values() if type(cache).__name__ == "PjitFunctionCache")


@pytest.fixture(autouse=True)
def own_blueprints():
    """A blueprint that a test registers ends with it: the tests of a worker share one registry."""
    from esper_jax.kasmina.blueprints import _REGISTRY

    before = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)
