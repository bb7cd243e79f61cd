"""Signals that come where no step can be torn: before and after training, and while a program is being compiled."""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from esper_jax import TrainingInterrupted, cli, experiment, options
from esper_jax.nissa import JsonlSink, course, events, read_events
from esper_jax.options import CONFIG, Train
from esper_jax.tolaria.data import Batches
from esper_jax.tolaria.evaluate import Evaluator
from esper_jax.tolaria.interruption import interrupts
from esper_jax.tolaria.saving import Saver
from tests.tolaria import growing
from tests.tolaria.test_resume import bits

ROOT = pathlib.Path(__file__).parents[2]
TINY = ["--task", "digits", "--controller", "none", "--epochs", "2", "--batch-size", "256", "--no-figure", "--quiet"]
SENT = [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]


def ended(arguments: list[str]) -> int:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *arguments])
    return int(stopped.value.code or 0)


def until(process: subprocess.Popen[str], log: pathlib.Path, text: str) -> None:
    """Wait until that stands in a process's log; it must not end before."""
    while not (log.exists() and text in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def raising(number: int):
    """A function that is sent that signal."""
    return lambda *_, **__: signal.raise_signal(number)


@pytest.mark.parametrize(("number", "status", "by"), SENT)
def test_before_anything_is_begun_there_is_nothing_to_go_on_with(tmp_path, monkeypatch, capsys, number, status, by):
    monkeypatch.setattr(experiment, "get_task", raising(number))
    before = signal.getsignal(signal.SIGTERM)
    assert ended([*TINY, "--run-dir", str(tmp_path / "r")]) == status
    said = capsys.readouterr().err
    assert f"{by} where no step ends" in said and "nothing was begun" in said and "resume" not in said
    assert not (tmp_path / "r").exists() and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "status", "by"), SENT)
def test_after_the_run_the_printed_command_does_what_is_left(tmp_path, monkeypatch, capsys, number, status, by):
    """The growing run is trained and saved; its host alone, to compare with, is not."""
    run = tmp_path / "r"
    with monkeypatch.context() as patched:
        patched.setattr(experiment, "_host_alone", raising(number))
        assert ended([*TINY, "--run-dir", str(run)]) == status
    said = capsys.readouterr().err
    assert f"{by} where no step ends" in said and f"resume with: esper-jax train --resume {run}\n" in said
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


class AtTheEnd:
    """A sink that sends this process a signal in the last tick of a run, after which no step comes."""

    def __init__(self, number, epoch):
        self.number, self.epoch = number, epoch

    def emit(self, event):
        if event.kind == "epoch" and event.epoch == self.epoch:
            signal.raise_signal(self.number)

    def close(self):
        """Nothing."""


@pytest.mark.parametrize(("number", "status", "by"), SENT)
def test_in_the_last_tick_it_is_answered_when_the_run_is_saved(tmp_path, number, status, by):
    made = growing.trainer(tmp_path, sinks=(AtTheEnd(number, 2),), controller=None)
    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    try:
        with pytest.raises(TrainingInterrupted, match=f"{by} at step 16: saved step 16") as raised:
            made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=2)
    finally:
        signal.signal(number, before)
    assert raised.value.signal == number


