"""What seeds cost that do nothing: bare host, empty slots, planted dormant seeds; forward pass and train step."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from common import (
    Column,
    Report,
    begin,
    interleave,
    noise_floor,
    parser,
    ratio,
    ratio_columns,
    time_columns,
    within,
    workload,
)
from common.steps import Looped, Stepper, bare_step, library_step, morph_step, own, same_program

import esper_jax

COLUMNS = (
    Column("model", "model"),
    Column("batch", "batch", "count"),
    Column("variant", "variant"),
    Column("program", "program"),
    Column("median", "median", "time"),
    Column("p95", "p95", "time"),
    Column("ratio", "ratio", "ratio"),
    Column("interval", "95% interval", "interval"),
    Column("spread", "spread", "ratio"),
    Column("floor", "floor", "percent"),
    Column("verdict", "1.00 within floor", "yes"),
)
IDENTICAL, COPY = "jaxpr identical", "the same once more"
STEPS = {"mlp": 128, "cnn": 16, "transformer": 8}
LOOP_BUDGET = 5
ALONE, AWAKE = "planted dormant, rest_alone", "planted dormant, awake"


def main() -> None:
    """Measure and print."""
    made = parser(__doc__ or "", rounds=200, budget=0.4)
    made.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="batch sizes")
    args = begin(made, reuse=True)
    report = Report("dormant", __doc__ or "", args)
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in MEASURES}
    for name in args.models:
        for batch in args.batch:
            work = workload(name, scale=args.scale, dtype=args.dtype, batch=batch, seed=args.seed)
            empty, planted = work.morph(where=work.where), work.morph(planted=True)
            for kind, measure in MEASURES.items():
                if kind == "loop" and batch != max(args.batch):
                    continue
                variants, programs = measure(work, empty, planted)
                rows[kind] += compared(args, work, variants, programs, STEPS[name] if kind == "loop" else 1)
    awake = "awake: the morph that `awake` makes of the planted one."
    report.table("Forward pass", COLUMNS, rows["forward"], f"{awake} {explained(rows['forward'])}")
    report.table("Train step, a loop of one's own", COLUMNS, rows["step"], f"{awake} {explained(rows['step'])}")
    note = (
        "Base: an empty morph in the same step, without probes. rest_alone: while all planted seeds rest, the step "
        f"calls the program of empty slots. {explained(rows['library'])}"
    )
    report.table("Train step, make_train_step", COLUMNS, rows["library"], note)
    steps = ", ".join(f"{name} {count}" for name, count in STEPS.items() if name in args.models)
    note = (
        f"Base: an empty morph in the loop that fit runs, without probes. Steps a call: {steps}. rest_alone: steps "
        "in which every planted seed rests are the empty morph's, in a loop of their own or another program. "
        f"{explained(rows['loop'])}"
    )
    report.table("Train step, Tolaria's loop", COLUMNS, rows["loop"], note)
    planted_sites = {name: len(workload(name, batch=1, sets=1).morph(planted=True).spec.plants) for name in args.models}
    report.note("Seeds planted: " + ", ".join(f"{name} {n}" for name, n in planted_sites.items()) + ".")
    report.finish()


def forward(work: Any, empty: Any, planted: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The forward pass in evaluation mode."""
    grafted, awake = esper_jax.graft(work.model.apply), esper_jax.awake(planted)
    xs = [x for x, _ in work.batches]

    def variant(apply: Any, variables: Any) -> Any:
        # A function object each, or jit would hand one program to all.
        jitted, given = jax.jit(lambda v, x: apply(v, x)), own(variables)
        return lambda i: jitted(given, xs[i])

    variants = {
        "bare host": variant(work.model.apply, work.variables),
        "copy of it": variant(work.model.apply, work.variables),
        "empty": variant(grafted, empty),
        "planted dormant": variant(grafted, planted),
        AWAKE: variant(grafted, awake),
    }
    same = functools.partial(same_program, work.model.apply, work.variables, grafted)
    same_bits = all(
        np.array_equal(variants["bare host"](i), variants[other](i))
        for i in range(len(xs))
        for other in ("empty", "planted dormant", AWAKE)
    )
    bits = f"outputs {'equal' if same_bits else 'NOT equal'} to the bit"
    return variants, programs(same(empty, xs[0]), same(awake, xs[0]), planted, bits)


