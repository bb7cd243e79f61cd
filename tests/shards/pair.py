"""One process of a job, as a script: it trains or goes on with the run in a folder, and says what it ended with.

The job's size has to be known before anything is asked of JAX, so what imports it comes after.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from esper_jax.tolaria import peers
from esper_jax.tolaria.interruption import leave

parser = argparse.ArgumentParser()
parser.add_argument("port")
parser.add_argument("processes", type=int)
parser.add_argument("process", type=int)
parser.add_argument("folder", type=pathlib.Path)
parser.add_argument("--sharding", default="fsdp")
parser.add_argument("--devices", type=int, default=2)
parser.add_argument("--streamed", action="store_true", help="each process gives its own share of every batch")
parser.add_argument("--kill-in-save", type=int, help="the tick in whose save the first process is killed")
parser.add_argument(
    "--terminate-after", type=int, help="calls of the train program until the second process gets SIGTERM"
)
parser.add_argument("--fail-in-save", type=int, help="the tick in whose save the second process finds its disk full")
parser.add_argument("--raise-in-epoch", type=int, help="the epoch whose batches the second process cannot read")
parser.add_argument("--end-early", nargs=2, metavar=("KIND", "EPOCH"), help="data of which the second process has less")
parser.add_argument("--die-early", action="store_true", help="the second process is killed before it trains")
parser.add_argument(
    "--terminate-waiting", action="store_true", help="the second process gets SIGTERM while it waits for a program"
)
parser.add_argument("--terminate-validating", type=int, help="validation batches until the second process gets SIGTERM")
parser.add_argument("--slow-steps", type=float, default=0.0, help="seconds that each call of the train program takes")
parser.add_argument("--resume", action="store_true")


def killed_in_save(tick: int) -> None:
    """Have this process die, as a machine might, when the arrays of that tick's step are written but no manifest."""
    from esper_jax.tolaria import checkpoint

    real = checkpoint.write_arrays

    def save(folder: pathlib.Path, arrays: Any) -> None:
        real(folder, arrays)
        if folder.parent.name == str(tick * 8):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write_arrays = save


def failing_in_save(tick: int) -> None:
    """Have this process find the disk full in the save of that tick."""
    from esper_jax.tolaria import together

    real = together.write_arrays

    def save(folder: pathlib.Path, arrays: Any) -> None:
        if folder.parent.name == str(tick * 8):
            raise OSError(28, "No space left on device")
        real(folder, arrays)

    together.write_arrays = save


def slowed(seconds: float) -> None:
    """Have each call of the train program take so long."""
    from esper_jax.tolaria.run import Run

    real = Run.dispatch

    def dispatch(self: Any, batches: Any, count: int) -> None:
        time.sleep(seconds)
        real(self, batches, count)

    Run.dispatch = dispatch


SIGNALLED: list[int] = []
"""The steps that this process had made when it got SIGTERM behind a call of the train program."""


def terminated_after(dispatches: int) -> None:
    """Have this process get SIGTERM behind so many calls of the train program."""
    from esper_jax.tolaria.run import Run

    real, made = Run.dispatch, []

    def dispatch(self: Any, batches: Any, count: int) -> None:
        real(self, batches, count)
        made.append(count)
        if len(made) == dispatches:
            SIGNALLED.append(self.made)
            signal.raise_signal(signal.SIGTERM)

    Run.dispatch = dispatch


def terminated_waiting() -> None:
    """Have this process get SIGTERM when it waits for a program, whose compilation takes a minute."""
    from esper_jax.tolaria.compiler import ThreadCompiler

    ThreadCompiler._build = lambda self, job: time.sleep(60)
    ThreadCompiler.hurry = lambda self, on: signal.raise_signal(signal.SIGTERM) if on else None


def terminated_validating(batches: int) -> None:
    """Have this process get SIGTERM behind so many batches of validations."""
    from esper_jax.tolaria.run import Run

    real, made = Run.pause, []

    def pause(self: Any) -> None:
        made.append(1)
        if len(made) == batches:
            signal.raise_signal(signal.SIGTERM)
        real(self)

    Run.pause = pause


def contrary(run: Any) -> Any:
    """A controller that would have it all otherwise, for a process that is not to ask its own."""

    class Contrary(run.FixedSchedule):  # type: ignore[misc,name-defined]
        def decide(self, *_: Any) -> Any:
            raise AssertionError("only the first process asks its controller")

    return Contrary({2: [("Dense_0", "mlp", {"hidden": 3})]})


def share(run: Any, process: int, processes: int, unreadable: int | None) -> Callable[[int], Any]:
    """`epoch -> batches` of one process's rows of each batch, in the order that one process shuffles arrays to."""
    from esper_jax.tolaria.data import Batches

    order = Batches(run.TRAIN, 32, jax.random.key(1))
    rows = slice(process * 32 // processes, (process + 1) * 32 // processes)

    def batches(epoch: int) -> list[Any]:
        if process == 1 and epoch == unreadable:
            raise OSError("a file of the data is gone")
        return [tuple(part[rows] for part in batch) for batch in order.epoch(epoch)]

    return batches


def ended_early(run: Any, process: int, train: Any, kind: str, epoch: int) -> tuple[Any, Any]:
    """Streams of which the second process's, of that kind, lacks the last batch in (validation: from) that epoch."""
    x, y = run.VALIDATION
    validation = [(x[at : at + 20], y[at : at + 20]) for at in range(0, 80, 20)]
    if process == 1 and kind == "validation":
        validation.pop()
    short = process == 1 and kind == "training"
    return (lambda now: train(now)[: -1 if short and now == epoch else None]), validation


def main(asked: argparse.Namespace) -> dict[str, Any]:
    """Train, or go on with, the run in the folder."""
    jax.config.update("jax_num_cpu_devices", asked.devices)
    if asked.processes > 1:
        peers.join(f"127.0.0.1:{asked.port}", asked.processes, asked.process)
    from esper_jax import TrainingInterrupted
    from tests.shards import run

    if asked.kill_in_save and asked.process == 0:
        killed_in_save(asked.kill_in_save)
    if asked.fail_in_save and asked.process == 1:
        failing_in_save(asked.fail_in_save)
    made = run.trainer(
        asked.folder, sharding=asked.sharding, **({"controller": contrary(run)} if asked.process else {})
    )
    state = made.restore() if asked.resume else run.begin(made)
    if asked.die_early and asked.process == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if asked.terminate_waiting and asked.process == 1:
        terminated_waiting()
    if asked.terminate_validating:
        made._evaluator.batch_size = 20
        if asked.process == 1:
            terminated_validating(asked.terminate_validating)
    if asked.slow_steps:
        slowed(asked.slow_steps)
    if asked.terminate_after and asked.process == 1:
        terminated_after(asked.terminate_after)
    train = share(run, asked.process, asked.processes, asked.raise_in_epoch) if asked.streamed else run.TRAIN
    validation = run.VALIDATION
    if asked.end_early:
        kind, epoch = asked.end_early
        train, validation = ended_early(run, asked.process, train, kind, int(epoch))
    try:
        state, history = made.fit(state, train, validation, epochs=run.EPOCHS)
    except TrainingInterrupted as interrupted:
        return {"interrupted": str(interrupted), "step": int(interrupted.state.step), "signalled": SIGNALLED}
    return run.told(made, state, history)


if __name__ == "__main__":
    said = main(parser.parse_args())
    sys.stdout.write(json.dumps(said) + "\n")
    if "interrupted" in said:
        leave(0)
