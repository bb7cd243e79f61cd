"""A disk that takes nothing for a while, or whose files another program spoilt: nothing is lost that could be kept."""

from __future__ import annotations

import errno
import threading
import warnings

import pytest

from esper_jax.nissa import Background, Event, Fanout, JsonlSink, ListSink, events, read_events
from esper_jax.nissa.backlog import Backlog
from esper_jax.nissa.spool import Spool


def lasting(number: int) -> Event:
    return events.warning(number, number, f"x {number}")


def metric(number: int) -> Event:
    return events.epoch(number, number, train_loss=1.0, loss=1.0, score=50.0)


class Disk:
    """The raw file of a sink or spool, which takes `room` more bytes (None: any number) and may not cut."""

    def __init__(self, owner) -> None:
        self.owner, self.room, self.stuck = owner, None, False
        self.really = owner._file

    def write(self, data: bytes) -> int:
        if self.room is None:
            return self.really.write(data)
        part = data[: self.room]
        self.room -= len(part)
        if not part:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.really.write(part)

    def truncate(self, size: int) -> int:
        if self.stuck:
            raise OSError(errno.EIO, "Input/output error")
        return self.really.truncate(size)

    def __getattr__(self, name: str):
        return getattr(self.really, name)


def kinds(found: list[Event]) -> list[str]:
    return [event.kind for event in found if event.kind in ("outage", "recovery")]


@pytest.mark.parametrize("room", [0, 1, 50, 300])
def test_a_log_on_a_full_disk_goes_on_later_with_every_event_in_order_and_whole_lines(tmp_path, room, monkeypatch):
    path = tmp_path / "events.jsonl"
    sink, kept = JsonlSink(path), ListSink()
    fanout = Fanout([sink, kept])
    fanout.emit(lasting(0))
    disk = Disk(sink)
    sink._file, disk.room = disk, room
    real = sink._reopen

    def full() -> None:
        real()
        sink._file = Disk(sink)
        sink._file.room = 0

    monkeypatch.setattr(sink, "_reopen", full)
    with warnings.catch_warnings(record=True, action="always") as said:
        for number in range(1, 20):
            fanout.emit(lasting(number))
    assert len(said) == 1 and "No space left" in str(said[0].message) and "wait in memory" in str(said[0].message)
    assert len(read_events(path)) < 5 and len(sink) == len(kept.events)
    monkeypatch.setattr(sink, "_reopen", real)
    with warnings.catch_warnings(action="error"):
        fanout.emit(lasting(20))
        fanout.close()
    assert [event.to_json() for event in read_events(path)] == [event.to_json() for event in kept.events]
    assert [event.step for event in read_events(path, "warning")] == list(range(21))
    assert kinds(kept.events) == ["outage", "recovery"]


def test_a_log_that_is_full_to_the_end_says_how_much_it_lacks(tmp_path, monkeypatch):
    sink = JsonlSink(tmp_path / "events.jsonl")
    sink.emit(lasting(0))

    def refuse() -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    sink._failed = True
    monkeypatch.setattr(sink, "_reopen", refuse)
    sink.emit(lasting(1))
    with pytest.raises(OSError, match=r"1 events are lost to .*Read-only file system"):
        sink.close()
    sink.close()
    assert len(read_events(tmp_path / "events.jsonl")) == 1


def test_a_full_disk_costs_a_slow_sink_no_event_even_if_it_stays_full(tmp_path, monkeypatch):
    given, kept = ListSink(), ListSink()
    go = threading.Event()
    emit = given.emit
    given.emit = lambda event: go.wait(20) and emit(event)
    background = Background(given, spool=tmp_path / "spool", size=5)
    fanout = Fanout([background, kept])
    fanout.emit(lasting(0))
    append = background._spool.append

    def full(line: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(background._spool, "append", full)
    with warnings.catch_warnings(record=True, action="always") as said:
        for number in range(1, 30):
            fanout.emit(lasting(number))
    assert len(said) == 1 and "the spool of ListSink fails (OSError" in str(said[0].message)
    go.set()
    assert background.flush()
    monkeypatch.setattr(background._spool, "append", append)
    fanout.emit(lasting(30))
    monkeypatch.setattr(background._spool, "append", full)
    with pytest.warns(RuntimeWarning, match="the spool of ListSink"):
        fanout.emit(lasting(31))
    fanout.close()
    assert [event.step for event in given.events if event.kind == "warning"] == list(range(32))
    assert kinds(kept.events)[:3] == ["outage", "recovery", "outage"]


def test_memory_is_bounded_and_measurements_go_first():
    def refuse(event: Event) -> None:
        raise OSError(errno.ENOSPC, "full")

    backlog = Backlog(refuse, "the log", room=4000)
    for number in range(100):
        backlog.put(metric(number))
        backlog.put(lasting(number))
    assert backlog.dropped > 90 and 0 < backlog.lost < 100
    assert len(backlog) + backlog.dropped + backlog.lost == 200
    backlog._write = lambda event: None
    assert backlog.drain()
    told = backlog.notices()
    assert [one.kind for one in told] == ["outage", "recovery", "warning"]
    assert f"lacks {backlog.dropped} metrics and {backlog.lost} other events" in told[-1].message


def test_a_half_line_that_cannot_be_cut_off_is_cut_off_before_the_next(tmp_path):
    spool = Spool(tmp_path)
    spool.append("first")
    disk = Disk(spool)
    spool._file, disk.room, disk.stuck = disk, 3, True
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            spool.append("second")
    disk.room, disk.stuck = None, False
    assert spool.append("third") == 2
    assert spool.read(0) == [(1, "first"), (2, "third")]
    spool.close()


@pytest.mark.parametrize("rubbish", [b"\xff\xfe\x00", b"{}", b"[" * 100_000, b'{"v": 1, "kind": 3}', b"null"])
def test_a_spoilt_line_or_a_stray_file_in_a_spool_costs_only_itself(tmp_path, rubbish):
    spool = Spool(tmp_path)
    for number in range(5):
        spool.append(lasting(number).to_json())
    spool.close()
    path = tmp_path / f"{1:012}.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[4] = rubbish
    path.write_bytes(b"\n".join(lines))
    (tmp_path / "notes.jsonl").write_text("mine")
    (tmp_path / "folder").mkdir()
    given, kept = ListSink(), ListSink()
    background = Background(given, spool=tmp_path)
    with warnings.catch_warnings(action="error"), Fanout([background, kept]) as fanout:
        fanout.open()
        assert background.flush()
        fanout.emit(lasting(5))
    assert [event.step for event in given.events if event.message.startswith("x ")] == [0, 1, 3, 5]
    assert background.spoilt == 2
    assert sum("are no events or are gone" in event.message for event in kept.events) >= 1
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "notes.jsonl"]  # what is not the spool's stays


def test_a_segment_that_was_cut_short_is_passed_over(tmp_path):
    spool = Spool(tmp_path, segment=3)
    for number in range(9):
        spool.append(lasting(number).to_json())
    spool.close()
    path = tmp_path / f"{4:012}.jsonl"
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    given = ListSink()
    background = Background(given, spool=tmp_path)
    background.open()
    assert background.flush()
    background.close()
    assert [event.step for event in given.events] == [0, 1, 2, 3, 6, 7, 8] and background.spoilt == 2
