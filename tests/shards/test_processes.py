"""Two processes train one model as one does; one that is lost ends the job, which goes on from its last whole step."""

from __future__ import annotations

import pathlib
import signal
import time
from typing import Any

import numpy as np
import pytest

from esper_jax.nissa import read_events
from esper_jax.tolaria.lifeline import LOST
from tests.shards.conftest import Job
from tests.shards.run import HALF

pytestmark = pytest.mark.slow


def aborted(code: int, folder: pathlib.Path, process: int) -> bool:
    """Whether gloo ended the process by itself: at the loss of another one, a third may send it what it did not expect.

    gloo throws that in a thread of its own, where nothing can catch it.
    """
    return code == -signal.SIGABRT and "gloo::EnforceNotMet" in (folder / f"error{process}").read_text()


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal within float tolerance, through all that the run did."""
    for what in ("params", "statistics", "optimizer", "folded"):
        for one, other in zip(ours[what], theirs[what], strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def test_shares_of_batches_a_signal_to_one_process_and_a_resume_end_where_one_process_ends(found, tmp_path):
    """Both processes stop at the same step, and go on from it; the steps of both are those of the whole batches.

    One step is not saved, since the second process cannot store its part of it: told, and the next one is.
    """
    first, second = Job(tmp_path, 2, "--streamed", "--terminate-after", "30", "--fail-in-save", "2").said()
    (unsaved,) = read_events(tmp_path / "run" / "events.jsonl", "error")
    assert unsaved.data["unsaved"] == 16 and "process 1 could not store its part: OSError" in unsaved.message
    saved = {int(path.name): path for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert 16 not in saved and {8, 24, first["step"]} <= set(saved)
    assert all((path / "default").is_dir() and (path / "default.1").is_dir() for path in saved.values())
    assert first["step"] == second["step"] > 0 and first["interrupted"].startswith("terminated at step")
    assert f"saved step {first['step']}" in second["interrupted"]
    ours = Job(tmp_path, 2, "--streamed", "--resume").said()
    for one in ours:
        same(one, found["one"])
        assert one["devices"] == [4] and one["warnings"] == []
    assert ours[0]["stages"] == ours[1]["stages"]


@pytest.mark.parametrize(
    ("kind", "epoch", "at"), [("training", 1, "batch 7 of epoch 1 of the training data"), ("validation", 0, "batch 3")]
)
def test_processes_whose_shares_of_the_data_differ_end_with_where_they_do(tmp_path, kind, epoch, at):
    """Before they meet in a step that one of them has no batch for, and would wait there for ever."""
    job = Job(tmp_path, 2, "--streamed", "--end-early", kind, str(epoch))
    codes = [process.wait(timeout=60) for process in job.all]
    assert all(codes), codes
    said = [(tmp_path / f"error{n}").read_text() for n in (0, 1)]
    assert f"ValueError: the processes' shares differ at {at}" in said[0] + said[1]
    assert "this process has float32[" in said[0] or "this process has no further one" in said[1], said


def test_a_process_killed_in_a_save_ends_the_other_and_fewer_processes_go_on_from_a_whole_step(found, tmp_path):
    """The first is killed when arrays are on disk and no manifest is; what is left is the step before, whole."""
    killed, other = Job(tmp_path, 2, "--kill-in-save", str(HALF)).all
    killed.wait(timeout=240)
    began = time.monotonic()
    other.wait(timeout=240)
    assert killed.returncode == -signal.SIGKILL and other.returncode == LOST
    assert time.monotonic() - began < 60
    assert "process 0 of 2 was lost" in (tmp_path / "error1").read_text()
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert steps[-1] == (HALF - 1) * 8
    (resumed,) = Job(tmp_path, 1, "--resume").said()
    same(resumed, found["one"])
    assert resumed["devices"] == [2]


def test_all_processes_end_when_one_is_lost(tmp_path):
    """Of four: nobody waits for ever in a step that it never joins; the sentence says what to do, the log has it too.

    Parameters are whole on both ("dp"), so the first process alone saves.
    """
    first, second, *others = Job(tmp_path, 4, "--sharding", "dp", "--devices", "1").all
    log = tmp_path / "run" / "events.jsonl"
    while not (log.exists() and log.read_text().count('"kind": "checkpoint"') >= 3):
        assert first.poll() is None
        time.sleep(0.2)
    second.kill()
    second.wait()
    began = time.monotonic()
    codes = {n: process.wait(timeout=120) for n, process in ((0, first), (2, others[0]), (3, others[1]))}
    assert time.monotonic() - began < 60
    said = f"so no further step can be made and this process ends too (exit status {LOST}); "
    said += f"go on with fit(restore(), ...) or with: esper-jax train --resume {tmp_path / 'run'}"
    gone = ["process 1 of 4 was lost", *(f"process {n} of 4 was lost" for n in codes if aborted(codes[n], tmp_path, n))]
    spoke = [n for n in codes if not aborted(codes[n], tmp_path, n)]
    for n in spoke:
        assert codes[n] == LOST
        assert any(f"esper_jax: {one}, {said}\n" in (tmp_path / f"error{n}").read_text() for one in gone)
    assert spoke
    if 0 in spoke:
        (lost,) = read_events(log, "error")
        assert lost.message in [f"{one}, {said}" for one in gone]
    steps = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()}
    assert {"8", "16", "24"} <= steps


def test_an_error_in_one_process_ends_the_others_with_it(tmp_path):
    """The one that raises ends with its own error; the other does not wait for it in the next step."""
    first, second = Job(tmp_path, 2, "--streamed", "--raise-in-epoch", "1").all
    first.wait(timeout=120)
    assert first.returncode == LOST
    assert "process 1 of 2 ended with OSError: a file of the data is gone" in (tmp_path / "error0").read_text()
    assert second.wait(timeout=60) != 0
    assert "OSError: a file of the data is gone" in (tmp_path / "error1").read_text()
