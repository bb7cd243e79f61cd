"""The command line: `esper-jax train`, `watch`, `tamiyo serve`, `urza`, `schema`, `tasks` and `blueprints`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from .experiment import BASELINE, Interrupted, run
from .kasmina.summary import blueprints
from .nissa import read_events
from .nissa.clean import clean
from .oona import OonaError
from .options import CONFIG, Train, resumed
from .tasks import TASKS
from .tolaria import CheckpointError, TrainingDiverged, TrainingInterrupted, peers
from .tolaria.interruption import leave
from .urza import UrzaError
from .urza import cli as urza


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Exits with 0; with 2 and one sentence for a wrong value; with 130 after Ctrl-C and 143 after SIGTERM, when the run
    is saved and the command that goes on with it was printed; with 75 where another process of the job is lost; with 1
    where training kept diverging.
    """
    try:
        import tyro
    except ImportError:
        _fail('the command line needs the package tyro: pip install "esper_jax[cli]"')
    from .tamiyo.command import TamiyoCommand
    from .watching import Schema, Watch

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            command = tyro.extras.subcommand_cli_from_dict(
                {
                    "train": Train,
                    "watch": Watch,
                    "schema": Schema,
                    "tasks": Tasks,
                    "blueprints": Blueprints,
                    "tamiyo": TamiyoCommand,
                    "urza": urza.command(),
                },
                prog="esper-jax",
                description="esper_jax: networks that grow while they train.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code:
            _fail(_first_sentence(complaint.getvalue(), sys.argv[1:] if arguments is None else arguments))
        raise
    with warnings.catch_warnings():
        warnings.showwarning = _note
        _do(command, sys.argv[1:] if arguments is None else arguments)


def _do(command: Any, given: Sequence[str]) -> None:
    if isinstance(command, Train):
        _train(command, given)
    elif isinstance(command, Tasks):
        for name, build in TASKS.items():
            print(f"{name:12} {(build.__doc__ or '').strip().splitlines()[0]}")
    elif isinstance(command, Blueprints):
        print(blueprints())
    elif isinstance(command, urza.Command):
        _urza(command)
    else:
        _run(command)


@dataclasses.dataclass(frozen=True)
class Tasks:
    """List the ready-made tasks."""


@dataclasses.dataclass(frozen=True)
class Blueprints:
    """List the blueprints: what can grow, and where."""


def _run(command: Any) -> None:
    """Run a command that has a `run` of its own; a wrong value is one sentence and exit status 2."""
    try:
        command.run()
    except (ValueError, KeyError, TypeError, ImportError, OSError, OonaError) as error:
        _fail(str(error.args[0]) if isinstance(error, KeyError) else str(error))


def _named(arguments: Sequence[str]) -> frozenset[str]:
    """The options that a command line names, as fields."""
    flags = (text[2:].partition("=")[0].replace("-", "_") for text in arguments if text.startswith("--"))
    return frozenset(flag.removeprefix("no_") for flag in flags)


def _run_of(directory: pathlib.Path | None) -> pathlib.Path | None:
    """The run that can be resumed: the host that trains alone, to compare with, is part of one."""
    if directory is not None and directory.name == BASELINE and (directory.parent / CONFIG).exists():
        return directory.parent
    return directory


def _train(options: Train, given: Sequence[str]) -> None:
    try:
        if options.resume is not None:
            options = resumed(options, _named(given))
        outcome = run(options)
    except (TrainingInterrupted, Interrupted) as interrupted:
        where = _run_of(interrupted.directory)
        again = where is not None and (where / CONFIG).exists()
        _say(
            f"\n{interrupted}\n" + (f"resume with: esper-jax train --resume {where}" if again else "nothing was begun")
        )
        leave(128 + interrupted.signal)
    except TrainingDiverged as diverged:
        _say(_end_report(diverged))
        leave(1)
    except (
        ValueError,
        KeyError,
        TypeError,
        ImportError,
        OSError,
        CheckpointError,
        OonaError,
        peers.FailedElsewhere,
    ) as error:
        _fail(str(error.args[0]) if isinstance(error, KeyError) else str(error))
    if not peers.first():
        return
    print(f"\n{outcome.table()}\n\nrun directory: {outcome.run_dir}")
    if outcome.figure is not None:
        print(f"figure: {outcome.figure}")


def _say(text: str) -> None:
    """To the screen, by the first process of a job."""
    if peers.first():
        print(text, file=sys.stderr)


def _end_report(diverged: TrainingDiverged) -> str:
    """Why a run was given up: each rollback with its reason, and what to do."""
    lines = [f"esper-jax: {clean(str(diverged))}"]
    if diverged.directory is not None:
        told = [e for e in read_events(diverged.directory / "events.jsonl") if e.kind == "rollback"]
        lines += [f"  epoch {e.epoch}, back to step {e.data['to_step']}: {clean(e.data['reason'])}" for e in told]
        where = _run_of(diverged.directory)
        lines.append(f"run directory: {where}")
        lines.append(f"allow more with: esper-jax train --resume {where} --max-rollbacks N")
    return "\n".join(lines)


def _urza(command: urza.Command) -> None:
    try:
        print("\n".join(clean(line) for line in urza.run(command).splitlines()))
    except (ValueError, KeyError, TypeError, ImportError, OSError, UrzaError) as error:
        _fail(str(error))


def _first_sentence(box: str, arguments: Sequence[str]) -> str:
    """What tyro's boxed error says first, on one line, and which help to read."""
    command = next(
        (word for word in arguments if word in ("tasks", "blueprints", "urza", "tamiyo", "watch", "schema")), "train"
    )
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()]
    text = [line for line in lines[1:] if line]
    ends = [
        i for i, line in enumerate(text) if line.startswith(("Got errors", "For full helptext", "Argument helptext"))
    ]
    return " ".join(text[: min(ends, default=len(text))]) + f" See esper-jax {command} --help."


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line, without the place in the source that warned."""
    print(f"esper-jax: {clean(str(message))}", file=sys.stderr)


def _fail(sentence: str) -> NoReturn:
    print(f"esper-jax: {clean(sentence)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
