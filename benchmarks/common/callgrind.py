"""Instructions that the processor executes in single calls of a program, counted by valgrind's callgrind.

The program is traced here and handed over as StableHLO; as a script this file is the process that valgrind watches,
which compiles it and counts call by call. Valgrind is slow at vector instructions: a step of the transformer of these
benchmarks takes most of a minute.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

DUMP, START, STOP = (0x43540000 + number for number in (0, 4, 5))
"""Callgrind's own client requests."""
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def counted(
    function: Callable[..., Any], state: Any, warm: Sequence[tuple[Any, ...]], calls: Sequence[tuple[Any, ...]]
) -> list[int]:
    """Instructions of each call `function(state, *rest) -> (state, ...)`, for the `rest` of each of `calls` in turn.

    Each goes on from the state that the last one gave, which is donated. Before that those of `warm` are made, from the
    same state on, and not counted, so that what is made at a first call is not. Threads that wait for others add about
    a million instructions to a call, more or less.

    Raises:
      RuntimeError: valgrind or the program failed; the last line that it wrote.
    """
    leaves, structure = jax.tree.flatten(state)
    keys = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    raw = [jax.random.key_data(leaf) if key else leaf for leaf, key in zip(leaves, keys, strict=True)]

    def plain(raw: list[Any], rest: list[Any]) -> list[Any]:
        typed = [jax.random.wrap_key_data(leaf) if key else leaf for leaf, key in zip(raw, keys, strict=True)]
        after = jax.tree.leaves(function(structure.unflatten(typed), *rest)[0])
        return [jax.random.key_data(leaf) if key else leaf for leaf, key in zip(after, keys, strict=True)]

    program = jax.export.export(jax.jit(plain, donate_argnums=0), platforms=("cpu",))(raw, list(calls[0]))
    given = jax.tree.map(np.asarray, (raw, [[list(rest) for rest in group] for group in (warm, calls)]))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "program").write_bytes(pickle.dumps((bytes(program.serialize()), *given)))
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        command += [sys.executable, __file__, str(folder / "program")]
        environment = {**os.environ, "XLA_FLAGS": ONE_THREAD, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, capture_output=True, env=environment)
        dumps = [folder / f"out.{number}" for number in range(1, len(calls) + 1)]
        if done.returncode or not all(dump.exists() for dump in dumps):
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"callgrind counted nothing: {said[-1] if said else 'it said nothing'}")
        totals = [re.findall(r"^totals: (\d+)", dump.read_text(), re.MULTILINE) for dump in dumps]
    if not all(totals):
        raise RuntimeError("callgrind wrote a dump without totals")
    return [int(found[0]) for found in totals]


def main() -> None:
    """In the process that callgrind watches: compile, warm up, and go back to the first state to count."""
    program, raw, groups = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
    call = jax.jit(jax.export.deserialize(program).call, donate_argnums=0).lower(raw, groups[0][0]).compile()

    request = client_requests()
    for counting, calls in zip((False, True), jax.tree.map(jax.numpy.asarray, groups), strict=True):
        state = jax.tree.map(jax.numpy.array, raw)
        for rest in calls:
            if counting:
                request(START)
            state = jax.block_until_ready(call(state, rest))
            if counting:
                request(STOP)
                request(DUMP)


def client_requests() -> Callable[[int], None]:
    """What tells valgrind something at this very point of the program, as its header's macro for x86-64 does.

    `callgrind_control` would take a process, whose beginning would be counted too.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("4889f8 31d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db c3"))
    code = ctypes.c_char.from_buffer(page)  # keeps the page
    tell = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(code))

    def request(number: int, _: Any = code) -> None:
        words = (ctypes.c_size_t * 6)(number)
        tell(ctypes.addressof(words))

    return request


if __name__ == "__main__":
    main()
