"""Tolaria: training with growth, validation, checkpoints and a controller, for people who want the whole loop."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from .._checks import flag, function, instance, one_of, place, seconds, whole
from ..kasmina.graft import graft
from ..kasmina.lifecycle import Lifecycle
from ..kasmina.linen import unboxed
from ..kasmina.morph import Morph, check_options, morph, nnx_adapter
from ..kasmina.spec import Spec
from ..nissa import events
from ..nissa.background import behind_slow
from ..nissa.console import Console
from ..nissa.event import Event
from ..nissa.sinks import Fanout, JsonlSink, ListSink, Sink
from ..oona import Address, MemoryBus, RedisBus
from ..protocol import Controller, Library
from . import directory, persist, snapshot
from .change import Changes
from .checkpoint import CheckpointError, Checkpoints
from .compiler import Compiler, check_place, make_compiler
from .data import Batches, Data, held, readable
from .dispatch import Dispatch, make_steps
from .evaluate import Evaluator, Score
from .feed import Feed
from .governor import Governor
from .inspect import check_arrays, check_batch
from .interruption import interrupts
from .lifeline import Lifeline
from .optim import growable
from .peers import agreed, alone, first, same_data
from .programs import Programs
from .run import Run
from .session import History, Session
from .settings import compile_cache
from .sharding import make_layout
from .state import TrainState
from .step import Calls, Loss
from .swap import check_swap
from .ticker import Ticker
from .veto import Limits


class Tolaria:
    """Trains a growing network.

    Args:
      model: a Linen module, its `apply`, or a function `(variables, inputs, ...) -> outputs`.
      loss: `loss(outputs, targets)`, averaged, e.g. `optax.softmax_cross_entropy_with_integer_labels`.
      tx: an optax transformation or `growable(...)`; a learning-rate schedule goes in here.
      controller: decides when, where and what to grow (`Tamiyo()`, `FixedSchedule`, ...); None grows nothing.
      score: `score(outputs, targets)`, higher is better, averaged and x 100 in points; None is accuracy.
      checkpoint_dir: where checkpoints and `events.jsonl` go; None keeps nothing.
      batch_size, eval_batch_size: examples in a batch, where data is given as arrays.
      tick_every: train steps between ticks (validation, gates, decisions); None ticks at the end of each epoch.
      checkpoint_every: ticks between checkpoints; the end of the run is always saved. `keep` are kept, and the best.
      patience: stop after so many ticks without a new best score; None never does.
      classes: number of classes, for the governor's collapse rule and the check of labels.
      check_data: look through the data for NaN, labels out of range, and batches that are empty or ragged: arrays once,
        batches of an iterable by their values in the first epoch and by their shapes and dtypes in all. Values of
        batches that are on the device already are not fetched; the train step skips and counts those that are NaN.
      controller_deadline: seconds that the controller may take to decide; None waits. One that is late, or raises,
        decides nothing at that tick, and a warning says so.
      where, slots, planted, blend: as for `morph`, when `init` is given variables.
      lifecycle, governor, limits: thresholds of gates and ramps, of rollbacks, and of what a controller may do.
      max_rollbacks: more than these end the run with `TrainingDiverged`.
      probe_every, unpack, train_kwargs, eval_kwargs, rngs: as for `make_train_step`.
      compute_dtype: as for `make_train_step`; the same holds in evaluation.
      sharding, mesh, seed_sharding: train on several devices: "dp", "fsdp" or `PartitionSpec`s, on a mesh (None: all
        devices, along "data"), and how seeds are divided; see `tolaria.sharding.Layout`. Without them: one device.
      dispatch, steps_per_dispatch: how steps are handed to the device, "auto", "scan", "loop" or "unroll", and how many
        at a time (see `tolaria.dispatch.Dispatch`); Ctrl-C is noticed between two such calls.
      rest_alone: while every planted seed rests, steps are those of the host with empty slots, and cost no more. One
        more body of the program compiles, or one more program where steps are not scanned, and the host's bits may
        differ by rounding from those of a run in which a seed trains, which are the same without it.
      resident_bytes: training data given as arrays stays on the device if it takes at most so many bytes, and
        validation data likewise; 0 only if it is there already.
      swap: when a grown or leaner program takes over. It is compiled in the background while training goes on in the
        old one, and takes over at a boundary that follows from the data: "epoch", the next tick, or a number of train
        steps after the decision. If it is not ready by then, the run waits and says for how long. "asap" takes it as
        soon as it is ready, and such a run cannot be repeated to the bit; "now" compiles on the next step.
      compile_in: "process" (of low priority), "thread", or "auto": a process on the CPU, a thread elsewhere.
      prefetch, prefetch_bytes: how many of the controller's likely next seeds have their programs compiled ahead, and
        how many bytes such programs may take, and those of seeds that are gone and may come back.
      compile_cache: a directory for JAX's persistent compilation cache, so that a later run finds its programs there.
      urza: a library of stored seeds (`Urza(url)`), for decisions that name one by its id.
      sinks: further receivers of events; slow ones (TensorBoard, ...) get a thread and a queue before them.
      oona: the URL of a Redis server that the events are published on as well, e.g. `redis://localhost:6379/0`; None
        keeps the bus inside the process. `trainer.bus` is it either way.
      oona_optional: train without that server, with one warning, where it cannot be reached at the start.
      progress: show progress (a live display on a terminal, plain lines elsewhere).

    >>> trainer = Tolaria(model, loss, optax.adamw(1e-3), controller=Tamiyo())   # doctest: +SKIP
    >>> state, history = trainer.fit(trainer.init(params, key=key), train, validation)   # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        loss: Loss,
        tx: Any,
        *,
        controller: Controller | None = None,
        score: Score | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 1024,
        tick_every: int | None = None,
        checkpoint_every: int = 1,
        keep: int = 3,
        patience: int | None = None,
        classes: int | None = None,
        check_data: bool = True,
        controller_deadline: float | None = None,
        where: Any = None,
        slots: int = 4,
        planted: Any = None,
        blend: str = "add",
        lifecycle: Lifecycle | None = None,
        governor: Governor | None = None,
        limits: Limits | None = None,
        max_rollbacks: int = 10,
        probe_every: int = 50,
        unpack: Callable[[Any], Any] | None = None,
        train_kwargs: Mapping[str, Any] | None = None,
        eval_kwargs: Mapping[str, Any] | None = None,
        rngs: Sequence[str] | None = None,
        compute_dtype: Any = None,
        sharding: Any = None,
        mesh: Mesh | None = None,
        seed_sharding: str = "host",
        dispatch: str = "auto",
        steps_per_dispatch: int | None = None,
        rest_alone: bool = False,
        resident_bytes: int = 1 << 30,
        swap: str | int = "epoch",
        compile_in: str = "auto",
        prefetch: int = 0,
        prefetch_bytes: int = 1 << 28,
        compile_cache: str | os.PathLike[str] | None = None,
        urza: Library | None = None,
        sinks: Sequence[Sink] = (),
        oona: str | Address | None = None,
        oona_optional: bool = False,
        progress: bool = True,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size), ("keep", keep)):
            whole(name, value, 1)
        for name, maybe in (("tick_every", tick_every), ("checkpoint_every", checkpoint_every), ("patience", patience)):
            whole(name, 1 if maybe is None else maybe, 1)
        counts = {"resident_bytes": resident_bytes, "prefetch": prefetch, "prefetch_bytes": prefetch_bytes}
        for name, value in (*counts.items(), ("max_rollbacks", max_rollbacks), ("probe_every", probe_every)):
            whole(name, value, 0)
        if classes is not None:
            whole("classes", classes, 2)
        if controller_deadline is not None:
            seconds("controller_deadline", controller_deadline)
        if controller is not None:
            instance("controller", controller, "init", "decide", example="a controller such as Tamiyo()")
        if urza is not None:
            instance("urza", urza, "get", example="a library such as Urza(url)")
        if isinstance(sinks, str) or not isinstance(sinks, Sequence):
            raise TypeError(f"sinks must be a sequence such as [ListSink()], got {sinks!r}")
        for sink in sinks:
            instance("sinks: a sink", sink, "emit", "close", example="one such as ListSink()")
        if score is not None:
            function("score", score, "lambda outputs, targets: outputs.argmax(-1) == targets")
        for name, config, kind in (
            ("lifecycle", lifecycle, Lifecycle),
            ("governor", governor, Governor),
            ("limits", limits, Limits),
        ):
            if config is not None:
                one_of(name, config, kind, f"{kind.__name__}()")
        for name, path in (("checkpoint_dir", checkpoint_dir), ("compile_cache", compile_cache)):
            if path is not None:
                place(name, path)
        for name, given in (("oona_optional", oona_optional), ("progress", progress), ("check_data", check_data)):
            flag(name, given)
        self.forward, self.tx, self.loss = graft(model), growable(tx), loss
        self.controller = controller
        self.checkpoint_dir = None if checkpoint_dir is None else pathlib.Path(checkpoint_dir)
        self.batch_size, self.keep = batch_size, keep
        self.tick_every, self.checkpoint_every, self.patience = tick_every, checkpoint_every, patience
        self.sinks, self.progress = tuple(sinks), progress
        wanted, blend = check_options(where, slots, planted, blend)
        self._morph_options = {"where": where, "slots": slots, "planted": wanted, "blend": blend}
        self._calls = Calls(self.forward, loss, unpack, train_kwargs, eval_kwargs, rngs, compute_dtype)
        self.layout = make_layout(sharding, mesh, seed_sharding)
        self._check = functools.partial(check_batch, classes=classes) if check_data else None
        self._evaluator = Evaluator(self._calls, score, eval_batch_size, self.layout, self._check)
        self._dispatch, self._resident_bytes = Dispatch(dispatch, steps_per_dispatch, rest_alone), resident_bytes
        self._step = make_steps(self._calls, self.tx, probe_every, self._dispatch, self.layout)
        self._ticker = Ticker(
            self._evaluator,
            self.tx,
            controller,
            lifecycle or Lifecycle(),
            governor or Governor(),
            limits or Limits(),
            classes,
            max_rollbacks,
            check_swap(swap),
            prefetch,
            urza,
            controller_deadline,
        )
        self._compile_in, self._prefetch, self._prefetch_bytes = compile_in, prefetch, prefetch_bytes
        check_place(compile_in, one_device=self.layout is None)
        if swap == "asap" and not alone():
            raise ValueError("swap='asap' hangs on each process's own clock; with several processes use 'epoch'")
        self._compile_cache = compile_cache
        self._resumed: tuple[Morph, Session, pathlib.Path] | None = None
        self.bus: MemoryBus | RedisBus = MemoryBus()
        if oona is not None:
            spool = None if self.checkpoint_dir is None else self.checkpoint_dir / "oona"
            self.bus = RedisBus(oona, spool=spool, name=directory.run_name(self.checkpoint_dir), optional=oona_optional)

    def init(self, params: Any, *, key: jax.Array, model: Any = None, example: Any = None) -> TrainState:
        """The state before the first step.

        Args:
          params: the host's variables, its bare params, or a `Morph`.
          key: a PRNG key; all randomness of the run follows from it.
          model: as for `morph`, to trace the sites' kinds and shapes.
          example: as for `morph`.
        """
        if not isinstance(params, Morph):
            params = morph(
                params if nnx_adapter(params) else _plain(unboxed(params)),
                model=model,
                example=example,
                **self._morph_options,
            )
        place = (lambda tree: tree) if self.layout is None else self.layout.place
        state = place(TrainState.create(place(params), self.tx, key=key))
        governor, control = self._first_control(params.spec, state.key)
        return state.replace(governor=governor, control=control)

    def fit(self, state: TrainState, train: Data, validation: Data, *, epochs: int = 20) -> tuple[TrainState, History]:
        """Train until `epochs` epochs are done, counted from the state's first step.

        Args:
          state: from `init` or `restore`; it is copied, and stays the caller's.
          train: arrays `(inputs, targets)`, a mapping, batches that can be iterated again (where they are two, a list
            of them: a pair is inputs and targets), or `epoch -> batches`.
          validation: the same; it is what scores, contributions and gates are measured on.
          epochs: how many epochs in all, so that a restored state goes on to the same end.

        Returns:
          The final state and a `History`.

        Raises:
          TrainingInterrupted: on Ctrl-C or SIGTERM, after a checkpoint was saved. TrainingDiverged: too many rollbacks.
          ValueError: data that cannot be trained on (see `check_data`), or that the mesh's devices do not divide.
          CheckpointError: a new run in a directory that holds another run's checkpoints, or that another process
          trains in now.
          OonaError: the bus that was asked for cannot be reached, before the first step.
          FailedElsewhere: another process of the job met one of these errors, before the first step.

        Where another process of the job is lost, this one ends with exit status 75 and a sentence.
        """
        if not isinstance(state, TrainState):
            raise TypeError(f"fit() needs the TrainState of init() or restore(), got {type(state).__name__}")
        whole("epochs", epochs, 1)
        wanted = jax.eval_shape(self.tx.init, state.morph)
        if jax.tree.structure(wanted) != jax.tree.structure(state.opt_state):
            raise ValueError(
                "the optimizer state in this TrainState is that of another optimizer; init() makes a new one"
            )
        session, whence = self._session(state)
        log = ListSink()
        with (
            self._checkpoints(state, whence) as checkpoints,
            self._sinks(state, log, epochs, whence is not None) as sink,
            compile_cache(self._compile_cache),
            self._compiler(state.morph) as compiler,
        ):
            programs = (self._step, self._evaluator.plain, self._ticker.move, self._evaluator.rows)
            store = Programs(programs, compiler, self._prefetch_bytes, self.layout)
            changes = Changes(store, self.tx, self._ticker.swap, self._prefetch, session, sink, self.layout)
            run = Run(
                self._step,
                self._ticker,
                changes,
                state,
                session,
                sink,
                checkpoints,
                tick_every=self.tick_every,
                checkpoint_every=self.checkpoint_every,
                patience=self.patience,
                resumed=whence is not None and whence == self._run_directory(),
            )
            for name, data in (("training", train), ("validation", validation)):
                with agreed():
                    arrays = readable(name, data)
                same_data(name, arrays)
                with agreed():
                    self._look_through(name, arrays)
            self._evaluator.checked = False
            validation = held(validation, self._evaluator.batch_size, self._resident_bytes, self.layout)
            batches = Batches(train, self.batch_size, state.key, self._check)
            feed = Feed(batches, self._calls, self._dispatch, self._resident_bytes, self.layout)
            now, started = (int(state.ticks), int(state.step)), time.perf_counter()
            if whence is not None:
                sink(events.resumed(*now, path=self.checkpoint_dir or ""))
            else:
                sink(events.run_started(epochs, epoch=now[0], step=now[1], morph=repr(state.morph)))
            lifeline = Lifeline(run.directory, run.lost, run.gone)
            with (
                lifeline as line,
                run.closing(),
                interrupts(run.rest.save, run.finish, run.overdue) as stop,
                line.training(),
            ):
                if line.missing:
                    sink(events.warning(*now, f"a lost process is noticed by JAX alone, and late: {line.missing}"))
                outcome = run.until(epochs, feed, validation, stop)
                run.save(wait=True)
                run.answer(stop)
            final = run.whole()
            took = time.perf_counter() - started
            now = (int(final.ticks), int(final.step))
            sink(events.run_ended(*now, outcome=outcome, score=session.best_score, seconds=took))
        return final, History(session.records, log.events)

    def _look_through(self, name: str, arrays: Any) -> None:
        """Look through data that is arrays (see `check_data`); None is an iterable."""
        if self._check is not None and arrays is not None:
            check_arrays(name, arrays, self._ticker.classes)

    def evaluate(self, state: TrainState | Morph, data: Data) -> dict[str, float]:
        """Mean loss and score (in points) on data: `{"loss": ..., "score": ...}`.

        Raises:
          ValueError: data that cannot be evaluated (see `check_data`).
        """
        if not isinstance(state, TrainState | Morph):
            raise TypeError(f"evaluate() needs a TrainState or a Morph, got {type(state).__name__}")
        self._look_through("validation", readable("validation", data, once=True))
        self._evaluator.checked = False  # this data may be another
        loss, score = self._evaluator(state.morph if isinstance(state, TrainState) else state, data)
        return {"loss": loss, "score": score}

    def restore(self, directory: str | os.PathLike[str] | None = None, *, step: int | None = None) -> TrainState:
        """The state of a checkpoint, its structure read from the checkpoint itself; `fit` goes on from it to the bit.

        Args:
          directory: None is this trainer's `checkpoint_dir`.
          step: None takes the newest whole step; damaged ones are skipped with a warning.

        Raises:
          ValueError: no directory is known. CheckpointError: none there, none whole, or one that does not fit this
          trainer's optimizer or controller.
        """
        if directory is not None:
            place("directory", directory)
        if step is not None:
            whole("step", step, 0)
        where = self.checkpoint_dir if directory is None else pathlib.Path(directory)
        if where is None:
            raise ValueError("restore() needs a directory: give one, or Tolaria(checkpoint_dir=...)")
        if not where.is_dir():
            raise CheckpointError(f"there is no directory {where} to restore from")
        with Checkpoints(where / persist.FOLDER, keep=self.keep, create=False) as checkpoints:
            state, session = persist.restore(
                checkpoints, self.tx, self._first_control, step, self._ticker.library, self.layout
            )
        state = state.replace(morph=state.morph.replace(form=getattr(self.forward, "form", None)))
        self._resumed = (state.morph, session, where.resolve())
        return state

    def __repr__(self) -> str:
        where = f", checkpoint_dir={str(self.checkpoint_dir)!r}" if self.checkpoint_dir else ""
        return f"Tolaria({self.forward!r}, controller={self.controller!r}{where})"

    def _first_control(self, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        governor = self._ticker.governor.init()
        if self.controller is None:
            return governor, None
        return governor, self.controller.init(spec.unrolled, np.asarray(jax.random.key_data(key)))

    def _session(self, state: TrainState) -> tuple[Session, pathlib.Path | None]:
        """The run's memory, and the directory of the checkpoint that it goes on from, or None."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None and resumed[0] is state.morph:
            return resumed[1:]
        return Session(snapshot.take(state)), None

    @contextlib.contextmanager
    def _compiler(self, host: Morph) -> Iterator[Compiler]:
        """A compiler for the time of one `fit`; its process starts at once where the network may grow."""
        compiler = make_compiler(self._compile_in, one_device=self.layout is None)
        room, wait = any(host.spec.free_slots(site.path) for site in host.spec.sites), True
        try:
            if self.controller is not None and room and self._ticker.swap != "now":
                compiler.start()
            yield compiler
        except KeyboardInterrupt:
            wait = False
            raise
        finally:
            compiler.close(wait=wait)

    @contextlib.contextmanager
    def _sinks(self, state: TrainState, log: ListSink, epochs: int, resumed: bool) -> Iterator[Callable[[Event], None]]:
        spools = None if self.checkpoint_dir is None else self.checkpoint_dir / "spool"
        with contextlib.ExitStack() as opened:
            with agreed():
                sinks: list[Sink] = [log, *behind_slow(self.sinks, spools), self.bus] if first() else [log]
                if self.checkpoint_dir is not None and first():
                    self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
                    file = JsonlSink(self.checkpoint_dir / "events.jsonl")
                    begun = resumed or int(state.step) > 0  # of a run that ended before it saved a step nothing stays
                    file.rewind(int(state.step) if begun else -1, epoch=int(state.ticks))
                    sinks.append(file)
                if self.progress and first():
                    sinks.append(Console(epochs))
                fanout = Fanout(sinks)
                opened.callback(fanout.close)
                fanout.open()
            yield fanout.emit

    def _run_directory(self) -> pathlib.Path | None:
        return None if self.checkpoint_dir is None else self.checkpoint_dir.resolve()

    @contextlib.contextmanager
    def _checkpoints(self, state: TrainState, whence: pathlib.Path | None) -> Iterator[Checkpoints | None]:
        if self.checkpoint_dir is None:
            yield None
            return
        folder = self.checkpoint_dir / persist.FOLDER
        with contextlib.ExitStack() as opened:
            with agreed():
                checkpoints = opened.enter_context(Checkpoints(folder, keep=self.keep))
                if first():
                    opened.enter_context(directory.held(self.checkpoint_dir))
                    another = whence is not None and whence != self._run_directory()
                    directory.check_ahead(checkpoints, int(state.step), another=another)
            yield checkpoints


def _plain(params: Any) -> Any:
    """Nested mappings as plain dicts, so that a state restored from disk has the same tree."""
    if isinstance(params, Mapping):
        return {name: _plain(child) for name, child in params.items()}
    return params
