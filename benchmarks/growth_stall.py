"""How long training stalls when a network grows: planted seeds, background and foreground compilation, GroMo."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from common import Column, Report, begin, parser, workload
from common.events import Event, measure, middle, run
from common.models import MLP, Workload
from common.steps import library_step

import esper_jax
from esper_jax.kasmina.morph import with_spec
from esper_jax.tolaria.step import Calls, one_step, sampled

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLUMNS = (
    Column("model", "model"),
    Column("way", "way to grow"),
    Column("idle_median", "idle step", "time"),
    Column("idle_p99", "idle p99", "time"),
    Column("during_median", "waiting: median / idle", "ratio"),
    Column("during_p95", "p95 / idle", "ratio"),
    Column("during_p99", "p99 / idle", "ratio"),
    Column("waited", "steps", "count"),
    Column("decision_steps", "decision, steps", "steps"),
    Column("worst", "worst step", "time"),
    Column("worst_steps", "in steps", "steps"),
    Column("extra", "extra in all", "time"),
    Column("extra_steps", "in steps", "steps"),
    Column("noise_steps", "noise, steps", "steps"),
    Column("swap_steps", "swap, steps", "steps"),
    Column("swap_grown_steps", "in grown steps", "steps"),
    Column("events", "events", "count"),
)
HOW_GROMO = (
    "GroMo is left out: there is no {python}. It wants torch, so it gets an environment of its own: make gromo, or "
    "python3.11 -m venv .venv-gromo; .venv-gromo/bin/pip install numpy torch==2.13.0; .venv-gromo/bin/pip install "
    "--no-deps gromo==0.1.0. Another place: --gromo PYTHON."
)
Way = Callable[[Workload, "Loop"], Event]


class Loop:
    """How long the loops are: steps in all, the one before which growth is decided, seconds to wait for a program.

    Where these are over, what compiles on idle cores only gets its share of the cores, and two minutes more.
    """

    def __init__(self, steps: int, at: int, patience: float) -> None:
        self.steps, self.at, self.patience = steps, at, patience
        self.hurried = 0


def main() -> None:
    """Measure and print."""
    made = parser(__doc__ or "", budget=4.0, models=("digits", "mlp", "cnn", "transformer"))
    made.set_defaults(models=["digits", "transformer"])
    made.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="ways to grow, besides GroMo")
    made.add_argument("--repeats", type=int, default=1, help="events of each kind")
    made.add_argument("--steps", type=int, default=300, help="steps before and after an event, at most")
    made.add_argument(
        "--patience",
        type=float,
        default=120.0,
        help="seconds to wait for a program before what compiles on idle cores only gets a share of them",
    )
    made.add_argument("--gromo", type=pathlib.Path, default=ROOT / ".venv-gromo/bin/python", help="python with GroMo")
    made.add_argument("--raw", action="store_true", help="write the seconds of every step into the JSON file")
    args = begin(made)
    report = Report("growth_stall", __doc__ or "", args)
    rows, raw = [], []
    for name in args.models:
        work = digits(args) if name == "digits" else workload(name, scale=args.scale, dtype=args.dtype, seed=args.seed)
        loop = fitting(work, args)
        for way in args.ways:
            try:
                events = [WAYS[way](work, loop) for _ in range(args.repeats)]
            except RuntimeError as error:
                report.note(f"{name}, {way} is left out: {error}.")
                continue
            if loop.hurried:
                report.note(
                    f"{name}, {way}: in {loop.hurried} of {args.repeats} events the cores were never idle for "
                    f"{args.patience:g} s, and the compiling process got its share of them."
                )
                loop.hurried = 0
            rows.append(row(name, way, events))
            raw.append({"model": name, "way": way, "events": [plain(event) for event in events]})
        if name == "digits":
            events, note = gromo(work, args, loop)
            if events:
                rows.append(row(name, "GroMo 0.1.0, torch", events))
                raw.append({"model": name, "way": "gromo", "events": [plain(event) for event in events]})
            report.note(note)
    report.table("One growth event in a training loop", COLUMNS, rows, *NOTES)
    if args.raw:
        report.found["events"] = raw
    report.finish()


NOTES = (
    "planted: a dormant seed germinates, data only; the first: with the little program that makes its weights still to "
    "compile, which all other ways find warm. lean: a seed in an empty slot, its train program built by the program "
    "store. thread: the same by a plain thread. recompile: compiled when the next step needs it.",
    "Each step is waited for. Extra time: all steps from the decision until three steps after the swap, above what as "
    "many undisturbed steps take; noise: the same of idle windows of that length. The swap: in idle steps, then in "
    "steps of the grown network. Medians of the events, but of worst steps and p99 the worst.",
    "GroMo: statistics over one pass of the training data, optimal update and its application, of one layer. Its "
    "network also changes at once, while a seed first learns apart.",
)


def row(model: str, way: str, events: list[Event]) -> dict[str, Any]:
    """The table's row of several events of one kind."""
    return {"model": model, "way": way, **middle([measure(event) for event in events]), "events": len(events)}


