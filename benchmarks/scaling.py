"""How cost grows: programs, checkpoints and decisions with the network, communication with devices and processes."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

DEVICES, BATCH = 8, 512
if "--worker" not in sys.argv:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from common import Column, Report, begin, parser  # noqa: E402
from common.collectives import on, results, sent  # noqa: E402
from common.ports import free_port  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

import esper_jax  # noqa: E402
from esper_jax.tolaria import peers, persist  # noqa: E402
from esper_jax.tolaria.checkpoint import Checkpoints  # noqa: E402
from esper_jax.tolaria.leaves import is_spread, parted  # noqa: E402
from esper_jax.tolaria.report import Measured, make_report  # noqa: E402
from esper_jax.tolaria.session import Session  # noqa: E402
from esper_jax.tolaria.sharding import Layout  # noqa: E402
from esper_jax.tolaria.snapshot import take  # noqa: E402
from esper_jax.tolaria.step import Calls, one_step  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOSS = optax.softmax_cross_entropy_with_integer_labels
STRUCTURE = (
    Column("layers", "layers", "count"),
    Column("sites", "sites", "count"),
    Column("slots", "slots", "count"),
    Column("width", "width", "count"),
    Column("seeds", "seeds", "count"),
    Column("parameters", "parameters", "count"),
    Column("trace", "trace", "times"),
    Column("compile", "compile", "times"),
    Column("bytes", "checkpoint, bytes", "count"),
    Column("save", "save", "times"),
    Column("restore", "restore", "times"),
    Column("decision", "decision", "times"),
)
SPREAD = (
    Column("rule", "rule"),
    Column("devices", "devices", "count"),
    Column("processes", "processes", "count"),
    Column("trace", "trace (once)", "time"),
    Column("compile", "compile (once)", "time"),
    Column("step", "step", "times"),
    Column("bytes", "checkpoint, bytes", "count"),
    Column("save", "save (once)", "time"),
    Column("collectives", "collectives", "count"),
    Column("sent", "sent a device and step, bytes", "count"),
    Column("grown", "with a seed a layer, bytes", "count"),
    Column("held", "held a device, bytes", "count"),
)
LARGE = (
    Column("rule", "rule"),
    Column("chips", "chips", "count"),
    Column("sent", "sent a chip and step, bytes", "count"),
    Column("time", "at that bandwidth", "time"),
    Column("formula", "formula"),
)


class Host(nn.Module):
    """Layers of one width."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def main() -> None:
    """Measure and print, or be one of the processes that are measured."""
    made = parser(__doc__ or "")
    made.add_argument(
        "--base",
        type=int,
        nargs=3,
        metavar=("LAYERS", "SLOTS", "WIDTH"),
        default=[8, 4, 256],
        help="what varies from it",
    )
    made.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32], help="depths to measure")
    made.add_argument(
        "--sites", type=int, nargs="+", default=[1, 4], help="numbers of layers that are sites to measure"
    )
    made.add_argument("--slots", type=int, nargs="+", default=[4, 16], help="slots a site to measure")
    made.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024], help="widths to measure")
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 4, 8], help="numbers of seeds to measure")
    made.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, DEVICES], help="meshes to measure")
    made.add_argument(
        "--divided", type=int, nargs=2, metavar=("LAYERS", "WIDTH"), default=[4, 512], help="the host on these meshes"
    )
    made.add_argument("--rules", nargs="+", choices=("dp", "fsdp"), default=["dp", "fsdp"], help="ways to divide")
    made.add_argument("--repeats", type=int, default=3, help="times that each structure is measured, in turn")
    made.add_argument("--chips", type=int, default=512, help="size of the mesh that is estimated")
    made.add_argument("--bandwidth", type=float, default=100e9, help="bytes a second that one of its chips can send")
    made.add_argument("--worker", nargs=7, help="used by the script itself")
    if "--worker" in sys.argv:
        worker(sys.argv[sys.argv.index("--worker") + 1 :])
        return
    args = begin(made)
    report = Report("scaling", __doc__ or "", args)
    base = {**dict(zip(("layers", "slots", "width"), args.base, strict=True)), "seeds": 0, "sites": None}
    layers, width = host = tuple(args.divided)
    cases = [base]
    cases += [{**base, "layers": n} for n in args.layers if n != base["layers"]]
    cases += [{**base, "sites": n} for n in args.sites]
    cases += [{**base, "slots": n} for n in args.slots if n != base["slots"]]
    cases += [{**base, "width": n} for n in args.widths if n != base["width"]]
    cases += [{**base, "seeds": n} for n in args.seeds]
    found = [[structure(**case) for case in cases] for _ in range(args.repeats)]
    rows = [together(list(same)) for same in zip(*found, strict=True)]
    report.table(
        "One device: programs, checkpoints, decisions",
        STRUCTURE,
        rows,
        "Each row differs from the first in one thing. trace and compile: the train step with probes, from empty "
        "caches. save: a whole checkpoint, written and synced. restore: read, and each leaf verified. decision: one "
        "call of Tamiyo, the best of 20. Every layer and the head are sites where no number is asked for. Times: the "
        "median (least to most) of --repeats rounds through all rows.",
    )
    rows = [alone(rule, n, host) for rule in args.rules for n in args.devices]
    rows += [processes(rule, host) for rule in args.rules]
    report.table(
        f"Devices and processes: {layers} layers of {width}, a batch of {BATCH}, on {os.cpu_count()} cores",
        SPREAD,
        rows,
        "Virtual devices share the cores, so their steps say what dividing costs and nothing of what it gains. sent: "
        "by ring algorithms, of the collectives in the compiled program. held: parameters and optimizer state. step: "
        "median (quartiles) of 20. With seeds: a lora of rank 8 at each layer, divided as its site is. On the CPU, XLA "
        "reduces divided gradients "
        "whole where other platforms scatter the sums, which sends half.",
    )
    chips, rows = args.chips, []
    for rule in args.rules:
        for grown in (False, True):
            found = results(lowered(rule, DEVICES, host, grown=grown).as_text())
            there = sent(on(found, DEVICES, chips), chips)
            rows.append(
                {
                    "rule": rule + (" with seeds" if grown else ""),
                    "chips": chips,
                    "sent": there,
                    "time": there / args.bandwidth,
                    "formula": formula(found, chips),
                }
            )
    report.table(
        f"A mesh of {chips}: an estimate, not a measurement",
        LARGE,
        rows,
        f"From the collectives compiled for {DEVICES} devices, with B the bytes of their results and n the chips: "
        f"all-reduce sends 2 B (n-1)/n, all-gather B (n-1)/n, reduce-scatter B/n (n-1) of the whole. The bandwidth is "
        f"--bandwidth, {args.bandwidth / 1e9:.0f} GB/s: set it to that of your chips. Latency, contention and overlap "
        "with computing are left out.",
    )
    report.finish()


