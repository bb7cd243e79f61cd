"""Scenarios of values, controllers and blueprints that are not as they should be; see `scenarios`."""

from __future__ import annotations

import contextlib
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax import Decision, FixedSchedule, Gates, Lifecycle, Stage, TrainingDiverged, register_blueprint
from esper_jax.tolaria.run import Run
from tests.faults.found import GATES, Found, bits, fit
from tests.tolaria import growing

# --- values that are not finite ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned(due: Callable[[Any], bool], poison: Callable[[Any], Any]) -> Iterator[None]:
    """The state of the run within the block is changed once, before the call of the train program where it is due."""
    real, done = Run.dispatch, []

    def dispatch(self: Run, batches: Any, count: int) -> None:
        if not done and due(self.state):
            done.append(True)
            self.state = poison(self.state)
        real(self, batches, count)

    Run.dispatch = dispatch
    try:
        yield
    finally:
        Run.dispatch = real


@contextlib.contextmanager
def watched(due: Callable[[Run], bool]) -> Iterator[list[Any]]:
    """Parameters and optimizer state to the bit, before and after each call of the train program where it is due."""
    real, seen = Run.dispatch, []

    def dispatch(self: Run, batches: Any, count: int) -> None:
        look = due(self)
        for step in (None, real):
            if step is not None:
                step(self, batches, count)
            if look:
                seen.append(tuple(bits((self.state.morph.params, self.state.opt_state.host))))

    Run.dispatch = dispatch
    try:
        yield seen
    finally:
        Run.dispatch = real


def _spoiled(tree: Any) -> Any:
    return jax.tree.map(lambda x: x * jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _host(state: Any) -> Any:
    params = state.morph.params
    return state.replace(morph=state.morph.with_params({**params, "host": _spoiled(params["host"])}))


def _seeds(state: Any) -> Any:
    return state.replace(morph=state.morph.replace(seeds=_spoiled(state.morph.seeds)))


def _optimizer(state: Any) -> Any:
    return state.replace(opt_state=state.opt_state.replace(host=_spoiled(state.opt_state.host)))


def _batches(bad: Callable[[int, int], bool]) -> Callable[[int], Any]:
    """`epoch -> batches`, those for which `bad(epoch, index)` full of NaN."""
    x, y = growing.TRAIN

    def batches(epoch: int) -> Any:
        for index, begin in enumerate(range(0, 256, 32)):
            part = x[begin : begin + 32]
            yield np.full_like(part, np.nan) if bad(epoch, index) else part, y[begin : begin + 32]

    return batches


def not_finite(folder: pathlib.Path, random: np.random.Generator, trials: int) -> Found:
    """NaN in a batch, in all of an epoch, the host, the optimizer, a seed, and for good: skipped, undone, stopped."""
    found = Found()
    finite = lambda state: all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.morph.params))  # noqa: E731

    def run(data: Any = growing.TRAIN, epochs: int = 5, **options: Any) -> Any:
        made = growing.trainer(None, check_data=False, **{"controller": None, **options})
        return made.fit(growing.start(made), data, growing.VALIDATION, epochs=epochs)

    with watched(lambda run: (run.epoch, run.batch) == (2, 3)) as seen:
        state, history = run(_batches(lambda epoch, index: (epoch, index) == (2, 3)), steps_per_dispatch=1)
    found.expect(len(seen) == 2 and seen[0] == seen[1], "one bad batch changed params or optimizer state")
    skipped = [e.data["skipped"] for e in history.of_kind("warning") if "skipped" in e.data]
    found.expect(skipped == [1] and finite(state) and not history.of_kind("rollback"), f"one bad batch: {skipped}")
    found.note("one batch: skipped, no bit of params and optimizer state changed")

    with watched(lambda run: run.epoch == 2) as seen:
        state, history = run(_batches(lambda epoch, index: epoch == 2), steps_per_dispatch=1)
    found.expect(len(seen) == 16 and len(set(seen)) == 1, "eight bad batches changed params or optimizer state")
    rules = [e.data["rule"] for e in history.of_kind("rollback")]
    found.expect(rules == ["non-finite"] and finite(state), f"an epoch of bad batches: {rules}")
    found.note("an epoch of batches: rolled back once")

    for name, poison in (("host", _host), ("optimizer", _optimizer)):
        with poisoned(lambda state: int(state.ticks) == 3, poison):
            state, history = run()
        rules = [e.data["rule"] for e in history.of_kind("rollback")]
        found.expect(rules == ["non-finite"] and finite(state), f"{name}: {rules}")
        found.note(f"the {name}: rolled back once")

    with poisoned(lambda state: bool(state.morph.seeds), _seeds):
        plan = {1: [("Dense_0", "lora", {"rank": 1})]}
        state, history = run(
            epochs=5, controller=FixedSchedule(plan, gates=Gates(min_training_ticks=3, min_health=0.0))
        )
    gone = [e for e in history.of_kind("stage") if e.data["after"] == "PRUNED"]
    host = bits(state.morph.host) == bits(run(epochs=5)[0].morph.host)
    found.expect(len(gone) == 1 and not history.of_kind("rollback") and host, f"a seed: {gone}, host untouched: {host}")
    found.note("a seed: pruned, the host untouched")

    try:
        run(_batches(lambda epoch, index: epoch > 0), epochs=30, max_rollbacks=3)
        found.failures.append("a run that always diverges came to its end")
    except TrainingDiverged as stop:
        words = "rolled back 4 times (max_rollbacks=3)" in str(stop)
        found.expect(words and finite(stop.state), f"for good: {stop}")
        found.note("for good: a clear stop with the last good state")
    return found