def plain(event: Event) -> dict[str, Any]:
    """An event as JSON, microseconds rounded."""
    return {
        "seconds": [round(s, 7) for s in event.seconds],
        "decided": event.decided,
        "swapped": event.swapped,
    }


def fitting(work: Workload, args: Any) -> Loop:
    """Loops of at most 2 x `--steps` steps, fewer where a step is slow."""
    step, state = library_step(work, work.morph())
    for _ in range(4):
        began = time.perf_counter()
        state, found = step(state, work.batches[0])
        jax.block_until_ready(found)
        each = time.perf_counter() - began
    steps = int(np.clip(args.budget / 2 / each, 20, args.steps))
    return Loop(2 * steps + 5, steps + 5, args.patience)


def first_site(work: Workload) -> str:
    """The site that grows."""
    return work.morph(where=work.where).spec.sites[0].path


def planted_first(work: Workload, loop: Loop) -> Event:
    """The first germination of a planted seed in a process: the little programs that make its weights compile."""
    jax.clear_caches()
    return planted(work, loop, warm=False)


def planted(work: Workload, loop: Loop, warm: bool = True) -> Event:
    """A later germination of a planted seed: another site has germinated the same before the loop began."""
    morph, site = work.morph(planted=True), first_site(work)
    step, state = library_step(work, morph)

    def event(state: Any) -> Any:
        return step, state.replace(
            morph=esper_jax.germinate(state.morph, site, work.blueprint, key=jax.random.key(1), **work.config)
        )

    if warm:
        event(state)
    return run(step, state, work.batches, steps=loop.steps, at=loop.at, event=event)[0]


def grown(work: Workload, state: Any, tx: Any) -> Any:
    """The state with a seed in an empty slot, its optimizer's state grown too."""
    morph = esper_jax.germinate(state.morph, first_site(work), work.blueprint, key=jax.random.key(1), **work.config)
    return state.replace(morph=morph, opt_state=tx.grow(state.opt_state, morph))


def rehearsed(work: Workload) -> tuple[Any, Any, Any]:
    """A step, its first state and optimizer with all caches empty but for the little programs of a germination."""
    jax.clear_caches()
    step, state = library_step(work, work.morph())
    tx = esper_jax.growable(work.optimizer())
    grown(work, state, tx)
    return step, state, tx


def recompile(work: Workload, loop: Loop) -> Event:
    """A germination in an empty slot whose program is compiled when the next step needs it."""
    step, state, tx = rehearsed(work)
    return run(
        step, state, work.batches, steps=loop.steps, at=loop.at, event=lambda state: (step, grown(work, state, tx))
    )[0]


def lean(work: Workload, loop: Loop) -> Event:
    """The same by the library's program store: the seed waits in GERMINATED while a process of its own compiles.

    Swapped in when it is ready (`swap="asap"` of Tolaria), which is the soonest that any boundary could be.
    """
    try:
        from esper_jax.tolaria import swap
        from esper_jax.tolaria.compiler import make_compiler
        from esper_jax.tolaria.programs import Program, Programs
    except ImportError as error:
        raise RuntimeError("this esper_jax has no program store") from error
    _, state, tx = rehearsed(work)
    calls = Calls(esper_jax.graft(work.model), optax.softmax_cross_entropy_with_integer_labels)
    program = Program("train", lambda state, batch: one_step(calls, tx, sampled(state, 50), state, batch), donate=(0,))
    site, compiler = first_site(work), make_compiler("auto")
    store = Programs([program], compiler)
    if hasattr(compiler, "start"):
        compiler.start()
    whole: dict[str, Any] = {}

    def decide(state: Any) -> Any:
        state = grown(work, state, tx)
        whole["spec"] = state.morph.spec
        store.request(state)
        view, whole["held"] = swap.park(state, swap.Waiting(((site, 0),), 0, None))
        return view

    def arrived() -> Any:
        if not store.ready(whole["spec"]):
            return None
        outcome = store.wait(whole["spec"])
        if outcome.error:
            raise RuntimeError(f"the grown program could not be built: {outcome.error}")
        return program

    def change(state: Any) -> Any:
        return swap.unpark(state, whole["held"])

    try:
        return ahead(work, loop, program, state, decide, arrived, change, lambda: compiler.hurry(True))
    finally:
        compiler.close()


