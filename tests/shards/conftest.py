"""What the runs on virtual devices ended with, made once for all test processes."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest

from tests.servers import free_port

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def spawn(
    folder: pathlib.Path, commands: Sequence[Sequence[str]], **each: Sequence[str]
) -> list[subprocess.Popen[bytes]]:
    """A process for each command; what they say goes to files (out0, error0, ...), so that none waits for a reader.

    `each` are environment variables, with a value for each process.
    """
    folder.mkdir(exist_ok=True)
    processes = []
    for n, command in enumerate(commands):
        environment = {**ENVIRONMENT, **{name: values[n] for name, values in each.items()}}
        with open(folder / f"out{n}", "wb") as out, open(folder / f"error{n}", "wb") as error:
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=error))
    return processes


class Job:
    """The processes of one job on this machine."""

    def __init__(self, folder: pathlib.Path, processes: int, *options: str) -> None:
        command = [sys.executable, "-m", "tests.shards.pair", str(free_port()), str(processes)]
        self.folder = folder
        self.all = spawn(folder, [[*command, str(n), str(folder / "run"), *options] for n in range(processes)])

    def said(self) -> list[dict[str, Any]]:
        """What each process says at its end; all of them ended well."""
        codes = [process.wait(timeout=240) for process in self.all]
        assert not any(codes), [(self.folder / f"error{n}").read_text()[-1500:] for n in range(len(codes))]
        return [json.loads((self.folder / f"out{n}").read_text().splitlines()[-1]) for n in range(len(codes))]


@pytest.fixture(scope="session")
def found(tmp_path_factory) -> dict[str, Any]:
    """By name of a layout, what `tests.shards.run` found; it needs a process of its own for its devices."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shards"
    answer, failure = folder / "found.json", folder / "failure.txt"
    try:
        folder.mkdir()
    except FileExistsError:  # another test process makes it
        while not (answer.exists() or failure.exists()):
            time.sleep(0.5)
    else:
        command = [sys.executable, "-m", "tests.shards.run", str(folder)]
        done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            failure.write_text(done.stderr[-3000:])
    if failure.exists():
        pytest.fail(failure.read_text())
    return json.loads(answer.read_text())
