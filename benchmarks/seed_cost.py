"""What a seed costs in each stage of its life, against what its arithmetic alone would cost (its FLOP share)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from common import Column, Report, begin, interleave, parser, ratio, ratio_columns, time_columns, workload
from common.models import Workload
from common.steps import Stepper, bare_step, morph_step, own

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.seeds._convolve import convolve, plain

STAGES = {"DORMANT": 0.0, "TRAINING": 0.0, "BLENDING": 0.5, "HOLDING": 1.0, "FOSSILIZED": 1.0}
SEEDS = {
    "mlp": (("mlp", {"hidden": 64}), ("lora", {"rank": 8})),
    "cnn": (("conv_light", {}), ("depthwise", {})),
    "transformer": (("lora", {"rank": 8}),),
}
COLUMNS = (
    Column("model", "model"),
    Column("seeds", "seeds"),
    Column("way", "way"),
    Column("stage", "stage"),
    Column("median", "median", "time"),
    Column("ratio", "time / bare", "ratio"),
    Column("interval", "95% interval", "interval"),
    Column("flops", "FLOPs / bare", "ratio"),
    Column("over", "time over FLOPs", "ratio"),
)
CONVOLUTION = (
    Column("way", "weight gradient of a convolution"),
    Column("median", "median", "time"),
    Column("p95", "p95", "time"),
    Column("ratio", "over plain, outside", "ratio"),
)
TRAP = 2.0


def main() -> None:
    """Measure and print."""
    made = parser(__doc__ or "", rounds=60, budget=1.2)
    made.add_argument("--all", action="store_true", help="all blueprints of each model, not the first alone")
    args = begin(made, reuse=True)
    report = Report("seed_cost", __doc__ or "", args)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        work = workload(name, scale=args.scale, dtype=args.dtype, seed=args.seed)
        for blueprint, config in SEEDS[name][: None if args.all else 1]:
            rows += measured(args, dataclasses.replace(work, blueprint=blueprint, config=scaled(config, args.scale)))
    report.table(
        "One train step with a seed at every planted site, by stage",
        COLUMNS,
        rows,
        "FLOPs: XLA's count of the lean program over that of the bare host, 1 + the seeds' share. Planted seeds sit "
        "behind lax.cond, lean ones do not; a lean seed has no DORMANT. Base: the bare host.",
        copies(rows),
    )
    report.note(trap(rows))
    if "cnn" in args.models:
        report.table("The trap itself", CONVOLUTION, convolutions(args), *TOLD)
    report.finish()


TOLD = (
    "Control flow: lax.cond on a flag that only the device knows. A plain convolution there is what seeds used before "
    "they had one of their own; on a GPU or TPU the two are the same.",
)


def scaled(config: dict[str, int], scale: float) -> dict[str, int]:
    """A blueprint's sizes at the models' scale."""
    return {name: max(1, round(size * scale)) for name, size in config.items()}


def measured(args: Any, work: Workload) -> list[dict[str, Any]]:
    """The bare host, its copy, planted seeds in each stage (one program), lean ones in each of theirs (another)."""
    planted = work.morph(planted=True)
    lean = work.morph(where=work.where)
    for site in lean.spec.sites:
        lean = esper_jax.germinate(lean, site.path, work.blueprint, key=jax.random.key(1), **work.config)
    planted = planted.replace(seeds=lean.seeds)
    step, state = bare_step(work)
    variants: dict[Any, Any] = {
        ("bare", "-"): Stepper(step, state, work.batches),
        ("copy", "-"): Stepper(*bare_step(work), work.batches),
    }
    programs = {}
    for way, morph in (("planted", planted), ("lean", lean)):
        step, _ = morph_step(work, morph)
        programs[way] = jax.jit(step, donate_argnums=0)
        for stage, alpha in STAGES.items():
            if way == "planted" or stage != "DORMANT":
                _, first = morph_step(work, in_stage(morph, stage, alpha))
                variants[way, stage] = Stepper(programs[way], first, work.batches, jitted=True)
    timed = interleave(variants, rounds=args.rounds, budget=args.budget, seed=args.seed)
    for way, program in programs.items():
        if program._cache_size() != 1:
            raise AssertionError(f"{work.name}, {way}: {program._cache_size()} programs for all stages, not 1")
    host = flops(*bare_step(work), work.batches[0])
    grown = flops(*morph_step(work, lean), work.batches[0])
    rows = []
    for way, stage in variants:
        row = {"model": work.name, "seeds": f"{len(planted.spec.plants)} {work.blueprint}", "way": way, "stage": stage}
        row |= time_columns(timed[way, stage])
        if way != "bare":
            row |= ratio_columns(ratio(timed[way, stage], timed["bare", "-"]))
        if stage not in ("-", "DORMANT") and host and grown:
            row |= {"flops": grown / host, "over": row["ratio"] / (grown / host)}
        rows.append(row)
    return rows


def in_stage(morph: esper_jax.Morph, stage: str, alpha: float) -> esper_jax.Morph:
    """The morph with every planted seed in that stage at that alpha."""
    state = dict(morph.state)
    for plant in morph.spec.plants:
        life = state[plant.site]
        state[plant.site] = life.replace(
            stage=life.stage.at[plant.slot].set(int(Stage[stage])),
            alpha=life.alpha.at[plant.slot].set(alpha),
            generation=life.generation.at[plant.slot].set(1),
        )
    return morph.replace(state=state)


def flops(step: Any, state: Any, batch: Any) -> float | None:
    """XLA's count of a step's floating-point operations; None where the platform gives none."""
    found = jax.jit(step, donate_argnums=0).lower(state, batch).compile().cost_analysis()  # the program that was timed
    return float(found["flops"]) if found and found.get("flops", 0) > 0 else None


def copies(rows: list[dict[str, Any]]) -> str:
    """How far a second copy of the bare host is from the first."""
    worst = max((row for row in rows if row["way"] == "copy"), key=lambda row: abs(row["ratio"] - 1))
    return f"Noise: the copy of the bare host that is farthest off has a ratio of {worst['ratio']:.3f}."


def trap(rows: list[dict[str, Any]]) -> str:
    """Whether planted seeds train far slower than lean ones: what a convolution in control flow does on the CPU."""
    median = {(r["model"], r["seeds"], r["way"], r["stage"]): r["median"] for r in rows}
    over = {
        f"{model}, {seeds}": found / median[model, seeds, "lean", stage]
        for (model, seeds, way, stage), found in median.items()
        if way == "planted" and stage == "TRAINING"
    }
    told = ", ".join(f"{name} {value:.2f}" for name, value in over.items())
    caught = [name for name, value in over.items() if value > TRAP]
    verdict = f"CAUGHT in control flow: {', '.join(caught)}" if caught else f"none is above {TRAP:.0f}"
    return f"Planted over lean while TRAINING: {told}; {verdict}."


def convolutions(args: Any) -> list[dict[str, Any]]:
    """The weight gradient of XLA's convolution and of the seeds' own, outside and inside `lax.cond`."""
    width = max(1, round(32 * args.scale))
    x = jax.random.normal(jax.random.key(0), (64, 16, 16, width)).astype(args.dtype)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, width, width)).astype(args.dtype)
    ways = {"plain": lambda x, k: plain(1, x, k), "the seeds' own": convolve}
    variants = {}
    for name, function in ways.items():

        def gradient(kernel: Any, flag: Any, function: Any = function) -> Any:
            return jax.grad(lambda k: jnp.mean(jnp.square(function(x, k).astype(jnp.float32))))(kernel)

        def inside(kernel: Any, flag: Any, function: Any = function) -> Any:
            def loss(kernel: Any) -> Any:
                y = jax.lax.cond(flag, lambda k: function(x, k), lambda k: x, kernel)
                return jnp.mean(jnp.square(y.astype(jnp.float32)))

            return jax.grad(loss)(kernel)

        for place, measured in (("outside", gradient), ("inside control flow", inside)):
            jitted = jax.jit(measured)
            given = own((kernel, jnp.ones((), bool)))
            variants[f"{name}, {place}"] = lambda i, jitted=jitted, given=given: jitted(*given)
    timed = interleave(variants, rounds=min(args.rounds, 20), budget=args.budget, sets=1, least=3, seed=args.seed)
    base = timed["plain, outside"]
    return [
        {"way": n, **time_columns(t), "ratio": None if t is base else ratio(t, base).median} for n, t in timed.items()
    ]


if __name__ == "__main__":
    main()
