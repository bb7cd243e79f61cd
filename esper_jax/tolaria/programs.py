"""The compiled programs of a run, one for each structure, and those that are built ahead for the next one."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from ..kasmina.blueprints import get_blueprint
from ..kasmina.morph import Morph
from ..kasmina.spec import Spec
from .compiler import BuildError, Built, Compiler, Job, WorkerError
from .peers import largest
from .sharding import Layout
from .state import TrainState

Signature = tuple[Any, Hashable]
TOLD_SECONDS = 1.0
"""A call's wait for a program in the making that is told of."""
WAITING = 1
"""What a process says that still waits for its programs; numbers above are those of signals (none is 1 here)."""


class Program:
    """A jitted function of a state or morph and further arguments, which may have been built ahead of its first call.

    Args:
      name: what it does, for messages.
      function: a pure function whose first argument is a `TrainState` or a `Morph`.
      donate: as for `jax.jit`.
      extra: makes from the morph the arguments that follow the first and have its structure. The others are batches
        and the like, whose shapes are remembered from the calls.
      extras: how many arguments `extra` gives.
      late: nobody needs it at once when the structure changes.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        donate: tuple[int, ...] = (),
        extra: Callable[[Morph], tuple[Any, ...]] = lambda morph: (),
        extras: int = 0,
        late: bool = False,
    ) -> None:
        self.name, self.function, self.donate = name, function, donate
        self.extra, self.extras, self.late = extra, extras, late
        self.jitted = jax.jit(function, donate_argnums=donate)
        self.shapes: dict[Hashable, Any] = {}
        self.ran: set[Signature] = set()
        self.ahead: dict[Signature, Future[Built]] = {}
        self.notice = ""
        """What is to be told of the last call, for whoever tells it and clears it."""
        self.hurry: Callable[[bool], None] = lambda on: None
        """Told that somebody waits for a program that is being built, and that nobody does any more."""

    def __call__(self, first: Any, *rest: Any) -> Any:
        """The function's result, from a program built ahead where there is one."""
        shape = _signature(rest[self.extras :])
        key = (_spec(first), shape)
        future = self.ahead.get(key)
        if future is not None and not future.done():
            self._await(future)
        if future is not None and (built := built_or_none(future)) is not None:
            try:
                return built.call(first, *rest)
            except (TypeError, ValueError) as error:  # checked before it runs: other dtypes, devices or shardings
                del self.ahead[key]
                said = " ".join(str(error).split())[:300]
                self.notice = f"the {self.name} program that was built ahead does not fit and is compiled anew: {said}"
        if key not in self.ran:
            self.ran.add(key)
            self.shapes.setdefault(shape, _abstract(rest[self.extras :]))
        return self.jitted(first, *rest)

    def _await(self, future: Future[Built]) -> None:
        began = time.perf_counter()
        self.hurry(True)
        try:
            built_or_none(future)
        finally:
            self.hurry(False)
        took = time.perf_counter() - began
        if took >= TOLD_SECONDS:
            self.notice = f"a call waited {took:.2g} s for the {self.name} program that is built in the background"

    def expect(self, *rest: Any) -> None:
        """Remember the shapes of a call that may come, so that its program can be built ahead."""
        self.shapes.setdefault(_signature(rest), _abstract(rest))

    def _cache_size(self) -> int:
        """How many programs were compiled when they were first called."""
        return int(self.jitted._cache_size())  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a structure's programs: seconds waited for, and spent on building, where, and what went wrong."""

    waited: float = 0.0
    trace: float = 0.0
    compile: float = 0.0
    where: str = ""
    programs: int = 0
    error: str = ""


