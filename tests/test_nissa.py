"""Nissa: events keep what they were given, logs survive crashes, no sink stops the training, pictures get drawn."""

import io
import itertools
import json
import math
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_jax.kasmina.stages import Stage
from esper_jax.nissa import (
    Console,
    Event,
    Fanout,
    JsonlSink,
    Kind,
    ListSink,
    Sink,
    course,
    events,
    lives,
    read_events,
    table,
    training_figure,
)
from esper_jax.protocol import Decision, Feedback, HealthSignal, SeedReport

SITE = "block_0/mlp/Dense_0"
NAMES = st.sampled_from(["NaN", "Infinity", "-Infinity", "~NaN", "~~Infinity", "~", "a\nb\u2028", "\udc80"]) | st.text()
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def seed_report(stage: Stage, alpha: float = 0.0, contribution: float = math.nan) -> SeedReport:
    return SeedReport(
        SITE, 0, "lora", stage, alpha, 3, 2, 0, 0.97, 0.4, contribution, 88.0, 640, pruning=False, ramping=False
    )


def life_of_a_seed(epochs: int = 60, born: int = 8, kept: bool = True) -> list[Event]:
    """A run in which one seed germinates at `born`, blends from 10 epochs on and is kept or pruned 18 epochs later."""
    found, before = [events.run_started(epochs)], Stage.DORMANT
    for epoch in range(1, epochs + 1):
        age = epoch - born
        edges = {0: Stage.GERMINATED, 1: Stage.TRAINING, 10: Stage.BLENDING, 15: Stage.HOLDING}
        edges |= {18: Stage.FOSSILIZED} if kept else {18: Stage.PRUNED, 19: Stage.EMBARGOED, 24: Stage.RESETTING}
        after = edges.get(age, before)
        alpha = min(max((age - 10) / 5, 0.0), 1.0) if after < Stage.PRUNED else 0.0
        where = {"site": SITE, "slot": 0, "blueprint": "lora"}
        if age == 0:
            found.append(events.germinated(epoch, epoch * 20, **where, reason="a plateau of 3 epochs"))
        elif after != before:
            reason = "contribution 1.42 points >= 1.0" if after == Stage.FOSSILIZED else f"because of {epoch}"
            found.append(
                events.stage(epoch, epoch * 20, **where, before=before, after=after, reason=reason, alpha=alpha)
            )
        before = after
        seeds = [seed_report(after, alpha, 1.4 * alpha)] if age >= 0 else []
        score = 90 - 30 * math.exp(-epoch / 6) + alpha
        found.append(events.epoch(epoch, epoch * 20, train_loss=1 / epoch, loss=1.1 / epoch, score=score, seeds=seeds))
    return [*found, events.run_ended(epochs, epochs * 20, score=91.0)]


@given(message=NAMES, data=st.dictionaries(NAMES, DATA, max_size=3), time=st.floats(0, 4e9))
def test_every_event_is_one_line_of_strict_json_and_reads_back_as_it_was(message, data, time):
    event = Event("epoch", 3, 120, message, data, time)
    line = event.to_json()
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = Event.from_json(line.encode("utf-8", "backslashreplace"))
    assert repr(back) == repr(event)  # repr: NaN equals itself there


def test_numpy_scalars_stages_paths_and_dataclasses_become_plain_values(tmp_path):
    data = {"a": np.float32(0.5), "b": np.arange(2), "c": Stage.HOLDING, "d": tmp_path, "e": np.bool_(True)}
    data |= {"nan": np.float32("nan"), "seed": seed_report(Stage.TRAINING), "pair": ("x", 1), 3: "three"}
    back = Event.from_json(Event("mine", np.int64(1), 2, data=data).to_json()).data
    assert (back["a"], back["b"], back["c"], back["d"], back["e"]) == (0.5, [0, 1], "HOLDING", str(tmp_path), True)
    assert math.isnan(back["nan"])
    assert (back["seed"]["stage"], back["pair"], back["3"]) == ("TRAINING", ["x", 1], "three")


def test_data_that_json_cannot_hold_is_refused_by_its_place():
    with pytest.raises(TypeError, match=r"data of the event 'mine'\['model'\] is a object"):
        Event("mine", 0, 0, data={"model": object()})


def test_a_later_schema_is_refused_in_a_sentence_that_says_what_to_do():
    line = Event("epoch", 0, 0).to_json().replace('{"v": 1', '{"v": 2')
    with pytest.raises(ValueError, match="update esper_jax"):
        Event.from_json(line)


