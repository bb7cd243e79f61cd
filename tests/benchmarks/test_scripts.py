"""The scripts run from end to end, at the smallest size, and write what they found."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ["--platform", "cpu", "--scale", "0.05", "--rounds", "3", "--budget", "0.2"]
RUNS = {
    "dormant": "--models mlp --batch 2",
    "scaling": "--base 1 2 8 --layers 1 --sites 1 --slots 2 --widths 8 --seeds 1 --repeats 1 "
    "--divided 1 64 --devices 2 --rules fsdp",
    "convolutions": "--batch 2 --networks 2",
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
        keys = [key for key, _, form in table["columns"] if form in ("time", "times") and key != "extra"]
        times = np.concatenate(
            [np.ravel(row[key]) for row in table["rows"] for key in keys if row.get(key) is not None]
        )
        assert times.size and (times > 0).all()
    CHECKS[name](found)


def dormant(found: dict[str, Any]) -> None:
    rows = found["tables"][0]["rows"]
    variants = ["bare host", "copy of it", "empty", "planted dormant", "planted dormant, awake"]
    assert [row["variant"] for row in rows] == variants
    assert rows[2]["program"] == rows[4]["program"] == "jaxpr identical" and "equal to the bit" in rows[3]["program"]
    assert "NOT" not in rows[3]["program"] and rows[1]["floor"] > 0
    own, library, loop = ({row["variant"] for row in table["rows"]} for table in found["tables"][1:])
    assert own == {row["variant"] for row in rows}
    assert library == loop == {"empty", "copy of it", "planted dormant", "planted dormant, rest_alone"}


def growth_stall(found: dict[str, Any]) -> None:
    rows = {row["way"]: row for row in found["tables"][0]["rows"]}
    assert list(rows) == ["lean"], found["notes"]
    assert rows["lean"]["waited"] > 0
    assert "make gromo" in found["notes"][-1]


def scaling(found: dict[str, Any]) -> None:
    """A seed adds to parameters and checkpoint; two devices send, two processes too, and 512 chips are estimated."""
    one, spread, large = (table["rows"] for table in found["tables"])
    assert [(row["sites"], row["seeds"]) for row in one] == [(2, 0), (1, 0), (2, 1)]
    assert one[2]["parameters"] - one[0]["parameters"] == 2 * 8 * 8
    assert one[2]["bytes"] - one[0]["bytes"] > 3 * 4 * 2 * 8 * 8  # with both moments of Adam
    assert all(row["bytes"] > 3 * 4 * 64 * 64 for row in spread)
    assert [(row["devices"], row["processes"]) for row in spread] == [(2, 1), (8, 2)]
    assert all(0 < row["sent"] < row["grown"] for row in spread) and spread[1]["held"] < spread[0]["held"]
    assert [row["chips"] for row in large] == [512, 512] and large[0]["time"] == large[0]["sent"] / 100e9


def convolutions(found: dict[str, Any]) -> None:
    rows = found["tables"][0]["rows"]
    assert [row["what"] for row in rows[::3]] == ["forward", "train step", "train step of 2 networks"]
    assert all(row["ratio"] > 0 for row in rows if row["variant"] != "Flax")


CHECKS = {"scaling": scaling, "dormant": dormant, "growth_stall": growth_stall, "convolutions": convolutions}


@pytest.mark.slow
def test_the_page_of_faults_tells_what_was_done_and_seen(tmp_path: pathlib.Path) -> None:
    where = ["--page", str(tmp_path / "page.md"), "--json", str(tmp_path / "out.json")]
    done = run("faults", "--only", "donated", "data", "--short", *where)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out.json").read_text())
    (row,), (tests,) = told["rows"], told["tests"]
    assert row["scenario"] == "donated" and row["trials"] == 10 and row["failures"] == []
    page = (tmp_path / "page.md").read_text()
    assert f"| donated | {row['about']} | 10 | 0 |" in page and "- **donated**: the state as it was (10)" in page
    assert tests["passed"] >= 20 and f"`faults/test_data.py` | {tests['passed']} | 0 |" in page


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind counts")
def test_instructions_of_a_step_are_counted_and_a_sampled_one_has_more(tmp_path: pathlib.Path) -> None:
    done = run("instructions", *SMALL, "--models", "mlp", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    without, probed = json.loads((tmp_path / "out.json").read_text())["tables"][0]["rows"]
    assert 0.5 < probed["ratio"] < 2 and without["other"] > 10_000 and probed["sampled"] > probed["other"]


@pytest.mark.slow
def test_a_wrong_option_is_answered_before_anything_is_measured() -> None:
    done = run("dormant", "--scale", "0")
    assert done.returncode == 2 and "--scale" in done.stderr and "above 0" in done.stderr
