"""Freed memory that the process keeps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import esper_jax
print(esper_jax.keep_memory() if sys.argv[1] == "keep" else None)
import jax, jax.numpy as jnp

@jax.jit
def step(x):
    return jnp.cumsum(x, axis=0).max(axis=1)

x = jnp.ones((5000, 5000))
for _ in range(4):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 3)
"""
NAMES = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def run(how: str, **more: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", STEPS, how]
    done = subprocess.run(command, env=clean | more, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_temporary_arrays_of_a_step_cost_no_page_faults():
    took, kept = run("keep")
    if took == "False":
        pytest.skip("another allocator than glibc's")
    _, returned = run("leave")
    assert int(returned) > 10_000
    assert int(kept) <= int(returned) // 2  # one call in a few may still take new pages


@pytest.mark.parametrize(
    ("name", "value"),
    [(NAMES[0], "4"), (NAMES[2], "0"), ("LD_PRELOAD", "libjemalloc.so.2"), ("GLIBC_TUNABLES", "glibc.malloc.check=0")],
)
def test_what_the_environment_says_is_left_alone(monkeypatch, name, value):
    import esper_jax

    monkeypatch.setenv(name, value)
    assert esper_jax.keep_memory() is False
