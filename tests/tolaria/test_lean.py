"""Lean growth without a stall: programs built in the background take over at a boundary that follows from the data."""

from __future__ import annotations

import concurrent.futures as futures
import signal
import threading
import time
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import FixedSchedule, Gates, Lifecycle, Stage, Tamiyo, TrainingInterrupted, register_blueprint
from esper_jax.kasmina.spec import Spec
from esper_jax.tolaria import compiler as compilers
from esper_jax.tolaria import programs, swap
from esper_jax.tolaria.compiler import BuildError, Job, ProcessCompiler, ThreadCompiler
from esper_jax.tolaria.data import Batches
from esper_jax.tolaria.programs import Program, Programs
from esper_jax.tolaria.settings import compile_cache
from tests.tolaria import growing
from tests.tolaria.test_resume import bits

GATES = Gates(min_training_ticks=2, min_health=0.1)
LORA = {2: [("Dense_1", "lora", {"rank": 2})]}


def run(epochs: int = 5, plan: Any = LORA, **options: Any):
    """A short run of the small host; one lora seed germinates at the second tick."""
    made = growing.trainer(None, controller=FixedSchedule(plan, gates=GATES), lifecycle=Lifecycle(GATES), **options)
    state, history = made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=epochs)
    return made, state, history


@pytest.fixture(scope="module")
def now():
    """The run whose grown program is compiled on the next step."""
    return run(swap="now")


@pytest.mark.parametrize("options", [{"compile_in": "process"}, {"compile_in": "thread"}, {"swap": 3}])
def test_a_program_built_in_the_background_changes_no_bit_of_the_run(now, options: dict[str, Any]) -> None:
    made, state, history = run(**options)
    chex.assert_trees_all_equal(bits(state), bits(now[1]))
    (swapped,) = history.of_kind("swap")
    assert swapped.data["grown"] == [["Dense_1", 0]] and swapped.data["programs"] >= 2
    assert swapped.data["where"] == options.get("compile_in", "thread")
    assert swapped.data["compile_seconds"] > 0
    # the boundary follows from the data: 8 steps an epoch, decided after 16
    assert swapped.step == 16 + options.get("swap", 8)
    assert not history.of_kind("warning")
    # nothing was compiled where training waits for it: the only program built by a call is the host's
    assert made._step._cache_size() == 1 and made._evaluator.plain._cache_size() == 1


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere it would take a step's time of the device")
@pytest.mark.parametrize("options", [{}, {"resident_bytes": 0}])
def test_the_first_call_of_a_program_built_ahead_is_as_quick_as_the_next(monkeypatch, options) -> None:
    """JAX finds out in Python how to call it; that was done where it was built, for batches on the device or not."""
    slow, found = [], jax.stages.Compiled.call

    def call(*args: Any, **kwargs: Any) -> Any:
        slow.append(threading.current_thread().name)
        return found(*args, **kwargs)

    monkeypatch.setattr(jax.stages.Compiled, "call", staticmethod(call))
    _, _, history = run(compile_in="process", **options)
    assert history.of_kind("swap") and slow and set(slow) == {"esper_jax compiler"}


def test_the_seed_waits_in_germinated_until_its_program_takes_over() -> None:
    _, _, history = run(swap=11)  # the boundary lies past the next tick
    told = [(e.epoch, e.data["after"]) for e in history.of_kind("stage")]
    assert told[0] == (2, "GERMINATED") and history.of_kind("swap")[0].step == 27
    assert (4, "TRAINING") in told
    waiting = [seed for seed in history.records[2]["seeds"] if seed["site"] == "Dense_1"]
    assert [seed["stage"] for seed in waiting] == ["GERMINATED"]


def test_a_parked_seed_that_shares_its_site_waits_too() -> None:
    plan = {1: [("Dense_1", "lora", {"rank": 2})], 4: [("Dense_1", "mlp", {"hidden": 4})]}
    _, _, history = run(plan=plan, epochs=8, swap=11)
    told = [(e.epoch, e.data["after"]) for e in history.of_kind("stage") if e.data["slot"] == 1]
    assert told[:2] == [(4, "GERMINATED"), (6, "TRAINING")]


