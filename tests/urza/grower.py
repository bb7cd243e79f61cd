"""A small run whose controller germinates a stored seed, in this process or in one of its own."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from esper_jax import Decision, Feedback, Gates, Lifecycle, Report, Tolaria

LOSS = optax.softmax_cross_entropy_with_integer_labels


class Net(nn.Module):
    """The host of `world.host_params`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.Dense(6, name="Dense_0")(x)
        return nn.Dense(3, name="Dense_1")(nn.relu(hidden))


NET = Net()


def data(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes of points in four dimensions."""
    x = np.random.default_rng(seed).normal(size=(size, 4)).astype(np.float32)
    return x, (np.sign(x[:, 0] * x[:, 1]) + np.sign(x[:, 2]) + 1).clip(0, 2).astype(np.int32)


TRAIN, VALIDATION = data(0, 96), data(1, 64)


class Grower:
    """Germinates one stored seed at one epoch, and notes the feedback."""

    def __init__(self, stored: str, epoch: int = 2, **fields: Any) -> None:
        self.decision, self.epoch = Decision("germinate", "Dense_0", stored=stored, **fields), epoch
        self.heard: list[Feedback] = []

    def init(self, spec: Any, key: Any) -> dict[str, Any]:
        """No state."""
        return {"n": np.int32(0)}

    def decide(self, state: Any, report: Report, feedback: tuple[Feedback, ...]) -> tuple[tuple[Decision, ...], Any]:
        """The one decision, when its epoch has come."""
        self.heard += feedback
        return ((self.decision,) if report.epoch == self.epoch else ()), state


def trainer(directory: pathlib.Path | str | None, controller: Any, urza: Any, **options: Any) -> Tolaria:
    """A trainer of `NET` with a library."""
    gates = Gates(min_training_ticks=2, min_health=0.1)
    return Tolaria(
        NET,
        LOSS,
        optax.adamw(1e-2),
        controller=controller,
        urza=urza,
        checkpoint_dir=directory,
        lifecycle=Lifecycle(gates, tempo=3),
        batch_size=32,
        keep=100,
        progress=False,
        **options,
    )
