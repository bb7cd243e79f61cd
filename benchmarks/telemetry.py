"""What telemetry costs a training step: no bus, the bus with a real redis-server, the same with the server down, sinks.

Each sample tells one tick's events, as a real run writes them, and then makes the steps of an epoch, so that what the
background threads do falls on the sample of the variant that they belong to.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from common import (
    Column,
    Ratio,
    Report,
    begin,
    interleave,
    noise_floor,
    parser,
    ratio,
    ratio_columns,
    time_columns,
    workload,
)
from common.ports import free_port

import esper_jax
from esper_jax.nissa import Event, Fanout, JsonlSink, ListSink, PrometheusSink, Sink, TensorBoardSink, events
from esper_jax.nissa.background import behind_slow
from esper_jax.oona import Address, Reader, RedisBus
from esper_jax.protocol import Decision, Feedback

TARGET = 1.02
STEP = (
    Column("model", "model"),
    Column("variant", "variant"),
    Column("median", "median step", "time"),
    Column("iqr", "quartiles", "time"),
    Column("p95", "p95", "time"),
    Column("ratio", "ratio", "ratio"),
    Column("interval", "95% interval", "interval"),
    Column("spread", "spread", "ratio"),
    Column("verdict", f"within {TARGET}"),
)
EMIT = (
    Column("variant", "variant"),
    Column("median", "median", "time"),
    Column("p95", "p95", "time"),
    Column("p99", "p99", "time"),
    Column("worst", "worst", "time"),
)
BASE, COPY, DOWN = "list and file", "the same once more", "bus, server down"


def main() -> None:
    """Measure and print."""
    made = parser(__doc__ or "", rounds=200, budget=4.0, models=("mlp", "cnn"))
    made.add_argument("--steps", type=int, default=100, help="train steps between two ticks")
    made.add_argument("--batch", type=int, default=64, help="batch size")
    made.add_argument("--redis", help="URL of a running server; without it, one of our own is started")
    args = begin(made)
    report = Report("telemetry", __doc__ or "", args, "redis", "tensorboardX", "prometheus-client")
    rows, counted = [], ""
    with tempfile.TemporaryDirectory() as folder, server(args.redis) as url:
        for name in args.models:
            with variants(pathlib.Path(folder, name), url) as (fanouts, buses):
                rows += steps(args, name, fanouts)
                counted = delivered(buses, url)
        note = f"Each sample is one tick of {len(tick(1))} events and {args.steps} steps. {counted}"
        report.table("Train step, with a tick's events in every epoch", STEP, rows, note)
        with variants(pathlib.Path(folder, "emit"), url) as (fanouts, _):
            report.table("One event, in the training thread", EMIT, emits(fanouts))
    report.finish()


def tick(epoch: int) -> list[Event]:
    """What one busy tick tells: two seeds, five sites, contributions, a decision, feedback, stage changes."""
    at = (epoch, 50 * epoch)
    seed = {"alpha": 0.5, "pruning": False, "age": 9, "steps": 3, "faults": 0, "health": 0.97, "ratio": 0.4}
    where = [{"site": f"block_{i}/mlp/Dense_1", "slot": 0, "blueprint": "lora"} for i in range(2)]
    choice = Decision("germinate", "block_3/mlp/Dense_1", None, "lora", {"rank": 8}, reason="a plateau of 3 epochs")
    answer = Feedback(choice, "applied", "", 88.0, 88.5, float("nan"), 0.1)
    return [
        *(events.contribution(*at, **one, value=1.5) for one in where),
        events.stage(*at, **where[0], before="BLENDING", after="HOLDING", reason="its alpha has reached 1 (G3)"),
        events.feedback(*at, answer),
        events.decision(*at, choice, outcome="applied", seconds=0.01),
        events.epoch(
            *at,
            train_loss=0.5,
            loss=0.6,
            score=88.0,
            seconds=2.0,
            seeds=[{**one, **seed, "stage": "BLENDING", "contribution": 1.5} for one in where],
            sites={f"block_{i}/mlp/Dense_1": {"gain": 0.1, "dead": 0.0, "variance": 2.0} for i in range(5)},
        ),
    ]


@contextlib.contextmanager
def variants(folder: pathlib.Path, url: str) -> Iterator[tuple[dict[str, Fanout], dict[str, RedisBus]]]:
    """The ways to tell, by name; and the buses among them."""

    def bus(name: str, where: str) -> RedisBus:
        return RedisBus(Address(where, f"{folder.name}-{name}"), spool=folder / name, linger=20.0)

    with server(None) as doomed:
        buses = {"bus": bus("up", url), DOWN: bus("down", doomed)}
        for one in buses.values():
            one.open()
    # The server of one is gone now.
    slow: list[Sink] = [TensorBoardSink(folder / "tensorboard"), PrometheusSink(0)]
    more: dict[str, list[Sink]] = {
        BASE: [],
        COPY: [],
        "bus": [buses["bus"]],
        DOWN: [buses[DOWN]],
        "TensorBoard and Prometheus": behind_slow(slow, folder / "spools"),
    }
    fanouts = {
        name: Fanout([Newest(), JsonlSink(folder / f"{number}.jsonl"), *sinks])
        for number, (name, sinks) in enumerate(more.items())
    }
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        for fanout in fanouts.values():
            fanout.open()
        try:
            yield fanouts, buses
        finally:
            for fanout in fanouts.values():
                fanout.close()


class Newest(ListSink):
    """Keeps the newest event only, so that memory does not grow with the rounds."""

    def emit(self, event: Event) -> None:
        """Replace the event."""
        self.events[:] = [event]


def steps(args: Any, name: str, fanouts: dict[str, Fanout]) -> list[dict[str, Any]]:
    """Epochs of one model, told in each way in turn."""
    work = workload(name, scale=args.scale, dtype=args.dtype, batch=args.batch, seed=args.seed)
    tx = esper_jax.growable(work.optimizer())
    step = esper_jax.make_train_step(esper_jax.graft(work.model.apply), work.loss, tx)

    def variant(fanout: Fanout) -> Callable[[int], Any]:
        state = esper_jax.TrainState.create(work.morph(), tx, key=jax.random.key(args.seed))
        holder = [jax.tree.map(lambda leaf: leaf.copy(), state), 0]

        def epoch(_: int) -> Any:
            for event in tick(holder[1]):
                fanout.emit(event)
            for index in range(args.steps):
                holder[0], metrics = step(holder[0], work.batches[index % len(work.batches)])
            holder[1] += 1
            jax.block_until_ready(metrics)
            return metrics

        return epoch

    made = {key: variant(fanout) for key, fanout in fanouts.items()}
    timed = interleave(made, rounds=args.rounds, budget=args.budget, sets=1, warmup=2, seed=args.seed)
    floor = noise_floor([ratio(timed[COPY], timed[BASE])])
    rows = []
    for key, timing in timed.items():
        row = {"model": name, "variant": key, **time_columns(timing)}
        row |= {part: row[part] / args.steps for part in ("median", "p95", "p99", "iqr")}
        if key != BASE:
            against = ratio(timing, timed[BASE])
            row |= ratio_columns(against) | {"floor": floor}
            row |= {} if key == COPY else {"verdict": verdict(against)}
        rows.append(row)
    return rows


def verdict(against: Ratio) -> str:
    """Whether the target is kept; where noise leaves that open, it is said."""
    if against.median <= TARGET:
        return "yes" if against.high <= TARGET else "yes, by the median"
    return "NO" if against.low > TARGET else "cannot be told"


def emits(fanouts: dict[str, Fanout], rounds: int = 400) -> list[dict[str, Any]]:
    """Seconds that `emit` keeps the caller, a tick at a time with a pause as training would make."""
    taken: dict[str, list[float]] = {name: [] for name in fanouts}
    for number in range(rounds):
        for name, fanout in fanouts.items():
            for event in tick(number):
                began = time.perf_counter()
                fanout.emit(event)
                taken[name].append(time.perf_counter() - began)
            time.sleep(0.001)
    return [{"variant": name, **quantiles(seconds)} for name, seconds in taken.items()]


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, tails and the worst."""
    median, p95, p99 = np.percentile(seconds, [50, 95, 99])
    return {"median": float(median), "p95": float(p95), "p99": float(p99), "worst": float(max(seconds))}


def delivered(buses: dict[str, RedisBus], url: str) -> str:
    """What arrived, compared by id, in a sentence."""
    up, down = buses["bus"], buses[DOWN]
    up.flush(60.0)
    with Reader(up.address) as reader:
        found: list[str] = []
        while messages := reader.read(1000):
            found += [message.id for message in messages]
    order = "in order and each once" if found == up.ids()[-len(found) :] else "NOT in order"
    return (
        f"The server has {len(found)} of {up.published} events, {order}; "
        f"{down.published - down.delivered} of the other bus wait on disk."
    )


@contextlib.contextmanager
def server(given: str | None) -> Iterator[str]:
    """The URL of a server: the given one, or one of our own that is killed afterwards."""
    if given is not None:
        yield given
        return
    if shutil.which("redis-server") is None:
        print("this needs redis-server (apt-get install redis-server), or --redis URL", file=sys.stderr)
        raise SystemExit(2)
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--loglevel", "warning"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