def after_fossilisation(folder: pathlib.Path, random: np.random.Generator, trials: int) -> Found:
    """A rollback in the epoch after a seed was kept leaves a finite model with the kept seed in it."""
    found = Found()
    plan = {1: [("Dense_0", "lora", {"rank": 1})]}
    options = {"controller": FixedSchedule(plan, gates=GATES, keep="always"), "lifecycle": Lifecycle(GATES, tempo=3)}
    kept_now = lambda state: any(Stage.FOSSILIZED in life.stage for life in state.morph.state.values())  # noqa: E731
    with poisoned(kept_now, _host):
        state, history = fit(growing.trainer(None, **options), 14)
    (kept,) = [e.epoch for e in history.of_kind("stage") if e.data["after"] == "FOSSILIZED"]
    (rollback,) = history.of_kind("rollback")
    found.expect(rollback.epoch == kept + 1 and rollback.data["to_step"] == kept * 8, f"{rollback}")
    stages = [seed["stage"] for seed in history.records[-1]["seeds"]]
    leaves = jax.tree.leaves(state.morph.params)
    found.expect(stages == ["FOSSILIZED"] and all(bool(jnp.isfinite(x).all()) for x in leaves), f"{stages}")
    found.note("finite, the kept seed in it")
    return found


# --- controllers and blueprints ---------------------------------------------------------------------------------------


class Rogue:
    """A controller that does `act(report)` at each tick."""

    def __init__(self, act: Callable[[Any], tuple[Decision, ...]]) -> None:
        self.act = act

    def init(self, spec: Any, key: Any) -> Any:
        """No state."""
        return None

    def decide(self, state: Any, report: Any, feedback: Any) -> Any:
        """What `act` says."""
        return self.act(report), state