def test_a_run_whose_steps_were_taken_away_is_not_begun_anew(tmp_path, capsys):
    """Its log tells of them; and what stands in the file of its seconds is no reason not to go on."""
    run = tmp_path / "r"
    cli.main(["train", *TINY, "--no-baseline", "--run-dir", str(run)])
    (run / "seconds.txt").write_text("")
    cli.main(["train", "--resume", str(run)])
    before = (run / "events.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    capsys.readouterr()
    assert ended(["--resume", str(run)]) == 2
    assert "tells of saved steps, and" in capsys.readouterr().err
    assert (run / "events.jsonl").read_bytes() == before


def test_a_damaged_line_of_the_log_stops_no_run(tmp_path):
    run = tmp_path / "r"
    cli.main(["train", *TINY, "--no-baseline", "--run-dir", str(run)])
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    (run / "events.jsonl").write_bytes(b"".join([lines[0], b"{\0\n", *lines[2:]]))
    with (
        JsonlSink(run / "events.jsonl") as log,
        pytest.warns(RuntimeWarning, match="line 2: .*it is kept as "),
    ):
        log.rewind(10**6)
    assert len(read_events(run / "events.jsonl")) >= len(lines) - 2
    assert (run / "events.jsonl.damaged").read_bytes().count(b"\n") == len(lines)


class Slow:
    """Validation batches, among which this process is sent a signal: before the one of that number."""

    def __init__(self, at, number=signal.SIGTERM):
        self.at, self.number, self.given = at, number, 0

    def __iter__(self):
        x, y = growing.VALIDATION
        for begin in range(0, 128, 16):
            self.given += 1
            if self.given == self.at:
                signal.raise_signal(self.number)
            yield x[begin : begin + 16], y[begin : begin + 16]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    made, validation = growing.trainer(folder, checkpoint_every=4), Slow(0)
    state, history = made.fit(growing.start(made), growing.TRAIN, validation, epochs=16)
    return state, history, course(read_events(folder / "events.jsonl")), validation.given


@pytest.mark.parametrize("at", ["its first evaluation", "contributions", "the last tick"])
def test_in_a_validation_the_run_is_saved_as_before_its_tick_and_goes_on_to_the_same_bits(
    whole, tmp_path, monkeypatch, at
):
    """So that a validation may take longer than a process that is told to end has; and the last save is of the end."""
    state, history, told, given = whole
    made = growing.trainer(tmp_path, checkpoint_every=4)
    number = {"its first evaluation": 21, "contributions": 78, "the last tick": given - 10}[at]
    validation, within, real = Slow(number), [], Evaluator.contributions

    def contributions(*given):
        within.append(given)
        found = real(*given)
        within.pop()
        return found

    monkeypatch.setattr(Evaluator, "contributions", contributions)
    with pytest.raises(TrainingInterrupted, match="terminated at step .*: saved step") as raised:
        made.fit(growing.start(made), growing.TRAIN, validation, epochs=16)
    assert validation.given == number
    assert bool(within) == (at == "contributions")
    again = growing.trainer(tmp_path, checkpoint_every=4)
    restored = again.restore()
    chex.assert_trees_all_equal(bits(restored), bits(raised.value.state))
    assert int(restored.batch) == 8 and int(restored.step) == 8 * (int(restored.ticks) + 1)
    ended, after = again.fit(restored, growing.TRAIN, Slow(0), epochs=16)
    chex.assert_trees_all_equal(bits(ended), bits(state))
    assert after["score"] == history["score"] and course(read_events(tmp_path / "events.jsonl")) == told
    chex.assert_trees_all_equal(bits(growing.trainer(tmp_path).restore()), bits(state))


def test_behind_the_last_step_the_last_save_is_of_the_end_all_the_same(whole, tmp_path):
    """What was saved before the last tick is replaced by what is after it."""

    def batches(epoch):
        for index, batch in enumerate(Batches(growing.TRAIN, 32, jax.random.key(1)).epoch(epoch)):
            if (epoch, index) == (15, 7):
                signal.raise_signal(signal.SIGINT)
            yield batch

    made = growing.trainer(tmp_path)
    with pytest.raises(TrainingInterrupted, match="interrupted at step 128: saved step 128"):
        made.fit(growing.start(made), batches, Slow(0), epochs=16)
    again = growing.trainer(tmp_path)
    restored = again.restore()
    assert int(restored.ticks) == 15
    again.fit(restored, growing.TRAIN, Slow(0), epochs=16)
    chex.assert_trees_all_equal(bits(growing.trainer(tmp_path).restore()), bits(whole[0]))


def test_ctrl_c_after_sigterm_changes_nothing_of_it():
    """The process ends soon in any case, and is perhaps being saved: with 143, and with no bare KeyboardInterrupt."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with interrupts() as stop:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
                signal.raise_signal(number)
            assert stop.number() == signal.SIGTERM
        with interrupts():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_fails_while_a_validation_is_left_ends_the_run(tmp_path, monkeypatch):
    """It is not taken for contributions that cannot be measured."""

    def full(*_, **__):
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(Saver, "save", full)
    made = growing.trainer(tmp_path, checkpoint_every=100)
    with pytest.raises(MemoryError, match="no room for a copy"):
        made.fit(growing.start(made), growing.TRAIN, Slow(78), epochs=16)


FORKING = """
import multiprocessing, os, signal, sys, time
from tests.tolaria import growing

class Ended:
    def emit(self, event):
        if event.kind == "epoch" and event.epoch == 1:
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
            time.sleep(0.5)
            child.terminate()
            child.join(5)
            print(child.exitcode)
            time.sleep(9)
    def close(self):
        pass

made = growing.trainer(None, sinks=(Ended(),), controller=None)
made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=2)
print("finished")
"""


@pytest.mark.slow
def test_a_signal_to_a_process_that_the_run_forked_is_that_ones():
    """A pool of workers ends its own by SIGTERM; the run goes on, also after the seconds that it would have itself."""
    command = [sys.executable, "-W", "ignore", "-c", FORKING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == ["-15", "finished"], done.stderr[-2000:]


class Counting:
    """A controller that decides nothing, and counts its ticks in place."""

    def init(self, spec, key):
        return {"decided": np.zeros((), np.int32)}

    def decide(self, state, report, feedback):
        state["decided"] += 1
        return (), state


HANGING = """
import hashlib, sys, time
from esper_jax.tolaria.saving import Saver
from tests.faults.test_signals import Counting
from tests.tolaria import growing

