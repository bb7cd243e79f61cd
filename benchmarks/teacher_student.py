"""Does growing a hidden layer unit by unit reach what a wider network trained from the start reaches?

The protocol of the GradMax paper (Evci et al., ICLR 2022): 1,000 points from N(0, 1)^10, a teacher 10-10-10 with a
ReLU and no bias, weights from U(-1, 1); a student 10-5-10 that grows by one hidden unit at steps 200, 400, 600, 800 and
1,000, plain SGD at 0.1 on the whole batch, 1,500 steps. Each unit is a span seed of this library, germinated, blended
in and kept by its public calls. The gap is what a static student of 10 units gains over one of 5: (small - grown) /
(small - big), of the mean squared error at the end. "jump" is the largest change of the loss at a germination.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Column, Report, begin, parser

import esper_jax

SPAN = ("first", "second")
VARIANTS = {
    "static, 5 units": None,
    "static, 10 units": None,
    "random": "",
    "gradmax": "gradmax",
    "tiny": "tiny",
    "best": "best",
}
SMALL, BIG = 5, 10


class Student(nn.Module):
    """Two layers without bias and a ReLU between."""

    units: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.units, use_bias=False, name="first")(x))
        return nn.Dense(10, use_bias=False, name="second")(x)


def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.square(outputs - targets)


def problems(teachers: int, points: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Inputs `[T, points, 10]` and targets of as many teachers."""
    xs, ys = [], []
    for teacher in range(teachers):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), teacher), 3)
        x = jax.random.normal(keys[0], (points, 10))
        first, second = (jax.random.uniform(key, (10, 10), minval=-1, maxval=1) for key in keys[1:])
        xs.append(x)
        ys.append(jax.nn.relu(x @ first) @ second)
    return jnp.stack(xs), jnp.stack(ys)


