"""What goes wrong around a program that is built beside the training: told, survived, and no step late."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_jax
from esper_jax import FixedSchedule, Gates, Lifecycle, TrainingInterrupted, register_blueprint
from esper_jax.kasmina.spec import Spec
from esper_jax.tolaria import compiler as compilers
from esper_jax.tolaria.compiler import BuildError, Built, Job, ProcessCompiler, ThreadCompiler
from esper_jax.tolaria.programs import Outcome, Program, Programs
from tests.tolaria import growing
from tests.tolaria.test_resume import bits

GATES = Gates(min_training_ticks=1, min_health=0.1)
LORA = {2: [("Dense_1", "lora", {"rank": 2})]}


def trainer(directory: Any = None, plan: Any = LORA, **options: Any) -> Any:
    options = {"compile_in": "thread", **options}
    return growing.trainer(
        directory, controller=FixedSchedule(plan, gates=GATES), lifecycle=Lifecycle(GATES, tempo=2), **options
    )


def fit(made: Any, epochs: int) -> Any:
    return made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=epochs)


class Failing(ThreadCompiler):
    """A compiler that cannot build the programs of these names."""

    names: tuple[str, ...] = ("train",)

    def _build(self, job: Job) -> Built:
        if job.name in self.names:
            raise BuildError(f"{job.name}: no registers left")
        return super()._build(job)


def test_a_program_that_fails_after_the_next_tick_still_reaches_the_controller(monkeypatch: Any) -> None:
    """The decision was answered as applied at that tick; now it is answered as refused."""
    monkeypatch.setattr("esper_jax.tolaria.trainer.make_compiler", lambda where, **_: Failing())
    _, history = fit(trainer(swap=11), 5)
    (failed,) = history.of_kind("compile_failed")
    assert "no registers left" in failed.message and failed.step == 27
    outcomes = [(e.data["outcome"], e.data["site"]) for e in history.of_kind("feedback")]
    assert outcomes == [("applied", "Dense_1"), ("refused", "Dense_1")]
    assert "no registers left" in history.of_kind("feedback")[1].data["reason"]


def test_contributions_are_built_ahead_and_cost_no_compilation_of_their_own() -> None:
    made = trainer()
    _, history = fit(made, 8)
    assert history.of_kind("contribution")
    assert made._evaluator.rows._cache_size() == 0


def test_contributions_that_cannot_be_compiled_are_told_once_and_training_goes_on(monkeypatch: Any) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no room for the program")

    monkeypatch.setattr("esper_jax.tolaria.evaluate._measure_rows", broken)
    state, history = fit(trainer(), 8)
    (failed,) = history.of_kind("compile_failed")
    assert "contributions cannot be measured" in failed.message and "no room for the program" in failed.message
    assert int(state.step) == 64 and not history.of_kind("contribution")


def job(number: int) -> Job:
    return Job(str(number), lambda x: x, (), (jax.ShapeDtypeStruct((), np.float32),), Spec(()))


def test_what_is_needed_overtakes_guesses_and_a_guess_that_is_needed_overtakes_the_others() -> None:
    order: list[str] = []
    begin = threading.Event()

    class Noting(ThreadCompiler):
        def _build(self, job: Job) -> Built:
            begin.wait(20.0)
            order.append(job.name)
            return super()._build(job)

    compiler = Noting()
    first = compiler.submit(job(0))
    guesses = [compiler.submit(job(number), guess=True) for number in (1, 2, 3)]
    needed = compiler.submit(job(4))
    compiler.hasten(guesses[2])
    begin.set()
    for future in (first, *guesses, needed):
        future.result(timeout=300)
    compiler.close()
    assert order == ["0", "4", "3", "1", "2"]


def test_guesses_that_are_likely_no_more_are_dropped_before_they_begin() -> None:
    begin = threading.Event()

    class Waiting(ThreadCompiler):
        def _build(self, job: Job) -> Built:
            begin.wait(20.0)
            return super()._build(job)

    morph = esper_jax.morph({f"Dense_{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)} for i in range(3)})
    tx = esper_jax.growable(growing.optax.sgd(0.1))
    state = esper_jax.TrainState.create(morph, tx, key=jax.random.key(0))
    program = Program("evaluate", lambda morph, x: x + morph.host["Dense_0"]["bias"].sum())
    program(morph, np.ones(2, np.float32))
    store = Programs((program,), Waiting())
    specs = []
    for index in range(3):
        grown = esper_jax.germinate(morph, f"Dense_{index}", "lora", key=jax.random.key(1))
        specs.append(grown.spec)
        store.prefetch(state.replace(morph=grown, opt_state=tx.init(grown)))
    store.outlive([specs[2]])
    assert {spec for spec, _ in program.ahead} == {specs[2]}
    begin.set()
    assert isinstance(store.wait(specs[2]), Outcome) and store.ready(specs[2])
    store.compiler.close()


def test_ctrl_c_ends_a_wait_for_a_program_and_the_run_resumes_to_the_same_bits(tmp_path: Any, monkeypatch: Any) -> None:
    expected, _ = fit(trainer(), 5)

    class Endless(ThreadCompiler):
        sent = threading.Event()

        def _build(self, job: Job) -> Built:
            if not self.sent.is_set():  # a job that waits behind the first would send another, to whatever runs then
                self.sent.set()
                os.kill(os.getpid(), signal.SIGINT)
            while not self._closed:
                time.sleep(0.01)
            raise BuildError("closed")

    with monkeypatch.context() as patched:
        patched.setattr("esper_jax.tolaria.trainer.make_compiler", lambda where, **_: Endless())
        with pytest.raises(TrainingInterrupted):
            fit(trainer(tmp_path), 5)
    made = trainer(tmp_path)
    state, _ = made.fit(made.restore(), growing.TRAIN, growing.VALIDATION, epochs=5)
    chex.assert_trees_all_equal(bits(state), bits(expected))


def picky_apply(params: dict[str, jax.Array], u: jax.Array) -> jax.Array:
    """Fits every shape that germination tries, and fails on batches of 32."""
    if u.shape[0] == 32:
        raise RuntimeError("no batches of 32, please")
    return u @ params["w"]


@pytest.mark.slow
@pytest.mark.parametrize(("swap", "step"), [("epoch", 24), (5, 21)])
def test_a_run_resumed_in_a_wait_changes_its_program_where_it_would_have_and_survives_one_that_fails(
    tmp_path: Any, monkeypatch: Any, swap: Any, step: int
) -> None:
    """Before its first step: the shapes of its batches are known from its data."""
    register_blueprint(
        "test-picky-32", init=lambda key, site: {"w": jnp.zeros((site.in_features, site.out_features))},
        apply=picky_apply, reads="input", kinds=("dense",), replace=True,
    )  # fmt: skip
    plan = {2: [("Dense_1", "test-picky-32", {})]}

    class Endless(ThreadCompiler):
        def _build(self, job: Job) -> Built:
            while not self._closed:
                time.sleep(0.01)
            raise BuildError("closed")

    with monkeypatch.context() as patched:
        patched.setattr("esper_jax.tolaria.trainer.make_compiler", lambda where, **_: Endless())
        patched.setattr(Programs, "wait", interrupted(Programs.wait))
        with pytest.raises(TrainingInterrupted, match=f"at step {step}"):
            fit(trainer(tmp_path, plan, swap=swap), 5)
    made = trainer(tmp_path, plan, swap=swap)
    state, history = made.fit(made.restore(), growing.TRAIN, growing.VALIDATION, epochs=5)
    (failed,) = history.of_kind("compile_failed")
    assert failed.step == step and "no batches of 32" in failed.message
    assert int(state.step) == 40 and state.morph.spec.plants == ()


def interrupted(wait: Any) -> Any:
    """`Programs.wait`, with a Ctrl-C while the run waits."""

    def call(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return wait(*args)

    return call


def test_a_source_file_written_to_during_the_run_is_not_compiled_elsewhere(tmp_path: Any, monkeypatch: Any) -> None:
    """The other process would import what is on disk now, which is another program."""
    path = tmp_path / "users_model.py"
    path.write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import users_model

    path.write_text("def double(x):\n    return 3 * x\n")
    os.utime(path, (compilers._BEGAN + 60, compilers._BEGAN + 60))
    compiler = ProcessCompiler()
    try:
        asked = Job("double", users_model.double, (), (jax.ShapeDtypeStruct((), np.float32),), Spec(()))
        built = compiler.submit(asked).result(timeout=120)
    finally:
        compiler.close()
    assert built.where == "thread" and float(built.call(np.float32(2))) == 4.0
    assert "users_model.py was written to after this process began" in compiler.notice


def settle(x: jax.Array) -> jax.Array:
    """What depends on settings: the type of a Python float, and the precision of a product."""
    return (x @ x) * jnp.ones(())


@pytest.mark.parametrize("kind", [ThreadCompiler, ProcessCompiler])
def test_settings_of_an_enclosing_with_block_hold_where_the_program_is_built(kind: Any) -> None:
    compiler = kind()
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        compiler.start()
        wanted = jax.jit(settle).lower(jax.ShapeDtypeStruct((2, 2), np.float32)).compile()
        asked = Job("settle", settle, (), (jax.ShapeDtypeStruct((2, 2), np.float32),), Spec(()))
        built = compiler.submit(asked).result(timeout=120)
        assert built.call(np.ones((2, 2), np.float32)).dtype == jnp.float64
        assert "f64" in wanted.as_text()
    compiler.close()
    assert built.where == ("thread" if kind is ThreadCompiler else "process")


@pytest.mark.slow
def test_the_loop_grows_under_x64() -> None:
    program = (
        "from tests.tolaria.test_lean_faults import fit, trainer\n"
        "import jax\n"
        "state, history = fit(trainer(), 6)\n"
        "assert history.of_kind('swap') and int(state.step) == 48\n"
        "assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.morph.host)} == {'float32'}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "JAX_ENABLE_X64": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
