"""Growing runs on 8 virtual devices, as a script: what they end with goes to a file as JSON."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from esper_jax import FixedSchedule, Gates, Lifecycle, Tolaria, TrainState, fold
from esper_jax.tolaria import History
from esper_jax.tolaria.leaves import flatten
from esper_jax.tolaria.peers import gathered, on_host
from tests.tolaria.growing import LOSS, data

EPOCHS, HALF = 8, 5
KERNEL = "Dense_1/kernel"


class Net(nn.Module):
    """A host with batch statistics and dropout; its middle kernel is large enough to be divided."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(64)(x)))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(2)(x)


TRAIN, VALIDATION = data(0, 256, 8), data(1, 100, 8)


def trainer(directory: pathlib.Path | None = None, **options: Any) -> Tolaria:
    """A trainer that grows, blends and keeps a lora seed at the middle layer."""
    gates = Gates(min_training_ticks=1, min_health=0.0)
    plan = {1: [("Dense_1", "lora", {"rank": 4})]}
    defaults: dict[str, Any] = {
        "controller": FixedSchedule(plan, gates=gates, keep="always"),
        "lifecycle": Lifecycle(gates, tempo=3),
        "checkpoint_dir": directory,
        "batch_size": 32,
        "keep": 100,
        "progress": False,
        "compile_in": "thread",
    }
    return Tolaria(Net(), LOSS, optax.sgd(0.05, momentum=0.9), **{**defaults, **options})


def begin(made: Tolaria) -> TrainState:
    """The first state, from fixed keys."""
    return made.init(Net().init(jax.random.key(0), TRAIN[0][:1]), key=jax.random.key(1))


def fit(made: Tolaria, state: TrainState, epochs: int = EPOCHS) -> tuple[TrainState, History]:
    """Train to that epoch."""
    return made.fit(state, TRAIN, VALIDATION, epochs=epochs)


def told(made: Tolaria, state: TrainState, history: History) -> dict[str, Any]:
    """What a run ended with, as JSON can hold it."""
    whole = lambda tree: [on_host(leaf).astype(np.float64).ravel().tolist() for leaf in jax.tree.leaves(tree)]  # noqa: E731
    place = lambda tree: {  # noqa: E731
        jax.tree_util.keystr(path): str(getattr(leaf.sharding, "spec", "one device"))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    morph = fold(gathered(state.morph))
    return {
        "params": whole(state.morph.params),
        "statistics": whole(state.morph.variables["batch_stats"]),
        "folded": whole(morph.host),
        "plants": [repr(plant) for plant in morph.spec.plants],
        "optimizer": whole(state.opt_state),
        "scores": history["score"],
        "stages": [[e.epoch, e.data["site"], e.data["after"]] for e in history.of_kind("stage")],
        "warnings": [e.message for e in history.events if e.kind in ("warning", "compile_failed")],
        "host places": place(state.morph.host),
        "seed places": place(state.morph.seeds),
        "optimizer places": place(state.opt_state),
        "devices": sorted({len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.morph)}),
        "compiled": len(COMPILED),
        "written in parts": [type(leaf).__name__ for leaf in flatten(gathered(state.morph.host))[1].values()].count(
            "ArrayImpl"
        ),
    }


COMPILED: list[str] = []


class Compilations(logging.Handler):
    """Notes JAX's log lines on train programs that it compiles."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line of the log."""
        if (text := record.getMessage()).startswith("Compiling") and "train_steps" in text.split(" with ")[0]:
            COMPILED.append(text)


def main(folder: pathlib.Path) -> dict[str, Any]:
    """One device, "dp", "fsdp", a mesh of one's own, seeds that rest until they germinate, and resumes of "fsdp"."""
    devices = np.asarray(jax.devices())
    grid = Mesh(devices.reshape(2, 4), ("in", "out"))
    found: dict[str, Any] = {"refused": refusals(grid)}
    for name, options in {
        "one": {},
        "dp": {"sharding": "dp"},
        "fsdp": {"sharding": "fsdp", "checkpoint_dir": folder / "fsdp"},
        "own": {"sharding": {KERNEL: PartitionSpec("in", "out")}, "mesh": grid, "seed_sharding": "replicated"},
        "rests": {"sharding": "fsdp", "rest_alone": True, "planted": {"lora": {"rank": 4}}, "where": "Dense_1"},
    }.items():
        made = trainer(**options)
        COMPILED.clear()
        found[name] = told(made, *fit(made, begin(made)))
    for count in (4, 1):
        made = trainer(sharding="fsdp", mesh=Mesh(devices[:count], ("data",)))
        found[f"on {count}"] = told(made, *fit(made, made.restore(folder / "fsdp", step=HALF * 8)))
    return found


def refusals(grid: Mesh) -> dict[str, str]:
    """What is said of layouts that cannot be."""
    variables = Net().init(jax.random.key(0), TRAIN[0][:1])

    def own(specs: Any) -> Any:
        return trainer(sharding=specs, mesh=grid).init(variables, key=jax.random.key(1))

    odd = trainer(sharding="dp", batch_size=30)
    specs = jax.tree.map(lambda leaf: PartitionSpec(), variables["params"])
    attempts: dict[str, Callable[[], Any]] = {
        "an axis": lambda: own({KERNEL: PartitionSpec("model")}),
        "indivisible": lambda: own({"Dense_2/kernel": PartitionSpec(None, "out")}),
        "too long": lambda: own({"Dense_2/bias": PartitionSpec(None, "out")}),
        "missing": lambda: own({name: child for name, child in specs.items() if name != "Dense_2"}),
        "extra": lambda: own({**specs, "Dense_9": {"bias": PartitionSpec()}}),
        "batch": lambda: fit(odd, begin(odd), 1),
    }
    return {name: message_of(attempt) for name, attempt in attempts.items()}


def message_of(attempt: Callable[[], Any]) -> str:
    """The ValueError's message; "" where nothing is raised."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    jax.config.update("jax_log_compiles", True)
    logging.getLogger("jax._src.interpreters.pxla").addHandler(Compilations())
    (folder / "found.tmp").write_text(json.dumps(main(folder)))
    (folder / "found.tmp").rename(folder / "found.json")
