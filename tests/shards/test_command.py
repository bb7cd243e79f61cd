"""`esper-jax train --distributed`: two processes end a run that one of them was told to leave, and go on with it.

The first time the options say which process is which, the second time SLURM's variables do.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from esper_jax.nissa import read_events
from tests.servers import free_port
from tests.shards.conftest import spawn

pytestmark = pytest.mark.slow
EPOCHS = 26
FIRST = ["--task", "digits", "--epochs", str(EPOCHS), "--controller", "fixed", "--training-ticks", "2", "--tempo", "2"]
FIRST += ["--sharding", "dp", "--batch-size", "128", "--no-figure"]


def started(folder: pathlib.Path, *options: str, slurm: bool = False) -> list[subprocess.Popen[bytes]]:
    """The command in two processes."""
    command = [sys.executable, "-m", "esper_jax", "train", *options, "--distributed", "--quiet"]
    if slurm:
        return spawn(folder, [command] * 2, **variables())
    job = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    return spawn(folder, [[*command, *job, str(n)] for n in range(2)])


def variables() -> dict[str, list[str]]:
    """What SLURM sets in both tasks of a step on this machine; JAX takes its port from the job's number."""
    for job in range(1, 4096):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 61440 + job))
            same = {"JOB_ID": str(job), "STEP_NODELIST": "127.0.0.1", "NTASKS": "2", "STEP_NUM_NODES": "1"}
            own = {"PROCID": ["0", "1"], "LOCALID": ["0", "1"]}
            return {
                f"SLURM_{name}": values for name, values in [*((k, [v] * 2) for k, v in same.items()), *own.items()]
            }
    raise AssertionError("no port is free")


def printed(file: pathlib.Path) -> list[str]:
    """The lines of a process, without those of gloo."""
    return [line for line in file.read_text().splitlines() if not line.startswith("[Gloo]")]


def test_sigterm_to_one_process_of_a_command_ends_both_and_the_printed_command_goes_on(tmp_path):
    """Status 143 from both; the first alone speaks and writes; the seed grows, and the host alone is trained too."""
    run, log = tmp_path / "run", tmp_path / "run" / "events.jsonl"
    first, second = started(tmp_path / "a", *FIRST, "--run-dir", str(run))
    while not (log.exists() and '"kind": "germinated"' in log.read_text()):
        assert first.poll() is None, (tmp_path / "a" / "error0").read_text()[-2000:]
        time.sleep(0.05)
    second.send_signal(signal.SIGTERM)
    assert [first.wait(timeout=60), second.wait(timeout=60)] == [143, 143], (tmp_path / "a" / "error1").read_text()
    said = (tmp_path / "a" / "error0").read_text()
    assert "terminated at step" in said and f"resume with: esper-jax train --resume {run}" in said
    assert printed(tmp_path / "a" / "out1") == [] and "resume" not in (tmp_path / "a" / "error1").read_text()

    both = started(tmp_path / "b", "--resume", str(run), slurm=True)
    codes = [process.wait(timeout=240) for process in both]
    assert codes == [0, 0], [(tmp_path / "b" / f"error{n}").read_text()[-2000:] for n in (0, 1)]
    assert "grown" in (tmp_path / "b" / "out0").read_text() and printed(tmp_path / "b" / "out1") == []
    events = list(read_events(log))
    assert [event.epoch for event in events if event.kind == "epoch"] == list(range(1, EPOCHS + 1))
    assert {"GERMINATED", "TRAINING", "BLENDING"} <= {event.data["after"] for event in events if event.kind == "stage"}
    rows = {row["model"]: row for row in json.loads((run / "summary.json").read_text())}
    assert rows["grown"]["parameters"] > rows["host alone"]["parameters"]
    assert min(row["test"] for row in rows.values()) > 60
    assert [event.message for event in events if event.kind in ("error", "warning")] == []
