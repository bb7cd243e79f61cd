"""What a task is: a small host model, real data cut into three fixed parts, and how answers are judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

Split = tuple[np.ndarray, np.ndarray]
"""Inputs and targets, each `[N, ...]` with one row an example, in a fixed order."""


def cross_entropy(logits: Float[Array, "B ... C"], targets: Int[Array, "B ..."]) -> Float[Array, " B"]:
    """Cross-entropy in nats of each example, averaged over the positions of a sequence where there are any."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.reshape(losses.shape[0], -1).mean(axis=1)


def accuracy(logits: Float[Array, "B ... C"], targets: Int[Array, "B ..."]) -> Float[Array, " B"]:
    """Share of right answers in each example, 0 to 1 in float32: 0 or 1 where an example has one answer."""
    right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return right.reshape(right.shape[0], -1).mean(axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Everything that a training run needs to know about one problem. Its arrays are read-only.

    Attributes:
      name: the name it is asked for by, e.g. `digits`.
      description: one sentence for people.
      inputs: what one row of the inputs is, in words.
      model: the host, a Linen module called as `model.apply(variables, x, train=...)`. It is small on purpose, so that
        growing can pay: a wider copy does clearly better.
      train: inputs `[N, ...]` and targets `[N, ...]` to train on.
      validation: the same for choosing: scores, contributions and gates are measured here.
      test: the same for the final figure; nothing is chosen by it.
      loss: `(outputs, targets) -> losses [B]`, lower is better.
      score: `(outputs, targets) -> scores [B]` in 0 to 1, higher is better; its mean times 100 is in points.
      classes: number of classes C (a guess costs `ln C`), or None where the task has none.
      batch_size: examples in a training batch.
      learning_rate: for AdamW.
      epochs: epochs of a full run.
      where: regex of the sites that seeds may use, or None for all.
      blueprints: names of the blueprints that suit the host, most useful first.
    """

    name: str
    description: str
    inputs: str
    model: nn.Module
    train: Split
    validation: Split
    test: Split
    loss: Callable[[Any, Any], Array] = cross_entropy
    score: Callable[[Any, Any], Array] = accuracy
    classes: int | None = None
    batch_size: int = 64
    learning_rate: float = 3e-3
    epochs: int = 30
    where: str | None = None
    blueprints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, (x, y) in self.splits():
            if len(x) != len(y) or len(x) == 0:
                raise ValueError(
                    f"task {self.name!r}: {name} has {len(x)} inputs and {len(y)} targets; give as many of each, "
                    "and at least one"
                )
            x.setflags(write=False)
            y.setflags(write=False)
        if not 0 < self.batch_size <= len(self.train[0]):
            raise ValueError(
                f"task {self.name!r}: batch_size {self.batch_size} does not fit its {len(self.train[0])} training "
                f"examples; give 1 to {len(self.train[0])}"
            )

    @property
    def example(self) -> np.ndarray:
        """The first training input as a batch of one, `[1, ...]`, to initialise the model with."""
        return self.train[0][:1]

    def splits(self) -> Iterator[tuple[str, Split]]:
        """`train`, `validation` and `test` by name."""
        return iter((("train", self.train), ("validation", self.validation), ("test", self.test)))
