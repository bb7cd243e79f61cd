"""The scripts run from end to end, at the smallest size, and write what they found."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ["--platform", "cpu", "--scale", "0.05", "--rounds", "3", "--budget", "0.2"]
RUNS = {
    "dormant": "--models mlp --batch 2",
    "growth_stall": "--models digits --ways lean --repeats 1 --steps 20 --patience 5 --gromo nowhere",
}


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_script_measures_and_writes_finite_figures(name: str, tmp_path: pathlib.Path) -> None:
    done = run(name, *SMALL, *RUNS[name].split(), "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["benchmark"] == name and found["tables"]
    for table in found["tables"]:
        keys = [key for key, _, form in table["columns"] if form == "time"]
        assert table["rows"] and any(row.get(key) is not None for row in table["rows"] for key in keys)
        assert all(row[key] > 0 for row in table["rows"] for key in keys if row.get(key) is not None and key != "extra")
    CHECKS[name](found)


def dormant(found: dict[str, Any]) -> None:
    rows = found["tables"][0]["rows"]
    assert [row["variant"] for row in rows] == ["bare host", "copy of it", "empty", "planted dormant"]
    assert rows[2]["program"] == "jaxpr identical" and "equal to the bit" in rows[3]["program"]
    assert "NOT" not in rows[3]["program"] and rows[1]["floor"] > 0


def growth_stall(found: dict[str, Any]) -> None:
    rows = {row["way"]: row for row in found["tables"][0]["rows"]}
    assert list(rows) == ["lean"], found["notes"]
    assert rows["lean"]["waited"] > 0
    assert "make gromo" in found["notes"][-1]


CHECKS = {"dormant": dormant, "growth_stall": growth_stall}


@pytest.mark.slow
def test_a_wrong_option_is_answered_before_anything_is_measured() -> None:
    done = run("dormant", "--scale", "0")
    assert done.returncode == 2 and "--scale" in done.stderr and "above 0" in done.stderr