def test_each_kind_has_a_constructor_whose_data_hold_its_fields():
    where = {"site": SITE, "slot": 1, "blueprint": "lora"}
    choice = Decision("germinate", SITE, 1, "lora", {"rank": 8}, confidence=0.9, urgency=0.8, reason="a plateau")
    answer = Feedback(choice, "refused", "budget: 900 > 800", 88.0, 88.5, math.nan, 0.1)
    made = [
        events.run_started(3, task="digits"),
        events.epoch(1, 2, train_loss=1.0, loss=1.0, score=50.0, seconds=0.1, learning_rate=1e-3),
        events.stage(1, 2, **where, before=Stage.TRAINING, after=3, reason="health 0.97", alpha=0.0),
        events.answer(1, 2, service="s", controller="c", asked_epoch=0, asked_step=1, decisions=[choice]),
        events.decision(1, 2, choice, outcome="refused", why="budget: 900 > 800"),
        events.feedback(1, 2, answer),
        events.germinated(1, 2, **where, parameters=640),
        events.contribution(1, 2, **where, value=1.5),
        events.interaction(1, 2, (SITE, 0), (SITE, 1), -0.25),
        events.fault(1, 2, **where, faults=2),
        events.swap(1, 2, grown=[(SITE, 1)], left=[], waited_seconds=0.5, compile_seconds=2.5),
        events.compile_failed(1, 2, seeds=[(SITE, 1)], reason="RuntimeError: no"),
        events.health(HealthSignal(SITE, None, 1, 2, 0.25, {"activity": 0.25, "flow": 1.0})),
        events.rollback(1, 2, reason="the loss is NaN", to_step=1),
        events.snapshot(1, 2, reason="5 epochs"),
        events.checkpoint(1, 2, path="runs/2", best=True),
        events.resumed(1, 2, path="runs/2", skipped=("runs/3: a checksum differs",)),
        events.early_stop(1, 2, reason="10 epochs without gain"),
        events.run_ended(1, 2, score=50.0),
        events.outage(1, 2, service="redis", error="refused"),
        events.recovery(1, 2, service="redis", seconds=1.5, replayed=3),
        events.dropped(1, 2, service="TensorBoardSink", dropped=2, total=5),
        events.warning(1, 2, "careful"),
        events.error(1, 2, "the disk is full", unsaved=2),
    ]
    assert [event.kind for event in made] == [str(kind) for kind in Kind]
    assert all(event.message for event in made)
    decision, feedback = made[4].data, made[5].data
    wanted = {"action": "germinate", "outcome": "refused", "why": "budget: 900 > 800", "confidence": 0.9}
    assert wanted.items() <= decision.items()
    assert {"action": "germinate", "site": SITE, "outcome": "refused", "score_before": 88.0}.items() <= feedback.items()
    assert (made[2].data["before"], made[2].data["after"]) == ("TRAINING", "BLENDING")
    assert "budget: 900 > 800" in made[4].message


def test_a_log_is_valid_after_each_event_and_appends_to_what_is_there(tmp_path):
    path = tmp_path / "run" / "events.jsonl"
    with JsonlSink(path) as sink:
        for step in range(3):
            sink.emit(events.warning(0, step, "x"))
            assert len(read_events(path)) == len(sink) == step + 1
    with JsonlSink(path) as sink:
        sink.emit(events.warning(0, 3, "x"))
        assert len(sink) == 4
    assert [event.step for event in read_events(path)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="closed"):
        sink.emit(events.warning(0, 4, "x"))


@pytest.mark.parametrize("tail", [b'{"v": 1, "kind": "ep', b"\0\0\0\0", b'{"v": 1, "ki\n', b"\0\0\n", b"{"])
def test_a_torn_last_line_is_dropped_when_the_log_is_opened_again(tmp_path, tail):
    path = tmp_path / "events.jsonl"
    with JsonlSink(path) as sink:
        sink.emit(events.warning(0, 1, "whole"))
    with path.open("ab") as file:
        file.write(tail)
    with JsonlSink(path) as sink:
        sink.emit(events.warning(0, 2, "after the crash"))
    assert [event.message for event in read_events(path)] == ["whole", "after the crash"]


def test_a_log_torn_in_its_first_line_starts_again_but_another_file_is_left_alone(tmp_path):
    torn, notes = tmp_path / "torn.jsonl", tmp_path / "notes.txt"
    torn.write_text('{"v": 1, "ki')
    with JsonlSink(torn) as sink:
        assert len(sink) == 0
    notes.write_text("my only copy")
    with pytest.raises(ValueError, match="not a log of events"):
        JsonlSink(notes)
    assert notes.read_text() == "my only copy"


