"""What Foundation's probes cost in instructions that the processor executes, by the interval at which they measure.

Counted by valgrind's callgrind on one thread, which no other load on the machine disturbs. A step is the average of
one that is sampled and of as many others as stand between two of those; valgrind takes most of a minute for a step of
the transformer, so a few are counted and not all. With `--again` each variant is counted so many times.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
from common import Column, Report, begin, parser, workload
from common.callgrind import counted
from common.steps import Looped
from observation import EVERY, LIMITS, SITES, steps_of

MORE = {"transformer": 4, "mlp": 100, "cnn": 1}
"""By how many steps the two calls differ of which instructions are counted, for each model."""
COLUMNS = (
    Column("model", "model"),
    Column("variant", "train step"),
    Column("instructions", "instructions", "count"),
    Column("ratio", "ratio", "ratio"),
    Column("sampled", "the sampled step", "count"),
    Column("other", "each other", "count"),
)


def main() -> None:
    """Count and print."""
    made = parser(__doc__ or "")
    made.set_defaults(models=["mlp", "transformer"])
    made.add_argument("--sites", choices=tuple(SITES), default="all", help="which sites are probed")
    made.add_argument("--again", type=int, default=1, help="how many times each is counted")
    args = begin(made)
    if shutil.which("valgrind") is None or args.platform != "cpu":
        made.error("instructions are counted by valgrind, which must be installed, and with --platform cpu")
    report = Report("instructions", __doc__ or "", args)
    rows = []
    for name in args.models:
        work = workload(name, scale=args.scale, dtype=args.dtype, seed=args.seed)
        base = 0.0
        for every in (0, EVERY) * args.again:
            row = instructions(steps_of(work, every, args.sites), MORE[name])
            base = row["instructions"] if every == 0 else base
            ratio = {"ratio": row["instructions"] / base} if every else {}
            rows.append({"model": name, "variant": f"probes every {every}" if every else "no probes", **row, **ratio})
        report.note(f"{name}, to be reached: {LIMITS[name]:.2f}.")
    report.table("Instructions of a train step", COLUMNS, rows)
    report.finish()


def instructions(steps: Looped, more: int) -> dict[str, Any]:
    """Instructions of the first step, which is sampled if any is, of each other, and of a step on average.

    The first has a call of its own. What each of the others adds is told from two more calls that make several, where a
    call may make several, and otherwise from one.
    """
    sizes = (1, 2, 2 + more) if steps.scans else (1, 1)
    one, *others = [(steps.batches[0], np.int32(size)) for size in sizes]
    first, *rest = counted(steps.steps.function, steps.state, (one, one), (one, *others))
    other = (rest[1] - rest[0]) / more if steps.scans else rest[0]
    return {"sampled": first, "other": other, "instructions": (first + (EVERY - 1) * other) / EVERY}


if __name__ == "__main__":
    main()