def own_loop(work: Any, empty: Any, planted: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The hand-written train step, and the same with a morph."""
    awake = esper_jax.awake(planted)
    variants = {
        "bare host": Stepper(*bare_step(work), work.batches),
        "copy of it": Stepper(*bare_step(work), work.batches),
        "empty": Stepper(*morph_step(work, empty), work.batches),
        "planted dormant": Stepper(*morph_step(work, planted), work.batches),
        AWAKE: Stepper(*morph_step(work, awake), work.batches),
    }
    same = [same_program(*bare_step(work), *morph_step(work, morph), work.batches[0]) for morph in (empty, awake)]
    return variants, programs(*same, planted)


def library(work: Any, empty: Any, planted: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """`make_train_step`'s step, whose base is itself with an empty morph."""

    def variant(morph: Any, **options: Any) -> Stepper:
        return Stepper(*library_step(work, morph, probe_every=0, **options), work.batches, jitted=True)

    variants = {"empty": variant(empty), "copy of it": variant(empty), "planted dormant": variant(planted)}
    variants[ALONE] = variant(planted, rest_alone=True)
    return variants, {**beside_empty(planted), ALONE: "the empty morph's own"}


def beside_empty(planted: Any) -> dict[str, str]:
    """What to say of the programs where an empty morph's is the base."""
    return {"empty": "base", "copy of it": COPY, "planted dormant": behind(planted)}


def behind(planted: Any) -> str:
    """What keeps planted seeds that sleep from being computed."""
    return f"{len(planted.spec.plants)} seeds behind lax.cond"


def loop(work: Any, empty: Any, planted: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The loop that `fit` runs, whose base is itself with an empty morph."""
    looped = functools.partial(Looped, work, count=STEPS[work.name], probe_every=0)
    variants = {"empty": looped(empty), "copy of it": looped(empty), "planted dormant": looped(planted)}
    variants[ALONE] = looped(planted, alone=True)
    scans = variants["empty"].scans
    return variants, {
        **beside_empty(planted),
        ALONE: "scanned, the empty morph's own steps" if scans else "the empty morph's own",
    }


MEASURES = {"forward": forward, "step": own_loop, "library": library, "loop": loop}


def programs(empty: bool, awake: bool, planted: Any, more: str = "") -> dict[str, str]:
    """What to say of each variant's program; whether these two are the host's own."""
    text, different = behind(planted), "jaxpr DIFFERENT"
    return {
        "bare host": "base",
        "copy of it": COPY,
        "empty": IDENTICAL if empty else different,
        "planted dormant": f"{text}; {more}" if more else text,
        AWAKE: IDENTICAL if awake else different,
    }


def compared(
    args: Any, work: Any, variants: dict[str, Any], programs: dict[str, str], steps: int
) -> list[dict[str, Any]]:
    """Time the variants, of so many steps a call, against the first, whose copy is the noise floor."""
    budget = args.budget * (LOOP_BUDGET if steps > 1 else 1)
    timed = interleave(variants, rounds=args.rounds, budget=budget, sets=len(work.batches), seed=args.seed)
    timed = {n: dataclasses.replace(t, samples=t.samples / steps) for n, t in timed.items()}
    names = list(variants)
    base = timed[names[0]]
    floor = noise_floor([ratio(timed["copy of it"], base)])
    rows = []
    for name in names:
        row = {"model": work.name, "batch": work.batch, "variant": name, "program": programs[name]}
        row |= time_columns(timed[name])
        if name != names[0]:
            against = ratio(timed[name], base)
            row |= ratio_columns(against)
            row |= {"floor": floor} if name == "copy of it" else {"verdict": within(against, floor)}
        rows.append(row)
    return rows


def explained(rows: list[dict[str, Any]]) -> str:
    """Below each table: how many variants cannot be told from the base."""
    judged = [row for row in rows if "verdict" in row]
    good = sum(row["verdict"] for row in judged)
    told = f"{good} of {len(judged)} ratios are 1.00 within the noise floor that the copy of the base shows"
    for variant in ("empty", AWAKE):
        these = [row["program"] == IDENTICAL for row in judged if row["variant"] == variant]
        told += f"; {sum(these)} of {len(these)} {variant} morphs trace to the host's own jaxpr" if these else ""
    return f"{told}."


if __name__ == "__main__":
    main()
