"""What Flax's convolutional layers take with `kasmina.conv_general_dilated` in place of XLA's own convolutions.

A CNN of three layers, each but the first at half the size. Forward pass, train step, and the train step of several
networks beside each other in one `vmap`, where XLA's CPU backend computes each network's convolutions alone. On other
platforms both are the same program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from common import Column, Report, begin, interleave, noise_floor, parser, ratio, ratio_columns, time_columns

from esper_jax.kasmina import conv_general_dilated

BASE, COPY, OURS = "Flax", "Flax, the same once more", "ours"
COLUMNS = (
    Column("what", "what"),
    Column("variant", "convolutions"),
    Column("median", "median", "time"),
    Column("p95", "p95", "time"),
    Column("ratio", "over Flax", "ratio"),
    Column("interval", "95% interval", "interval"),
    Column("spread", "spread", "ratio"),
)
RATE = 0.01


class CNN(nn.Module):
    """Three convolutions with relu, then a linear layer on the mean."""

    width: int
    dtype: Any
    convolution: Any = None

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            features, stride = self.width * 2**i, 1 + (i > 0)
            own = {"conv_general_dilated": self.convolution} if self.convolution else {}
            x = nn.relu(nn.Conv(features, (3, 3), strides=stride, dtype=self.dtype, **own)(x))
        return nn.Dense(10, dtype=self.dtype)(x.mean((1, 2)))


def main() -> None:
    """Measure and print."""
    made = parser(__doc__ or "", rounds=40, budget=6.0, models=("cnn",))
    made.add_argument("--batch", type=int, default=32, help="batch size")
    made.add_argument("--width", type=int, default=32, help="channels of the first layer")
    made.add_argument("--networks", type=int, default=4, help="networks beside each other")
    args = begin(made)
    width = int(args.width * args.scale)
    report = Report("convolutions", __doc__ or "", args)
    rows, floors = [], []
    pairs = {
        name: variants(args, width, convolution) for name, convolution in ((BASE, None), (OURS, conv_general_dilated))
    }
    for what in pairs[BASE]:
        calls = {BASE: pairs[BASE][what], COPY: pairs[BASE][what], OURS: pairs[OURS][what]}
        timed = interleave(calls, rounds=args.rounds, budget=args.budget, sets=1, seed=args.seed)
        floors.append(ratio(timed[COPY], timed[BASE]))
        for name, timing in timed.items():
            found = {} if name == BASE else ratio_columns(ratio(timing, timed[BASE]))
            rows.append({"what": what, "variant": name, **time_columns(timing), **found})
    title = f"A CNN of {width} to {4 * width} channels on {args.batch} images of 28 x 28"
    report.table(title, COLUMNS, rows, f"Noise floor, from a second copy of Flax's: {noise_floor(floors):.3f}.")
    report.finish()


def variants(args: Any, width: int, convolution: Any) -> dict[str, Callable[[int], Any]]:
    """The forward pass, the train step of one network, and that of several."""
    model = CNN(width, jnp.dtype(args.dtype), convolution)
    keys = jax.random.split(jax.random.key(args.seed), 2 + args.networks)
    x = jax.random.normal(keys[0], (args.batch, 28, 28, 3))
    y = jax.random.randint(keys[1], (args.batch,), 0, 10)
    first, several = model.init(keys[2], x), jax.vmap(lambda key: model.init(key, x))(keys[2:])

    def step(variables: Any) -> Any:
        def loss(variables: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(variables, x), y).mean()

        return jax.tree.map(lambda p, g: p - RATE * g, variables, jax.grad(loss)(variables))

    calls = {
        "forward": (lambda variables: model.apply(variables, x), first),
        "train step": (step, first),
        f"train step of {args.networks} networks": (jax.vmap(step), several),
    }

    def call(function: Any, variables: Any, _: int) -> Any:
        return function(variables)

    return {what: functools.partial(call, jax.jit(function), given) for what, (function, given) in calls.items()}


if __name__ == "__main__":
    main()
