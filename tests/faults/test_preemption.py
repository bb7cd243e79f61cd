"""A run that is told to end, whose disk is full, or whose directory another run holds."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import chex
import pytest

from esper_jax import CheckpointError, cli
from esper_jax.nissa import read_events
from esper_jax.tolaria.directory import held
from tests.tolaria import growing
from tests.tolaria.test_resume import bits

ROOT = pathlib.Path(__file__).parents[2]


class Raiser:
    """A sink that sends this process a signal when an epoch has been told."""

    def __init__(self, number: int, epoch: int) -> None:
        self.number, self.epoch = number, epoch

    def emit(self, event):
        if event.kind == "epoch" and event.epoch == self.epoch:
            signal.raise_signal(self.number)

    def close(self):
        """Nothing."""


@pytest.fixture(scope="module")
def whole():
    made = growing.trainer(None)
    return made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=6)[0]


def test_a_handler_of_ones_own_keeps_its_sigterm(tmp_path):
    """A program that deals with SIGTERM itself is not overruled."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        made = growing.trainer(None, sinks=(Raiser(signal.SIGTERM, 1),))
        made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1]


def test_a_second_run_in_a_directory_is_refused_with_the_holder(tmp_path):
    """By its process and host; the first run is not disturbed, and its end frees the directory."""

    class Second:
        def __init__(self):
            self.error = None

        def emit(self, event):
            if event.kind == "epoch" and event.epoch == 1:
                other = growing.trainer(tmp_path)
                with pytest.raises(CheckpointError) as raised:
                    other.fit(growing.start(other), growing.TRAIN, growing.VALIDATION, epochs=1)
                self.error = str(raised.value)

        def close(self):
            """Nothing."""

    second = Second()
    made = growing.trainer(tmp_path, sinks=(second,), controller=None)
    made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=2)
    assert f"in use by process {os.getpid()} on " in second.error and "checkpoint_dir" in second.error
    again = growing.trainer(tmp_path, controller=None)
    again.fit(again.restore(), growing.TRAIN, growing.VALIDATION, epochs=3)


def test_where_there_are_no_locks_a_run_says_that_nothing_keeps_others_out(tmp_path, monkeypatch):
    """A network's file system may have none: the run goes on, and it is for the user to see to it."""
    import fcntl

    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(RuntimeWarning, match="is not kept from a second process, .*No locks available"), held(tmp_path):
        pass


def test_a_save_that_fails_is_an_error_event_and_the_next_one_tries_again(whole, tmp_path, monkeypatch):
    """Training goes on with the same bits; the event names the step."""
    from esper_jax.tolaria import checkpoint

    real, calls = checkpoint.write_arrays, []

    def full(folder: pathlib.Path, arrays):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(folder, arrays)

    monkeypatch.setattr(checkpoint, "write_arrays", full)
    made = growing.trainer(tmp_path, checkpoint_every=1)
    state, _ = made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=6)
    chex.assert_trees_all_equal(bits(state.morph), bits(whole.morph))
    told = [e for e in read_events(tmp_path / "events.jsonl") if e.kind == "error" and "unsaved" in e.data]
    assert [event.data["unsaved"] for event in told] == [16] and "No space left" in told[0].message
    saved = [e.step for e in read_events(tmp_path / "events.jsonl") if e.kind == "checkpoint"]
    assert saved == [8, 24, 32, 40, 48]


@pytest.mark.parametrize("where", ["file", "/sys/esper_jax run"])
def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path, where):
    """Before the first step: a file lies in its place, or its disk takes no directories, not even root's."""
    (tmp_path / "file").write_text("")
    made = growing.trainer(tmp_path / where)
    with pytest.raises(CheckpointError, match="name a writable one"):
        made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=1)


@pytest.mark.slow
def test_the_command_line_ends_with_143_in_time_and_prints_how_to_go_on(tmp_path, capsys):
    """SIGTERM to `esper-jax train`; the printed command resumes the run. A second one is refused while it trains."""
    command = [sys.executable, "-m", "esper_jax", "train", "--task", "digits", "--epochs", "60", "--no-baseline"]
    command += ["--run-dir", str(tmp_path / "run"), "--quiet", "--no-figure"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "events.jsonl"
    while not (log.exists() and log.read_text().count('"epoch"') > 20):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    with pytest.raises(SystemExit) as refused:
        cli.main(["train", "--resume", str(tmp_path / "run"), "--quiet"])
    holder = f"in use by process {process.pid} on {socket.gethostname()}: one run writes to a directory"
    assert refused.value.code == 2 and holder in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 10
    assert f"resume with: esper-jax train --resume {tmp_path / 'run'}" in said


def test_a_directory_that_may_only_be_read_is_one_sentence_before_the_first_step(tmp_path):
    """A file system mounted read-only, or somebody else's directory: as a user who is not root."""
    script = (
        "import os, sys\n"
        "from tests.tolaria import growing\n"
        "from esper_jax import CheckpointError\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "made = growing.trainer(sys.argv[1])\n"
        "try: made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=1)\n"
        "except CheckpointError as error: print('refused:', error)\n"
    )
    mine = tmp_path / "mine"
    mine.mkdir()
    mine.chmod(0o555)
    for parent in [
        p for p in tmp_path.parents if p.is_relative_to(tempfile.gettempdir())
    ]:  # a way in for another user, where this one may give it
        with contextlib.suppress(OSError):
            parent.chmod(parent.stat().st_mode | 0o055)
    done = subprocess.run([sys.executable, "-c", script, str(mine)], capture_output=True, text=True, cwd=ROOT)
    assert "refused: " in done.stdout and "name a writable one" in done.stdout, done.stdout + done.stderr[-2000:]
    assert not list(mine.iterdir())
