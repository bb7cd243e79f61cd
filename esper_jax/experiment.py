"""One experiment on a ready-made task: a growing run, the host alone trained equally long, a table and a figure."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax

from . import nissa
from ._files import replace_text
from .kasmina import Gates, Lifecycle, Morph, get_blueprint, morph
from .kasmina.morph import count
from .kasmina.summary import compare
from .options import CONFIG, Train, swap_of, write_config
from .protocol import Controller
from .tamiyo import FixedSchedule, RandomSchedule, Tamiyo, TamiyoClient
from .tamiyo.client import TOKEN
from .tasks import Task, get_task
from .tolaria import History, Tolaria, TrainingDiverged, TrainingInterrupted, TrainState, growable, peers, persist
from .tolaria.interruption import Terminated, ended_by, terminated

BASELINE = "host_alone"
"""The folder of a run in which its host trains alone, to compare with."""
LEAST_REST = 10
"""Epochs of a trial beside training and blending: starting, holding until the contribution is sure, a ramp down."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an experiment found: `rows` of the final table (see `HEADERS`), and where the files are."""

    rows: list[list[Any]]
    run_dir: pathlib.Path
    figure: pathlib.Path | None
    grown: Morph

    def table(self) -> str:
        """The final table as text."""
        return nissa.table(self.rows, HEADERS)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM before or after training: nothing was under way that could be saved.

    `directory` is the run's, None where it was another's; `signal` what came.
    """

    def __init__(self, message: str, directory: pathlib.Path | None, signal: int) -> None:
        super().__init__(message)
        self.directory, self.signal = directory, signal


HEADERS = ("model", "parameters", "FLOPs", "validation", "test", "seconds")


def run(options: Train, say: Callable[[str], None] = print) -> Outcome:
    """Run the experiment; with `options.resume` go on from the run directory's newest checkpoint.

    Raises:
      ValueError, KeyError, ImportError: a wrong value, in one sentence, before anything is written.
      TrainingInterrupted: on Ctrl-C or SIGTERM, after a checkpoint was saved; Interrupted: before or after training.
    """
    options.check()
    if options.distributed:
        peers.join(options.coordinator, options.processes, options.process)
        say = say if peers.first() else _unsaid
    given, claimed = options.run_dir, []
    with peers.agreed():
        if given is None and peers.first():
            claimed = _fresh_directory(f"{options.task}-{options.seed}")
            given = claimed[0]
    run_dir = pathlib.Path(peers.told(str(given)))
    try:
        with _interruptions(run_dir, resumes=options.resume is not None):
            outcome = _run(options, run_dir, say)
            peers.told(True)  # none leaves before the first has written all
    finally:
        for path in claimed:
            with contextlib.suppress(OSError):  # it is not empty: a run was begun
                path.rmdir()
    return outcome


def _run(options: Train, run_dir: pathlib.Path, say: Callable[[str], None]) -> Outcome:
    begun = False
    with peers.agreed():
        task = get_task(options.task)
        epochs = options.epochs or task.epochs
        if options.resume is not None and peers.first():
            begun = persist.begun(run_dir)
    begun = peers.told(begun)
    with peers.agreed():
        variables, trainer = _trainer(options, task, run_dir, epochs, grow=True, **_telemetry(options, run_dir))
        state = trainer.restore() if begun else trainer.init(variables, key=jax.random.key(options.seed))
        done = _seconds_so_far(run_dir) if begun else 0.0
        if options.resume is None:
            write_config(options, run_dir)
        elif not begun:
            say(f"no step of the run in {run_dir} was saved, so it begins anew")
    say(f"{task.name}: {task.description}\n{state.morph!r}\nrun directory: {run_dir}")
    started = time.perf_counter()
    try:
        state, history = trainer.fit(state, task.train, task.validation, epochs=epochs)
    except (TrainingInterrupted, TrainingDiverged):
        _note_seconds(run_dir, done + time.perf_counter() - started)
        raise
    except Exception:
        log = run_dir / "events.jsonl"
        if peers.first() and options.resume is None and not (log.exists() and log.stat().st_size):
            (run_dir / CONFIG).unlink(missing_ok=True)  # nothing was trained: the directory is free for another attempt
        raise
    seconds = done + time.perf_counter() - started
    _note_seconds(run_dir, seconds)
    rows, host_history = [], None
    if options.baseline:
        say("\nthe host alone, trained equally long:")
        host_row, host_history = _host_alone(options, task, run_dir, epochs, variables)
        rows.append(host_row)
    rows.append(_row("grown", task, trainer, state, seconds))
    figure = _draw(options, run_dir, task, history, host_history, say)
    summary = [dict(zip(HEADERS, row, strict=True)) for row in rows]
    if peers.first():
        replace_text(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    return Outcome(rows, run_dir, figure, state.morph)


@contextlib.contextmanager
def _interruptions(run_dir: pathlib.Path, *, resumes: bool) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM outside of `fit`, which has its own way, raise `Interrupted`."""
    ours = resumes or not (run_dir / CONFIG).exists()
    free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    mine = free and threading.current_thread() is threading.main_thread()
    if mine:
        signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except TrainingInterrupted:
        raise
    except KeyboardInterrupt as stopped:
        number = signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT
        what = f"{ended_by(number)} where no step ends, so nothing more was saved"
        raise Interrupted(what, run_dir if ours else None, number) from None
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def make_controller(options: Train, task: Task, sites: Sequence[str], epochs: int) -> Controller | None:
    """The controller an experiment asks for; none germinates so late that the trial could not end within the run."""
    blueprints = options.blueprints or task.blueprints
    gates = Gates(strict=options.strict, min_training_ticks=options.training_ticks)
    if options.service is not None:
        return TamiyoClient(options.service, token=os.environ.get(TOKEN), lag=options.service_lag)
    if options.controller == "none":
        return None
    last = epochs - (options.training_ticks + options.tempo + LEAST_REST)
    if options.controller == "tamiyo":
        return Tamiyo(blueprints=blueprints, gates=gates, last_epoch=last)
    if options.controller == "random":
        return RandomSchedule(blueprints=blueprints, gates=gates, last_epoch=last)
    pairs = dict(zip(range(10, last + 1, 10), _pairs(task, sites, blueprints), strict=False))
    plan: dict[int, Any] = {epoch: [(site, name, {})] for epoch, (site, name) in pairs.items()}
    return FixedSchedule(plan, gates=gates)


