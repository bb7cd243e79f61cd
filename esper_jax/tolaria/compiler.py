"""Compiling beside the training: in a process of its own that runs only when the cores are idle, or in a thread.

A thread of this process holds the interpreter while it traces and takes the cores while it compiles. So on the CPU a
program is built in another process, whose executable is handed over as bytes; elsewhere, where the accelerator is busy
with steps that were dispatched before and a second process could not have the device, a thread does it.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable

from ..kasmina._pytree import is_key
from ..kasmina.blueprints import Blueprint
from ..kasmina.spec import Spec
from . import frames
from .settings import sendable, settings, under

# Before anything is imported: idle priority, so that the process runs on what the training leaves of the cores, and
# deafness to Ctrl-C, which is for the training process to answer.
_IDLE = """import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
if hasattr(os, "SCHED_IDLE"):
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
else:
    os.nice(19)"""


_BEGAN = time.time()
SHORT = 1.0
"""Seconds that a compiler has to end where nobody waits for what it builds."""


class BuildError(RuntimeError):
    """A program could not be traced or compiled; the message says what and why."""


class WorkerError(RuntimeError):
    """The process that compiles could not be used (it died, or something cannot be sent to it)."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to build: `jax.jit(function, donate_argnums=donate)` for arguments of these shapes.

    `args` is a tuple of pytrees of `jax.ShapeDtypeStruct`; `spec` is the structure they have, and `blueprints` are the
    recipes it names.
    """

    name: str
    function: Callable[..., Any]
    donate: tuple[int, ...]
    args: tuple[Any, ...]
    spec: Spec
    blueprints: tuple[Blueprint, ...] = ()


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled program, the seconds it took to trace and to compile, where, and its size in bytes (0: not known)."""

    call: Callable[..., Any]
    trace_seconds: float
    compile_seconds: float
    where: str
    size: int = 0


class Compiler(Protocol):
    """Builds programs one after another, off the training thread."""

    def start(self) -> None:
        """Get ready for the first job."""
        ...

    def submit(self, job: Job, *, guess: bool = False) -> Future[Built]:
        """The program to come; a guess comes after all others. A `BuildError` means that the program is at fault."""
        ...

    def hasten(self, future: Future[Built]) -> None:
        """What was a guess is needed now: it goes before all guesses."""
        ...

    def hurry(self, on: bool) -> None:
        """Somebody waits (or no longer): take the cores now."""
        ...

    def close(self, *, wait: bool = True) -> None:
        """End; what is not built is cancelled. Without `wait` only the interpreter's exit waits for what is under way.

        See `under_way`.
        """
        ...


def check_place(where: str, *, one_device: bool = True) -> str:
    """`where` itself if it is a place to compile in; ValueError otherwise."""
    if where not in ("auto", "process", "thread"):
        raise ValueError(f"compile_in must be 'auto', 'process' or 'thread', got {where!r}")
    if where == "process" and not one_device:
        raise ValueError("compile_in='process' builds for one device; on a mesh programs are built in a 'thread'")
    return where


def make_compiler(where: str, *, one_device: bool = True) -> Compiler:
    """A compiler: "process", "thread", or "auto": a process on the CPU for one device, a thread elsewhere."""
    if check_place(where, one_device=one_device) == "auto":
        where = "process" if jax.default_backend() == "cpu" and one_device else "thread"
    return ProcessCompiler() if where == "process" else ThreadCompiler()


def build_here(job: Job) -> Built:
    """The program, built in this process."""
    began = time.perf_counter()
    try:
        lowered = jax.jit(job.function, donate_argnums=job.donate).lower(*job.args)
        traced = time.perf_counter()
        compiled = lowered.compile()
    except Exception as error:
        raise BuildError(f"{job.name}: {type(error).__name__}: {error}") from error
    return Built(compiled, traced - began, time.perf_counter() - traced, "thread")


_abandoned: list[threading.Thread] = []


def under_way() -> bool:
    """Whether a program is still being built that nobody waits for: the interpreter's exit takes as long as that."""
    return any(thread.is_alive() for thread in _abandoned)


Asked = tuple[Job, Future[Built], dict[str, Any]]
"""A job, what comes of it, and JAX's settings in the thread that asked."""


