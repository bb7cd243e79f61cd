"""Readers: alone and in groups, over crashes of a consumer and of the server, and past rubbish in the stream."""

from __future__ import annotations

import threading

import pytest

from esper_jax.nissa import Event, events
from esper_jax.oona import Address, MemoryBus, OonaError, Reader, RedisBus
from tests.servers import RedisServer, needs_redis

pytest.importorskip("redis")
pytestmark = needs_redis


def warned(number: int) -> Event:
    return events.warning(0, number, f"x {number}", number=number)


@pytest.fixture
def bus(server, tmp_path):
    with RedisBus(Address(server.url, "r"), spool=tmp_path / "oona", cooldown=0.05) as made:
        yield made


def publish(bus: RedisBus, start: int, stop: int) -> None:
    for number in range(start, stop):
        bus.emit(warned(number))
    assert bus.flush()


def numbers(messages) -> list[int]:
    return [message.event.data["number"] for message in messages]


def test_a_group_shares_the_events_and_each_goes_to_one_consumer(server, bus):
    publish(bus, 0, 100)
    a, b = (Reader(server.url, group="g", consumer=name) for name in "ab")
    got: dict[str, list[int]] = {"a": [], "b": []}
    for _ in range(20):
        for name, reader in (("a", a), ("b", b)):
            messages = reader.read(10)
            reader.ack(messages)
            got[name] += numbers(messages)
    assert sorted(got["a"] + got["b"]) == list(range(100))
    assert got["a"] and got["b"]
    assert server.client().xpending("esper:run:r", "g")["pending"] == 0


def test_what_a_consumer_took_and_did_not_confirm_it_gets_again_when_it_is_back(server, bus):
    publish(bus, 0, 10)
    first = Reader(server.url, group="g", consumer="a")
    first.ack(first.read(4))
    assert numbers(first.read(4)) == [4, 5, 6, 7]
    assert numbers(first.read(4)) == [8, 9]  # those it holds are not given again
    back = Reader(server.url, group="g", consumer="a")
    messages = back.read(100)
    assert numbers(messages) == [4, 5, 6, 7, 8, 9]
    back.ack(messages)
    assert back.read() == []


def test_what_a_dead_consumer_held_goes_to_another_one(server, bus):
    publish(bus, 0, 10)
    dead = Reader(server.url, group="g", consumer="dead")
    assert len(dead.read(6)) == 6
    other = Reader(server.url, group="g", consumer="other", claim_after=0.0)
    got = []
    while messages := other.read(3):
        other.ack(messages)
        got += numbers(messages)
    assert got == list(range(10))


def test_a_reader_waits_for_the_next_event_and_no_longer(server, bus):
    reader = Reader(Address(server.url, "r"))
    assert reader.read(block=0.05) == []
    timer = threading.Timer(0.2, bus.emit, [warned(7)])
    timer.start()
    assert numbers(reader.read(block=5.0)) == [7]


def test_rubbish_in_the_stream_is_counted_and_passed_over(server, bus):
    publish(bus, 0, 3)
    client = server.client()
    for fields in (
        {"x": "y"},
        {"id": "abc", "event": "{}"},
        {"id": "abc-1", "event": "not json"},
        {"id": "abc-2", "event": warned(1).to_json().replace('"v": 1', '"v": 99')},
    ):
        client.xadd("esper:run:r", fields)
    # Redis made those ids by the clock: what is published now still comes behind them.
    publish(bus, 3, 6)
    for reader in (Reader(server.url), Reader(server.url, group="g")):
        assert numbers(reader.read(100)) == list(range(6))
        assert reader.skipped == 4


@pytest.mark.parametrize("group", [None, "g"])
def test_no_reader_sees_an_event_twice_when_the_server_lost_all_and_was_sent_it_again(group, tmp_path):
    with RedisServer() as server:
        bus = RedisBus(Address(server.url, "r"), spool=tmp_path / "oona", cooldown=0.05)
        with bus:
            publish(bus, 0, 50)
            reader = Reader(server.url, group=group)
            got = reader.read(30)
            if group:
                reader.ack(got)
            server.restart()
            publish(bus, 50, 80)
            stream = iter(reader.follow())
            while len(got) < 80:
                got.append(next(stream))
        assert [message.id for message in got] == bus.ids()
        assert reader.duplicates >= (30 if group else 0)


def test_a_new_run_of_the_same_name_is_read_from_its_start_after_the_server_was_emptied(server, tmp_path):
    reader = None
    for part in ("a", "b"):
        with RedisBus(Address(server.url, "same"), spool=tmp_path / part) as bus:
            publish(bus, 0, 20 if part == "a" else 10)
            reader = reader or Reader(Address(server.url, "same"))
            assert numbers(reader.read(100)) == list(range(20 if part == "a" else 10))
        server.client().flushall()


def test_reading_where_there_is_nothing_says_so(server):
    with pytest.raises(OonaError, match="has no runs yet"):
        Reader(server.url)
    with pytest.raises(ValueError, match="only a reader in a group"):
        Reader(Address(server.url, "r")).ack([])
    assert Reader(Address(server.url, "not-yet")).read() == []


def test_the_bus_inside_the_process_gives_every_event_to_every_reader_until_it_is_closed():
    bus = MemoryBus(maxlen=50)
    got: list[list[int]] = [[], []]

    def follow(into: list[int]) -> None:
        into.extend(message.event.step for message in bus.follow())

    threads = [threading.Thread(target=follow, args=(into,)) for into in got]
    for thread in threads:
        thread.start()
    for number in range(40):
        bus.emit(warned(number))
    bus.close()
    for thread in threads:
        thread.join(5.0)
    assert got == [list(range(40))] * 2
    for number in range(100):
        bus.emit(warned(number))
    assert [message.event.step for message in bus.read(count=1000)] == list(range(50, 100))
