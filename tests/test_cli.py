"""The command line as a user meets it: errors in a sentence, a whole small run, Ctrl-C and resume."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from esper_jax import cli
from esper_jax.nissa import course, read_events

SMALL = ["--task", "digits", "--epochs", "26", "--training-ticks", "2", "--tempo", "3", "--controller", "fixed"]
SMALL += ["--quiet", "--blueprints", "mlp", "lora", "--where", "Dense", "--batch-size", "128"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--task", "digts"], "there is no task 'digts'; choose from digits"),
        (["train", "--blueprints", "conv_lite"], "unknown blueprint 'conv_lite'; known: affine"),
        (["train", "--epochs", "0"], "--epochs must be 1 or more, got 0"),
        (["train", "--epochs", "many"], "Error parsing --epochs"),
        (["train", "--learning-rate", "-1"], "--learning-rate must be above 0"),
        (["train", "--where", "["], "is no regular expression"),
        (["train", "--where", "nowhere"], "found no site that where='nowhere' admits; the host has: Conv_0"),
        (["train", "--swap", "0"], "--swap: swap must be 'epoch', a number of steps"),
        (["train", "--controller", "x"], "invalid choice 'x'"),
        (["train", "--service", "localhost:8700"], "a service is http://host:port or https://host:port, got"),
        (["train", "--bogus", "1"], "Unrecognized options: --bogus"),
        (["train", "--resume", "no/such/run"], "no/such/run holds no run"),
        (["train", "--run-dir", "/proc/version/run"], "cannot write to the run directory"),
        ([], "Expected one of {train"),
    ],
)
def test_a_wrong_value_is_one_sentence_and_exit_status_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence in said and said.startswith("esper-jax: ") and len(said.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["tasks", "blueprints"])
def test_lists_name_what_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([command])
    said = capsys.readouterr().out
    assert ("charlm" in said) if command == "tasks" else ("conv_light" in said and "lora" in said)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    for word in ("--task", "--growth", "nothing recompiles", "--resume", "--schedule"):
        assert word in said


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """A small whole run in a process of its own: its directory and what it printed."""
    directory = tmp_path_factory.mktemp("run") / "r"
    result = spawn([*SMALL, "--run-dir", str(directory)])
    output, errors = result.communicate(timeout=300)
    assert result.returncode == 0, errors
    return directory, output


def spawn(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "esper_jax", "train", *arguments]
    root = pathlib.Path(__file__).parents[1]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=root, stdout=pipe, stderr=pipe, text=True, env={**os.environ})


def test_a_run_ends_with_a_table_of_host_and_grown_and_writes_all_its_files(finished) -> None:
    directory, output = finished
    summary = json.loads((directory / "summary.json").read_text())
    assert [row["model"] for row in summary] == ["host alone", "grown"]
    assert summary[1]["parameters"] > summary[0]["parameters"] == 438
    assert "host alone" in output and "figure: " in output
    assert (directory / "figure.png").stat().st_size > 20_000
    assert list((directory / "checkpoints").iterdir()) and (directory / "config.json").is_file()
    kinds = {event.kind for event in read_events(directory / "events.jsonl")}
    assert {"run_started", "epoch", "germinated", "stage", "decision", "feedback", "run_ended"} <= kinds


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_resume_and_the_resumed_run_tells_the_same_story(finished, tmp_path) -> None:
    directory = tmp_path / "r"
    running = spawn([*SMALL, "--run-dir", str(directory)])
    log = directory / "events.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (log.is_file() and '"germinated"' in log.read_text()):
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=200)
    assert running.returncode == 130, errors
    assert "saved step" in errors and f"esper-jax train --resume {directory}" in errors
    resumed = spawn(["--resume", str(directory)])
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert course(read_events(log)) == course(read_events(finished[0] / "events.jsonl"))
    both = [json.loads((d / "summary.json").read_text()) for d in (directory, finished[0])]
    for a, b in zip(*both, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_a_directory_that_holds_a_run_is_not_overwritten(finished, capsys: pytest.CaptureFixture[str]) -> None:
    directory, _ = finished
    before = (directory / "events.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *SMALL, "--run-dir", str(directory)])
    assert stopped.value.code == 2 and "already holds a run" in capsys.readouterr().err
    assert (directory / "events.jsonl").read_bytes() == before