def test_a_program_for_other_arrays_than_it_meets_gives_way(now) -> None:
    """Another kind of key than the one it was built for: the call compiles as any jitted function would."""
    made, *_ = run()
    key = jax.random.key(1, impl="rbg")
    state = made.init(growing.Net().init(jax.random.key(0), growing.TRAIN[0][:1]), key=key)
    state, history = made.fit(state, growing.TRAIN, growing.VALIDATION, epochs=4)
    assert int(state.step) == 32 and history.of_kind("swap")


def test_one_change_at_a_time() -> None:
    plan = {2: [("Dense_1", "lora", {})], 3: [("Dense_0", "lora", {})]}
    _, _, history = run(plan=plan, swap=30, limits=esper_jax.Limits(cooldown=0))
    refused = [e for e in history.of_kind("decision") if e.data["outcome"] == "refused"]
    assert len(refused) == 1 and "one change at a time" in refused[0].data["why"]


def test_asap_takes_a_program_as_soon_as_it_is_built() -> None:
    controller = FixedSchedule({1: LORA[2]}, gates=GATES)
    made = growing.trainer(None, controller=controller, lifecycle=Lifecycle(GATES), swap="asap")

    def train(epoch: int):
        for index, batch in enumerate(Batches(growing.TRAIN, 32, jax.random.key(1)).epoch(epoch)):
            if (epoch, index) == (3, 4):
                futures.wait([one for p in (made._step, made._ticker.move) for one in p.ahead.values()])
            yield batch

    state, history = made.fit(growing.start(made), train, growing.VALIDATION, epochs=6)
    (swapped,) = history.of_kind("swap")
    assert 8 <= swapped.step <= 32 and swapped.data["waited_seconds"] == 0
    assert state.morph.spec.plant("Dense_1", 0) is not None


@pytest.mark.parametrize(("swap_at", "step"), [("epoch", 20), (7, 18)])
def test_a_run_cut_off_while_its_program_is_built_resumes_to_the_same_bits(tmp_path, swap_at: Any, step: int) -> None:
    """The seed that waits is in the checkpoint, and so is the boundary at which its program takes over."""
    seen = 0

    def train(epoch: int):
        nonlocal seen
        for batch in Batches(growing.TRAIN, 32, jax.random.key(1)).epoch(epoch):
            seen += 1
            if seen == step:
                signal.raise_signal(signal.SIGINT)
            yield batch

    whole = run(swap=swap_at)[1]
    options = {"controller": FixedSchedule(LORA, gates=GATES), "lifecycle": Lifecycle(GATES), "swap": swap_at}
    made = growing.trainer(tmp_path, **options)
    with pytest.raises(TrainingInterrupted):
        made.fit(growing.start(made), train, growing.VALIDATION, epochs=5)
    again = growing.trainer(tmp_path, **options)
    restored = again.restore()
    assert int(restored.morph.state["Dense_1"].stage[0]) == Stage.GERMINATED
    state, history = again.fit(restored, growing.TRAIN, growing.VALIDATION, epochs=5)
    (swapped,) = history.of_kind("swap")
    assert swapped.data["programs"] >= 1
    chex.assert_trees_all_equal(bits(state), bits(whole))


def picky_init(key: jax.Array, site: esper_jax.Site) -> dict[str, jax.Array]:
    """Weights of a seed that cannot be traced on a training batch."""
    return {"w": jnp.zeros((site.in_features, site.out_features))}


def picky_apply(params: dict[str, jax.Array], u: jax.Array) -> jax.Array:
    """Fits every shape that germination tries, and fails on batches of 32."""
    if u.shape[0] == 32:
        raise RuntimeError("no batches of 32, please")
    return u @ params["w"]