def thread(work: Workload, loop: Loop) -> Event:
    """The same, compiled by a plain thread of this process while the loop goes on; swapped in when it is ready."""
    step, state, tx = rehearsed(work)
    made: dict[str, Any] = {}

    def compile_ahead(shapes: Any) -> None:
        made["step"] = step.lower(shapes, work.batches[0]).compile()

    def decide(state: Any) -> Any:
        made["seed"] = grown(work, state, tx)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), made["seed"])
        made["thread"] = threading.Thread(target=compile_ahead, args=(shapes,))
        made["thread"].start()
        return state

    def arrived() -> Any:
        if "step" not in made and not made["thread"].is_alive():
            raise RuntimeError("the thread ended without a program")
        return made.get("step")

    def change(state: Any) -> Any:
        seed = made["seed"]
        morph = with_spec(state.morph, seed.morph.spec).replace(seeds=seed.morph.seeds, state=seed.morph.state)
        return state.replace(morph=morph, opt_state=dataclasses.replace(state.opt_state, seeds=seed.opt_state.seeds))

    return ahead(work, loop, step, state, decide, arrived, change)


def ahead(
    work: Workload, loop: Loop, step: Any, state: Any, decide: Any, arrived: Any, change: Any, hurry: Any = None
) -> Event:
    """A loop that decides on a growth and goes on; each step asks whether the program is there, and then takes it.

    `decide(state)` begins and gives the state to go on with, `arrived()` the program or None, `change(state)` the
    state that the program takes; `hurry()`, if there is one, is called once when patience is over.
    """
    seconds: list[float] = []
    until = float("inf")
    swapped, last, i = None, loop.steps, 0
    before = time.perf_counter()
    while i < last:
        if i == loop.at:
            until = before + loop.patience
            state = decide(state)
        elif swapped is None and i > loop.at:
            program = arrived()
            if program is not None:
                step, state, swapped = program, change(state), i
                last = i + loop.steps - loop.at
            elif before > until and hurry is None:
                raise RuntimeError(f"the grown program was not there {i - loop.at} steps after the decision")
            else:
                last = max(last, i + 2)
                if before > until:
                    hurry()
                    hurry, until = None, before + 120
                    loop.hurried += 1
        state, found = step(state, work.batches[i % len(work.batches)])
        jax.block_until_ready(found)
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
        i += 1
    assert swapped is not None
    return Event(seconds, loop.at, swapped)


WAYS: dict[str, Way] = {
    "planted": planted,
    "planted, the first": planted_first,
    "lean": lean,
    "thread": thread,
    "recompile": recompile,
}


def digits(args: Any) -> Workload:
    """Handwritten digits (8 x 8 pixels) for an MLP of two hidden layers of 64, as GroMo gets them."""
    x, y = digits_data()
    model = MLP(64, jax.numpy.dtype(args.dtype))
    batches = tuple(
        (jax.numpy.asarray(x[i : i + 64]), jax.numpy.asarray(y[i : i + 64])) for i in range(0, len(x) - 63, 64)
    )
    variables = jax.jit(model.init)(jax.random.key(args.seed), batches[0][0])
    return Workload("digits", model, variables, batches, "Dense_0$", "mlp", {"hidden": 16}, 64)


def digits_data() -> tuple[np.ndarray, np.ndarray]:
    """All images as rows of 64 in 0 to 1, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.data / 16).astype(np.float32), found.target.astype(np.int32)


def gromo(work: Workload, args: Any, loop: Loop) -> tuple[list[Event], str]:
    """GroMo's growth step in a process of its own on the same data, and what to say of it."""
    if not args.gromo.exists():
        return [], HOW_GROMO.format(python=args.gromo.name)
    events, about = [], {}
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "digits.npz"
        np.savez(data, x=np.concatenate([x for x, _ in work.batches]), y=np.concatenate([y for _, y in work.batches]))
        worker = pathlib.Path(__file__).with_name("gromo_worker.py")
        for seed in range(args.repeats):
            options = {"steps": loop.steps, "at": loop.at, "seed": seed}
            command = [str(args.gromo), str(worker), str(data)]
            command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                return [], f"GroMo is left out: its process failed: {reason}"
            about = json.loads(done.stdout)
            events.append(Event(about["seconds"], about["at"], about["at"]))
    before, after = about["parameters"]
    return events, (
        f"GroMo {about['gromo']} on torch {about['torch']}, {about['threads']} threads: {before:,} parameters, then "
        f"{after:,}."
    )


if __name__ == "__main__":
    main()
