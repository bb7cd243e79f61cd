"""A spool that lies behind its stream: what the stream holds under its ids is another's, and ours still arrive."""

from __future__ import annotations

import shutil
import threading

import pytest

from esper_jax.nissa import Event, events
from esper_jax.nissa.spool import Spool
from esper_jax.oona import Reader, RedisBus, deliver
from tests.servers import RedisServer, needs_redis

pytest.importorskip("redis")
pytestmark = needs_redis


def told(start: int, stop: int, by: str) -> list[Event]:
    return [events.warning(number, number, f"{by} {number}") for number in range(start, stop)]


def publish(bus: RedisBus, found: list[Event]) -> None:
    for event in found:
        bus.emit(event)


def messages(url: str, run: str) -> list:
    with Reader(f"{url}?run={run}") as reader:
        found = []
        while more := reader.read(1000):
            found += more
        assert reader.duplicates == 0 and reader.skipped == 0
    return found


def said(bus: RedisBus) -> list[str]:
    return [notice.message for notice in bus.notices() if "under the ids" in notice.message]


def test_a_copied_run_directory_and_the_run_it_was_copied_from_both_go_on(server, tmp_path):
    with RedisBus(server.url, spool=tmp_path / "a", name="r") as first:
        publish(first, told(0, 30, "both"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for _ in range(2):  # the second time the copy knows already
        with RedisBus(server.url, spool=tmp_path / "a") as a, RedisBus(server.url, spool=tmp_path / "b") as b:
            for number in range(0, 40, 10):
                publish(a, told(number, number + 10, "original"))
                assert a.flush()
                publish(b, told(number, number + 5, "copy"))
                assert b.flush()
        warned = said(b)
        assert not said(a)
    assert not warned
    found = messages(server.url, first.run)
    ids = [message.id for message in found]
    assert len(set(ids)) == len(ids) == 30 + 80 + 40
    for bus, by, count in ((a, "original", 80), (b, "copy", 40)):
        mine = [message for message in found if message.id in set(bus.ids())]
        assert [message.id for message in mine] == bus.ids()
        assert sum(message.event.message.startswith(by) for message in mine) == count


def test_a_copy_alone_that_goes_on_behind_its_original_says_so_and_delivers(server, tmp_path):
    with RedisBus(server.url, spool=tmp_path / "a", name="r") as first:
        publish(first, told(0, 10, "both"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with RedisBus(server.url, spool=tmp_path / "a") as a:
        publish(a, told(10, 40, "original"))
    with RedisBus(server.url, spool=tmp_path / "b") as b:
        publish(b, told(10, 13, "copy"))
        assert b.flush()
        (warning,) = said(b)
        assert "from its event number 11 on" in warning and "?run=NAME" in warning
    assert [m.event.message for m in messages(server.url, a.run)][-3:] == ["copy 10", "copy 11", "copy 12"]


def test_a_spool_that_a_power_cut_shortened_is_no_reason_to_swallow_what_follows(server, tmp_path):
    with RedisBus(server.url, spool=tmp_path / "oona", name="r") as bus:
        publish(bus, told(0, 50, "before"))
    path = tmp_path / "oona" / f"{1:012}.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:30]))
    with RedisBus(server.url, spool=tmp_path / "oona") as bus:
        publish(bus, told(30, 35, "after"))
        assert bus.flush() and bus.sent == 5 and len(said(bus)) == 1
    found = messages(server.url, bus.run)
    assert [m.event.message.split()[0] for m in found] == ["before"] * 50 + ["after"] * 5
    assert len({m.id for m in found}) == 55
    server.client().flushall()  # and a server that loses all is given what the spool has
    assert deliver(tmp_path / "oona", server.url) == 35
    assert [m.id for m in messages(server.url, bus.run)] == bus.ids()


def test_a_stream_that_holds_only_others_events_gets_all_of_ours(server, tmp_path):
    url = f"{server.url}?run=shared"
    with RedisBus(url, spool=tmp_path / "a") as a:
        publish(a, told(0, 20, "a"))
    server.client().flushall()
    with RedisBus(url, spool=tmp_path / "b") as b:
        publish(b, told(0, 1200, "b"))
    assert deliver(tmp_path / "a", url) == 20
    assert [m.id for m in messages(server.url, "shared")] == b.ids() + a.ids()


def test_lines_that_are_no_text_and_strange_files_do_not_stop_the_bus(server, tmp_path):
    spool = Spool(tmp_path / "oona")
    for event in told(0, 5, "x"):
        spool.append(event.to_json())
    spool.close()
    path = tmp_path / "oona" / f"{1:012}.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[4] = b"\xff\xfe"
    path.write_bytes(b"\n".join(lines))
    (tmp_path / "oona" / "notes.jsonl").write_text("mine")
    with RedisBus(server.url, spool=tmp_path / "oona", name="r") as bus:
        publish(bus, told(5, 6, "x"))
        assert bus.flush()
    with Reader(f"{server.url}?run={bus.run}") as reader:
        assert [m.event.step for m in reader.read()] == [0, 1, 3, 5] and reader.skipped == 2


def test_a_server_killed_again_and_again_while_batches_are_on_their_way_gets_each_event_once(tmp_path):
    with RedisServer(durable=True) as server:
        bus = RedisBus(server.url, spool=tmp_path / "oona", cooldown=0.02, max_cooldown=0.05, name="r")
        bus.open()

        def talk() -> None:
            for event in told(0, 4000, "x"):
                bus.emit(event)

        thread = threading.Thread(target=talk)
        thread.start()
        for _ in range(4):
            server.kill()
            server.restart()
        thread.join()
        assert bus.flush(20)
        bus.close()
        assert [m.id for m in messages(server.url, bus.run)] == bus.ids() and len(bus.ids()) == 4000
