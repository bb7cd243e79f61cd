"""`esper-jax watch`: one picture of a run, from its directory, however it is written, at 80 columns."""

from __future__ import annotations

import io
import json
import math
import pathlib
import threading

import pytest

from esper_jax import cli
from esper_jax.nissa import Console, Event, Fanout, JsonlSink, ListSink, events
from esper_jax.nissa.picture import Picture
from esper_jax.nissa.watch import LogSource, sparkline, view, watch
from esper_jax.protocol import Decision
from tests.test_nissa import SITE, life_of_a_seed

rich = pytest.importorskip("rich.console")
REASON = "a plateau of 3 epochs"


def life() -> list[Event]:
    """A seed's life with what the trainer adds: sites, and a decision with its reason."""
    found = []
    for event in life_of_a_seed():
        if event.kind == "epoch":
            sites = {SITE: {"gain": 0.5, "health": 0.75}, "head/Dense_0": {"gain": 0.1, "health": 1.0}}
            event = Event("epoch", event.epoch, event.step, event.message, {**event.data, "sites": sites}, event.time)
        found.append(event)
        if event.kind == "epoch" and event.epoch == 9:
            choice = Decision("germinate", SITE, 0, "lora", reason=REASON)
            found.append(events.decision(9, event.step, choice, outcome="applied"))
            refused = Decision("prune", SITE, 0, reason="it harms")
            found.append(events.decision(9, event.step, refused, outcome="refused", why="cooldown: 1 < 3"))
    return found


def pictured(run, **options) -> Picture:
    picture = Picture(**options)
    for event in run:
        picture.add(event)
    return picture


def drawn(picture: Picture, width: int = 80, height: int = 40, **options) -> list[str]:
    console = rich.Console(file=io.StringIO(), width=width, height=height, highlight=False)
    console.print(view(picture, "digits-0", width=width, height=height, **options))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("height", [16, 24, 50])
@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("until", [0, 1, 8, 40, 70, 10_000])
def test_a_picture_keeps_within_the_width_at_every_time_of_a_run(until, width, height):
    lines = drawn(pictured(life()[:until]), width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) <= max(height, 24)


def test_it_shows_scores_seeds_with_stage_and_alpha_sites_health_and_reasons():
    run = life()
    blending = next(i for i, event in enumerate(run) if event.data.get("after") == "BLENDING") + 4
    lines = drawn(pictured(run[:blending]))
    text = " ".join(" ".join(lines).split())
    for word in ("running", "epoch", "/60", "score", "best", "lora", "blending", "health", REASON, "cooldown: 1 < 3"):
        assert word in text, word
    assert "refused prune" in text and "0.75" in text
    assert any("▁" in line and "█" in line for line in lines)
    assert any("░" in line and "lora" in line for line in lines)


def test_it_says_how_the_run_ended_and_what_went_wrong():
    run = [*life()[:-1], events.fault(60, 1200, site=SITE, slot=0, blueprint="lora", faults=2), life()[-1]]
    text = "\n".join(drawn(pictured(run), trouble="the bus does not answer"))
    assert "finished" in text and "1 faults" in text and "the bus does not answer" in text


def test_a_resumed_run_forgets_what_came_after_its_checkpoint():
    run = life()
    cut = next(i for i, event in enumerate(run) if event.kind == "epoch" and event.epoch == 20)
    step = run[cut].step
    picture = pictured([*run[: cut + 30], events.resumed(20, step, path="run")])
    assert max(point.step for point in picture.points) == step
    assert picture.metrics == run[cut].data
    assert all(one.step <= step for one in (*picture.decisions, *picture.told))


@pytest.mark.parametrize(
    "event",
    [
        Event("epoch", 1, 1, "", {"score": "high"}),
        Event("epoch", 1, 1, "", {"score": 1.0, "seeds": [{"site": "a"}]}),
        Event("epoch", 1, 1, "", {"score": 1.0, "seeds": 3}),
        Event("epoch", 1, 1, "", {"score": 1.0, "sites": {"a": 3}}),
        Event("run_started", 0, 0, "", {}),
        Event("decision", 1, 1, "x", {}),
        Event("run_ended", 1, 1, "x", {}),
    ],
)
def test_an_event_that_makes_no_sense_changes_nothing_and_is_counted(event):
    picture = pictured(life()[:40])
    before = drawn(picture)
    picture.add(event)
    assert picture.unread == 1 and drawn(picture) == before