def _pairs(task: Task, sites: Sequence[str], blueprints: Sequence[str]) -> list[tuple[str, str]]:
    """Sites in order, each with the first of the blueprints that fits it."""
    known = {site.path: site for site in morph(_variables(task, 0)).spec.sites}
    pairs = []
    for path in sites:
        fitting = [name for name in blueprints if get_blueprint(name).fits(known[path])]
        pairs += [(path, fitting[0])] if fitting else []
    return pairs


def _trainer(
    options: Train, task: Task, run_dir: pathlib.Path, epochs: int, *, grow: bool, **more: Any
) -> tuple[dict[str, Any], Tolaria]:
    variables = _variables(task, options.seed)
    blueprints = options.blueprints or task.blueprints
    where = options.where or task.where
    planted: dict[str, Any] | None = {name: {} for name in blueprints} if grow and options.growth == "planted" else None
    slots = max(options.slots, len(planted or ()))
    sites = [site.path for site in morph(variables, where=where, slots=slots).spec.sites]
    rate = options.learning_rate or task.learning_rate
    steps = epochs * (len(task.train[0]) // (options.batch_size or task.batch_size))
    host_rate = optax.cosine_decay_schedule(rate, steps) if options.schedule == "cosine" else rate
    trainer = Tolaria(
        task.model,
        task.loss,
        growable(optax.adamw(host_rate), seeds=optax.adamw(rate)),
        controller=make_controller(options, task, sites, epochs) if grow else None,
        score=task.score,
        checkpoint_dir=run_dir,
        batch_size=options.batch_size or task.batch_size,
        classes=task.classes,
        where=where,
        slots=slots,
        planted=planted,
        checkpoint_every=5,
        swap=swap_of(options.swap),
        max_rollbacks=options.max_rollbacks,
        sharding=options.sharding,
        seed_sharding=options.seed_sharding,
        compile_cache=options.compile_cache,
        lifecycle=Lifecycle(
            Gates(strict=options.strict, min_training_ticks=options.training_ticks), tempo=options.tempo
        ),
        progress=not options.quiet,
        **more,
    )
    return variables, trainer


def _telemetry(options: Train, run_dir: pathlib.Path) -> dict[str, Any]:
    """Where else the growing run's events go."""
    sinks: list[nissa.Sink] = []
    if not peers.first():
        return {}
    if options.tensorboard:
        sinks.append(nissa.TensorBoardSink(run_dir / "tensorboard"))
    if options.prometheus is not None:
        sinks.append(nissa.PrometheusSink(options.prometheus))
    if options.wandb is not None:
        sinks.append(nissa.WandbSink(options.wandb, directory=run_dir, name=run_dir.name))
    return {"sinks": sinks, "oona": options.oona, "oona_optional": options.oona_optional}


def _variables(task: Task, seed: int) -> dict[str, Any]:
    return dict(task.model.init(jax.random.key(seed), task.example))


def _host_alone(
    options: Train, task: Task, run_dir: pathlib.Path, epochs: int, variables: dict[str, Any]
) -> tuple[list[Any], History]:
    quiet = dataclasses.replace(options, quiet=True)
    _, trainer = _trainer(quiet, task, run_dir / BASELINE, epochs, grow=False)
    trainer.checkpoint_dir = _empty(run_dir / BASELINE)
    started = time.perf_counter()
    state = trainer.init(variables, key=jax.random.key(options.seed))
    state, history = trainer.fit(state, task.train, task.validation, epochs=epochs)
    return _row("host alone", task, trainer, state, time.perf_counter() - started), history


def _row(name: str, task: Task, trainer: Tolaria, state: TrainState, seconds: float) -> list[Any]:
    compared = compare(task.model, state.morph, task.example)
    return [
        name,
        count(state.morph.params),
        compared.grown_flops,
        round(trainer.evaluate(state, task.validation)["score"], 2),
        round(trainer.evaluate(state, task.test)["score"], 2),
        round(seconds, 1),
    ]


def _draw(
    options: Train,
    run_dir: pathlib.Path,
    task: Task,
    history: History,
    host: History | None,
    say: Callable[[str], None],
) -> pathlib.Path | None:
    if not options.figure or not peers.first():
        return None
    try:
        from .nissa.figure import training_figure

        title = f"{task.name}: growing network, seed {options.seed}"
        events = run_dir / "events.jsonl"
        host_events = None if host is None else run_dir / BASELINE / "events.jsonl"
        return pathlib.Path(training_figure(events, run_dir / "figure.png", host_events=host_events, title=title))
    except ImportError as error:
        say(f"no figure: {error}")
        return None


def _unsaid(text: str) -> None:
    """What another process says already."""


def _fresh_directory(name: str) -> list[pathlib.Path]:
    """The first directory of that name that there is not, made so that nobody takes it; and its parent, if new."""
    base = pathlib.Path("runs") / name
    parent = [] if base.parent.exists() else [base.parent]
    for path in [base, *(base.with_name(f"{name}-{i}") for i in range(2, 10**6))]:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(
                f"cannot make the run directory {path}: {error.strerror or error}; give --run-dir"
            ) from None
        return [path, *parent]
    raise ValueError(f"a million runs are called {name}; give --run-dir")


def _empty(directory: pathlib.Path) -> pathlib.Path:
    """The directory without what an interrupted baseline left there."""
    if peers.first() and directory.exists():
        shutil.rmtree(directory)
    return directory


def _seconds_so_far(run_dir: pathlib.Path) -> float:
    """What was noted; 0 where nothing was. It is told in a table, and nothing hangs on it."""
    with contextlib.suppress(OSError, ValueError):
        return float((run_dir / "seconds.txt").read_text())
    return 0.0


def _note_seconds(run_dir: pathlib.Path, seconds: float) -> None:
    if peers.first():
        with contextlib.suppress(OSError):  # a full disk
            replace_text(run_dir / "seconds.txt", f"{seconds:.3f}\n")
