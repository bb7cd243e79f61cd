"""What Tolaria's loop costs beside the best loop that can be written by hand for the same model.

By hand: one epoch as a `lax.scan` in one program, as a Python loop of jitted steps, and (`--unrolled`) as such a loop
with four steps written out in each call; the bare model, optax alone, donated buffers, shuffled and gathered in the
program, its losses kept. None of these looks whether a gradient is finite, as Tolaria does in every step; the guarded
one does, by optax's `apply_if_finite`. Tolaria: the loop that `fit` runs between ticks, probes at the default interval
included, in the mode it chooses by itself and in each mode by name, from data on the device and from data on the host.
XLA's CPU backend is slow at convolutions inside control flow: the rows of the CNN are where a wrong choice shows.

One program's time moves by a few hundredths with where the compiler happens to put its arrays, in either direction,
and a copy of the same program does not show that. So the transformer has other widths, too.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Column, Report, begin, interleave, noise_floor, parser, ratio, ratio_columns, time_columns, workload
from common.cli import positive

from esper_jax import Tolaria
from esper_jax.tolaria import snapshot
from esper_jax.tolaria.change import Changes
from esper_jax.tolaria.compiler import ThreadCompiler
from esper_jax.tolaria.data import Batches, shuffled
from esper_jax.tolaria.feed import Feed
from esper_jax.tolaria.interruption import Stop
from esper_jax.tolaria.programs import Programs
from esper_jax.tolaria.run import Run
from esper_jax.tolaria.session import Session

WRITTEN_OUT = 4
STEPS = {"mlp": 64, "cnn": 16, "transformer": 24}
AGAIN = {"scan": "hand scan", "loop": "hand loop", "unroll": "hand unrolled"}
"""The loop by hand that is like each mode of Tolaria's; a copy of the one that it chose shows the noise."""


class Hand:
    """Loops that someone would write for the bare model: an epoch from arrays on the device."""

    def __init__(self, work: Any, data: Any, steps: int, tx: Any) -> None:
        self.work, self.data, self.steps, self.tx = work, data, steps, tx
        params, rest = work.variables["params"], {k: work.variables[k] for k in work.collections}
        self.first = lambda: jax.tree.map(jnp.array, (params, rest, self.tx.init(params)))
        self.state: dict[str, Any] = {}
        self.scan = jax.jit(self._scan, donate_argnums=0)
        self.one = jax.jit(functools.partial(self._several, 1), donate_argnums=0)
        self.four = jax.jit(functools.partial(self._several, WRITTEN_OUT), donate_argnums=0)

    def step(self, state: Any, rows: Any, data: Any) -> Any:
        params, rest, opt_state = state
        batch = jax.tree.map(lambda leaf: leaf[rows], data)

        def loss(params: Any) -> Any:
            return self.work.mean_loss(self.work.model.apply, {"params": params, **rest}, batch)

        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = self.tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), rest, opt_state), value

    def _scan(self, state: Any, key: Any, data: Any) -> Any:
        order = shuffled(key, 0, self.steps * self.work.batch, self.work.batch)
        return jax.lax.scan(lambda state, rows: self.step(state, rows, data), state, order)

    def _several(self, count: int, state: Any, order: Any, start: Any, data: Any) -> Any:
        losses = []
        for i in range(count):
            state, loss = self.step(state, order[start + i], data)
            losses.append(loss)
        return state, losses

    def epoch(self, name: str, number: int) -> Any:
        """One epoch; the state after it, and the losses."""
        key, state = jax.random.key(number), self.state.pop(name, None) or self.first()
        kind = name.removesuffix(" again").removesuffix(", guarded")
        if kind == "hand scan":
            state, losses = self.scan(state, key, self.data)
        else:
            size, call = (1, self.one) if kind == "hand loop" else (WRITTEN_OUT, self.four)
            order = shuffled(key, 0, self.steps * self.work.batch, self.work.batch)
            losses = []
            for start in range(0, self.steps, size):
                state, some = call(state, order, start, self.data)
                losses += some
        self.state[name] = state
        return state, losses