def test_text_from_elsewhere_cannot_steer_the_terminal():
    evil = "\x1b]0;owned\x07\x1b[2J\u202e\udc80"
    picture = pictured(
        [
            *life()[:40],
            events.warning(5, 5, f"careful {evil}[bold]"),
            events.epoch(6, 6, train_loss=1.0, loss=1.0, score=1.0, sites={evil: {"gain": 1.0}}),
        ]
    )
    text = "\n".join(drawn(picture))
    text.encode()
    assert "\x1b" not in text and "\u202e" not in text and "\x07" not in text and "[bold]" in text


def test_a_log_is_followed_while_it_is_written_torn_lines_and_a_cut_for_a_resume_included(tmp_path):
    source = LogSource(tmp_path)
    assert source.poll() == (False, []) and source.trouble
    run = life()
    path = tmp_path / "events.jsonl"
    with JsonlSink(path) as sink:
        for event in run[:10]:
            sink.emit(event)
        assert [len(part) for part in source.poll()[1:]] == [10]
        with path.open("ab") as file:
            file.write(run[10].to_json().encode()[:20])
        assert source.poll() == (False, [])
        with path.open("ab") as file:
            file.write(run[10].to_json().encode()[20:] + b"\nrubbish\n")
        afresh, found = source.poll()
        assert not afresh and [event.step for event in found] == [run[10].step] and source.unread == 1
    path.write_text("".join(event.to_json() + "\n" for event in run[:10]))
    with JsonlSink(path) as sink:
        sink.rewind(run[4].step)
        afresh, found = source.poll()
        assert afresh and [event.to_json() for event in found] == path.read_text().splitlines()


def test_watching_ends_when_the_run_does(tmp_path):
    (tmp_path / "events.jsonl").touch()

    def write() -> None:
        with JsonlSink(tmp_path / "events.jsonl") as sink:
            for event in life():
                sink.emit(event)

    thread = threading.Thread(target=write)
    thread.start()
    file = io.StringIO()
    picture = watch(LogSource(tmp_path), interval=0.01, file=file)
    thread.join()
    assert picture.ended == "finished" and len(picture.points) == 60
    assert "finished" in file.getvalue()


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_draws_again_and_leaves_the_last_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "30")
    run = life()
    path = tmp_path / "events.jsonl"
    path.write_text("".join(event.to_json() + "\n" for event in run[:40]))
    file = Terminal()

    def sleep(seconds: float) -> None:
        path.write_text("".join(event.to_json() + "\n" for event in run))

    picture = watch(LogSource(tmp_path), file=file, sleep=sleep)
    text = file.getvalue()
    assert picture.ended == "finished"
    assert text.count("digits") == 0 and text.index("running") < text.index("finished")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_the_command_prints_one_picture_or_says_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["watch", str(tmp_path / "nowhere"), "--once"])
    assert stopped.value.code == 2 and "there is no run in" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit):
        cli.main(["watch", str(tmp_path / "run"), "--once"])
    assert "events.jsonl is not there yet" in capsys.readouterr().err
    with JsonlSink(tmp_path / "run/events.jsonl") as sink:
        for event in life():
            sink.emit(event)
    cli.main(["watch", str(tmp_path / "run"), "--once"])
    assert "finished" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["watch", str(tmp_path / "run"), "--interval", "0"])
    assert "--interval must be a finite number of seconds above 0" in capsys.readouterr().err


def test_the_command_prints_the_schema(capsys):
    cli.main(["schema"])
    assert json.loads(capsys.readouterr().out)["title"].startswith("esper_jax event, version")


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], list(range(500)), [math.pi, -1.0]])
def test_a_sparkline_has_its_width_and_its_ends(values):
    line = sparkline(values, 40)
    assert len(line) == min(40, len(values))
    assert min(values) == max(values) or {"▁", "█"} <= set(line)


