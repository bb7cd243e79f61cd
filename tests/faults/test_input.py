"""Hostile options and configuration files end in one sentence and status 2, and never in a traceback or a run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pathlib
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_jax import Decision, cli
from esper_jax.experiment import BASELINE
from esper_jax.options import CONFIG, Train, read_config, write_config
from esper_jax.tasks import get_task
from esper_jax.tolaria.asking import Asking, ControllerError
from tests.faults.disk import full_disk
from tests.faults.found import examples

NAMES = [field.name for field in dataclasses.fields(Train)]
TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=20)
NUMBERS = st.sampled_from(["-1", "0", "1e400", "nan", "-inf", "99999999999999999999", "0x10", "1.5", "", " 3 ", "٣"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)


def config(**given: object) -> bytes:
    """A configuration file of the defaults, with these options."""
    return json.dumps({**dataclasses.asdict(Train()), **given}).encode()


class Passed(Exception):
    """All options are such that a run could begin."""


def ended(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> tuple[int, str]:
    """The exit status and what was said of a command that would train; 0 where it would have begun."""

    def begin(options: Train) -> None:
        options.check()
        get_task(options.task)
        raise Passed

    said = io.StringIO()
    with monkeypatch.context() as patched, contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        patched.setattr(cli, "run", begin)
        try:
            cli.main(["train", *arguments])
        except Passed:
            return 0, ""
        except SystemExit as stop:
            return int(stop.code or 0), said.getvalue()
    raise AssertionError("the command came back")


@settings(max_examples=examples(60), deadline=None)
@given(name=st.sampled_from([n for n in NAMES if n != "resume"]), value=TEXT | NUMBERS)
def test_any_value_of_any_option_is_taken_or_refused_in_a_sentence(name, value):
    status, said = ended(pytest.MonkeyPatch(), [f"--{name.replace('_', '-')}={value}"])
    assert status in (0, 2)
    if status:
        lines = said.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("esper-jax: ") and "Traceback" not in said, said


@settings(max_examples=examples(80), deadline=None)
@given(name=st.sampled_from(NAMES) | TEXT, value=JSON)
def test_any_value_in_a_configuration_file_is_taken_or_refused_in_a_sentence(tmp_path_factory, name, value):
    directory = tmp_path_factory.mktemp("run")
    write_config(Train(), directory)
    data = json.loads((directory / CONFIG).read_text())
    data[name] = value
    (directory / CONFIG).write_text(json.dumps(data))
    status, said = ended(pytest.MonkeyPatch(), ["--resume", str(directory)])
    assert status in (0, 2) and "Traceback" not in said
    if status:
        assert said.startswith("esper-jax: ") and len(said.strip().splitlines()) == 1, said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "holds a list and no options"),
        (b'{"colour": 1}', "has the option 'colour', which this esper-jax does not know"),
        (b'{"epochs": "many"}', "has epochs = 'many', which cannot be"),
        (b'{"seed": true}', "has seed = True, which cannot be"),
        (b'{"epochs": 3}', "config.json lacks task, seed, "),
        (config(epochs=-3), "--epochs must be 1 or more"),
        (config(task="no such task"), "no such task"),
    ],
)
def test_a_configuration_file_that_is_none_says_what_is_wrong(content, words, tmp_path, monkeypatch):
    (tmp_path / CONFIG).write_bytes(content)
    status, said = ended(monkeypatch, ["--resume", str(tmp_path)])
    assert status == 2 and words in said


def test_what_is_written_is_read_back(tmp_path):
    options = Train(blueprints=("lora",), learning_rate=0.1, sharding="dp", compile_cache=pathlib.Path("programs"))
    write_config(options, tmp_path)
    back = read_config(tmp_path)
    assert dataclasses.replace(back, run_dir=None, resume=None) == options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-rollbacks", "-1"], "--max-rollbacks must be 0 or more, got -1"),
        (["--coordinator", "localhost:1"], "need --distributed"),
        (["--sharding", "ddp"], "sharding"),
    ],
)
def test_options_of_devices_and_rollbacks_are_checked_before_anything_is_written(arguments, words, monkeypatch):
    status, said = ended(monkeypatch, arguments)
    assert status == 2 and words in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("localhost:1", 2, None), "belong together"),
        (("localhost:1", 2, 2), "must be from 0 to 1"),
        (("localhost", 2, 0), "must be host:port"),
        (("", 2, 0), "must be host:port"),
        ((":99", 2, 0), "must be host:port"),
        (("localhost:99999", 2, 0), "from 1 to 65535"),
        (("localhost:1", 0, 0), "--processes must be 1 or more"),
        ((None, None, None), "could not join a job"),
    ],
)
def test_a_process_that_cannot_join_a_job_says_why(given, words):
    from esper_jax.tolaria import peers

    with pytest.raises(ValueError, match=words):
        peers.join(*given)


def test_a_run_that_keeps_diverging_ends_with_a_report_and_status_1(tmp_path, monkeypatch, capsys):
    """Each rollback with its reason, where the run is, and the command that allows more."""
    from esper_jax.nissa import JsonlSink, events
    from esper_jax.tolaria import TrainingDiverged

    with JsonlSink(tmp_path / "events.jsonl") as log:
        for epoch in (3, 5):
            told = {"to_step": 16, "rule": "non-finite", "pruned": []}
            log.emit(events.rollback(epoch, epoch * 8, reason="the training loss is nan", **told))

    def diverges(options: Train) -> None:
        error = TrainingDiverged("training was rolled back 2 times (max_rollbacks=1)")
        error.directory = tmp_path
        raise error

    monkeypatch.setattr(cli, "run", diverges)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train"])
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1
    assert said == [
        "esper-jax: training was rolled back 2 times (max_rollbacks=1)",
        "  epoch 3, back to step 16: the training loss is nan",
        "  epoch 5, back to step 16: the training loss is nan",
        f"run directory: {tmp_path}",
        f"allow more with: esper-jax train --resume {tmp_path} --max-rollbacks N",
    ]


def test_a_run_that_ends_while_its_host_trains_alone_is_resumed_as_a_whole(tmp_path, monkeypatch, capsys):
    """The command that is printed names the run, not the folder of the comparison in it."""
    from esper_jax.tolaria import TrainingDiverged, TrainingInterrupted

    (tmp_path / "run" / BASELINE).mkdir(parents=True)
    (tmp_path / "run" / BASELINE / "events.jsonl").write_text("")
    write_config(Train(run_dir=tmp_path / "run"), tmp_path / "run")
    diverged = TrainingDiverged("training was rolled back 11 times")
    diverged.directory = tmp_path / "run" / BASELINE
    for error in (TrainingInterrupted("stopped", None, tmp_path / "run" / BASELINE, 15), diverged):
        monkeypatch.setattr(cli, "run", lambda options, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(SystemExit):
            cli.main(["train"])
        said = capsys.readouterr().err
        assert f"--resume {tmp_path / 'run'}" in said and BASELINE not in said
    (tmp_path / "run" / CONFIG).unlink()
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert f"--resume {tmp_path / 'run' / BASELINE}" in capsys.readouterr().err, "a run that is merely called so"


@pytest.mark.parametrize(
    ("given", "rollbacks"), [((), 3), (("--max-rollbacks", "10"), 10), (("--max-rollbacks=5",), 5)]
)
def test_a_resume_takes_what_is_said_even_where_it_is_the_default(tmp_path, monkeypatch, given, rollbacks):
    write_config(Train(run_dir=tmp_path / "run", max_rollbacks=3), tmp_path / "run")
    seen = []

    def stop(options: Train) -> None:
        seen.append(options)
        raise Passed

    monkeypatch.setattr(cli, "run", stop)
    with pytest.raises(Passed):
        cli.main(["train", "--resume", str(tmp_path / "run"), *given])
    assert Train().max_rollbacks == 10 and seen[0].max_rollbacks == rollbacks


@pytest.mark.parametrize(
    "given",
    [
        *[("--seed", "9" * 20), ("--seed", "-1"), ("--learning-rate", "inf"), ("--learning-rate", "nan")],
        *[("--learning-rate", "1e300"), ("--service-lag", "-1"), ("--epochs", "9" * 12), ("--tempo", "9" * 12)],
    ],
)
def test_numbers_that_nothing_can_be_trained_with_are_refused(given, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *given])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and given[0] in said and "Traceback" not in said


@pytest.mark.parametrize("junk", [None, [None], "prune", [{"action": "prune"}], 3])
def test_a_controller_that_gives_no_decisions_decides_nothing(junk):
    """The run goes on as if nobody had been asked, and a warning says what came."""
    from tests.tolaria import growing

    class Junk:
        def init(self, spec, key):
            return 0

        def decide(self, state, report, feedback):
            return junk, state

    made = growing.trainer(None, controller=Junk())
    _, history = made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=2)
    told = [event.message for event in history.events if event.kind == "warning"]
    assert len(told) == 2 and all(f"gave {junk!r} where a sequence of Decision is expected" in text for text in told)


def test_an_option_that_a_configuration_lacks_is_named(tmp_path):
    """Its default may not be what the run had."""
    write_config(Train(batch_size=32), tmp_path)
    data = json.loads((tmp_path / CONFIG).read_text())
    del data["batch_size"], data["seed"]
    (tmp_path / CONFIG).write_text(json.dumps(data))
    with pytest.raises(ValueError, match="config.json lacks seed, batch_size; restore it from a copy"):
        read_config(tmp_path)


def test_a_configuration_is_written_whole_or_not_at_all_and_once(tmp_path):
    with full_disk(100), pytest.raises(ValueError, match="cannot write to the run directory .*File too large"):
        write_config(Train(), tmp_path)
    assert not list(tmp_path.iterdir())
    write_config(Train(), tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        write_config(Train(seed=1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG] and read_config(tmp_path).seed == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"site": []}, "site=[]"),
        ({"action": None}, "action=None"),
        ({"slot": "x"}, "slot='x'"),
        ({"slot": [0]}, "slot=[0]"),
        ({"blueprint": 3}, "blueprint=3"),
        ({"config": 5}, "config=5"),
        ({"config": {"rank": object()}}, "what cannot be kept: decision.config['rank'] is a object"),
        ({"alpha": object()}, "what cannot be kept: decision.alpha is a object"),
        ({"steps": "x"}, "steps='x'"),
        ({"reason": b"x"}, "reason=b'x'"),
        ({"stored": 7}, "stored=7"),
    ],
)
def test_a_decision_of_other_kinds_of_values_is_told_and_left_out(given, words):
    """What else was decided, and the controller's state, are kept."""
    good = Decision("prune", "Dense_0", np.int32(0), confidence="sure")  # this is for the veto to refuse

    class Odd:
        def init(self, spec, key):
            return 0

        def decide(self, state, report, feedback):
            odd = Decision(**{"action": "germinate", "site": "Dense_0", "blueprint": "lora", **given})
            return (odd, good), state + 1

    ask = Asking()
    assert ask(Odd(), 0, None, ()) == ([good], 1)
    (told,) = ask.complaints
    assert told.startswith(f"the controller gave a decision with {words}") and told.endswith("; it is left out")


