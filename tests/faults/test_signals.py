"""Signals that come where no step can be torn: before and after training, and while a program is being compiled."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from esper_jax import cli, experiment, options
from esper_jax.nissa import JsonlSink, events, read_events
from esper_jax.options import CONFIG, Train

ROOT = pathlib.Path(__file__).parents[2]
TINY = ["--task", "digits", "--controller", "none", "--epochs", "2", "--batch-size", "256", "--no-figure", "--quiet"]
SENT = [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]


def ended(arguments: list[str]) -> int:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *arguments])
    return int(stopped.value.code or 0)


def raising(number: int):
    """A function that is sent that signal."""
    return lambda *_, **__: signal.raise_signal(number)


@pytest.mark.parametrize(("number", "status", "by"), SENT)
def test_before_anything_is_begun_there_is_nothing_to_go_on_with(tmp_path, monkeypatch, capsys, number, status, by):
    monkeypatch.setattr(experiment, "get_task", raising(number))
    before = signal.getsignal(signal.SIGTERM)
    assert ended([*TINY, "--run-dir", str(tmp_path / "r")]) == status
    said = capsys.readouterr().err
    assert f"{by} while no step was under way" in said and "nothing was begun" in said and "resume" not in said
    assert not (tmp_path / "r").exists() and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "status", "by"), SENT)
def test_after_the_run_the_printed_command_does_what_is_left(tmp_path, monkeypatch, capsys, number, status, by):
    """The growing run is trained and saved; its host alone, to compare with, is not."""
    run = tmp_path / "r"
    with monkeypatch.context() as patched:
        patched.setattr(experiment, "_host_alone", raising(number))
        assert ended([*TINY, "--run-dir", str(run)]) == status
    said = capsys.readouterr().err
    assert f"{by} while no step was under way" in said and f"resume with: esper-jax train --resume {run}\n" in said
    cli.main(["train", "--resume", str(run)])
    assert [row["model"] for row in json.loads((run / "summary.json").read_text())] == ["host alone", "grown"]


def test_a_run_that_ended_before_its_first_save_is_begun_anew(tmp_path, capsys):
    """Of the first attempt there are its options, and events that are dropped."""
    run = tmp_path / "r"
    options.write_config(
        Train(epochs=2, controller="none", batch_size=256, baseline=False, figure=False, quiet=True), run
    )
    with JsonlSink(run / "events.jsonl") as log:
        log.emit(events.run_started(2, morph="the first attempt"))
        log.emit(events.warning(1, 3, "of the first attempt"))
    cli.main(["train", "--resume", str(run)])
    assert f"no step of the run in {run} was saved, so it begins anew" in capsys.readouterr().out
    told = list(read_events(run / "events.jsonl"))
    assert [event.kind for event in told].count("run_started") == 1 and "first attempt" not in str(told)
    assert [event.epoch for event in told if event.kind == "epoch"] == [1, 2] and (run / CONFIG).exists()


SLOW = """
import sys, time
from esper_jax import cli
from esper_jax.tolaria.compiler import ThreadCompiler
real = ThreadCompiler._build
ThreadCompiler._build = lambda self, job: (time.sleep(90), real(self, job))[1]
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_compilation_that_takes_long_does_not_hold_up_the_exit(tmp_path):
    """On a mesh, as on a GPU or TPU, programs are built in a thread, and XLA cannot be interrupted."""
    run, log = tmp_path / "r", tmp_path / "r" / "events.jsonl"
    train = ["train", "--task", "digits", "--epochs", "26", "--controller", "fixed", "--training-ticks", "2", "--tempo"]
    train += ["2", "--sharding", "dp", "--batch-size", "256", "--no-baseline", "--no-figure", "--quiet", "--run-dir"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *train, str(run)], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    while not (log.exists() and '"kind": "germinated"' in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 10, said
    assert "saved step" in said and f"resume with: esper-jax train --resume {run}" in said
    cli.main(["train", "--resume", str(run)])
    assert [event.kind for event in read_events(log)].count("swap") >= 1