class _Queued:
    """One thread that takes jobs in turn, guesses last; `_build` is what it does with one."""

    def __init__(self) -> None:
        self._more = threading.Condition()
        self._asked: collections.deque[Asked] = collections.deque()
        self._guessed: collections.deque[Asked] = collections.deque()
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self) -> None:
        """Nothing to do in a thread."""

    def submit(self, job: Job, *, guess: bool = False) -> Future[Built]:
        """See `Compiler`."""
        future: Future[Built] = Future()
        with self._more:
            if self._closed:
                _cancel(future)
                return future
            (self._guessed if guess else self._asked).append((job, future, settings()))
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="esper_jax compiler", daemon=True)
                self._thread.start()
            self._more.notify()
        return future

    def hasten(self, future: Future[Built]) -> None:
        """See `Compiler`."""
        with self._more:
            for one in [one for one in self._guessed if one[1] is future]:
                self._guessed.remove(one)
                self._asked.append(one)

    def hurry(self, on: bool) -> None:
        """Nothing to do in a thread."""

    def close(self, *, wait: bool = True) -> None:
        """See `Compiler`."""
        with self._more:
            self._closed = True
            for _, future, _ in (*self._asked, *self._guessed):
                _cancel(future)
            self._asked.clear()
            self._guessed.clear()
            self._more.notify()
        if self._thread is None or self._thread is threading.current_thread():
            return
        self._thread.join(None if wait else SHORT)
        if self._thread.is_alive():
            _abandoned.append(self._thread)
            atexit.register(self._thread.join)  # a compilation under way at the interpreter's exit would abort it

    def _serve(self) -> None:
        while True:
            with self._more:
                self._more.wait_for(lambda: self._asked or self._guessed or self._closed)
                if self._closed:
                    return
                job, future, wanted = (self._asked or self._guessed).popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                with under(wanted):
                    built = self._build(job)
                future.set_result(built)
            except BaseException as error:
                future.set_exception(error)

    def _build(self, job: Job) -> Built:
        raise NotImplementedError


def _cancel(future: Future[Built]) -> None:
    future.cancel()
    future.set_running_or_notify_cancel()


class ThreadCompiler(_Queued):
    """Builds in a thread of this process."""

    def _build(self, job: Job) -> Built:
        return build_here(job)

    def __repr__(self) -> str:
        return "ThreadCompiler()"