def test_a_controller_that_is_late_writes_into_a_state_of_its_own():
    """It may have its state written over at any time, and what is saved and given back is not to change with it."""
    kept, late = np.zeros(2), threading.Event()

    class Late:
        def decide(self, state, report, feedback):
            late.wait(30)
            state += 1
            late.clear()
            return (), state

    with pytest.raises(ControllerError, match="did not answer within"):
        Asking(0.05)(Late(), kept, None, ())
    late.set()
    while late.is_set():
        time.sleep(0.01)
    assert kept.tolist() == [0, 0]


@pytest.mark.parametrize(
    "junk", [ValueError("no idea"), None, [None], [Decision("germinate", "nowhere", None, "lora")]]
)
def test_candidates_that_make_no_sense_cost_a_guess_and_nothing_else(junk):
    """They are only asked for to compile ahead; the same complaint is made once."""
    from tests.tolaria import growing

    class Guessing:
        def init(self, spec, key):
            return 0

        def decide(self, state, report, feedback):
            return (), state

        def candidates(self, state, report):
            if isinstance(junk, Exception):
                raise junk
            return junk

    made = growing.trainer(None, controller=Guessing(), prefetch=1)
    _, history = made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=3)
    (told,) = [event.message for event in history.events if event.kind == "warning"]
    assert "the controller's candidates cannot be used, so nothing is compiled ahead" in told
