"""TensorBoard, Prometheus and W&B: what a run shows there is what its events say."""

from __future__ import annotations

import json
import sys
import urllib.request

import pytest

from esper_jax.nissa import Background, Event, PrometheusSink, TensorBoardSink, WandbSink, events
from esper_jax.protocol import Decision

SITE = "block_0/Dense_1"


def run() -> list[Event]:
    """A short run with one seed that is pruned at the end."""
    where = {"site": SITE, "slot": 0, "blueprint": "lora"}
    row = {**where, "stage": "BLENDING", "alpha": 0.25, "health": 0.9, "contribution": float("nan")}
    choice = Decision("germinate", SITE, 0, "lora", reason="a plateau")
    sites = {SITE: {"gain": 0.5, "dead": 0.0, "variance": 2.0}}
    return [
        events.run_started(2, task="digits"),
        events.decision(1, 10, choice, outcome="applied"),
        events.germinated(1, 10, **where, reason="a plateau", parameters=64),
        events.epoch(1, 10, train_loss=1.5, loss=1.25, score=80.0, seconds=0.5, seeds=[row], sites=sites),
        events.stage(2, 20, **where, before="BLENDING", after="PRUNED", reason="it harms"),
        events.epoch(2, 20, train_loss=1.0, loss=1.125, score=82.5, seconds=0.5, sites=sites),
        events.run_ended(2, 20, score=82.5),
    ]


def give(sink) -> None:
    with Background(sink) as background:
        background.open()
        for event in run():
            background.emit(event)


def test_tensorboard_has_every_number_by_step_and_every_reason(tmp_path):
    pytest.importorskip("tensorboardX")
    sink = TensorBoardSink(tmp_path)
    give(sink)
    scalars, texts = tensorboard(tmp_path)
    assert scalars["score"] == {10: 80.0, 20: 82.5}
    assert scalars["train_loss"] == {10: 1.5, 20: 1.0}
    assert scalars[f"seed_alpha/{SITE}/0/lora"] == {10: 0.25}
    assert scalars[f"site_gain/{SITE}"] == {10: 0.5, 20: 0.5}
    assert f"seed_contribution/{SITE}/0/lora" not in scalars  # not measured
    assert any("it harms" in text for text in texts)


def tensorboard(directory) -> tuple[dict[str, dict[int, float]], list[str]]:
    """Scalars and texts of the written files, by the format itself: length, checksum, protobuf, checksum."""
    from tensorboardX.proto.event_pb2 import Event as Record

    scalars: dict[str, dict[int, float]] = {}
    texts: list[str] = []
    for path in sorted(directory.glob("events.out.tfevents*")):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            record = Record.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            for value in record.summary.value:
                if value.HasField("tensor"):
                    texts += [text.decode() for text in value.tensor.string_val]
                else:
                    scalars.setdefault(value.tag, {})[record.step] = value.simple_value
    return scalars, texts


def test_prometheus_serves_the_newest_numbers_and_forgets_seeds_that_are_gone():
    pytest.importorskip("prometheus_client")
    sink = PrometheusSink(port=0)
    sink.open()
    try:
        for event in run()[:4]:
            sink.emit(event)
        page = fetch(sink.url)
        seed = f'{{blueprint="lora",site="{SITE}",slot="0"}}'
        assert "esper_score 80.0" in page
        assert f"esper_seed_alpha{seed} 0.25" in page
        assert f'esper_site_gain{{site="{SITE}"}} 0.5' in page
        assert 'esper_decisions_total{action="germinate",outcome="applied"} 1.0' in page
        for event in run()[4:]:
            sink.emit(event)
        page = fetch(sink.url)
        assert "esper_score 82.5" in page and "esper_seed_alpha{" not in page
        assert 'esper_transitions_total{stage="PRUNED"} 1.0' in page
        assert 'esper_events_total{kind="epoch"} 2.0' in page
        with pytest.raises(OSError, match="give PrometheusSink another port"):
            PrometheusSink(port=sink.port).open()
    finally:
        sink.close()
    with pytest.raises(OSError, match="refused"):
        fetch(sink.url)
    sink.emit(run()[3])
    assert "esper_score 80.0" in fetch(sink.url)
    sink.close()


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()


def test_wandb_offline_keeps_configuration_numbers_and_events(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    give(WandbSink("growing", directory=tmp_path, mode="offline", id="abc"))
    wandb.teardown()  # its own process writes the file when it ends
    written = next(tmp_path.glob("wandb/offline-run-*/run-abc.wandb")).read_bytes()
    for text in (b"train_loss", f"seed_alpha/{SITE}/0/lora".encode(), b"digits"):
        assert text in written
    table = next(tmp_path.glob("wandb/offline-run-*/files/media/table/events_*.table.json"))
    rows = json.loads(table.read_text())["data"]
    assert [1, 10, "germinated", f"lora germinated at {SITE} slot 0: a plateau"] in rows


class FakeRun:
    """What `wandb.init` answers, as the sink calls it."""

    def __init__(self) -> None:
        self.config, self.summary, self.logged, self.finished = FakeConfig(), {}, [], 0

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        """Accepted."""

    def log(self, data) -> None:
        self.logged.append(data)

    def finish(self) -> None:
        self.finished += 1


class FakeConfig(dict):
    def update(self, data, allow_val_change: bool = False) -> None:
        super().update(data)


class FakeWandb:
    def __init__(self) -> None:
        self.run, self.options = FakeRun(), {}

    def init(self, **options) -> FakeRun:
        self.options = options
        return self.run

    def Table(self, columns, data):
        return {"columns": columns, "data": data}


def test_wandb_is_called_with_the_numbers_of_each_epoch(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    give(WandbSink("growing", mode="offline", name="a"))
    assert fake.options == {"project": "growing", "dir": None, "name": "a", "mode": "offline"}
    assert fake.run.config == {"epochs": 2, "task": "digits"}
    logged = [data for data in fake.run.logged if "score" in data]
    assert [(data["step"], data["score"]) for data in logged] == [(10, 80.0), (20, 82.5)]
    assert logged[0][f"seed_alpha/{SITE}/0/lora"] == 0.25
    assert fake.run.logged[-1]["events"]["data"][0][2] == "run_started"
    assert fake.run.summary == {"outcome": "finished", "score": 82.5} and fake.run.finished == 1


@pytest.mark.parametrize(
    ("module", "make", "command"),
    [
        ("tensorboardX", lambda: TensorBoardSink("x"), r"tensorboardX.*pip install \"esper_jax\[sinks\]\""),
        ("prometheus_client", PrometheusSink, r"prometheus-client.*pip install \"esper_jax\[sinks\]\""),
        ("wandb", lambda: WandbSink("x"), r"wandb.*pip install \"esper_jax\[wandb\]\""),
    ],
)
def test_a_missing_package_is_named_when_the_sink_is_made(module, make, command, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=command):
        make()