def start(
    layers: int, width: int, slots: int, seeds: int, sites: int | None = None, batch: int = 64
) -> tuple[Any, ...]:
    """Model, optimizer, first state and a batch; the first so many layers are sites, or all of them and the head."""
    model, tx = Host(layers, width), esper_jax.growable(optax.adam(1e-3))
    x = np.random.default_rng(0).normal(size=(batch, width)).astype(np.float32)
    y = np.arange(batch, dtype=np.int32) % 10
    where = None if sites is None else lambda path, kind: int(path.removeprefix("Dense_")) < sites
    morph = esper_jax.morph(model.init(jax.random.key(0), x[:1]), slots=slots, where=where)
    for n in range(seeds):
        morph = esper_jax.germinate(morph, f"Dense_{n}", "lora", key=jax.random.key(n), rank=8)
    return model, tx, esper_jax.TrainState.create(morph, tx, key=jax.random.key(1)), (x, y)


def structure(layers: int, slots: int, width: int, seeds: int, sites: int | None) -> dict[str, Any]:
    """One row of the first table."""
    jax.clear_caches()
    model, tx, state, batch = start(layers, width, slots, seeds, sites)
    step = esper_jax.make_train_step(esper_jax.graft(model.apply), LOSS, tx, donate=False)
    marks = [time.perf_counter()]
    low = step.lower(state, batch)  # type: ignore[attr-defined]
    marks.append(time.perf_counter())
    compiled = low.compile()
    marks.append(time.perf_counter())
    state, _ = compiled(state, batch)
    session = Session(take(state))
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as store:
        tree, meta = persist.described(state, session, {})
        began = time.perf_counter()
        store.save(1, tree, meta)
        save = time.perf_counter() - began
        began = time.perf_counter()
        store.read(1)
        restore = time.perf_counter() - began
        size = bytes_in(folder)
    return {
        "layers": layers,
        "sites": len(state.morph.spec.sites),
        "slots": slots,
        "width": width,
        "seeds": seeds,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.morph.params)),
        "trace": marks[1] - marks[0],
        "compile": marks[2] - marks[1],
        "bytes": size,
        "save": save,
        "restore": restore,
        "decision": decision(state),
    }


def bytes_in(folder: str) -> int:
    """The size of all files there."""
    return sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*") if path.is_file())


