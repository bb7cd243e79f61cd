"""A small run that germinates, blends, fossilises and prunes, for tests; as a script it can be killed on the way."""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from esper_jax import FixedSchedule, Gates, Lifecycle, Tolaria
from esper_jax.nissa.event import Event

EPOCHS = 16
LOSS = optax.softmax_cross_entropy_with_integer_labels


class Net(nn.Module):
    """A host with BatchNorm and dropout, so that collections and random numbers matter."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(2)(x)


def data(seed: int, size: int, features: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Two classes by the sign of a product: more than four units want."""
    x = np.random.default_rng(seed).normal(size=(size, features)).astype(np.float32)
    return x, (x[:, 0] * x[:, 1] > 0).astype(np.int32)


TRAIN, VALIDATION = data(0, 256), data(1, 128)


class Killer:
    """A sink that kills the process, as the machine might, when an epoch has been told."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def emit(self, event: Event) -> None:
        """SIGKILL at the event."""
        if event.kind == "checkpoint" and event.epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None:
        """Nothing."""


def trainer(directory: pathlib.Path | None, **options: Any) -> Tolaria:
    """A trainer that grows an mlp seed beside the first layer, and a lora seed that still blends at the end."""
    gates = Gates(min_training_ticks=2, min_health=0.1)
    plan = {3: [("Dense_0", "mlp", {"hidden": 8})], EPOCHS - 4: [("Dense_1", "lora", {"rank": 2})]}
    tx = options.pop("tx", optax.adamw(optax.cosine_decay_schedule(3e-2, 200)))
    defaults: dict[str, Any] = {
        "controller": FixedSchedule(plan, gates=gates, keep="always"),
        "lifecycle": Lifecycle(gates, tempo=3),
        "checkpoint_dir": directory,
        "batch_size": 32,
        "keep": 100,
        "progress": False,
        "classes": 2,
        "compile_in": "thread",
    }
    return Tolaria(Net(), LOSS, tx, **{**defaults, **options})


def start(made: Tolaria) -> Any:
    """The first state, from fixed keys."""
    variables = Net().init(jax.random.key(0), TRAIN[0][:1])
    return made.init(variables, key=jax.random.key(1))


if __name__ == "__main__":
    made = trainer(pathlib.Path(sys.argv[1]), sinks=(Killer(int(sys.argv[2])),))
    made.fit(start(made), TRAIN, VALIDATION, epochs=EPOCHS)
