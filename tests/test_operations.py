"""Everything at once: three real processes train, carry events and decide; two of them die on the way and come back."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest

from esper_jax import Decision, Gates, Lifecycle, Stage, Tolaria, Urza, cli, growable, restore_morph, seed_of
from esper_jax.nissa import Event, read_events
from esper_jax.nissa.event import DROPPABLE
from esper_jax.oona import Reader
from esper_jax.tamiyo import MockController
from esper_jax.tasks import get_task

from .servers import RedisServer, needs_redis
from .services import ROOT, Service

pytestmark = [pytest.mark.slow, needs_redis]

TOKEN = "a-token-for-this-test"
EPOCHS = 70
SITE, SLOT = "Dense_0", 0
PLAN = {4: [(SITE, "mlp", {"hidden": 8})]}
GATES = ["gates.min_training_ticks=2", "keep=always", "tempo=3"]


class Training:
    """`esper-jax train` in a process of its own, which can be held still while the test does something."""

    def __init__(self, directory: pathlib.Path, service: Service, redis: RedisServer) -> None:
        self.log = directory / "events.jsonl"
        options = ["--task", "digits", "--epochs", str(EPOCHS), "--training-ticks", "2", "--tempo", "3", "--quiet"]
        options += ["--where", "Dense", "--batch-size", "128", "--no-baseline", "--no-figure"]
        options += ["--service", service.url, "--oona", redis.url, "--run-dir", str(directory)]
        environment = {**os.environ, "ESPER_TAMIYO_TOKEN": TOKEN, "JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-m", "esper_jax", "train", *options],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=pipe,
            stderr=pipe,
        )

    def until(self, reached: Callable[[list[Event]], bool], seconds: float = 300) -> list[Event]:
        """Wait until the log says so; AssertionError where the run ends before, or does not get there."""
        deadline = time.monotonic() + seconds
        events: list[Event] = []
        while time.monotonic() < deadline:
            over = self.process.poll() is not None
            events = read_events(self.log) if self.log.is_file() else []
            if reached(events):
                return events
            if over:
                break
            time.sleep(0.005)
        raise AssertionError(f"it did not come to that; the last event is {events[-1:]}; {self.process.poll()=}")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The process stands still meanwhile."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def end(self) -> str:
        """What it printed, once it has ended well."""
        printed, errors = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, errors
        return printed


def services(events: list[Event], kind: str) -> list[str]:
    """Which services such events are about, in order: "controller" or "bus"."""
    told = [event.data["service"] for event in events if event.kind == kind]
    return ["controller" if name.startswith("the controller at") else "bus" for name in told]


@pytest.fixture
def esper(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`esper-jax` with these words, on a terminal of 80 columns: what it prints."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*words: str) -> str:
        capsys.readouterr()
        cli.main(words)
        return capsys.readouterr().out

    return call


def test_a_run_outlives_its_services_and_what_it_grew_grows_again_in_another(
    tmp_path: pathlib.Path, esper: Callable[..., str]
) -> None:
    directory = tmp_path / "first"
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(RedisServer(durable=True))
        service = Service("--controller", "fixed", "--set", f"plan={json.dumps(PLAN)}", *GATES, token=TOKEN)
        stack.callback(service.stop)
        training = Training(directory, service, redis)
        stack.callback(training.process.kill)

        training.until(_sprouted)
        with training.held():  # in the middle of the run: look at it, and take both services away
            seen = esper("watch", redis.url, "--once")
            assert max(map(len, seen.splitlines())) <= 80, seen
            for shown in (SITE, "mlp", "TRAINING", "decisions", "the plan germinates mlp", "running"):
                assert shown.lower() in seen.lower(), seen
            service.kill()
            redis.kill()
        training.until(lambda events: set(services(events, "outage")) == {"controller", "bus"})
        with training.held():
            service.start()
            redis.restart()
        printed = training.end()
        assert "grown" in printed

        events = read_events(directory / "events.jsonl")
        _each_outage_was_told_once_and_ended(events)
        stages = [event.data["after"] for event in events if event.kind == "stage"]
        assert stages == ["GERMINATED", "TRAINING", "BLENDING", "HOLDING", "FOSSILIZED"]
        assert [event.epoch for event in events if event.kind == "epoch"] == list(range(1, EPOCHS + 1))
        _nothing_was_lost(events, redis)
        assert "FOSSILIZED" in esper("watch", redis.url, "--once").upper()
    assert "FOSSILIZED" in esper("watch", str(directory), "--once").upper()  # from the directory alone

    library = tmp_path / "library"
    seed = _stored(directory, library)
    listed = esper("urza", "list", str(library))
    assert seed[:8] in listed and "mlp" in listed
    _grows_again(tmp_path / "second", library, seed)


def _sprouted(events: list[Event]) -> bool:
    """A seed has germinated, more than an epoch ago."""
    born = [event.epoch for event in events if event.kind == "germinated"]
    return bool(born) and events[-1].epoch > born[0] + 1


def _each_outage_was_told_once_and_ended(events: list[Event]) -> None:
    """Of each service outages and recoveries take turns."""
    told = {
        name: [e.kind for e in events if e.kind in ("outage", "recovery") and services([e], e.kind) == [name]]
        for name in ("bus", "controller")
    }
    assert told["bus"] == ["outage", "recovery"]
    # Where the machine is busy, a short epoch may be over before the controller answers: also the last one.
    assert told["controller"] == (["outage", "recovery"] * EPOCHS)[: len(told["controller"])]
    assert len(told["controller"]) >= 2


def _nothing_was_lost(events: list[Event], redis: RedisServer) -> None:
    """On the bus is all that is in the log but metrics, in order, and no id twice."""
    reader = Reader(redis.url)
    messages = []
    while found := reader.read(500):
        messages += found
    reader.close()
    assert reader.duplicates == 0 and reader.skipped == 0
    assert max(Counter(message.id for message in messages).values()) == 1
    kept = [event.to_json() for event in events if event.kind not in DROPPABLE]
    delivered = [message.event.to_json() for message in messages if message.event.kind not in DROPPABLE]
    assert delivered == kept


def _stored(directory: pathlib.Path, library: pathlib.Path) -> str:
    """The fossil's id in a library that has nothing else."""
    fossil = seed_of(restore_morph(directory), SITE, SLOT)
    return Urza(str(library)).put(fossil, provenance={"run": "first"}, measure=False)


