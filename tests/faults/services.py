"""Scenarios of the services around a run, its bus and its library of seeds; see `scenarios`."""

from __future__ import annotations

import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from esper_jax import Urza, UrzaError
from esper_jax.nissa import Event, course
from esper_jax.oona import Address, deliver
from tests.faults.disk import DAMAGE
from tests.faults.found import Found, bits, fit
from tests.servers import RedisServer, free_port
from tests.tolaria import growing

EPOCHS = 8


class At:
    """A sink that does something when an epoch has been told, in the middle of training."""

    def __init__(self, actions: dict[int, Callable[[], Any]]) -> None:
        self.actions = actions

    def emit(self, event: Event) -> None:
        """What is due at that epoch."""
        if event.kind == "epoch" and event.epoch in self.actions:
            self.actions[event.epoch]()

    def close(self) -> None:
        """Nothing."""


CASES = ("absent", "killed", "paused", "full")


def bus(folder: pathlib.Path, random: np.random.Generator, trials: int) -> Found:
    """The bus's server absent, killed, paused or full: each event arrives once, and the run is as if alone."""
    found = Found()
    state, history = fit(growing.trainer(None), EPOCHS)
    expected, told = bits(state.morph), course(history.events)
    plain, compiling = slowest(history)
    for trial in range(trials):
        case = CASES[trial % len(CASES)]
        with RedisServer() as server:
            made = _with_bus(case, folder / str(trial), server)
            state, history = fit(made, EPOCHS)
            found.expect(bits(state.morph) == expected, f"{case}: the run trained otherwise")
            found.expect(course(history.events) == told, f"{case}: another course of events")
            took, took_compiling = slowest(history)
            found.expect(took < plain + 2.0, f"{case}: an epoch took {took:.1f} s")
            found.expect(took_compiling < compiling + 10.0, f"{case}: one that compiles took {took_compiling:.1f} s")
            if case == "absent":
                found.expect(made.bus.delivered == 0 < len(made.bus.ids()), f"{case}: nothing waits on disk")
            else:
                if not made.bus.flush(0):  # the server was away for longer than the end of a run waits: kept on disk
                    server.client().ping()  # answers when it is back
                    deliver(folder / str(trial) / "oona", made.bus.address)
                ids = [entry["id"] for _, entry in server.client().xrange(made.bus.address.stream)]
                found.expect(ids == made.bus.ids() and len(ids) >= len(told), f"{case}: {len(ids)} ids in the stream")
                found.expect(made.bus.outages == 1, f"{case}: {made.bus.outages} outages")
        found.note(f"{case}: told, every event once, the run as if alone")
    return found


def _with_bus(case: str, directory: pathlib.Path, server: RedisServer) -> Any:
    """A trainer whose bus fails in that way at the fourth epoch, when all is compiled, and comes back at the sixth."""

    def memory(size: int) -> None:
        server.client().config_set("maxmemory", size)

    def noticed(then: Callable[[], Any]) -> Callable[[], None]:
        def act() -> None:
            while not made.bus.outages:
                time.sleep(0.01)
            then()

        return act

    actions: dict[str, dict[int, Callable[[], Any]]] = {
        "absent": {},
        "killed": {4: server.kill, 6: noticed(server.restart)},
        "paused": {4: lambda: server.client().client_pause(3000, all=True)},
        "full": {4: lambda: memory(1), 6: noticed(lambda: memory(0))},
    }
    url = f"redis://127.0.0.1:{free_port()}" if case == "absent" else server.url
    address = Address(url, directory.name, timeout=0.5)
    made = growing.trainer(directory, oona=address, oona_optional=case == "absent", sinks=(At(actions[case]),))
    return made


def slowest(history: Any) -> tuple[float, float]:
    """Seconds of the slowest epoch that compiles nothing, and of the slowest that does (first, or after growth)."""
    compiling = {1, *(event.epoch + 1 for event in history.of_kind("germinated"))}
    took = {record["epoch"]: record["seconds"] for record in history.records}
    return max(took[epoch] for epoch in took.keys() - compiling), max(took[epoch] for epoch in compiling)


def tampered(folder: pathlib.Path, random: np.random.Generator, trials: int) -> Found:
    """Each file of a library of seeds damaged in four ways: never another seed, and a run goes on without it."""
    import jax

    import esper_jax
    from tests.urza.grower import TRAIN, VALIDATION, Grower, trainer
    from tests.urza.world import host_params, same_bits, stored

    found, whole = Found(), folder / "library"
    site = esper_jax.morph(host_params()).spec.by_path["Dense_0"]
    seed = stored("mlp", site, hidden=2)
    name = Urza(whole).put(seed, contribution=1.5, program=True)
    files = [path for path in sorted(whole.rglob("*")) if path.is_file() and path.name != ".lock"]

    def run(library: pathlib.Path | None, controller: Any) -> Any:
        made = trainer(None, controller, None if library is None else Urza(library))
        return made.fit(made.init(host_params(), key=jax.random.key(0)), TRAIN, VALIDATION, epochs=3)

    alone = bits(run(None, None)[0].morph.host)
    cases = [(path.relative_to(whole), kind) for path in files for kind in DAMAGE]
    for index in random.permutation(len(cases))[:trials]:
        file, kind = cases[index]
        copy = folder / "copy"
        shutil.copytree(whole, copy)
        DAMAGE[kind](copy / file, random)
        case = f"{kind}: {file.parts[0]}"
        try:
            again = Urza(copy).get(name)
            found.expect(same_bits(again.params, seed.params), f"{case}: another seed came back")
            found.note(f"{case}: the same seed")
        except UrzaError as error:
            found.expect(file.name[:12] in str(error), f"{case}: the error names no file: {error}")
            state, history = run(copy, Grower(name))
            refused = [e for e in history.of_kind("decision") if e.data["outcome"] == "refused"]
            found.expect(len(refused) == 1 and "stored:" in refused[0].data["why"], f"{case}: not told")
            found.expect(bits(state.morph.host) == alone, f"{case}: the host trained otherwise")
            found.note(f"{case}: refused by name, the host as if alone")
        shutil.rmtree(copy)
    return found