TIMES = ("trace", "compile", "save", "restore", "decision")


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several that were measured alike: times as median, least and most."""
    times = {name: [row[name] for row in rows] for name in TIMES}
    return rows[0] | {name: [float(np.median(some)), min(some), max(some)] for name, some in times.items()}


def decision(state: esper_jax.TrainState) -> float:
    """Seconds of the fastest of 20 calls of the heuristic on a report of this state."""
    controller = esper_jax.Tamiyo(blueprints=("lora",))
    spec = state.morph.spec
    control = controller.init(spec.unrolled, np.asarray(jax.random.key_data(state.key)))
    report = make_report(state, Measured(1.0, 1.0, 50.0, {}), {})
    taken = []
    for _ in range(20):
        began = time.perf_counter()
        controller.decide(control, report, ())
        taken.append(time.perf_counter() - began)
    return min(taken)


def step_on(layout: Layout, model: Any, tx: Any) -> Any:
    """The train step on a mesh, jitted."""
    calls = Calls(esper_jax.graft(model.apply), LOSS)

    def step(state: Any, batch: Any) -> Any:
        state, metrics = one_step(calls, tx, False, state, batch)
        return layout.pinned(state), metrics

    return jax.jit(step, donate_argnums=0)


def laid_out(rule: str, devices: int, host: tuple[int, int], *, grown: bool) -> tuple[Any, ...]:
    """The jitted step on so many devices, and its arguments in their places."""
    layout = Layout(Mesh(np.asarray(jax.devices()[:devices]), ("data",)), rule)
    model, tx, state, batch = start(*host, 4, host[0] if grown else 0, batch=BATCH)
    return step_on(layout, model, tx), layout.place(state), layout.put_batch(batch)


def lowered(rule: str, devices: int, host: tuple[int, int], *, grown: bool) -> Any:
    """The compiled step."""
    step, state, batch = laid_out(rule, devices, host, grown=grown)
    return step.lower(state, batch).compile()


def spread(rule: str, devices: int, host: tuple[int, int], folder: str) -> dict[str, Any]:
    """One row of the second table; the folder is for a checkpoint, and one that all processes see."""
    step, state, batch = laid_out(rule, devices, host, grown=False)
    marks = [time.perf_counter()]
    low = step.lower(state, batch)
    marks.append(time.perf_counter())
    compiled = low.compile()
    marks.append(time.perf_counter())
    found, grown = results(compiled.as_text()), results(lowered(rule, devices, host, grown=True).as_text())
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves((state.morph.params, state.opt_state))
        for shard in leaf.addressable_shards[:1]
    )
    times = []
    for _ in range(22):
        began = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - began)
    tree, meta = persist.described(state, Session(take(state)), {})
    tree = parted(tree)
    began = time.perf_counter()
    if peers.first() or is_spread(tree):
        with Checkpoints(folder) as store:
            store.save(1, tree, meta)
    save = time.perf_counter() - began
    return {
        "rule": rule,
        "devices": devices,
        "processes": jax.process_count(),
        "trace": marks[1] - marks[0],
        "compile": marks[2] - marks[1],
        "bytes": bytes_in(folder),
        "save": save,
        "step": [float(np.quantile(times[2:], q)) for q in (0.5, 0.25, 0.75)],
        "collectives": sum(count for count, _ in found.values()),
        "sent": sent(found, devices),
        "grown": sent(grown, devices),
        "held": held,
    }


def alone(rule: str, devices: int, host: tuple[int, int]) -> dict[str, Any]:
    """The row of one process."""
    with tempfile.TemporaryDirectory() as folder:
        return spread(rule, devices, host, folder)


def processes(rule: str, host: tuple[int, int]) -> dict[str, Any]:
    """The row of two processes with half of the devices each."""
    half = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES // 2}"
    environment = {**os.environ, "XLA_FLAGS": half, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--worker", rule, *map(str, host), str(free_port()), "2"]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryDirectory() as folder:
        jobs = [
            subprocess.Popen([*command, str(n), folder], env=environment, stdout=said if n == 0 else subprocess.DEVNULL)
            for n in range(2)
        ]
        codes = [job.wait(timeout=300) for job in jobs]
        said.seek(0)
        text = said.read()
    if any(codes):
        raise RuntimeError(f"the two processes ended with {codes}")
    return dict(json.loads(text.splitlines()[-1]))


def worker(given: list[str]) -> None:
    """One of two processes: the row, as JSON."""
    rule, layers, width, port, count, process, folder = given
    peers.join(f"127.0.0.1:{port}", int(count), int(process))
    print(json.dumps(spread(rule, len(jax.devices()), (int(layers), int(width)), folder)), flush=True)


def formula(found: dict[str, tuple[int, int]], chips: int) -> str:
    """How the bytes come about."""
    there = on(found, DEVICES, chips)
    shapes = {"all-reduce": "2 x {b:,} x (n-1)/n", "reduce-scatter": "{b:,} x (n-1)"}
    terms = [shapes.get(kind, "{b:,} x (n-1)/n").format(b=size) for kind, (_, size) in there.items()]
    return " + ".join(f"{kind} {term}" for (kind, _), term in zip(there.items(), terms, strict=True))


if __name__ == "__main__":
    main()