def batches(epoch):
    for index in range(0, 256, 32):
        if sys.argv[2] == "data" and (epoch, index) == (2, 96):
            time.sleep(90)
        yield growing.TRAIN[0][index : index + 32], growing.TRAIN[1][index : index + 32]

def validation():
    for index in range(0, 128, 16):
        if sys.argv[2] == "validation" and made._ticker._now[0] == 1 and index == 64:
            time.sleep(90)
        yield growing.VALIDATION[0][index : index + 16], growing.VALIDATION[1][index : index + 16]

class Validation:
    def __iter__(self):
        return validation()

class Hangs(Counting):
    def decide(self, state, report, feedback):
        state["decided"] += 1
        if sys.argv[2] == "controller" and report.epoch == 2:
            time.sleep(90)
        if sys.argv[2] == "compiled code" and report.epoch == 2:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        state["decided"] -= 1
        return super().decide(state, report, feedback)

if sys.argv[3:]:
    Saver._write = lambda *_: time.sleep(90)
made = growing.trainer(sys.argv[1], controller=Hangs(), checkpoint_every=3, steps_per_dispatch=1)
step, calls = made._step, 0

def compiling(state, *rest):
    global calls
    calls += 1
    if sys.argv[2] == "a compilation" and calls == 13 or sys.argv[2] == "the first compilation":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    after = step(state, *rest)
    if sys.argv[2] == "a step" and calls == 30:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    return after

compiling.expect = step.expect
made._step = compiling
made._ticker._now = (0, 0)
made.fit(growing.start(made), batches, Validation(), epochs=4)
"""


def straight(made, state):
    """That run, in which nothing hangs."""
    (x, y), (u, v) = growing.TRAIN, growing.VALIDATION
    train = [(x[at : at + 32], y[at : at + 32]) for at in range(0, 256, 32)]
    validation = [(u[at : at + 16], v[at : at + 16]) for at in range(0, 128, 16)]
    return bits(made.fit(state, train, validation, epochs=4)[0])


@pytest.fixture(scope="module")
def unhung():
    made = growing.trainer(None, controller=Counting(), steps_per_dispatch=1)
    return straight(made, growing.start(made))


HANGS = {"data": 19, "validation": 16, "controller": 16, "compiled code": 16, "a compilation": 12, "a step": 24}
HANGS["the first compilation"] = 0
"""Where the run hangs, and the step that is saved: the one it is at, but for a step that is on its way already."""


@pytest.mark.slow
@pytest.mark.parametrize("what", HANGS)
def test_a_process_that_hangs_where_no_step_ends_has_ten_seconds(tmp_path, what, unhung):
    """In some no handler runs: Python cannot interrupt compiled code, nor a compilation."""
    run = tmp_path / "r"
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(run), what], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    log = run / "events.jsonl"
    told = {"a step": '"kind": "epoch", "epoch": 3', "data": '"kind": "epoch", "epoch": 2'}
    first = '"run_started"' if what == "the first compilation" else '"kind": "epoch", "epoch": 1'
    until(process, log, told.get(what, first))
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 10, said
    assert f"step {HANGS[what]} is saved in {run}" in said and "go on with fit(restore(), ...)" in said
    assert ("later ones are lost" in said) == (what == "a step")
    made = growing.trainer(run, controller=Counting(), steps_per_dispatch=1)
    restored = made.restore()
    assert int(restored.step) == HANGS[what]
    chex.assert_trees_all_equal(straight(made, restored), unhung)
    assert [event.kind for event in read_events(log)].count("run_started") == 1


@pytest.mark.slow
def test_a_disk_that_hangs_too_does_not_keep_the_process(tmp_path):
    """Nothing can be saved then, which is said."""
    run = tmp_path / "r"
    command = [sys.executable, "-c", HANGING, str(run), "data", "and the disk"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    until(process, run / "events.jsonl", '"kind": "epoch", "epoch": 2')
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "nothing is saved" in said
    assert time.monotonic() - began < 28  # within the half minute that schedulers give


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
    until(process, log, '"kind": "germinated"')
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 10, said
    assert "saved step" in said and f"resume with: esper-jax train --resume {run}" in said
    cli.main(["train", "--resume", str(run)])
    assert [event.kind for event in read_events(log)].count("swap") >= 1
