"""The bus against a real server: everything arrives, in order, once, whatever becomes of the server meanwhile."""

from __future__ import annotations

import dataclasses
import re
import time
import traceback
import warnings

import pytest

from esper_jax import cli
from esper_jax.nissa import Event, Fanout, Kind, ListSink, events
from esper_jax.oona import Address, OonaError, Reader, RedisBus, deliver, runs
from tests.servers import RedisServer, free_port, needs_redis

redis = pytest.importorskip("redis")
pytestmark = needs_redis
QUICK = {"cooldown": 0.05, "max_cooldown": 0.2}


def warned(number: int, text: str = "x") -> Event:
    return events.warning(number // 10, number, f"{text} {number}", number=number)


def publish(bus: RedisBus, start: int, stop: int, size: int = 0) -> None:
    for number in range(start, stop):
        bus.emit(warned(number, "x" * max(1, size)))


def stored(server: RedisServer, bus: RedisBus) -> list[str]:
    """The ids that the stream holds, read by hand."""
    return [entry["id"] for _, entry in server.client().xrange(bus.address.stream)]


def read_all(url: str, run: str) -> list:
    with Reader(Address(url, run)) as reader:
        found = []
        while messages := reader.read(1000):
            found += messages
        return found


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_every_event_arrives_once_in_order_and_as_it_was(server, tmp_path):
    sent = [events.epoch(n, n, train_loss=float("nan"), loss=1.0, score=n) for n in range(1200)]
    with RedisBus(server.url, spool=tmp_path / "oona", name="digits") as bus:
        for event in sent:
            bus.emit(event)
    assert bus.published == bus.delivered == 1200 and bus.outages == 0
    assert stored(server, bus) == bus.ids()
    messages = read_all(server.url, bus.run)
    assert [message.id for message in messages] == bus.ids()
    assert [message.event.to_json() for message in messages] == [event.to_json() for event in sent]
    assert runs(server.url) == [bus.run] and bus.run.startswith("digits-")


@pytest.mark.parametrize("durable", [True, False])
def test_a_server_killed_in_the_middle_gets_everything_when_it_is_back(durable, tmp_path):
    """What a server without a log lost is sent again; one with a log gets nothing twice."""
    with RedisServer(durable=durable) as server:
        bus = RedisBus(server.url, spool=tmp_path / "oona", **QUICK)
        kept = ListSink()
        fanout = Fanout([bus, kept])
        fanout.open()
        reader = Reader(Address(server.url, bus.run))
        for number in range(100):
            fanout.emit(warned(number))
        assert bus.flush()
        early = reader.read(1000)
        assert len(early) == 100
        server.kill()
        with warnings.catch_warnings(record=True, action="always") as said:
            for number in range(100, 200):
                fanout.emit(warned(number))
            until(lambda: bus.outages == 1)
            fanout.emit(warned(200))
        with warnings.catch_warnings(action="error"):
            for number in range(201, 300):
                fanout.emit(warned(number))
        with pytest.raises(OonaError, match="does not answer"):
            reader.read()
        server.restart()
        assert bus.flush()
        fanout.emit(warned(300))
        fanout.close()
        assert len(said) == 1
        assert re.search(r"redis://.* fails \(.*\); events wait on disk", str(said[0].message))
        assert [event.kind for event in kept.events if event.kind in (Kind.OUTAGE, Kind.RECOVERY)] == [
            "outage",
            "recovery",
        ]
        assert stored(server, bus) == bus.ids()
        late = []
        while messages := reader.read(1000):
            late += messages
        assert [message.id for message in early + late] == bus.ids()
        numbers = [m.event.data["number"] for m in early + late if "number" in m.event.data]
        assert numbers == list(range(301))


def test_a_server_that_lost_everything_while_nothing_was_sent_is_noticed_at_the_end(tmp_path):
    with RedisServer() as server:
        with RedisBus(server.url, spool=tmp_path / "oona", **QUICK) as bus:
            publish(bus, 0, 50)
            assert bus.flush()
            server.restart()
        assert stored(server, bus) == bus.ids() and len(bus.ids()) == 50


def test_what_a_crash_took_back_from_the_server_is_sent_again(server, tmp_path):
    with RedisBus(server.url, spool=tmp_path / "oona") as bus:
        publish(bus, 0, 30)
        assert bus.flush()
        client = redis.Redis.from_url(server.url)
        before = client.dump(bus.address.stream)
        publish(bus, 30, 50)
        assert bus.flush()
        client.restore(bus.address.stream, 0, before, replace=True)  # as after a start from an older file
        assert len(stored(server, bus)) == 30
        publish(bus, 50, 60)
        assert bus.flush()
        assert stored(server, bus) == bus.ids() and len(bus.ids()) == 60


def test_an_answer_that_was_lost_makes_no_duplicate(server, tmp_path, monkeypatch):
    with RedisBus(server.url, spool=tmp_path / "oona", **QUICK) as bus:
        execute, lost = redis.client.Pipeline.execute, []

        def cut_off(pipe, *arguments):
            done = execute(pipe, *arguments)
            if len(lost) < 4:
                lost.append(done)
                raise redis.ConnectionError("cut off after the server had done it")
            return done

        monkeypatch.setattr(redis.client.Pipeline, "execute", cut_off)
        for number in range(0, 50, 10):
            publish(bus, number, number + 10)
            assert bus.flush()
        assert len(lost) == 4
    assert stored(server, bus) == bus.ids() and len(bus.ids()) == 50


def test_a_write_that_comes_between_look_and_batch_leaves_no_gap(server, tmp_path, monkeypatch):
    with RedisBus(Address(server.url, "r"), spool=tmp_path / "oona", **QUICK) as bus:
        publish(bus, 0, 10)
        assert bus.flush()
        client, read, came = server.client(), bus._spool.read, []

        def slip_in(after: int, count: int):
            if not came:
                came.append(client.xadd("esper:run:r", {"id": "other-1", "event": "{}"}, id="11-0"))
            return read(after, count)

        monkeypatch.setattr(bus._spool, "read", slip_in)
        publish(bus, 10, 20)
        assert bus.flush() and came
    assert [one for one in stored(server, bus) if one != "other-1"] == bus.ids()


@pytest.mark.parametrize("seconds", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_paused_server_stops_nobody_and_gets_everything_once(server, seconds, tmp_path):
    with RedisBus(Address(server.url, "paused", timeout=0.5), spool=tmp_path / "oona", linger=10.0, **QUICK) as bus:
        publish(bus, 0, 50)
        assert bus.flush()
        server.client().client_pause(seconds * 1000, all=True)
        began = slowest = 0.0
        end = time.monotonic() + seconds * 0.75
        number = 50
        while time.monotonic() < end:
            began = time.perf_counter()
            publish(bus, number, number + 1)
            slowest = max(slowest, time.perf_counter() - began)
            number += 1
            time.sleep(0.01)
        assert bus.outages == 1 and bus.delivered < bus.published
        assert slowest < 1.0  # the pause is at least 2 s
        assert bus.flush(seconds + 20)
    assert stored(server, bus) == bus.ids() and len(bus.ids()) == number


def test_a_server_without_memory_refuses_whole_batches_and_is_given_them_later(tmp_path):
    with RedisServer(maxmemory="3mb", maxmemory_policy="noeviction") as server:
        with RedisBus(server.url, spool=tmp_path / "oona", **QUICK) as bus:
            publish(bus, 0, 400, size=20_000)
            until(lambda: bus.outages >= 1)
            assert "OutOfMemory" in next(notice.data for notice in bus.notices())["error"]
            assert bus.delivered < 400
            part = stored(server, bus)
            assert part == bus.ids()[: len(part)]
            server.client().config_set("maxmemory", 0)
            assert bus.flush()
        assert stored(server, bus) == bus.ids()


def test_a_wrong_password_is_an_error_at_the_start_that_does_not_show_it(tmp_path):
    with RedisServer(password="right") as server:
        wrong = server.url.replace("right", "wrong-secret")
        for url in (wrong, server.bare_url):
            with pytest.raises(OonaError, match=r"refuses: AuthenticationError.*oona_optional=True") as refused:
                RedisBus(url, spool=tmp_path / "oona").open()
            assert not refused.value.transient and "wrong-secret" not in str(refused.value)
        with pytest.raises(OonaError, match="refuses") as refused:
            Reader(wrong)
        with RedisBus(server.url, spool=tmp_path / "oona") as bus:
            publish(bus, 0, 3)
        assert len(stored(server, bus)) == 3
        assert "right" not in repr(bus) and "right" not in str(bus.address)


def test_a_server_that_takes_no_writes_is_an_error_at_the_start(tmp_path):
    with RedisServer(maxmemory="1", maxmemory_policy="noeviction") as server:
        with pytest.raises(OonaError, match="cannot serve: OutOfMemoryError"):
            RedisBus(server.url, spool=tmp_path / "oona").open()
        server.client().config_set("maxmemory", 0)
        server.client().replicaof("127.0.0.1", free_port())
        with pytest.raises(OonaError, match="ReadOnlyError"):
            RedisBus(server.url, spool=tmp_path / "oona").open()
    assert not (tmp_path / "oona").exists()


def test_a_password_may_come_from_the_environment(tmp_path, monkeypatch):
    with RedisServer(password="right") as server:
        monkeypatch.setenv("REDISCLI_AUTH", "right")
        with RedisBus(server.bare_url, spool=tmp_path / "oona") as bus:
            publish(bus, 0, 3)
        assert len(read_all(server.bare_url, bus.run)) == 3


def test_a_password_changed_on_the_way_is_one_outage_and_loses_nothing(tmp_path):
    with RedisServer(password="right") as server, RedisBus(server.url, spool=tmp_path / "oona", **QUICK) as bus:
        publish(bus, 0, 10)
        assert bus.flush()
        client = server.client()
        client.config_set("requirepass", "other")
        client.client_kill_filter(_type="normal", skipme=True)
        publish(bus, 10, 20)
        until(lambda: bus.outages == 1)
        client.config_set("requirepass", "right")
        assert bus.flush()
        assert [entry["id"] for _, entry in client.xrange(bus.address.stream)] == bus.ids()


def test_no_server_at_the_start_is_an_error_unless_optional_and_then_one_warning(tmp_path):
    url = f"redis://127.0.0.1:{free_port()}/0"
    with pytest.raises(OonaError, match=r"does not answer: ConnectionError.* Start or correct the server") as refused:
        RedisBus(url, spool=tmp_path / "oona").open()
    assert refused.value.transient
    bus = RedisBus(url, spool=tmp_path / "oona", optional=True, linger=0.5, **QUICK)
    fanout = Fanout([bus])
    with warnings.catch_warnings(record=True, action="always") as said:
        fanout.open()
        for number in range(30):
            fanout.emit(warned(number))
        assert len(said) == 1 and "events wait on disk" in str(said[0].message)
        fanout.close()
    assert len(said) == 2  # the second at the end: 30 events and the outage are on disk
    assert "31 events of run-" in str(said[1].message) and str(tmp_path / "oona") in str(said[1].message)


def test_what_a_run_could_not_deliver_is_delivered_later(tmp_path):
    with RedisServer() as server:
        url = server.url
        server.stop()
        bus = RedisBus(url, spool=tmp_path / "oona", optional=True, name="late", **QUICK)
        with pytest.warns(RuntimeWarning, match="40 events of late"), bus:
            publish(bus, 0, 40)
        server.restart()
        with pytest.raises(FileNotFoundError, match="no spool of a bus"):
            deliver(tmp_path, url)
        assert deliver(tmp_path / "oona", url) == 40
        assert stored(server, bus) == bus.ids() and runs(url) == [bus.run]
        assert deliver(tmp_path / "oona", url) == 0
        server.restart()  # and it has lost everything
        assert deliver(tmp_path / "oona", url) == 40
        assert stored(server, bus) == bus.ids()


def test_a_run_that_was_killed_goes_on_in_the_same_stream(server, tmp_path):
    first = RedisBus(server.url, spool=tmp_path / "oona", name="r")
    first.open()
    publish(first, 0, 10)
    first.flush()
    server.client().client_pause(300, all=True)
    publish(first, 10, 20)
    first._spool.close()  # as a kill would: no goodbye, the lock is gone
    with RedisBus(server.url, spool=tmp_path / "oona", name="r") as second:
        publish(second, 20, 30)
        assert second.flush()
        assert second.run == first.run
    assert [m.event.data["number"] for m in read_all(server.url, second.run)] == list(range(30))


def test_two_processes_cannot_publish_one_run(server, tmp_path):
    with RedisBus(server.url, spool=tmp_path / "oona"), pytest.raises(OonaError, match="in use by process [0-9]+ on "):
        RedisBus(server.url, spool=tmp_path / "oona").open()


def test_two_runs_of_one_name_share_a_stream_and_lose_nothing(server, tmp_path):
    address = Address(server.url, "shared")
    with RedisBus(address, spool=tmp_path / "a", **QUICK) as a, RedisBus(address, spool=tmp_path / "b", **QUICK) as b:
        for number in range(0, 200, 5):
            publish(a, number, number + 5)
            publish(b, number, number + 5)
        assert a.flush() and b.flush()
    ids = stored(server, a)
    assert sorted(ids) == sorted(a.ids() + b.ids())
    assert [one for one in ids if one in set(a.ids())] == a.ids()
    assert [m.id for m in read_all(server.url, "shared")] == ids


def test_the_stream_is_trimmed_and_what_is_kept_is_the_newest(server, tmp_path):
    with RedisBus(Address(server.url, "short", maxlen=200), spool=tmp_path / "oona") as bus:
        publish(bus, 0, 2000)
    ids = stored(server, bus)
    assert 200 <= len(ids) < 600
    assert ids == bus.ids()[-len(ids) :]


def test_a_full_disk_is_one_outage_and_its_events_are_written_when_there_is_room(server, tmp_path, monkeypatch):
    with RedisBus(server.url, spool=tmp_path / "oona") as bus:
        publish(bus, 0, 5)
        with monkeypatch.context() as patch:

            def full(line: str) -> int:
                raise OSError(28, "No space left on device")

            patch.setattr(bus._spool, "append", full)
            publish(bus, 5, 10)
            assert [notice.kind for notice in bus.notices()] == ["outage"]
        publish(bus, 10, 12)
    assert [m.event.data["number"] for m in read_all(server.url, bus.run)] == list(range(12))
    assert bus.lost == 0


def test_nothing_is_left_behind_where_no_directory_was_given(server, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with RedisBus(server.url) as bus:
        publish(bus, 0, 5)
        assert list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://localhost", "redis:", "", "localhost:6379", "redis://h/0?maxlen=x"])
def test_a_url_that_is_none_is_refused_in_a_sentence(url):
    with pytest.raises(ValueError, match="such as 'redis://|must be numbers"):
        Address.of(url)


def test_a_url_carries_the_settings_and_hides_the_password():
    address = Address.of("rediss://me:secret@h:1/2?run=a&maxlen=5&timeout=0.5&ssl_cert_reqs=none")
    assert (address.run, address.maxlen, address.timeout) == ("a", 5, 0.5)
    assert address.shown == "rediss://me:***@h:1/2?ssl_cert_reqs=none"
    assert "secret" not in repr(address)
    assert address.bare == "rediss://me@h:1/2?ssl_cert_reqs=none&run=a&maxlen=5&timeout=0.5"
    assert Address.of("redis://:secret@h/0").bare == "redis://h/0"
    with pytest.raises(ValueError, match="letters, digits"):
        Address.of("redis://h/0?run=a%20b")
    with pytest.raises(ValueError, match="must be numbers") as refused:
        Address.of("redis://me:secret@h/0?timeout=x")
    assert "secret" not in str(refused.value)


SECRET = "pa%2Fs%40s%3Fw%23o"  # pa/s@s?w#o
SECRETS = ("pa/s", "s@s", "s?w", "w#o", "pa%2F", "%40s")


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@h:1/0",
        f"redis://me:{SECRET}@h:1/0",
        f"redis://h:1/0?password={SECRET}",
        f"redis://h:1/0?username=me&password={SECRET}&timeout=2",
        f"rediss://h:1/0?ssl_password={SECRET}",
        f"unix:///run/redis.sock?password={SECRET}",
        "redis://:pa/s@s?w#o@h:1/0",
        "redis://:s?w@h",
        "redis://:w#o@h",
        "redis://:pa/s",
        "redis://me:pa/s@h:1/0?timeout=x",
        "http://me:pa/s@h",
        "redis:me:s@s",
        "redis://[pa/s",
    ],
)
def test_a_password_is_in_no_text_however_it_is_given(url):
    try:
        address = Address.of(url)
    except ValueError as refused:
        texts = ["".join(traceback.format_exception(refused))]
    else:
        assert "pa/s@s?w#o" in dict(address.secrets).values() and address.url == Address.of(address.bare).url
        assert address.client().connection_pool.connection_kwargs["socket_timeout"] == address.timeout
        echo = redis.AuthenticationError("pa/s@s?w#o is wrong")
        texts = [repr(address), str(address), address.shown, address.bare, address.url, str(address.trouble(echo))]
        again = dataclasses.replace(address, run="other")
        assert again.secrets == address.secrets and again.username == address.username
    for text in texts:
        assert not any(secret in text for secret in SECRETS), text


@pytest.mark.parametrize("how", ["redis://:{p}@{h}/0", "redis://{h}/0?password={p}", "redis://default:{p}@{h}/0"])
def test_a_password_with_any_letters_reaches_the_server_however_it_is_given(tmp_path, how):
    with RedisServer(password="pa/s@s?w#o") as server:
        url = how.format(p=SECRET, h=f"127.0.0.1:{server.port}")
        with RedisBus(url, spool=tmp_path / "oona") as bus:
            publish(bus, 0, 3)
            assert bus.flush()
        with Reader(url) as reader:  # the newest run
            assert len(reader.read()) == 3


def test_a_name_alone_may_be_a_token_and_is_not_shown(monkeypatch):
    monkeypatch.delenv("REDISCLI_AUTH", raising=False)
    address = Address.of("redis://token@h/0")
    assert (address.shown, address.bare, address.username) == ("redis://***@h/0", "redis://h/0", "token")
    monkeypatch.setenv("REDISCLI_AUTH", "right")
    assert address.bare == "redis://token@h/0"


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("timeout=inf", "timeout must be above 0 and at most 3600"),
        ("timeout=nan", "timeout must be above 0"),
        ("maxlen=0", "maxlen must be 1 or more"),
        ("foo=1", "does not understand the URL.*foo"),
        ("db=x", "does not understand the URL.*db"),
        ("socket_timeout=x", "does not understand the URL.*socket_timeout"),
    ],
)
def test_a_setting_that_redis_or_we_do_not_have_is_one_sentence_for_the_command(query, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["watch", f"redis://localhost:1/0?{query}", "--once"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(sentence, said) and said.count("\n") == 1
