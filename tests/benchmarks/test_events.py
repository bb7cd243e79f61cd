"""What an event cost a loop is computed from its steps as it is told, and the page of results from their files."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.common.events import Event, measure, middle, run

ROOT = pathlib.Path(__file__).resolve().parents[2]


def steps(*parts: tuple[float, int]) -> list[float]:
    """`(seconds, how many)` one after another."""
    return [seconds for seconds, count in parts for _ in range(count)]


def test_a_stall_in_the_foreground_costs_its_step_above_an_idle_one() -> None:
    found = measure(Event(steps((5.0, 5), (1.0, 20), (31.0, 1), (1.0, 20)), decided=25, swapped=25))
    assert found["idle_median"] == 1 and found["worst_steps"] == 31
    assert found["extra"] == found["extra_steps"] == found["swap_steps"] == pytest.approx(30)
    assert found["during_median"] is None and found["waited"] == 0 and found["noise_steps"] == 0


def test_a_slower_grown_program_is_no_extra_time_but_slow_steps_while_waiting_are() -> None:
    found = measure(Event(steps((2.0, 30), (6.0, 1), (3.0, 10), (8.0, 1), (4.0, 20)), decided=30, swapped=41))
    assert found["during_median"] == found["during_p99"] == 1.5 and found["waited"] == 11
    assert found["decision_steps"] == 2
    assert found["extra"] == pytest.approx(4 + 10 * 1 + 4) and found["swap_steps"] == pytest.approx(2)
    assert found["swap_grown_steps"] == pytest.approx(1)
    assert found["worst"] == 8


def test_noise_is_what_idle_windows_of_the_same_length_differ_by() -> None:
    idle = np.random.default_rng(0).normal(1, 0.1, 400)
    found = measure(Event([*idle, *steps((1.0, 30))], decided=400, swapped=400))
    assert found["noise_steps"] == pytest.approx(0.1 * 4**0.5 * 0.67, rel=0.3)


def test_several_events_are_their_medians_but_the_worst_of_the_worst() -> None:
    joined = middle([{"extra": x, "worst": x, "during_p99": x, "during_median": None} for x in (1.0, 2.0, 9.0)])
    assert joined == {"extra": 2.0, "worst": 9.0, "during_p99": 9.0, "during_median": None}


@pytest.mark.parametrize("event", [Event([1.0] * 40, 8, 8), Event([1.0] * 40, 20, 38), Event([1.0] * 40, 20, 19)])
def test_too_few_steps_to_judge_by_are_refused(event: Event) -> None:
    with pytest.raises(ValueError, match="10 idle steps"):
        measure(event)


def test_the_loop_goes_on_with_the_step_and_state_that_the_event_gives() -> None:
    def step(state: list[str], batch: str) -> tuple[list[str], float]:
        return [*state, batch], 0.0

    def louder(state: list[str], batch: str) -> tuple[list[str], float]:
        return [*state, batch.upper()], 0.0

    event, state = run(step, [], ["a", "b"], steps=4, at=2, event=lambda state: (louder, [*state, "-"]))
    assert state == ["a", "b", "-", "A", "B"]
    assert len(event.seconds) == 4 and event.decided == event.swapped == 2 and min(event.seconds) >= 0


def render(folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(ROOT / "benchmarks/report.py"),
        "--results",
        str(folder),
        "--out",
        str(folder / "R.md"),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_page_holds_each_result_and_says_how_to_fill_the_gpu_section_until_it_is(tmp_path: pathlib.Path) -> None:
    assert "no results yet" in render(tmp_path).stderr
    machine = {"processor": "Abacus", "cores": 2, "memory_gib": 8.0, "load": 0.1, "platform": "cpu", "devices": 1}
    table = {"title": "T", "columns": [["t", "time", "time"]], "rows": [{"t": 2e-3}], "notes": []}
    result = {"benchmark": "dormant", "about": "About.", "date": "2026-01-01", "machine": machine, "versions": {}}
    result |= {"options": {"scale": 1.0, "dtype": "float32"}, "tables": [table], "notes": ["A note."]}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/dormant.json").write_text(json.dumps(result))
    assert render(tmp_path).returncode == 0
    page = (tmp_path / "R.md").read_text()
    assert "Abacus, 2 cores" in page and "| 2 ms |" in page and "A note." in page
    assert "No GPU was available" in page and "BENCH_PLATFORM=gpu" in page
    (tmp_path / "gpu").mkdir()
    gpu = {**result, "machine": {**machine, "accelerator": "Loom", "platform": "gpu"}}
    gpu["roofline"] = {"matmul_flops": 5e14, "copy_bytes": 2e12, "size": 8192}
    (tmp_path / "gpu/dormant.json").write_text(json.dumps(gpu))
    assert render(tmp_path).returncode == 0
    page = (tmp_path / "R.md").read_text()
    assert "1 x Loom" in page and "500 TFLOP/s" in page and "No GPU was available" not in page
    (tmp_path / "gpu/odd.json").write_text("{}")
    assert "odd.json" in render(tmp_path).stderr