def _grows_again(directory: pathlib.Path, library: pathlib.Path, seed: str) -> None:
    """A second run germinates the stored seed by a decision that names it, bits and all, and trains it."""
    task = get_task("digits")
    variables: dict[str, Any] = dict(task.model.init(jax.random.key(7), task.example))
    script = {1: [Decision("germinate", SITE, stored=seed, reason="it served another run well")]}
    trainer = Tolaria(
        task.model,
        task.loss,
        growable(optax.adamw(3e-3)),
        controller=MockController(script),
        urza=Urza(str(library)),
        score=task.score,
        checkpoint_dir=directory,
        where="Dense",
        batch_size=128,
        lifecycle=Lifecycle(Gates(min_training_ticks=2), tempo=3),
        progress=False,
    )
    state = trainer.init(variables, key=jax.random.key(8))
    state, history = trainer.fit(state, task.train, task.validation, epochs=1)
    stored = Urza(str(library)).get(seed)
    planted = jax.tree.leaves(state.morph.seeds[SITE][f"slot_{SLOT}"])
    for mine, theirs in zip(planted, jax.tree.leaves(stored.params), strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()
    (decision,) = history.of_kind("decision")
    assert decision.data["outcome"] == "applied" and decision.data["stored"] == seed
    state, _ = trainer.fit(state, task.train, task.validation, epochs=3)
    assert Stage(int(state.morph.state[SITE].stage[SLOT])) >= Stage.TRAINING
    assert any(
        (np.asarray(mine) != np.asarray(theirs)).any()
        for mine, theirs in zip(jax.tree.leaves(state.morph.seeds[SITE]), planted, strict=True)
    )
