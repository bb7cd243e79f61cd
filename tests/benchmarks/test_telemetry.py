"""The telemetry benchmark runs from end to end, on a model so small that the numbers mean nothing."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from tests.servers import needs_redis

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks/telemetry.py"


def call(*arguments: str) -> str:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True).stdout


@needs_redis
@pytest.mark.slow
def test_it_measures_every_way_of_telling_and_finds_all_events_delivered(tmp_path):
    for package in ("redis", "tensorboardX", "prometheus_client"):
        pytest.importorskip(package)
    path = tmp_path / "telemetry.json"
    said = call("--models", "mlp", "--scale", "0.05", "--rounds", "3", "--steps", "3", "--json", str(path))
    found = json.loads(path.read_text())
    step, emit = found["tables"]
    assert [row["variant"] for row in step["rows"]] == [row["variant"] for row in emit["rows"]]
    assert {"bus", "bus, server down"} <= {row["variant"] for row in step["rows"]}
    assert all(row["median"] > 0 for table in found["tables"] for row in table["rows"])
    assert "in order and each once" in said and "of the other bus wait on disk" in said
    assert found["versions"]["redis"] and found["machine"]["cores"] >= 1


def test_it_says_what_its_options_are():
    assert "--redis" in call("--help")
