"""The process that compiles: reads jobs from its input, answers with executables, and ends with its parent."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import time
from typing import Any

from . import frames


def main() -> None:
    """Serve until the input ends. What the user's code prints goes to the error stream."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        _configure(pickle.loads(frames.read(sys.stdin.buffer)))
        functions: dict[int, Any] = {}
        ours = set(sys.modules)
        while True:
            found = answer(frames.read(sys.stdin.buffer), functions)
            files = (getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - ours)
            frames.write(channel, pickle.dumps({**found, "sources": [file for file in files if file]}))
    except (EOFError, BrokenPipeError):
        return


def answer(job: bytes, functions: dict[int, Any]) -> dict[str, Any]:
    """Build one job: payload, skeleton of the output and seconds, or an error and whose fault it is."""
    import cloudpickle
    import jax
    from jax.experimental import serialize_executable

    from ..kasmina.blueprints import adopt

    try:
        asked = cloudpickle.loads(job)
        adopt(asked["blueprints"])
        if asked["function"] is not None:
            functions[asked["key"]] = cloudpickle.loads(asked["function"])
        jitted = jax.jit(functions[asked["key"]], donate_argnums=asked["donate"])
    except Exception as error:  # unpickling runs the user's modules
        return {"at fault": "transport", "error": f"{type(error).__name__}: {error}"}
    try:
        began = time.perf_counter()
        lowered = jitted.lower(*asked["args"])
        traced = time.perf_counter()
        compiled = lowered.compile()
        built = time.perf_counter()
    except Exception as error:
        return {"at fault": "program", "error": f"{type(error).__name__}: {error}"}
    try:
        payload, _, out_tree = serialize_executable.serialize(compiled)
        skeleton = frames.dumps(jax.tree.unflatten(out_tree, range(out_tree.num_leaves)), asked["spec"])
    except Exception as error:  # which executables can be handed over is JAX's to say
        return {"at fault": "transport", "error": f"{type(error).__name__}: {error}"}
    return {"payload": payload, "skeleton": skeleton, "trace": traced - began, "compile": built - traced}


def _configure(values: dict[str, Any]) -> None:
    """This process's JAX set up as the parent's."""
    import jax

    for name, value in values.items():
        if jax.config.values.get(name) != value:
            with contextlib.suppress(AttributeError, ValueError, RuntimeError):
                jax.config.update(name, value)
    # An executable that came from the persistent cache cannot be handed over: it lacks its functions when it runs.
    jax.config.update("jax_enable_compilation_cache", False)


def _end_with(parent: int) -> None:
    """End at once when the parent has, however long a compilation would still take."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)