def test_a_program_that_cannot_be_compiled_is_told_and_training_goes_on_without_it(now) -> None:
    register_blueprint("test-picky", init=picky_init, apply=picky_apply, reads="input", kinds=("dense",), replace=True)
    _, state, history = run(plan={2: [("Dense_1", "test-picky", {})]}, compile_in="process")
    (failed,) = history.of_kind("compile_failed")
    assert "no batches of 32, please" in failed.data["reason"] and failed.data["seeds"] == [["Dense_1", 0]]
    assert state.morph.spec.plants == () and int(state.step) == 40
    (answer,) = history.of_kind("feedback")
    assert answer.data["outcome"] == "refused" and "could not be compiled" in answer.data["reason"]
    host = lambda state: bits(state.morph.host)  # noqa: E731
    alone = growing.trainer(None, controller=None)
    plain, _ = alone.fit(growing.start(alone), growing.TRAIN, growing.VALIDATION, epochs=5)
    chex.assert_trees_all_equal(host(state), host(plain))


def test_a_leaner_structure_goes_back_to_its_compiled_program() -> None:
    """A seed pruned by NaN rests for seven ticks and leaves; the host's own program is there already."""
    register_blueprint("test-bad", init=picky_init, apply=bad_apply, reads="input", kinds=("dense",), replace=True)
    made, state, history = run(plan={2: [("Dense_1", "test-bad", {})]}, epochs=14)
    came, left = history.of_kind("swap")
    assert came.data["grown"] and left.data["left"] == [["Dense_1", 0]]
    assert left.data["programs"] == 0 and left.data["waited_seconds"] == 0
    assert state.morph.spec.plants == () and made._step._cache_size() == 1


def bad_apply(params: dict[str, jax.Array], u: jax.Array) -> jax.Array:
    """Never finite."""
    return (u @ params["w"]) * jnp.nan


def test_what_cannot_be_sent_to_a_process_is_compiled_in_a_thread_and_told_once(now) -> None:
    lock = threading.Lock()

    def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        with lock:
            return growing.LOSS(outputs, targets)

    controller = FixedSchedule(LORA, gates=GATES)
    made = esper_jax.Tolaria(
        growing.Net(),
        loss,
        optax.adamw(optax.cosine_decay_schedule(3e-2, 200)),
        controller=controller,
        lifecycle=Lifecycle(GATES),
        batch_size=32,
        classes=2,
        progress=False,
        compile_in="process",
    )
    state, history = made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=5)
    chex.assert_trees_all_equal(bits(state), bits(now[1]))
    (told,) = history.of_kind("warning")
    assert "cannot be sent to another process" in told.message
    assert "thread" in history.of_kind("swap")[0].data["where"]


def test_prefetched_programs_are_there_when_the_decision_comes(monkeypatch) -> None:
    """Tamiyo's candidates are compiled ahead; the growth that follows builds nothing more."""
    asked: list[Spec] = []
    request = Programs.request
    monkeypatch.setattr(
        Programs, "request", lambda self, state, **how: counted(asked, state, request(self, state, **how))
    )
    tamiyo = Tamiyo(
        blueprints=("lora",), gates=GATES, min_epoch=4, plateau=1, stable_ticks=1, stable_low=-9, stable_high=9
    )
    made = growing.trainer(None, controller=tamiyo, prefetch=8)
    _, history = made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=12)
    swapped = history.of_kind("swap")
    assert swapped and len(asked) > 0
    grown = next(spec for spec in asked if spec.plants)
    assert all(made._step.ahead[key].done() for key in made._step.ahead if key[0] == grown)


def counted(asked: list[Spec], state: Any, built: int) -> int:
    """Note the structures for which something was built."""
    if built:
        asked.append(state.morph.spec)
    return built


def double(morph: esper_jax.Morph, x: jax.Array) -> jax.Array:
    """Something to compile."""
    return 2 * x + morph.host["Dense_0"]["bias"].sum()


class Slow(ThreadCompiler):
    """A compiler whose programs claim a size."""

    def _build(self, job: Job) -> compilers.Built:
        import dataclasses

        return dataclasses.replace(super()._build(job), size=100)