class Programs:
    """The store: asks a compiler for the programs of the next structure and hands them over when it is due.

    Args:
      programs: a run's programs; those named "train" take a `TrainState`, the others a `Morph`.
      compiler: builds them in the background.
      budget: bytes that programs may take which no structure in use needs: built on suspicion (`prefetch`), or of a
        seed that is gone; the oldest are dropped first.
      layout: where the state lives on a mesh; None is one device.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        compiler: Compiler,
        budget: int = 256 * 2**20,
        layout: Layout | None = None,
    ) -> None:
        self.programs, self.compiler, self.budget, self.layout = tuple(programs), compiler, budget, layout
        self._guesses: collections.OrderedDict[Spec, None] = collections.OrderedDict()
        self._specs: dict[Spec, Spec] = {}
        for program in self.programs:
            program.hurry = compiler.hurry

    def same(self, spec: Spec) -> Spec:
        """The one object that stands for this structure, so that a call need not compare its fields."""
        return self._specs.setdefault(spec, spec)

    def known(self) -> bool:
        """Whether the shapes of training batches are known, so that something can be asked for."""
        return any(program.shapes for program in self.programs if program.name == "train")

    def request(self, state: TrainState, *, guess: bool = False) -> int:
        """Ask for what this structure lacks of programs; how many are being built now.

        Args:
          state: a state of that structure, concrete or abstract; only shapes and dtypes are read.
          guess: it is not needed yet, and what is goes before it.
        """
        spec, asked = self.same(state.morph.spec), 0
        if not guess and spec in self._guesses:
            del self._guesses[spec]
            for future in self._futures(spec):
                self.compiler.hasten(future)
        state = state.replace(governor=None, control=None, morph=state.morph.replace(spec=spec))
        bare = _abstract(state) if self.layout is None else self.layout.shaped(_abstract(state))
        blueprints = tuple(get_blueprint(name) for name in sorted({plant.blueprint for plant in spec.plants}))
        for program in self.programs:
            first = bare if program.name == "train" else bare.morph
            extra = _abstract(program.extra(bare.morph))
            for shape, rest in program.shapes.items():
                key = (spec, shape)
                if key in program.ran or key in program.ahead and not failed(program.ahead[key]):
                    continue
                job = Job(program.name, program.function, program.donate, (first, *extra, *rest), spec, blueprints)
                program.ahead[key] = self.compiler.submit(job, guess=guess)
                asked += 1
        return asked

    def prefetch(self, state: TrainState) -> None:
        """Ask for the programs of a structure that may come next, within the budget."""
        spec = self.same(state.morph.spec)
        if self.request(state, guess=True) or spec in self._guesses:
            self._guesses[spec] = None
            self._guesses.move_to_end(spec)
        self._fit()

    def outlive(self, likely: Collection[Spec]) -> None:
        """Drop guesses that are likely no more and not built yet; what is built stays within the budget."""
        for spec in [spec for spec in self._guesses if spec not in likely]:
            if not all(future.done() for future in self._futures(spec)):
                del self._guesses[spec]
                self.forget(spec)

    def notices(self) -> list[str]:
        """What the programs and the compiler have to say since the last call."""
        told = []
        for one in (*self.programs, self.compiler):
            if notice := getattr(one, "notice", ""):
                told.append(notice)
                one.notice = ""  # type: ignore[attr-defined]
        return told

    def retire(self, spec: Spec) -> None:
        """A structure is in use: its programs stay, and those of leaner ones; others as if they were guesses.

        A seed that is pruned is often grown again: its programs are there then, if the budget has room for them.
        """
        for known in dict.fromkeys(known for program in self.programs for known, _ in program.ahead):
            if known not in self._guesses and not set(known.plants) <= set(spec.plants):
                if all(future.done() for future in self._futures(known)):
                    self._guesses[known] = None
                else:
                    self.forget(known)
        self._fit()

    def _fit(self) -> None:
        """Drop the oldest guesses until the others are within the budget."""
        sizes = {guess: self._size(guess) for guess in self._guesses}
        while self._guesses and sum(sizes.values()) > self.budget:
            oldest, _ = self._guesses.popitem(last=False)
            sizes.pop(oldest)
            self.forget(oldest)

    def ready(self, spec: Spec) -> bool:
        """Whether all that `wait` would wait for is built (or has failed)."""
        return all(future.done() for future in self._futures(spec, late=False))

    def wait(self, spec: Spec, stop: Callable[[], int] = lambda: 0) -> Outcome | int:
        """Wait until this structure's programs are built; those marked `late` are waited for when they are called.

        Several processes wait for each other's. Where `stop()` became the number of a signal first, on any of them,
        that number.
        """
        futures = self._futures(spec, late=False)
        began = time.perf_counter()
        hurried = not self.ready(spec)
        if hurried:
            self.compiler.hurry(True)
        while (said := largest(stop() or (0 if self.ready(spec) else WAITING))) == WAITING:
            concurrent.futures.wait(futures, timeout=0.1)
        if said:
            self.compiler.hurry(False)
            return said
        built, error = [], ""
        for future in futures:
            try:
                built.append(future.result())
            except (BuildError, WorkerError, CancelledError) as failure:
                error = error or str(failure) or "it was cancelled"
        if hurried:
            self.compiler.hurry(False)
        return Outcome(
            waited=time.perf_counter() - began if hurried else 0.0,
            trace=sum(b.trace_seconds for b in built),
            compile=sum(b.compile_seconds for b in built),
            where=", ".join(sorted({b.where for b in built})),
            programs=len(built),
            error=error,
        )

    def forget(self, spec: Spec) -> None:
        """Drop what was built for a structure ahead of its use."""
        for program in self.programs:
            for key in [key for key in program.ahead if key[0] == spec]:
                program.ahead.pop(key).cancel()

    def _futures(self, spec: Spec, *, late: bool = True) -> list[Future[Built]]:
        chosen = [program for program in self.programs if late or not program.late]
        return [future for p in chosen for (known, _), future in p.ahead.items() if known == spec]

    def _size(self, spec: Spec) -> int:
        return sum(future.result().size for future in self._futures(spec) if future.done() and not failed(future))

    def __repr__(self) -> str:
        names = ", ".join(f"{p.name}: {len(p.ran)} run, {len(p.ahead)} ahead" for p in self.programs)
        return f"Programs({names}; {self.compiler!r})"


def built_or_none(future: Future[Built]) -> Built | None:
    """The program once it is there; None where none comes, so that what needs it compiles on its own."""
    try:
        return future.result()
    except (BuildError, WorkerError, CancelledError):
        return None


def failed(future: Future[Built]) -> bool:
    """Whether it is known that no program will come of it; what needs one compiles on its own then."""
    return future.done() and (future.cancelled() or future.exception() is not None)


def _spec(first: Any) -> Spec:
    return first.spec if isinstance(first, Morph) else first.morph.spec


def _signature(tree: Any) -> Hashable:
    """Structure, shapes and dtypes of a batch."""
    if isinstance(tree, tuple):
        return tuple(_signature(part) for part in tree)
    if isinstance(tree, Mapping):
        return tuple((name, _signature(part)) for name, part in tree.items())
    if isinstance(tree, np.ndarray | np.generic | jax.Array):
        return tree.shape, tree.dtype
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in leaves)


def _abstract(tree: Any) -> Any:
    """Shapes, dtypes, weak types and places on a mesh as a call of a jitted function sees them."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        found = jax.typeof(leaf)
        there = getattr(leaf, "sharding", None)
        sharding = there if isinstance(there, NamedSharding) else None
        weak = getattr(found, "weak_type", False)
        return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=sharding, weak_type=weak)

    return jax.tree.map(one, tree)
