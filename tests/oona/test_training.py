"""Training with the bus: the same bits with it, without it, and with a server that dies; and every event on it."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from esper_jax import FixedSchedule, Gates, Lifecycle, Tolaria
from esper_jax.nissa import Event, course, read_events
from esper_jax.nissa.sinks import rewound
from esper_jax.oona import Address, MemoryBus, OonaError, Reader, RedisBus
from tests.servers import RedisServer, free_port, needs_redis

EPOCHS = 10
X = np.random.default_rng(0).normal(size=(128, 3)).astype(np.float32)
DATA = X, (X[:, 0] * X[:, 1] > 0).astype(np.int32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2)(nn.relu(nn.Dense(3)(x)))


class At:
    """A sink that does something at the end of an epoch, in the middle of training."""

    def __init__(self, **actions: Any) -> None:
        self.actions = {int(name.removeprefix("epoch")): action for name, action in actions.items()}

    def emit(self, event: Event) -> None:
        if event.kind == "epoch" and event.epoch in self.actions:
            self.actions[event.epoch]()

    def close(self) -> None:
        """Nothing."""


STEP: dict[str, Any] = {}


def trainer(directory: str | os.PathLike[str] | None = None, **options: Any) -> Tolaria:
    """A trainer that germinates an mlp seed at epoch 2 and blends it; all share one compiled step."""
    gates = Gates(min_training_ticks=1, min_health=0.1)
    schedule = FixedSchedule({2: [("Dense_0", "mlp", {"hidden": 4})]}, gates=gates, keep="always")
    tx = STEP.setdefault("tx", optax.adam(3e-2))
    made = Tolaria(
        Net(),
        optax.softmax_cross_entropy_with_integer_labels,
        tx,
        controller=schedule,
        lifecycle=Lifecycle(gates, tempo=3),
        checkpoint_dir=directory,
        checkpoint_every=5,
        batch_size=32,
        progress=False,
        **options,
    )
    for name in ("_step", "_evaluator"):
        setattr(made, name, STEP.setdefault(name, getattr(made, name)))
    made._ticker.evaluator, made._ticker.tx = made._evaluator, STEP.setdefault("growable", made.tx)
    made.tx = STEP["growable"]
    return made


def fitted(made: Tolaria, epochs: int = EPOCHS):
    state = made.init(Net().init(jax.random.key(0), X[:1]), key=jax.random.key(1))
    return made.fit(state, DATA, DATA, epochs=epochs)


def bits(state) -> list[bytes]:
    state = state.replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def lines(found) -> list[str]:
    """Events in their written form: a NaN equals a NaN."""
    return [event.to_json() for event in found]


@pytest.fixture(scope="module")
def alone():
    """The run with nothing configured: the bus inside the process."""
    made = trainer()
    assert isinstance(made.bus, MemoryBus)
    with warnings.catch_warnings(action="error", category=RuntimeWarning):
        state, history = fitted(made)
    return state, history, made.bus


def test_without_a_server_the_bus_is_in_the_process_and_has_every_event(alone):
    _, history, bus = alone
    assert lines(message.event for message in bus.read(count=10_000)) == lines(history.events)
    assert "FOSSILIZED" in {row["stage"] for row in history.records[-1]["seeds"]}


@needs_redis
def test_the_bits_are_those_of_a_run_without_a_bus_and_every_event_is_on_it(alone, server, tmp_path):
    made = trainer(tmp_path / "my run", oona=server.url)
    state, history = fitted(made)
    assert bits(state) == bits(alone[0])
    assert course(history.events) == course(alone[1].events)
    assert made.bus.run.startswith("my-run-")
    messages = Reader(server.url).read(10_000)
    assert [message.id for message in messages] == made.bus.ids()
    written = read_events(tmp_path / "my run/events.jsonl")
    assert lines(message.event for message in messages) == lines(history.events) == lines(written)


@needs_redis
def test_a_server_that_dies_and_comes_back_changes_no_bit_and_misses_no_event(alone, tmp_path):
    with RedisServer() as server:
        bus_is_back = threading.Event()

        def come_back() -> None:
            while not made.bus.outages:  # it is noticed on the next attempt to send
                time.sleep(0.01)
            server.restart()
            bus_is_back.set()

        at = At(epoch3=server.kill, epoch7=come_back)
        made = trainer(tmp_path, oona=Address(server.url, timeout=1.0), sinks=[at])
        with warnings.catch_warnings(record=True, action="always") as said:
            state, history = fitted(made)
        assert bus_is_back.is_set()
        told = [str(one.message) for one in said if one.category is RuntimeWarning]
        assert len(told) == 1 and "fails (ConnectionError" in told[0] and "events wait on disk" in told[0]
        assert bits(state) == bits(alone[0])
        assert course(history.events) == course(alone[1].events)
        assert [event.kind for event in history.events].count("outage") == 1
        ids = [entry["id"] for _, entry in server.client().xrange(made.bus.address.stream)]
        assert ids == made.bus.ids() and len(ids) >= len(alone[1].events)


@needs_redis
def test_a_server_that_stays_away_changes_no_bit_and_its_events_are_on_disk(alone, tmp_path):
    with RedisServer() as server:
        made = trainer(tmp_path, oona=server.url, sinks=[At(epoch3=server.kill)])
        with warnings.catch_warnings(record=True, action="always") as said:
            state, history = fitted(made)
        told = [str(one.message) for one in said if one.category is RuntimeWarning]
        assert len(told) == 2 and "events wait on disk" in told[0] and "were not delivered" in told[1]
        assert bits(state) == bits(alone[0])
        assert history.events[-1].kind == "warning" and "were not delivered" in history.events[-1].message
        on_disk = [event for path in (tmp_path / "oona").glob("*.jsonl") for event in read_events(path)]
        assert lines(on_disk) == lines(history.events[: len(on_disk)]) and len(on_disk) == len(made.bus.ids())
        server.restart()
        resumed = trainer(tmp_path, oona=server.url)
        resumed.fit(resumed.restore(), DATA, DATA, epochs=EPOCHS)
        ids = [entry["id"] for _, entry in server.client().xrange(resumed.bus.address.stream)]
        assert ids == resumed.bus.ids() and ids[: len(made.bus.ids())] == made.bus.ids()


@needs_redis
@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_is_one_stream_that_reads_as_if_nothing_had_happened(alone, server, tmp_path):
    command = [sys.executable, "-m", "tests.oona.test_training", server.url, str(tmp_path / "run")]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    made = trainer(tmp_path / "run", oona=server.url)
    state, _ = made.fit(made.restore(), DATA, DATA, epochs=EPOCHS)
    assert bits(state) == bits(alone[0])
    found = Reader(server.url).read(10_000)
    assert [message.id for message in found] == made.bus.ids()
    assert [message.event.kind for message in found].count("run_started") == 1
    read: list[Event] = []
    for message in found:
        if message.event.kind == "resumed":
            read = rewound(read, message.event.step)
        read.append(message.event)
    assert course(read) == course(alone[1].events)
    assert lines(read) == lines(read_events(tmp_path / "run/events.jsonl"))


def test_a_server_that_cannot_be_reached_is_an_error_before_the_first_step(tmp_path):
    pytest.importorskip("redis")
    url = f"redis://127.0.0.1:{free_port()}/0"
    with pytest.raises(OonaError, match=r"does not answer.*oona_optional=True"):
        fitted(trainer(tmp_path / "run", oona=url))
    assert not (tmp_path / "run/oona").exists()


def test_an_optional_server_that_cannot_be_reached_is_one_warning(alone, tmp_path):
    pytest.importorskip("redis")
    url = f"redis://127.0.0.1:{free_port()}/0"
    with warnings.catch_warnings(record=True, action="always") as said:
        state, _ = fitted(trainer(tmp_path, oona=url, oona_optional=True))
    told = [str(one.message) for one in said if one.category is RuntimeWarning]
    assert len(told) == 2 and "fails (ConnectionError" in told[0] and "were not delivered" in told[1]
    assert bits(state) == bits(alone[0])


def test_a_missing_package_is_an_error_when_the_trainer_is_made(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(OonaError, match=r'needs the package redis.*pip install "esper_jax\[redis\]"'):
        trainer(oona="redis://localhost/0")
    with pytest.raises(ValueError, match="oona must be a URL"):
        trainer(oona="localhost")
    assert isinstance(trainer().bus, MemoryBus)


@needs_redis
def test_a_server_that_refuses_every_write_never_reaches_the_training(server, tmp_path, alone):
    """A key of the stream's name that is no stream: every write is refused, for good."""
    server.client().set("esper:run:r", "mine")
    with warnings.catch_warnings(record=True, action="always") as said:
        state, _ = fitted(trainer(tmp_path, oona=Address(server.url, "r")))
    told = [str(one.message) for one in said if one.category is RuntimeWarning]
    assert len(told) == 2 and "WRONGTYPE" in told[0] and "were not delivered" in told[1]
    assert bits(state) == bits(alone[0])
    assert server.client().get("esper:run:r") == "mine"
    assert isinstance(trainer(oona=server.url).bus, RedisBus)


if __name__ == "__main__":
    die = At(epoch8=lambda: os.kill(os.getpid(), signal.SIGKILL))
    fitted(trainer(sys.argv[2], oona=sys.argv[1], sinks=[die]))
