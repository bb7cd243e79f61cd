"""The thread before a slow sink: training never waits, measurements are dropped and counted, nothing else is lost."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
import warnings

import pytest

from esper_jax.nissa import Background, Event, Fanout, ListSink, events
from esper_jax.nissa.background import behind_slow
from esper_jax.nissa.spool import Spool


def metric(number: int) -> Event:
    return events.epoch(number, number, train_loss=1.0, loss=1.0, score=50.0)


def lasting(number: int) -> Event:
    return events.warning(number, number, f"x {number}")


class Gate(ListSink):
    """A sink that waits until it is let go, or fails while it is told to."""

    slow = True

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.failing = False
        self.closed = 0

    def emit(self, event: Event) -> None:
        self.go.wait(20.0)
        if self.failing:
            raise ConnectionResetError("the dashboard is gone")
        super().emit(event)

    def close(self) -> None:
        self.closed += 1


def steps(sink: ListSink, kind: str) -> list[int]:
    return [event.step for event in sink.events if event.kind == kind]


def test_a_stuck_sink_costs_measurements_that_are_counted_and_no_other_event(tmp_path):
    gate = Gate()
    background = Background(gate, size=10, spool=tmp_path / "spool")
    slowest = 0.0
    for number in range(1, 301):
        began = time.perf_counter()
        background.emit(metric(number))
        background.emit(lasting(number))
        slowest = max(slowest, time.perf_counter() - began)
    assert background.dropped >= 290 and slowest < 5.0  # the sink would hold it for 20 s
    gate.go.set()
    assert background.flush()
    background.close()
    assert steps(gate, "warning") == list(range(1, 301))
    given = steps(gate, "epoch")
    assert given == sorted(given) and len(given) + background.dropped == 300
    assert gate.closed == 1 and not (tmp_path / "spool").exists()


def test_order_is_kept_over_the_way_by_the_disk(tmp_path):
    gate = Gate()
    with Background(gate, size=3, spool=tmp_path / "spool") as background:
        for number in range(50):
            background.emit(lasting(number))
        gate.go.set()
        for number in range(50, 100):
            background.emit(lasting(number))
            time.sleep(0.0005)
    assert steps(gate, "warning") == list(range(100))


def test_drops_are_reported_to_the_other_sinks():
    gate, kept = Gate(), ListSink()
    fanout = Fanout([Background(gate, size=5), kept])
    for number in range(100):
        fanout.emit(metric(number))
    gate.go.set()
    fanout.close()
    reports = [event.data for event in kept.events if event.kind == "dropped"]
    assert sum(report["dropped"] for report in reports) == reports[-1]["total"] >= 94
    assert reports[-1]["service"] == "Gate"
    assert len(steps(gate, "epoch")) == 100 - reports[-1]["total"]


def test_a_failing_sink_is_one_outage_and_one_recovery_and_gets_every_lasting_event(tmp_path):
    gate, kept = Gate(), ListSink()
    gate.go.set()
    background = Background(gate, spool=tmp_path / "spool", cooldown=0.02)
    fanout = Fanout([background, kept])
    gate.failing = True
    with warnings.catch_warnings(record=True, action="always") as said:
        for number in range(30):
            fanout.emit(lasting(number))
            time.sleep(0.005)
        gate.failing = False
        assert background.flush()
        fanout.emit(lasting(30))
        fanout.close()
    assert len(said) == 1 and "Gate fails (ConnectionResetError: the dashboard is gone)" in str(said[0].message)
    assert [event.kind for event in kept.events if event.kind in ("outage", "recovery")] == ["outage", "recovery"]
    assert steps(gate, "warning") == list(range(31))


def test_what_a_dead_sink_did_not_get_is_kept_and_given_to_the_next_one(tmp_path):
    gate = Gate()
    gate.go.set()
    gate.failing = True
    background = Background(gate, spool=tmp_path / "spool", cooldown=60.0)
    fanout = Fanout([background])
    with warnings.catch_warnings(record=True, action="always") as said:
        for number in range(20):
            fanout.emit(lasting(number))
            time.sleep(0.002)
        fanout.close()
    assert len(said) == 2 and "Gate fails" in str(said[0].message)
    assert "21 events did not reach Gate; they are kept in" in str(said[1].message)  # 20, and the outage
    after = Gate()
    after.go.set()
    with Background(after, spool=tmp_path / "spool") as background:
        background.emit(lasting(20))
    assert steps(after, "warning") == list(range(21))
    assert not (tmp_path / "spool").exists()


def test_a_sink_that_never_returns_does_not_hold_the_end_up(tmp_path):
    gate = Gate()
    background = Background(gate, spool=tmp_path / "spool", linger=0.1)
    background.emit(lasting(1))
    with (
        pytest.warns(RuntimeWarning, match="1 events did not reach"),
        pytest.raises(TimeoutError, match="did not come"),
    ):
        background.close()
    gate.go.set()


def test_only_slow_sinks_get_a_thread_and_it_opens_them_where_errors_are_seen(tmp_path):
    quick, slow = ListSink(), Gate()
    given = behind_slow([quick, slow, Gate()], tmp_path)
    behind = given[1]
    assert given[0] is quick and isinstance(behind, Background) and behind_slow([behind], tmp_path) == [behind]
    with Fanout(given):
        Fanout(given[1:]).open()
        assert {path.name for path in tmp_path.iterdir()} == {"Gate", "Gate-2"}

    def refuse() -> None:
        raise OSError("the port is taken")

    slow.open = refuse
    with pytest.raises(OSError, match="the port is taken"):
        Fanout([behind]).open()


def test_a_background_may_be_used_again_after_close():
    gate = Gate()
    gate.go.set()
    background = Background(gate)
    for number in range(3):
        background.emit(lasting(number))
        background.close()
    assert steps(gate, "warning") == [0, 1, 2] and gate.closed == 3


def test_a_spool_that_is_taken_away_is_an_outage_and_no_crash_of_the_thread(tmp_path):
    gate = Gate()
    background = Background(gate, size=2, spool=tmp_path / "spool", linger=0.5, cooldown=0.01)
    for number in range(20):
        background.emit(lasting(number))
    shutil.rmtree(tmp_path / "spool")
    gate.go.set()
    end = time.monotonic() + 10.0
    told = []
    while not told and time.monotonic() < end:
        told = background.notices()
        time.sleep(0.01)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        background.close()
    assert "FileNotFoundError" in told[0].message
    assert steps(gate, "warning")[:2] == [0, 1]


@pytest.mark.parametrize("segment", [1, 3, 7, 4096])
def test_a_spool_gives_back_what_it_was_given_from_any_place(tmp_path, segment):
    spool = Spool(tmp_path, segment=segment)
    lines = [f'{{"n": {number}, "text": "{"é" * (number % 5)}"}}' for number in range(1, 21)]
    assert [spool.append(line) for line in lines] == list(range(1, 21))
    for after, count in itertools.product((0, 5, 19, 20, 3), (1, 4, 100)):
        found, place = [], after
        while batch := spool.read(place, count):
            assert len(batch) <= count
            found += batch
            place = batch[-1][0]
        assert found == list(enumerate(lines, 1))[after:]
    spool.forget(10)
    assert spool.first <= 11
    kept = [number for number, _ in drained(spool)]
    assert kept == list(range(spool.first, 21))
    spool.note(10)
    token = spool.token
    spool.close()
    again = Spool(tmp_path, segment=segment)
    assert (again.last, again.noted(), again.token) == (20, 10, token)
    assert again.append("x") == 21 and drained(again)[-1] == (21, "x")
    again.forget(21)
    again.close()
    assert Spool(tmp_path, segment=segment).last == 21


def drained(spool: Spool) -> list[tuple[int, str]]:
    found, place = [], 0
    while batch := spool.read(place, 5):
        found += batch
        place = batch[-1][0]
    return found


def test_a_line_torn_by_a_crash_is_cut_off_a_spool(tmp_path):
    spool = Spool(tmp_path)
    spool.append("whole")
    spool.close()
    with (tmp_path / f"{1:012}.jsonl").open("ab") as file:
        file.write(b'{"torn')
    again = Spool(tmp_path)
    assert again.last == 1 and again.append("next") == 2
    assert again.read(0) == [(1, "whole"), (2, "next")]
    with pytest.raises(BlockingIOError, match="in use by process [0-9]+ on "):
        Spool(tmp_path)
