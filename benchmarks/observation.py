"""What Foundation's probes cost in a train step, at the default interval and, with `--always`, while they measure.

Variants take turns in one process: steps without probes (twice, for the noise floor) and with probes at the default
interval, or on every step; each call makes a number of steps that holds sampled steps at exactly that interval. Beside
the time stand XLA's own counts for the compiled step; `instructions.py` counts those that the processor executes. The
compiled program is read too: steps that are not sampled must not meet a measurement.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from common import Column, Report, begin, interleave, noise_floor, parser, ratio, ratio_columns, time_columns, workload
from common.steps import Looped

from esper_jax.kasmina.summary import flops

EVERY, STEPS = 50, 50
LIMITS = {"transformer": 1.01, "mlp": 1.02, "cnn": 1.02}
SITES = {
    "planted": "a dormant seed planted at each of {} sites",
    "all": "nothing planted at {} sites, as morph(params) has them",
}
VARIANTS = {"no probes": 0, "no probes again": 0, f"probes every {EVERY}": EVERY}
ALWAYS = {"probes every step": 1}


def steps_of(work: Any, probe_every: int, sites: str) -> Looped:
    """`STEPS` steps of one variant."""
    return Looped(work, work.morph(planted=sites == "planted"), STEPS, probe_every=probe_every)


def hidden(text: str) -> tuple[int, int]:
    """How many operations of the probes the compiled program holds, and how many where steps not sampled run them.

    Scanned, sampled steps are a loop of their own, of that name; elsewhere their measurements sit behind conditionals.
    """
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            bodies[name := found.group(1)] = []
        elif name:
            bodies[name].append(line)
    marked = {name: [line for line in body if "/measure/" in line] for name, body in bodies.items()}
    exposed = {name: [line for line in lines if "/sampled/" not in line] for name, lines in marked.items()}
    inside: set[str] = set()
    todo = [
        callee
        for body in bodies.values()
        for line in body
        if " conditional(" in line
        for callee in re.findall(r"(?:true_computation|false_computation)=%?([\w.\-]+)", line)
        + [n.strip(" %") for group in re.findall(r"branch_computations=\{([^}]*)\}", line) for n in group.split(",")]
    ]
    while todo:
        callee = todo.pop()
        if callee in inside or callee not in bodies:
            continue
        inside.add(callee)
        for line in bodies[callee]:
            todo += re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line)
    total = sum(len(lines) for lines in marked.values())
    return total, sum(len(lines) for name, lines in exposed.items() if name not in inside)


def main() -> None:
    made = parser(__doc__ or "", rounds=40, budget=4.0)
    made.set_defaults(models=["mlp", "transformer"])  # a CNN on a CPU takes minutes
    made.add_argument("--sites", nargs="+", choices=tuple(SITES), default=["all"], help="which sites are probed")
    made.add_argument("--always", action="store_true", help="measure steps that all measure too")
    args = begin(made, reuse=True)
    report = Report("observation", __doc__ or "", args)
    for name in args.models:
        for sites in args.sites:
            measure(name, sites, args, report)
    report.finish()


def measure(name: str, sites: str, args: argparse.Namespace, report: Report) -> None:
    work = workload(name, scale=args.scale, dtype=args.dtype, seed=args.seed)
    intervals = VARIANTS | (ALWAYS if args.always else {})
    variants = {n: steps_of(work, every, sites) for n, every in intervals.items()}
    timed = interleave(variants, rounds=args.rounds, warmup=2, budget=args.budget, least=6, seed=args.seed)
    base, rows = timed["no probes"], []
    for n, timing in timed.items():
        compiled = variants[n].compiled()
        total, outside = hidden(compiled.as_text())
        row = {"variant": n, **time_columns(timing), **ratio_columns(ratio(timing, base))}
        row |= {"step": timing.median / STEPS, "least": float(timing.samples.min() / base.samples.min())}
        row |= {"flops": flops(compiled), "probing": total, "outside": outside}
        rows.append(row)
    floor = noise_floor([ratio(timed["no probes again"], base)])
    columns = (
        Column("variant", "train step"),
        Column("step", "a step", "time"),
        Column("ratio", "time", "ratio"),
        Column("interval", "95%", "interval"),
        Column("least", "fastest", "ratio"),
        Column("probing", "probe operations", "count"),
        Column("outside", "of them in every step", "count"),
        Column("samples", "samples", "count"),
    )
    probed = len(variants["no probes"].state.morph.spec.sites)
    title = f"{name}: {STEPS} steps of {work.batch}, {SITES[sites].format(probed)}"
    note = f"Noise floor, from a second copy without probes: {floor:.3f}. To be reached: {LIMITS[name]:.2f}."
    report.table(title, columns, rows, note)


if __name__ == "__main__":
    main()
