"""The command line: `esper-jax train`, `esper-jax tasks`, `esper-jax blueprints`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from .experiment import Train, read_config, run
from .kasmina.summary import blueprints
from .tasks import TASKS
from .tolaria import CheckpointError, TrainingDiverged, TrainingInterrupted


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, with 2 and one sentence for a wrong value, with 130 after Ctrl-C."""
    try:
        import tyro
    except ImportError:
        _fail('the command line needs the package tyro: pip install "esper_jax[cli]"')
    command = tyro.extras.subcommand_cli_from_dict(
        {"train": _train, "tasks": _tasks, "blueprints": _blueprints},
        prog="esper-jax",
        description="esper_jax: networks that grow while they train.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    assert command is None


def _train(options: Train) -> None:
    """Train a growing network on a task, and its host alone equally long.

    Prints each event in a seed's life with its reason, ends with a table, and writes a run directory (events.jsonl,
    checkpoints, summary.json) and a figure.
    """
    try:
        if options.resume is not None:
            options = read_config(options.resume)
        outcome = run(options)
    except TrainingInterrupted as interrupted:
        where = options.run_dir or "RUN_DIRECTORY"
        print(f"\n{interrupted}\nresume with: esper-jax train --resume {interrupted.directory or where}", file=sys.stderr)
        sys.exit(130)
    except TrainingDiverged as diverged:
        print(f"esper-jax: {diverged}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, KeyError, TypeError, ImportError, FileNotFoundError, CheckpointError) as error:
        _fail(str(error.args[0]) if isinstance(error, KeyError) else str(error))
    print(f"\n{outcome.table()}\n\nrun directory: {outcome.run_dir}")
    if outcome.figure is not None:
        print(f"figure: {outcome.figure}")


def _tasks() -> None:
    """List the ready-made tasks."""
    for name, build in TASKS.items():
        print(f"{name:12} {(build.__doc__ or '').strip().splitlines()[0]}")


def _blueprints() -> None:
    """List the blueprints: what can grow, and where."""
    print(blueprints())


def _fail(sentence: str) -> NoReturn:
    print(f"esper-jax: {sentence}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
