"""One schema: what is declared, what the constructors make, and what a real run writes are the same."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import pytest

from esper_jax.nissa import METRICS, Event, JsonlSink, Kind, ListSink, events, read_events, samples, schema
from esper_jax.nissa.schema import DATA
from tests.oona import test_training as small

jsonschema = pytest.importorskip("jsonschema")
STRICT = jsonschema.Draft202012Validator(schema(strict=True))
OPEN = jsonschema.Draft202012Validator(schema())


class Complaining(ListSink):
    """A sink that has something of every kind to say itself."""

    def notices(self) -> list[Event]:
        if any(event.kind == "outage" for event in self.events):
            return []
        return [
            events.outage(1, 4, service="it", error="refused"),
            events.recovery(1, 4, service="it", seconds=0.5, replayed=3),
            events.dropped(1, 4, service="it", dropped=1, total=2),
        ]


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[str]:
    """What a run that germinates, blends, fossilises, refuses, saves and resumes really writes."""
    directory = tmp_path_factory.mktemp("run")
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        small.fitted(small.trainer(directory, sinks=[Complaining()]), epochs=6)
    made = small.trainer(directory)
    made.fit(made.restore(), small.DATA, small.DATA, epochs=10)
    return (directory / "events.jsonl").read_text().splitlines()


def test_every_line_of_a_real_run_passes_the_strict_schema(lines):
    for line in lines:
        STRICT.validate(json.loads(line))
    kinds = {json.loads(line)["kind"] for line in lines}
    assert kinds >= {
        "run_started",
        "epoch",
        "stage",
        "decision",
        "feedback",
        "germinated",
        "contribution",
        "snapshot",
        "checkpoint",
        "resumed",
        "outage",
        "recovery",
        "dropped",
        "run_ended",
    }


def test_every_kind_has_a_type_and_the_schema_is_itself_valid():
    assert set(DATA) == set(Kind)
    for made in (schema(), schema(strict=True)):
        jsonschema.Draft202012Validator.check_schema(made)
        assert json.loads(json.dumps(made)) == made


def changed(line: str, **fields) -> dict:
    record = json.loads(line)
    data = {**record["data"], **fields.pop("data", {})}
    return {**record, **fields, "data": data}


def test_what_is_not_so_written_is_refused(lines):
    stage = next(line for line in lines if json.loads(line)["kind"] == "stage")
    for wrong in (
        changed(stage, v=2),
        changed(stage, epoch="3"),
        changed(stage, data={"after": "FLOWERING"}),
        changed(stage, data={"slot": "0"}),
        changed(stage, data={"alpha": "high"}),
        changed(stage, more=1),
        {name: value for name, value in json.loads(stage).items() if name != "time"},
    ):
        assert not STRICT.is_valid(wrong) and not OPEN.is_valid(wrong), wrong


def test_readers_let_additions_through_and_the_strict_form_does_not(lines):
    added = changed(lines[1], data={"mine": 3})
    own = changed(lines[1], kind="my_kind")
    for record in (added, own):
        assert OPEN.is_valid(record) and not STRICT.is_valid(record)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.5, 3])
def test_every_float_there_is_can_be_written_and_is_valid(value):
    event = events.epoch(1, 2, train_loss=value, loss=value, score=value)
    STRICT.validate(json.loads(event.to_json()))


def test_metrics_are_the_measured_fields_of_a_real_epoch(lines):
    epochs = [Event.from_json(line) for line in lines if json.loads(line)["kind"] == "epoch"]
    found = {sample.metric.name for event in epochs for sample in samples(event)}
    assert found >= {"train_loss", "loss", "score", "seconds", "seed_alpha", "seed_health", "seed_contribution"}
    assert found >= {"site_gain", "site_variance", "site_dead"}
    last = next(event for event in reversed(epochs) if event.data["seeds"])
    seed = last.data["seeds"][0]
    path = f"seed_alpha/{seed['site']}/{seed['slot']}/{seed['blueprint']}"
    assert {sample.path: sample.value for sample in samples(last)}[path] == seed["alpha"]
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_a_metric_that_was_not_measured_is_left_out():
    event = events.epoch(1, 2, train_loss=math.nan, loss=1.0, score=math.inf)
    assert [sample.metric.name for sample in samples(event)] == ["loss"]
    assert samples(dataclasses.replace(event, kind="warning")) == []


def test_reading_back_gives_the_events_that_were_emitted(lines, tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    assert [event.to_json() for event in read_events(path)] == lines
    with JsonlSink(tmp_path / "again.jsonl") as sink:
        for event in read_events(path):
            sink.emit(dataclasses.replace(event))  # written anew
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()
