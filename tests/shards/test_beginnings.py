"""What one process alone meets before or beside the steps ends all of them, and soon."""

from __future__ import annotations

import signal
import time

import pytest

from esper_jax.nissa import read_events
from esper_jax.tolaria.directory import held
from tests.shards.conftest import Job
from tests.shards.test_processes import same

pytestmark = pytest.mark.slow


def test_a_directory_that_refuses_the_first_process_refuses_all(tmp_path):
    """Only the first holds the lock and writes; the others do not wait for it in the first step."""
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run"):
        job = Job(tmp_path, 2)
        codes = [process.wait(timeout=120) for process in job.all]
    said = [(tmp_path / f"error{n}").read_text() for n in (0, 1)]
    assert codes == [1, 1], said
    assert "CheckpointError: " in said[0] and "FailedElsewhere: process 0: " in said[1]
    assert all("in use by process" in text for text in said)


def test_a_process_that_is_lost_before_it_trains_ends_the_other_within_a_minute(tmp_path):
    """JAX's own watch does it then."""
    first, second = Job(tmp_path, 2, "--die-early").all
    assert second.wait(timeout=120) == -signal.SIGKILL
    began = time.monotonic()
    assert first.wait(timeout=120) != 0
    assert time.monotonic() - began < 60


def test_a_signal_to_one_process_in_a_validation_ends_both_as_before_the_tick_and_they_go_on(found, tmp_path):
    """In the third epoch's, behind the second of its five batches; all agree two batches later."""
    for said in Job(tmp_path, 2, "--terminate-validating", "12").said():
        assert said["step"] == 24 and "terminated at step 24: saved" in said["interrupted"]
    assert len(read_events(tmp_path / "run" / "events.jsonl", "epoch")) == 2
    for ours in Job(tmp_path, 2, "--resume").said():
        same(ours, found["one"])
        assert len(ours["scores"]) == len(found["one"]["scores"])


def test_where_steps_are_slow_a_signal_to_one_process_ends_both_behind_the_very_step(tmp_path):
    """Else it would take the time of two more, which may be longer than a process that is told to end has."""
    first, second = Job(tmp_path, 2, "--slow-steps", "0.8", "--terminate-after", "5").said()
    assert second["signalled"] == [second["step"]] == [first["step"]]
    assert f"terminated at step {first['step']}: saved" in first["interrupted"]


def test_a_signal_to_one_process_that_waits_for_a_program_ends_both_in_time_and_they_go_on(found, tmp_path):
    """The other has its program already; a compilation cannot be interrupted, and nobody waits for it."""
    log = tmp_path / "run" / "events.jsonl"
    job = Job(tmp_path, 2, "--terminate-waiting")
    while not (log.exists() and '"kind": "germinated"' in log.read_text()):
        assert job.all[0].poll() is None, (tmp_path / "error0").read_text()[-2000:]
        time.sleep(0.05)
    began = time.monotonic()
    first, second = job.said()
    assert time.monotonic() - began < 20  # training to the boundary and the save are in it
    assert first["step"] == second["step"] == 16 and "terminated at step 16: saved" in second["interrupted"]
    for ours in Job(tmp_path, 2, "--resume").said():
        same(ours, found["one"])
        assert ours["stages"] == found["one"]["stages"][1:]  # it had germinated before