class Ours:
    """Epochs of Tolaria's own loop, without its ticks."""

    def __init__(self, work: Any, data: Any, mode: str, resident: bool = True, probe_every: int = 50) -> None:
        trainer = Tolaria(
            work.model,
            work.loss,
            work.optimizer(),
            batch_size=work.batch,
            dispatch=mode,
            resident_bytes=1 << 30 if resident else 0,
            probe_every=probe_every,
            progress=False,
        )
        state = trainer.init(work.morph(), key=jax.random.key(0))
        session, quiet = Session(snapshot.take(state)), lambda event: None
        store = Programs((trainer._step,), ThreadCompiler())
        changes = Changes(store, trainer.tx, "epoch", 0, session, quiet)
        options: dict[str, Any] = {"tick_every": None, "checkpoint_every": 1, "patience": None}
        self.run = Run(trainer._step, trainer._ticker, changes, state, session, quiet, None, **options)
        batches = Batches(jax.tree.map(np.asarray, data), work.batch, jax.random.key(0))
        self.feed = Feed(batches, trainer._calls, trainer._dispatch, trainer._resident_bytes)
        self.stop = Stop()

    def epoch(self, number: int) -> Any:
        """One epoch; the state after it."""
        self.run.epoch, self.run.batch = number, 0
        self.run.through(self.feed, None, self.stop)
        self.feed.look_ahead(number + 1)
        self.run.forget_calls()  # as at a tick
        return self.run.state


def main() -> None:
    made = parser(__doc__ or "", rounds=30, budget=4.5)
    made.add_argument("--steps", type=int, help=f"steps of an epoch (default: {STEPS}; a multiple of {WRITTEN_OUT})")
    made.add_argument(
        "--unrolled", nargs="*", choices=tuple(STEPS), default=["cnn"], help="models whose steps are written out too"
    )
    made.add_argument(
        "--widths", type=positive, nargs="*", default=[0.5, 2.0], help="factors of other widths of the transformer"
    )
    args = begin(made, reuse=True)
    report = Report("loop", __doc__ or "", args)
    for name in args.models:
        measure(name, args, report)
        for width in args.widths if name == "transformer" else ():
            measure(name, args, report, width)
    report.finish()


def measure(name: str, args: Any, report: Report, width: float | None = None) -> None:
    """Measure all loops of one model; at another `width` only the scan by hand and what Tolaria chooses."""
    steps = args.steps or STEPS[name]
    scale = args.scale * (width or 1.0)
    work = workload(name, scale=scale, dtype=args.dtype, sets=steps, seed=args.seed)
    data = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *work.batches)
    hand = Hand(work, data, steps, work.optimizer())
    with_guard = Hand(work, data, steps, optax.apply_if_finite(work.optimizer(), max_consecutive_errors=1 << 30))
    ours = {"tolaria": Ours(work, data, "auto")}
    modes = [mode for mode in AGAIN if mode != "unroll" or name in args.unrolled]
    if width is None:
        ours["tolaria, data on the host"] = Ours(work, data, "auto", resident=False)
        ours |= {f"tolaria, {mode}": Ours(work, data, mode) for mode in modes}
    ours["tolaria, auto, no probes"] = Ours(work, data, "auto", probe_every=0)
    ours["tolaria"].epoch(0)
    copied = AGAIN[ours["tolaria"].feed.mode]
    by_hand = [AGAIN[mode] for mode in modes] if width is None else [copied]
    variants = {n: functools.partial(hand.epoch, n) for n in (*by_hand, f"{copied} again")}
    guarded = f"{copied}, guarded"
    variants[guarded] = functools.partial(with_guard.epoch, guarded)
    variants |= {n: o.epoch for n, o in ours.items()}
    warmup = 3 if name == "transformer" else 5  # epochs in which the pace of scanned steps grows
    timed = interleave(variants, rounds=args.rounds, sets=4, warmup=warmup, budget=args.budget, least=6, seed=args.seed)
    best = min(by_hand, key=lambda n: timed[n].median)
    rows = []
    for n, timing in timed.items():
        row = {"variant": n, **time_columns(timing), **ratio_columns(ratio(timing, timed[best]))}
        row["step"] = timing.median / steps
        against = ratio(timing, timed[guarded])
        row |= {"guarded": against.median, "guarded interval": [against.low, against.high]}
        row["least"] = float(timing.samples.min() / timed[best].samples.min())
        rows.append(row)
    floor = noise_floor([ratio(timed[f"{copied} again"], timed[copied])])
    columns = (
        Column("variant", "loop"),
        Column("median", "epoch", "time"),
        Column("step", "a step", "time"),
        Column("ratio", "over the best by hand", "ratio"),
        Column("interval", "95%", "interval"),
        Column("guarded", "over the guarded", "ratio"),
        Column("guarded interval", "95%", "interval"),
        Column("least", "of the fastest epochs", "ratio"),
        Column("samples", "epochs", "count"),
    )
    what = name if width is None else f"{name} of {width:g} times the width"
    report.table(
        f"{what}: an epoch of {steps} steps of {work.batch}; tolaria chose {ours['tolaria'].feed.mode}",
        columns,
        rows,
        f"The best by hand is the {best}. Noise floor, from a second copy of the {copied}: {floor:.3f}.",
    )


if __name__ == "__main__":
    main()