def test_a_reader_skips_a_line_being_written_and_names_a_broken_one(tmp_path):
    path = tmp_path / "events.jsonl"
    whole = events.warning(0, 1, "x").to_json()
    path.write_text(f"{whole}\n{whole[:9]}")
    assert len(read_events(path)) == 1
    path.write_text(f"{whole}\nrubbish\n{whole}\n")
    with pytest.raises(ValueError, match=r"events\.jsonl, line 2"):
        read_events(path)


@pytest.mark.parametrize("killed", [1, 9, 30, 60])
@pytest.mark.parametrize("tear", [False, True])
def test_a_resumed_runs_log_equals_an_uninterrupted_one(tmp_path, killed, tear):
    run = life_of_a_seed()
    path = tmp_path / "events.jsonl"
    with JsonlSink(path) as sink:
        for event in run[: killed * 2]:
            sink.emit(event)
        if killed == 60:
            sink.emit(events.run_ended(60, 1200, outcome="interrupted"))
    if tear:
        with path.open("ab") as file:
            file.write(b'{"v": 1, "kind": "sta')
    step = max(0, killed - 4) * 20
    with JsonlSink(path) as sink:
        sink.rewind(step)
        sink.emit(events.resumed(step // 20, step, path="checkpoints"))
        for event in run:
            if event.step > step:
                sink.emit(event)
    assert course(read_events(path)) == course(run)
    assert list(tmp_path.iterdir()) == [path]


def test_rewind_by_count_is_exact_where_a_rollback_ran_steps_twice():
    sink = ListSink()
    for step in (1, 2, 3, 2, 3, 4):
        sink.emit(events.warning(0, step, str(len(sink.events))))
    sink.rewind(2, count=2)
    assert [event.message for event in sink.events] == ["0", "1"]


def test_the_course_of_two_runs_is_equal_whatever_their_clocks_say():
    first = events.epoch(1, 2, train_loss=math.nan, loss=1.0, score=50.0, seconds=0.1, examples_per_second=10.0)
    second = events.epoch(1, 2, train_loss=math.nan, loss=1.0, score=50.0, seconds=9.9, examples_per_second=11.0)
    other = events.epoch(1, 2, train_loss=math.nan, loss=1.0, score=50.1)
    assert course([first]) == course([second, events.checkpoint(1, 2, path="x")]) != course([other])


class Broken:
    """A sink on a full disk."""

    def __init__(self):
        self.asked = 0

    def emit(self, event):
        self.asked += 1
        raise OSError("No space left on device")

    def close(self):
        raise OSError("No space left on device")


def test_a_raising_sink_is_dropped_with_one_warning_and_the_others_get_everything():
    broken, kept = Broken(), ListSink()
    fanout = Fanout([broken, kept])
    assert isinstance(fanout, Sink)
    assert isinstance(broken, Sink)
    with pytest.warns(RuntimeWarning, match=r"Broken failed .* No space left on device"):
        fanout.emit(events.snapshot(0, 0, reason="x"))
    with warnings.catch_warnings(action="error"):
        fanout.emit(events.snapshot(0, 1, reason="x"))
        fanout.emit(events.snapshot(0, 2, reason="x"))
        fanout.close()
    assert broken.asked == 1
    assert [event.kind for event in kept.events].count("warning") == 1
    assert [event.step for event in kept.events if event.kind == "snapshot"] == [0, 1, 2]
    assert fanout.dropped == {"Broken": 4}  # three events and the warning


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_training_goes_on_when_every_sink_is_broken():
    fanout = Fanout([Broken(), Broken()])
    fanout.emit(events.snapshot(0, 1, reason="x"))
    fanout.emit(events.snapshot(0, 2, reason="x"))
    assert fanout.sinks == []
    assert list(fanout.dropped) == ["Broken", "Broken'"]


def shown(run: list[Event], **options) -> list[str]:
    file = io.StringIO()
    console = Console(60, file=file, **options)
    for event in run:
        console.emit(event)
    console.close()
    return file.getvalue().splitlines()


def test_plain_output_fits_80_columns_and_tells_each_event_with_its_reason():
    lines = shown(life_of_a_seed(), seconds=1e9)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for reason in (
        "a plateau of 3 epochs",
        "because of 9",
        "because of 18",
        "because of 23",
        "contribution 1.42 points",
    ):
        assert reason in text
    metrics = [line for line in lines if "/60  train" in line]
    assert len(metrics) == 21  # each third of 60 epochs, the last one, and the first
    assert lines[-1].endswith("run finished after 60 epochs, score 91.00")


def test_slow_epochs_are_shown_each_and_the_last_line_is_never_left_out():
    clock = iter(range(0, 10_000, 6))
    assert len([line for line in shown(life_of_a_seed()[:-1], now=lambda: next(clock)) if "/60  train" in line]) == 60
    stopped = shown(life_of_a_seed()[:24], seconds=1e9)
    assert any("/60" in line for line in stopped[-2:])


def test_a_refusal_that_repeats_is_told_once_in_a_while():
    choice = Decision("germinate", SITE, None, "lora")
    run = [events.decision(epoch, epoch, choice, outcome="refused", why=f"cooldown {epoch}") for epoch in range(20)]
    assert len(shown(run)) == 2


def test_quiet_shows_only_what_went_wrong():
    run = [*life_of_a_seed(), events.rollback(60, 1200, reason="the loss is NaN", to_step=1100)]
    assert shown(run, quiet=True) == ["epoch   60 rolled back to step 1100: the loss is NaN"]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_a_terminal_shows_bar_metrics_seeds_and_reasons_within_80_columns(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = Terminal()
    console = Console(60, file=file)
    for event in life_of_a_seed()[:50]:
        console.emit(event)
    console.close()
    text = file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert all(word in plain for word in ("epoch 23/60", "score", "lora", "holding", "████", "contrib"))
    assert "a plateau of 3 epochs" in " ".join(plain.split())
    assert max(len(line) for line in re.split(r"[\r\n]", plain)) <= 80
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again


def test_without_rich_a_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    file = Terminal()
    console = Console(60, file=file)
    for event in life_of_a_seed():
        console.emit(event)
    assert "\x1b" not in file.getvalue()
    assert "contribution 1.42 points" in file.getvalue()


def test_a_table_aligns_numbers_right_and_words_left_and_refuses_ragged_rows():
    text = table(
        [["host", 1200, 91.5, None], ["grown", np.int64(1850), math.nan, "x"]], ["model", "size", "score", "?"]
    )
    assert text.splitlines() == [
        "model   size  score  ?",
        "-----  -----  -----  -",
        "host   1,200   91.5  -",
        "grown  1,850      -  x",
    ]
    with pytest.raises(ValueError, match="2 cells"):
        table([["host"]], ["model", "score"])


def test_a_slot_planted_again_is_a_new_life_and_milestones_are_dated():
    first, second = life_of_a_seed(40, born=2, kept=False), life_of_a_seed(60, born=35)
    both = [e for e in first if 0 < e.epoch < 34] + [e for e in second if e.epoch >= 34]
    found = lives(both)
    assert [(life.born, life.pruned, life.kept) for life in found] == [(2, 20, None), (35, None, 53)]
    assert found[0].end == 34
    assert found[0].contribution == 1.4  # as last measured before it was pruned
    pieces = found[1].spans(60)
    assert pieces[0][0] == 34.5
    assert pieces[-1][1] == 60.5
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("grown", ["seed", "none", "one epoch", "nan"])
def test_a_figure_is_drawn_from_a_log_with_any_number_of_seeds(tmp_path, grown, suffix):
    pytest.importorskip("matplotlib")
    host = [events.epoch(e, e, train_loss=1.0, loss=1 / e, score=80 + e / 10) for e in range(1, 61)]
    nothing = [events.epoch(e, e, train_loss=math.nan, loss=math.inf, score=math.nan) for e in range(1, 9)]
    run = {"seed": life_of_a_seed(), "none": host, "one epoch": host[:1], "nan": nothing}[grown]
    with JsonlSink(tmp_path / "events.jsonl") as sink:
        for event in run:
            sink.emit(event)
    path = training_figure(
        sink.path, tmp_path / "out" / f"figure.{suffix}", host_events=host if grown == "seed" else None
    )
    assert path.stat().st_size > 8_000
    if suffix == "png":
        from matplotlib.image import imread

        pixels = imread(path)
        assert pixels.shape[1] == 1200
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50


def test_a_figure_of_no_epochs_says_what_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="holds no epoch event"):
        training_figure([events.run_started(3)], tmp_path / "figure.png")


def test_a_figure_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r'pip install "esper_jax\[plot\]"'):
        training_figure(life_of_a_seed(), tmp_path / "figure.png")


def test_nissa_is_imported_without_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import esper_jax.nissa; print('imported')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "imported"