class Course:
    """All teachers and students of one variant at once: a population of morphs under one `vmap`."""

    def __init__(self, model: Student, rate: float) -> None:
        self.model, self.forward = model, esper_jax.graft(model)
        self.tx = esper_jax.growable(optax.sgd(rate))
        self.measure = jax.jit(jax.vmap(self._loss))
        self.grow = functools.cache(self._grow)
        self.run = jax.jit(jax.vmap(self._run, (0, 0, 0, 0, None)), static_argnums=4)

    def start(self, keys: jax.Array) -> Any:
        init = lambda key: self.model.init(key, jnp.ones((1, 10)))  # noqa: E731
        return jax.vmap(lambda key: esper_jax.morph(init(key), slots=BIG - SMALL))(keys)

    def _loss(self, morph: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(loss(self.forward(morph, x), y))

    def _run(self, morph: Any, state: Any, x: jax.Array, y: jax.Array, steps: int) -> tuple[Any, Any]:
        def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
            morph, state = carry
            grads = jax.grad(lambda params: self._loss(morph.with_params(params), x, y))(morph.params)
            params, state = self.tx.step(grads, state, morph)
            return (morph.with_params(params), state), None

        return jax.lax.scan(step, (morph, state), None, length=steps)[0]

    def _grow(self, init: str) -> Any:
        """One unit more: scored, germinated, blended in over the ticks of a ramp, and kept."""

        def grow(morph: Any, x: jax.Array, y: jax.Array, key: jax.Array, slot: int) -> Any:
            options: dict[str, Any] = {}
            if init:
                scores = esper_jax.growth_scores(morph, (x, y), loss, forward=self.forward, spans=[SPAN])
                options = {"init": init, "scores": scores}
            morph = esper_jax.germinate(
                morph, span=SPAN, blueprint="units", units=1, bias=False, slot=slot, key=key, **options
            )
            gates = esper_jax.Lifecycle(gates=esper_jax.Gates(min_training_ticks=0, min_health=0.0), tempo=3)
            morph = esper_jax.advance(esper_jax.advance(morph, SPAN[1], slot), SPAN[1], slot)
            for _ in range(6):
                morph, _ticked = esper_jax.tick(morph, config=gates)
            return esper_jax.fossilize(morph, SPAN[1], slot)

        return jax.jit(jax.vmap(grow, (0, 0, 0, 0, None)), static_argnums=4)


def course(name: str, args: Any, xs: jax.Array, ys: jax.Array, keys: jax.Array) -> dict[str, Any]:
    """One variant on all problems; final losses `[T * S]`, the largest jump of the loss, seconds."""
    began = time.perf_counter()
    run = Course(Student(BIG if name == "static, 10 units" else SMALL), args.rate)
    morph = run.start(keys)
    state = jax.vmap(run.tx.init)(morph)
    jump, done = 0.0, 0
    growths = [args.steps * k * 2 // 15 for k in range(1, BIG - SMALL + 1)] if VARIANTS[name] is not None else []
    for slot, at in enumerate([*growths, args.steps]):
        morph, state = run.run(morph, state, xs, ys, at - done)
        done = at
        if at == args.steps:
            break
        before = run.measure(morph, xs, ys)
        new = jax.vmap(lambda key, slot=slot: jax.random.fold_in(key, 100 + slot))(keys)
        morph = run.grow(VARIANTS[name])(morph, xs, ys, new, slot)
        state = jax.vmap(run.tx.grow)(state, morph)
        jump = max(jump, float(jnp.max(jnp.abs(run.measure(morph, xs, ys) - before))))
    return {"losses": np.asarray(run.measure(morph, xs, ys)), "jump": jump, "seconds": time.perf_counter() - began}


def main() -> None:
    made = parser(__doc__ or "", rounds=1, budget=0.0)
    made.add_argument("--teachers", type=int, default=10, help="teachers")
    made.add_argument("--students", type=int, default=3, help="students of each teacher")
    made.add_argument("--points", type=int, default=1000, help="points of the data")
    made.add_argument("--steps", type=int, default=1500, help="train steps; a unit grows at 2/15, 4/15, ... of them")
    made.add_argument("--rate", type=float, default=0.1, help="learning rate")
    args = begin(made)
    report = Report("teacher_student", __doc__ or "", args)
    x, y = problems(args.teachers, args.points, args.seed)
    xs, ys = (jnp.repeat(part, args.students, axis=0) for part in (x, y))
    keys = jax.random.split(jax.random.key(args.seed + 1), len(xs))
    found = {name: course(name, args, xs, ys, keys) for name in VARIANTS}
    small, big = (found[f"static, {units} units"]["losses"] for units in (SMALL, BIG))
    rows = []
    for name, one in found.items():
        by_teacher = lambda losses: losses.reshape(args.teachers, args.students).mean(1)  # noqa: E731
        gaps = (by_teacher(small) - by_teacher(one["losses"])) / (by_teacher(small) - by_teacher(big))
        spread = np.quantile(gaps, [0.25, 0.75])
        rows.append(
            {
                "variant": name,
                "loss": float(one["losses"].mean()),
                "gap": float((small.mean() - one["losses"].mean()) / (small.mean() - big.mean())),
                "median": float(np.median(gaps)),
                "spread": f"{spread[0]:.2f} to {spread[1]:.2f}",
                "jump": one["jump"],
                "seconds": one["seconds"],
            }
        )
    columns = (
        Column("variant", "student"),
        Column("loss", "mean squared error", "ratio"),
        Column("gap", "gap recovered", "ratio"),
        Column("median", "median of teachers", "ratio"),
        Column("spread", "quartiles"),
        Column("jump", "largest jump", "ratio"),
        Column("seconds", "seconds", "ratio"),
    )
    title = f"{args.teachers} teachers, {args.students} students each, {args.steps} steps"
    report.table(title, columns, rows, "gap recovered: of the mean losses of all; known: random 0.73, GradMax 0.95.")
    report.finish()


if __name__ == "__main__":
    main()
