"""How long programs take to make: trace, lower and compile, of the bare host, empty, planted and grown morphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from common import Column, Report, begin, parser, workload
from common.models import Workload
from common.steps import bare_step, library_step, own

import esper_jax
from esper_jax.tolaria.evaluate import Evaluator
from esper_jax.tolaria.step import Calls

PHASES = ("trace", "lower", "compile")
ORDER = ("step", "eval", "contribution")
COLUMNS = (
    Column("model", "model"),
    Column("program", "program"),
    Column("structure", "structure"),
    Column("trace", "trace", "time"),
    Column("lower", "lower", "time"),
    Column("compile", "compile", "time"),
    Column("whole", "whole", "time"),
    Column("worst", "worst whole", "time"),
    Column("ratio", "over bare", "ratio"),
    Column("equations", "equations", "count"),
)


def main() -> None:
    """Measure and print."""
    made = parser(__doc__ or "")
    made.set_defaults(models=["mlp", "transformer"])
    made.add_argument("--repeats", type=int, default=1, help="times each program is made, all caches cleared before")
    made.add_argument("--grown", type=int, nargs="+", default=[1], help="seeds in the grown morphs")
    args = begin(made)
    if jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_enable_compilation_cache", False)
    report = Report("compile_time", __doc__ or "", args)
    rows = []
    for name in args.models:
        work = workload(name, scale=args.scale, dtype=args.dtype, sets=1, seed=args.seed)
        rows += measured(args, work)
    report.table(
        "Time to make a program",
        COLUMNS,
        rows,
        f"Medians of {args.repeats}, each from empty caches and without a persistent one. step: make_train_step with "
        "its probes; of the bare host a hand-written step without guard and meters. contribution: four configurations "
        "of alphas in one program. equations: of the jaxpr, those of inner ones included.",
    )
    report.finish()


def measured(args: Any, work: Workload) -> list[dict[str, Any]]:
    """All programs of one model, structures taken in turn so that load falls on all alike."""
    made = {
        (program, structure): build
        for structure, morph in structures(work, args.grown).items()
        for program, build in programs(work, morph).items()
    }
    taken: dict[Any, list[dict[str, float]]] = {key: [] for key in made}
    for _ in range(args.repeats):
        for key, build in made.items():
            taken[key].append(make(*build()))
    rows = []
    for (program, structure), found in sorted(taken.items(), key=lambda item: ORDER.index(item[0][0])):
        row = {"model": work.name, "program": program, "structure": structure, "equations": found[0]["equations"]}
        row |= {phase: float(np.median([f[phase] for f in found])) for phase in PHASES}
        whole = [sum(f[phase] for phase in PHASES) for f in found]
        row |= {"whole": float(np.median(whole)), "worst": max(whole)}
        rows.append(row)
    base = {row["program"]: row["whole"] for row in rows if row["structure"] == "bare host"}
    for row in rows:
        if row["structure"] != "bare host" and row["program"] in base:
            row["ratio"] = row["whole"] / base[row["program"]]
    return rows


def structures(work: Workload, grown: list[int]) -> dict[str, esper_jax.Morph | None]:
    """The bare host (None), an empty morph, planted seeds, and morphs with lean seeds."""
    planted, lean = work.morph(planted=True), work.morph(where=work.where)
    found: dict[str, esper_jax.Morph | None] = {
        "bare host": None,
        "empty": work.morph(),
        f"planted {len(planted.spec.plants)}": planted,
    }
    sites = [site.path for site in lean.spec.sites]
    for count in sorted(grown):
        while len(lean.spec.plants) < count:
            site = sites[len(lean.spec.plants) % len(sites)]
            lean = esper_jax.germinate(lean, site, work.blueprint, key=jax.random.key(1), **work.config)
        found[f"grown {count}"] = lean
    return found


def programs(work: Workload, morph: esper_jax.Morph | None) -> dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]]:
    """Functions that give each program anew: a jitted function and its arguments."""
    batch = work.batches[0]
    if morph is None:

        def step() -> Any:
            function, state = bare_step(work)
            return jax.jit(function, donate_argnums=0), (state, batch)

        def evaluate() -> Any:
            forward = lambda v, b: work.loss(work.model.apply(v, b[0]), b[1]).mean()  # noqa: E731
            return jax.jit(forward), (own(work.variables), batch)

        return {"step": step, "eval": evaluate}

    def evaluator() -> Evaluator:
        return Evaluator(Calls(esper_jax.graft(work.model), work.loss), None, work.batch)

    def library() -> Any:
        function, state = library_step(work, morph)
        return function, (state, batch)

    found = {"step": library, "eval": lambda: (jitted(evaluator(), "plain"), (morph, batch))}
    if morph.spec.plants:
        masks = {path: np.ones((4, morph.spec.slots), bool) for path in morph.state}
        found["contribution"] = lambda: (jitted(evaluator(), "rows"), (morph, masks, batch))
    return found


def jitted(evaluator: Evaluator, name: str) -> Any:
    """One of an evaluator's jitted functions."""
    found = getattr(evaluator, name, None) or getattr(evaluator, f"_{name}")
    return getattr(found, "jitted", found)


def make(function: Any, given: tuple[Any, ...]) -> dict[str, float]:
    """Seconds to trace, lower and compile a jitted function for its arguments, and its size."""
    jax.clear_caches()
    marks = [time.perf_counter()]
    traced = function.trace(*given)
    marks.append(time.perf_counter())
    lowered = traced.lower()
    marks.append(time.perf_counter())
    lowered.compile()
    marks.append(time.perf_counter())
    return {**dict(zip(PHASES, np.diff(marks), strict=True)), "equations": equations(traced.jaxpr.jaxpr)}


def equations(jaxpr: Any) -> int:
    """Equations of a jaxpr and of all inside them."""
    inner = [sub for eqn in jaxpr.eqns for value in eqn.params.values() for sub in jaxprs(value)]
    return len(jaxpr.eqns) + sum(equations(sub) for sub in inner)


def jaxprs(value: Any) -> list[Any]:
    """The jaxprs in an equation's parameter."""
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    if hasattr(value, "eqns"):
        return [value]
    if isinstance(value, tuple | list):
        return [sub for item in value for sub in jaxprs(item)]
    return []


if __name__ == "__main__":
    main()