def test_the_bus_is_watched_over_a_restart_of_the_server(tmp_path, capsys):
    pytest.importorskip("redis")
    from esper_jax.oona import Address, BusSource, OonaError, RedisBus
    from tests.servers import RedisServer, free_port

    with pytest.raises(OonaError, match="refuses"), RedisServer(password="x") as locked:
        BusSource(locked.bare_url)
    source = BusSource(f"redis://127.0.0.1:{free_port()}/0")
    assert source.poll() == (False, []) and "does not answer" in source.trouble
    run = life()
    with RedisServer() as server:
        early = BusSource(server.url)
        assert early.poll() == (False, []) and "has no runs yet" in early.trouble
        with RedisBus(Address(server.url, "r"), spool=tmp_path / "oona", cooldown=0.05) as bus:
            for event in run[:50]:
                bus.emit(event)
            assert bus.flush()
            source = BusSource(server.url)
            first = source.poll()[1]
            server.restart()
            for event in run[50:]:
                bus.emit(event)
            assert bus.flush()
        found = list(first)
        while len(found) < len(run):
            found += source.poll()[1]
        assert [event.to_json() for event in found] == [event.to_json() for event in run]
        cli.main(["watch", f"{server.url}?run=r", "--once"])
        assert "r  finished  epoch 60/60" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            cli.main(["watch", f"{server.url}?run=other", "--once"])
        assert "other has no events yet" in capsys.readouterr().err


def test_watching_without_rich_names_the_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r'pip install "esper_jax\[cli\]"'):
        watch(LogSource(pathlib.Path(tmp_path)), once=True)


@pytest.mark.parametrize("content", [b"my notes\n", b'{"a": 1}\n', b"\xff\xfe\n", b"notes", b"[1, 2]\n", b"\x00" * 50])
def test_a_file_that_is_no_event_log_is_an_error(tmp_path, content, capsys):
    path = tmp_path / "events.jsonl"
    path.write_bytes(content)
    for given in (path, tmp_path):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["watch", str(given)])
        assert stopped.value.code == 2 and "is no event log" in capsys.readouterr().err


def test_a_run_that_has_no_events_or_fell_silent_is_said_once_and_still_followed(tmp_path):
    path = tmp_path / "events.jsonl"
    path.touch()
    old = [Event(e.kind, e.epoch, e.step, e.message, e.data, e.time - 3600) for e in life()]
    written = iter([[], [], old[:30], [], [], old[30:]])

    def sleep(seconds: float) -> None:
        with path.open("a") as file:
            file.writelines(event.to_json() + "\n" for event in next(written))

    file = io.StringIO()
    assert watch(LogSource(tmp_path), file=file, sleep=sleep).ended == "finished"
    text = file.getvalue()
    assert text.count("no events yet") == 1 and text.count("no new event since") == 1
    assert "may have ended" in text and text.index("no events yet") < text.index("no new event since")
    path.write_text("".join(event.to_json() + "\n" for event in old[:30]))
    file = io.StringIO()
    watch(LogSource(tmp_path), file=file, once=True)
    assert "may have ended" in file.getvalue()


def test_no_display_passes_on_what_could_steer_a_terminal(tmp_path, capsys, monkeypatch):
    evil = "\x1b]0;owned\x07\x1b[2J\u202e\u200f"
    bad = ("\x1b", "\x07", "\u202e", "\u200f")
    rows = [{"site": f"a{evil}", "slot": 0, "blueprint": evil, "stage": "TRAINING", "alpha": 0.5}]
    run = [
        events.warning(1, 1, f"careful {evil}"),
        events.outage(1, 1, service=evil, error=evil),
        events.epoch(1, 1, train_loss=1.0, loss=1.0, score=1.0, seeds=rows),
        events.run_ended(1, 1, outcome=evil),
    ]
    plain = io.StringIO()
    monkeypatch.setenv("TERM", "xterm-256color")
    for file in (plain, Terminal()):
        console = Console(1, file=file)
        for event in run:
            console.emit(event)
        console.close()
        text = file.getvalue()
        assert "careful" in text and "\x1b]0" not in text and "\x1b[2J\u202e" not in text
        assert not any(one in text for one in bad[1:])
    assert not any(one in plain.getvalue() for one in bad)
    with pytest.warns(RuntimeWarning, match="fails") as said:
        Fanout([ListSink()]).emit(run[1])
    assert not any(one in str(said[0].message) for one in bad)
    named = tmp_path / "run\x1b[2J"
    named.mkdir()
    with pytest.raises(SystemExit):
        cli.main(["watch", str(named / "none"), "--once"])
    assert "\x1b" not in capsys.readouterr().err
    (named / "events.jsonl").write_text("".join(event.to_json() + "\n" for event in run))
    cli.main(["watch", str(named), "--once"])
    assert not any(one in capsys.readouterr().out for one in bad)