class ProcessCompiler(_Queued):
    """Builds in a child process that runs at idle priority, with this process's sys.path and JAX configuration.

    The model, loss, score and optimizer travel by cloudpickle. What cannot be sent, or an executable that cannot be
    handed over, is built in a thread instead, and `notice` says so once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notice, self._told = "", False
        self._broken = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None
        self._sent: dict[int, Callable[..., Any]] = {}

    def start(self) -> None:
        """Start the process now, so that its imports are done when the first job comes."""
        if self._process is not None or self._broken or self._closed:
            return
        try:
            self._start()
        except Exception as error:  # no executable, no working directory, no memory: a thread does it then
            self._broken = f"it cannot be started: {type(error).__name__}: {error}"

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close())
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) or os.getcwd() for path in sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{_IDLE}\nfrom esper_jax.tolaria.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        frames.write(self._process.stdin, pickle.dumps(sendable(settings())))

    def hurry(self, on: bool) -> None:
        """Give the process ordinary priority while somebody waits for it."""
        if self._process is not None:
            _set_idle(self._process.pid, not on)

    def close(self, *, wait: bool = True) -> None:
        """See `Compiler`."""
        self._closed = True
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        super().close(wait=wait)
        if process is not None:
            for stream in (process.stdin, process.stdout, self._errors):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _build(self, job: Job) -> Built:
        try:
            return self._remote(job)
        except BuildError:  # the process sees modules as they are on disk: only what fails here too is at fault
            return build_here(job)
        except WorkerError as error:
            if self._closed:
                raise
            if not self._told:
                self.notice, self._told = f"programs are compiled in a thread of this process, because {error}", True
            return build_here(job)

    def _remote(self, job: Job) -> Built:
        import cloudpickle

        self.start()
        process = self._process
        if process is None:
            raise WorkerError(f"there is no compiling process: {self._broken or 'it was closed'}")
        known = self._sent.get(id(job.function)) is job.function
        try:
            function = None if known else cloudpickle.dumps(job.function)
            text = cloudpickle.dumps(
                {
                    "key": id(job.function),
                    "function": function,
                    "donate": job.donate,
                    "spec": job.spec,
                    "args": job.args,
                    "blueprints": job.blueprints,
                }
            )
        except Exception as error:  # pickling runs the user's objects: anything may come
            raise WorkerError(f"{job.name} cannot be sent to another process: {error}") from error
        try:
            frames.write(process.stdin, text)
            answer = frames.read(process.stdout)
        except (OSError, EOFError, ValueError) as error:
            raise WorkerError(f"the compiling process ended: {self._last_words() or error}") from error
        self._sent[id(job.function)] = job.function
        found = pickle.loads(answer)
        if edited := _edited(found.get("sources", ())):
            raise WorkerError(
                f"{edited} was written to after this process began: the compiling process would read another program"
            )
        if found.get("at fault") == "program":
            raise BuildError(f"{job.name}: {found['error']}")
        if "error" in found:
            raise WorkerError(f"{job.name} cannot be handed over: {found['error']}")
        try:
            return _loaded(job, found)
        except Exception as error:  # unpickling and loading machine code: whatever is wrong, a thread can build it
            raise WorkerError(f"{job.name} cannot be loaded: {type(error).__name__}: {error}") from error

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        with contextlib.suppress(OSError, ValueError):
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            return lines[-1] if lines else ""
        return ""

    def __repr__(self) -> str:
        return f"ProcessCompiler({'running' if self._process is not None else 'not started'})"


def _edited(files: Iterable[str]) -> str:
    """The first of these source files that was written to since this module was imported; "" where none was."""
    for file in files:
        with contextlib.suppress(OSError):
            if os.path.getmtime(file) > _BEGAN:
                return file
    return ""


def _set_idle(process: int, idle: bool) -> None:
    """Idle or ordinary priority for every thread of a process, where the system has such a thing."""
    if not hasattr(os, "SCHED_IDLE"):
        return
    policy = os.SCHED_IDLE if idle else os.SCHED_OTHER
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with contextlib.suppress(OSError):
                os.sched_setscheduler(int(thread), policy, os.sched_param(0))


def _loaded(job: Job, found: dict[str, Any]) -> Built:
    """The executable of an answer, ready to be called."""
    skeleton = frames.Unpickler(found["skeleton"], job.spec).load()
    in_tree, out_tree = jax.tree.structure((job.args, {})), jax.tree.structure(skeleton)
    devices = jax.local_devices()[:1]
    call = serialize_executable.deserialize_and_load(found["payload"], in_tree, out_tree, execution_devices=devices)
    with contextlib.suppress(Exception):  # the first call comes all the same, and says what is wrong
        rehearse(call, job.args)
    return Built(call, found["trace"], found["compile"], "process", len(found["payload"]))


def rehearse(call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Run a program on made-up arrays of these shapes: zeros, and 1 for whole numbers behind the first argument.

    XLA's CPU backend makes the kernels of its matrix products at a program's first run, which takes as long as several
    steps. And JAX finds out once, in Python, how to call a program with arguments of each kind. So that is done here,
    beside the training: with a state of JAX's arrays, as it will be, and batches of NumPy's and of JAX's. It needs the
    memory of one more state and two batches while it lasts. Only programs that came from the other process are
    rehearsed: they are for one device and call nothing in this one.
    """
    if jax.default_backend() == "cpu":
        rest = jax.tree.map(_zeros, args[1:])
        rest = jax.tree.map(lambda leaf: leaf + 1 if np.ndim(leaf) == 0 and leaf.dtype.kind in "iu" else leaf, rest)
        there = jax.tree.map(lambda leaf: jnp.asarray(leaf) if np.ndim(leaf) else leaf, rest)
        for batches in (rest, there) if any(map(np.ndim, jax.tree.leaves(rest))) else (rest,):
            first = jax.tree.map(lambda shape: jnp.asarray(_zeros(shape)), args[0])
            jax.block_until_ready(call(first, *batches))


def _zeros(shape: jax.ShapeDtypeStruct) -> Any:
    if not is_key(shape):
        return np.zeros(shape.shape, shape.dtype)
    kinds: list[Any] = []

    def data(key: jax.Array) -> jax.Array:
        kinds.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    words = jax.eval_shape(data, shape)
    return jax.random.wrap_key_data(jnp.zeros(words.shape, words.dtype), impl=kinds[0])