def test_prefetched_programs_keep_to_their_budget_and_the_oldest_go_first() -> None:
    morph = esper_jax.morph({f"Dense_{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)} for i in range(3)})
    tx = esper_jax.growable(optax.sgd(0.1))
    state = esper_jax.TrainState.create(morph, tx, key=jax.random.key(0))
    program = Program("double", double)
    program(morph, np.ones(3, np.float32))
    store = Programs((program,), Slow(), budget=250)
    specs = []
    for index in range(3):
        grown = esper_jax.germinate(morph, f"Dense_{index}", "lora", key=jax.random.key(1))
        specs.append(grown.spec)
        store.prefetch(state.replace(morph=grown, opt_state=tx.init(grown)))
        while not store.ready(grown.spec):
            time.sleep(0.01)
    store.prefetch(state.replace(morph=grown, opt_state=tx.init(grown)))
    assert {key[0] for key in program.ahead} == set(specs[1:])
    store.compiler.close()


class Held(ThreadCompiler):
    """A compiler that builds nothing until it is hurried, and notes that."""

    def __init__(self) -> None:
        super().__init__()
        self.hurried: list[bool] = []
        self.begin = threading.Event()

    def hurry(self, on: bool) -> None:
        self.hurried.append(on)
        self.begin.set()

    def _build(self, job: Job) -> compilers.Built:
        assert self.begin.wait(60)
        return super()._build(job)


def test_a_call_that_needs_a_program_still_being_built_hurries_it_and_tells_of_the_wait(monkeypatch: Any) -> None:
    monkeypatch.setattr(programs, "TOLD_SECONDS", 0.0)
    morph = esper_jax.morph({f"Dense_{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)} for i in range(2)})
    tx = esper_jax.growable(optax.sgd(0.1))
    program, x = Program("double", double), np.ones(3, np.float32)
    program(morph, x)
    store = Programs((program,), Held())
    grown = esper_jax.germinate(morph, "Dense_1", "lora", key=jax.random.key(1))
    store.request(esper_jax.TrainState.create(grown, tx, key=jax.random.key(0)))
    np.testing.assert_array_equal(program(grown, x), 2 * x)
    assert store.compiler.hurried == [True, False]  # type: ignore[attr-defined]
    (notice,) = store.notices()
    assert notice.startswith("a call waited ") and notice.endswith(
        "for the double program that is built in the background"
    )
    program(grown, x)
    assert store.notices() == [] and len(store.compiler.hurried) == 2  # type: ignore[attr-defined]
    store.compiler.close()


def test_parked_seeds_leave_the_view_and_come_back_as_they_were() -> None:
    """Whether the seed has its site to itself or shares it with one that lives."""
    tx = esper_jax.growable(optax.adam(0.1))
    morph = esper_jax.morph({"Dense_0": {"kernel": jnp.ones((2, 2))}, "Dense_1": {"kernel": jnp.ones((2, 2))}})
    morph = esper_jax.germinate(morph, "Dense_0", "lora", key=jax.random.key(0))
    before = morph.spec
    for site in ("Dense_0", "Dense_1"):
        morph = esper_jax.germinate(morph, site, "mlp", hidden=3, key=jax.random.key(1))
    state = esper_jax.TrainState.create(morph, tx, key=jax.random.key(0))
    waiting = swap.plan(before, state, 1, 10, 5)
    assert waiting == swap.Waiting((("Dense_0", 1), ("Dense_1", 0)), 1, 15)
    view, held = swap.park(state, waiting)
    assert view.morph.spec == before and set(view.morph.seeds) == {"Dense_0"}
    chex.assert_trees_all_equal(bits(swap.unpark(view, held)), bits(state))


def test_a_process_that_dies_is_replaced_by_a_thread_and_what_it_said_last_is_told() -> None:
    compiler = ProcessCompiler()
    compiler.start()
    assert compiler._process is not None
    compiler._process.kill()
    morph = esper_jax.morph({"Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}})
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), morph)
    job = Job("double", double, (), (abstract, jax.ShapeDtypeStruct((3,), jnp.float32)), morph.spec)
    built = compiler.submit(job).result(timeout=300)
    assert built.where == "thread" and "the compiling process ended" in compiler.notice
    assert np.array_equal(built.call(morph, np.ones(3, np.float32)), [2, 2, 2])
    compiler.close()


def test_ctrl_c_does_not_reach_the_process() -> None:
    """It goes to all processes of the terminal; what is being built goes on, and the training process decides."""
    compiler = ProcessCompiler()
    compiler.start()
    morph = esper_jax.morph({"Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}})
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), morph)
    job = Job("double", double, (), (abstract, jax.ShapeDtypeStruct((3,), jnp.float32)), morph.spec)
    assert compiler.submit(job).result(timeout=300).where == "process"
    assert compiler._process is not None
    compiler._process.send_signal(signal.SIGINT)
    assert compiler.submit(job).result(timeout=300).where == "process" and not compiler.notice
    compiler.close()


def test_closing_ends_the_process_and_cancels_what_waits() -> None:
    compiler = ProcessCompiler()
    compiler.start()
    process = compiler._process
    compiler.close()
    assert process is not None and process.poll() is not None
    with pytest.raises(BaseException):  # noqa: B017, PT011 (CancelledError is no Exception everywhere)
        compiler.submit(Job("double", double, (), (), Spec(()))).result(timeout=5)


def test_a_second_fit_goes_on_where_the_first_ended_before_its_programs_were_built(now) -> None:
    """What the first call's compiler left unbuilt is compiled when it is needed."""
    made = growing.trainer(None, controller=FixedSchedule(LORA, gates=GATES), lifecycle=Lifecycle(GATES))
    state, _ = made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=2)
    assert made._step.ahead and int(state.morph.state["Dense_1"].stage[0]) == Stage.GERMINATED
    state, _ = made.fit(state, growing.TRAIN, growing.VALIDATION, epochs=5)
    assert int(state.step) == 40 and state.morph.spec.plants


def test_an_error_of_the_program_is_a_build_error_that_names_it() -> None:
    job = Job("broken", picky_apply, (), ({}, jax.ShapeDtypeStruct((32, 2), jnp.float32)), Spec(()))
    with pytest.raises(BuildError, match="broken: RuntimeError: no batches of 32"):
        compilers.build_here(job)


def test_the_persistent_cache_is_used_where_a_directory_is_given_and_left_as_it_was(tmp_path) -> None:
    before = jax.config.values["jax_compilation_cache_dir"]
    for _ in range(2):  # a second run finds its programs there
        run(epochs=4, compile_in="process", compile_cache=tmp_path)
        assert list(tmp_path.iterdir())
    assert jax.config.values["jax_compilation_cache_dir"] == before
    with compile_cache(None):
        assert jax.config.values["jax_compilation_cache_dir"] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swap": 0}, "swap must be 'epoch', a number of steps"),
        ({"swap": "later"}, "swap must be"),
        ({"compile_in": "cloud"}, "compile_in must be"),
        ({"prefetch": -1}, "prefetch must be"),
        ({"prefetch_bytes": 1.5}, "prefetch_bytes must be"),
    ],
)
def test_a_wrong_option_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        growing.trainer(None, **options)


class Wide(nn.Module):
    """A host whose blueprint is made up in this test alone."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """One layer."""
        return nn.Dense(2)(x)


def test_a_blueprint_registered_by_the_user_reaches_the_process() -> None:
    register_blueprint(
        "test-local", init=lambda key, site: {"w": jnp.zeros((site.in_features, site.out_features))},
        apply=lambda params, u: u @ params["w"], reads="input", kinds=("dense",), replace=True,
    )  # fmt: skip
    made = esper_jax.Tolaria(
        Wide(), growing.LOSS, optax.sgd(0.1), controller=FixedSchedule({1: [("Dense_0", "test-local")]}),
        batch_size=32, progress=False, compile_in="process",
    )  # fmt: skip
    state = made.init(Wide().init(jax.random.key(0), growing.TRAIN[0][:1]), key=jax.random.key(1))
    _, history = made.fit(state, growing.TRAIN, growing.VALIDATION, epochs=3)
    assert history.of_kind("swap")[0].data["where"] == "process"
