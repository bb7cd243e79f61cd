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
    """Every compiled program holds several memory maps of the process, of which Linux allows 65,530.

    A worker of this suite compiles so many that they run out, and XLA crashes; what is not used any more is let go.
    """
    yield
    if next(_TESTS) % 20 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 30_000:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def own_blueprints():
    """A blueprint that a test registers ends with it: the tests of a worker share one registry."""
    from esper_jax.kasmina.blueprints import _REGISTRY

    before = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)