def rogue_controllers(folder: pathlib.Path, random: np.random.Generator, trials: int) -> Found:
    """A controller that raises, or proposes what cannot be: every tick is told, and the host trains as if alone."""
    found = Found()
    alone = bits(fit(growing.trainer(None, controller=None), 4)[0].morph)

    def raises(report: Any) -> tuple[Decision, ...]:
        raise KeyError("no such thing")

    def illegal(report: Any) -> tuple[Decision, ...]:
        site = "Dense_0"
        wrong = (
            Decision("germinate", "nowhere", None, "lora"),
            Decision("germinate", site, None, "no such blueprint"),
            Decision("germinate", site, None, "lora", {"rank": "many"}),
            Decision("germinate", site, 99, "lora"),
            Decision("fossilize", site, 0),
            Decision("explode", site, 0),
            Decision("set_alpha", site, 0, alpha=float("nan")),
            Decision("germinate", site, None, "lora", confidence=float("nan")),
        )
        return wrong[(report.epoch - 1) % 4 * 2 :][:2]

    free = threading.Event()

    def hangs(report: Any) -> tuple[Decision, ...]:
        free.wait()
        return ()

    for name, act in (("raises", raises), ("hangs", hangs), ("proposes what cannot be", illegal)):
        state, history = fit(growing.trainer(None, controller=Rogue(act), controller_deadline=0.2), 4)
        if name == "hangs":
            free.set()
        found.expect(bits(state.morph) == alone, f"{name}: the host trained otherwise")
        warned = [e.message for e in history.of_kind("warning") if "controller" in e.data]
        refused = [e for e in history.of_kind("decision") if e.data["outcome"] == "refused" and e.data["why"]]
        words = {"raises": ["no such thing"] * 4, "hangs": ["did not answer within"] + ["still busy"] * 3}.get(name, [])
        found.expect(len(warned) == len(words) and all(map(str.__contains__, warned, words)), f"{name}: {warned}")
        found.expect(len(refused) == (0 if words else 8), f"{name}: {len(refused)} refused")
        found.note(f"{name}: told, the host as if alone")
    return found


def broken_blueprints(folder: pathlib.Path, random: np.random.Generator, trials: int) -> Found:
    """A blueprint that raises when traced, only in the step, in XLA, or is misshapen: told, the host as if alone."""
    found = Found()

    def init(key: Any, site: Any) -> Any:
        return {"w": jnp.zeros((site.out_features, site.out_features))}

    def traced(params: Any, u: Any) -> Any:
        raise RuntimeError("cannot be traced")

    def stepped(params: Any, u: Any) -> Any:
        if u.shape[0] not in (1, 2):  # the batches of a program, and not the example that a germination looks at
            raise RuntimeError("cannot be traced in a step")
        return u @ params["w"]

    def compiled(params: Any, u: Any) -> Any:
        """Traced and lowered by JAX; XLA then finds no code for it."""
        there = jax.ffi.ffi_call("esper_jax_no_such_code", jax.ShapeDtypeStruct(u.shape, u.dtype))
        return there(jax.lax.stop_gradient(u)) @ params["w"]

    def shaped(params: Any, u: Any) -> Any:
        return jnp.concatenate([u @ params["w"]] * 2, -1)

    alone = bits(fit(growing.trainer(None, controller=None), 5)[0].morph.host)
    for name, apply in (("traced", traced), ("stepped", stepped), ("compiled", compiled), ("shaped", shaped)):
        register_blueprint(f"broken_{name}", init=init, apply=apply)
        plan = {1: [("Dense_0", f"broken_{name}", {})]}
        state, history = fit(growing.trainer(None, controller=FixedSchedule(plan, gates=GATES)), 5)
        found.expect(bits(state.morph.host) == alone, f"{name}: the host trained otherwise")
        told = [f"{e.message} {e.data}" for e in history.events if e.kind in ("decision", "compile_failed")]
        why = {"compiled": "esper_jax_no_such_code", "shaped": "gives shape (2, 8)"}.get(name, "cannot be traced")
        found.expect(any(why in text for text in told), f"{name}: {told}")
        found.expect(not state.morph.spec.plants, f"{name}: it is still planted")
        found.note(f"{name}: told, the host as if alone")
    return found
