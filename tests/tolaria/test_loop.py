"""The loop: the same bits however steps are grouped and wherever the data is, one program, and what the step may do."""

from __future__ import annotations

import pathlib
import signal
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import esper_jax
from esper_jax import FixedSchedule, Gates, Lifecycle, Tolaria, TrainingInterrupted, TrainState, growable
from esper_jax.kasmina.stages import Stage
from esper_jax.tolaria.data import Batches, shuffled
from esper_jax.tolaria.dispatch import Dispatch, Pace, make_steps
from esper_jax.tolaria.feed import Feed
from esper_jax.tolaria.step import Calls, convolves, one_step
from tests.kasmina.hosts import HOSTS, host
from tests.tolaria import growing

LOSS = optax.softmax_cross_entropy_with_integer_labels
TRAIN, VALIDATION = growing.data(0, 208), growing.data(1, 64)
BATCH, BATCHES = 16, 13


def bits(tree: Any) -> Any:
    """Leaves as numpy, PRNG keys by their data."""
    typed = lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if typed(leaf) else leaf), tree)


def trainer(directory: pathlib.Path | None = None, **options: Any) -> Tolaria:
    """A trainer whose planted seed germinates at tick 2; 13 batches an epoch."""
    gates = Gates(min_training_ticks=2, min_health=0.1)
    defaults: dict[str, Any] = {
        "controller": FixedSchedule({2: [("Dense_0", "lora", {})]}, gates=gates, keep="always"),
        "planted": "lora",
        "slots": 1,
        "lifecycle": Lifecycle(gates, tempo=3),
        "batch_size": BATCH,
        "progress": False,
        "checkpoint_dir": directory,
        "keep": 100,
    }
    return Tolaria(growing.Net(), LOSS, optax.adamw(1e-2), **{**defaults, **options})


def fit(train: Any = TRAIN, epochs: int = 3, **options: Any) -> tuple[Any, Any, Tolaria]:
    made = trainer(**options)
    state, history = made.fit(growing.start(made), train, VALIDATION, epochs=epochs)
    return bits(state), history, made


@pytest.fixture(scope="module")
def by_default() -> tuple[Any, Any, Tolaria]:
    return fit(tick_every=9)


def test_order_is_a_permutation_that_key_and_epoch_give_and_leaves_out_the_rest() -> None:
    key = jax.random.key(5)
    orders = [np.asarray(shuffled(key, epoch, 50, 8)) for epoch in (0, 0, 1)]
    assert orders[0].shape == (6, 8) and len(set(orders[0].ravel())) == 48 and orders[0].max() < 50
    assert np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], np.asarray(shuffled(jax.random.key(6), 0, 50, 8)))


@pytest.mark.parametrize(
    "options",
    [{"resident_bytes": 0}, {"steps_per_dispatch": 1}, {"steps_per_dispatch": 4}],
    ids=["host data", "1 a call", "4 a call"],
)
def test_a_run_has_the_same_bits_however_steps_are_grouped_and_wherever_the_data_is(by_default, options) -> None:
    """With ticks every 9 steps in epochs of 13, so that groups are cut; a seed germinates and trains on the way."""
    state, history, made = fit(tick_every=9, **options)
    chex.assert_trees_all_equal(state, by_default[0])
    assert history["score"] == by_default[1]["score"] and history["train_loss"] == by_default[1]["train_loss"]
    assert made._step._cache_size() == 1


@pytest.mark.slow
def test_a_stream_of_batches_has_the_bits_of_the_arrays_it_came_from(by_default) -> None:
    """Batches one by one, as a function of the epoch; four at a time from a loader's jax arrays."""

    def train(epoch: int) -> Any:
        yield from Batches(TRAIN, BATCH, jax.random.key(1)).epoch(epoch)

    def on_device(epoch: int) -> Any:
        return [jax.tree.map(jnp.asarray, batch) for batch in train(epoch)]

    chex.assert_trees_all_equal(fit(train, tick_every=9)[0], by_default[0])
    chex.assert_trees_all_equal(fit(on_device, tick_every=9, steps_per_dispatch=4)[0], by_default[0])


def test_one_program_serves_whole_groups_remainders_ticks_and_a_planted_seeds_life(by_default) -> None:
    _, history, made = by_default
    assert {event.data["after"] for event in history.of_kind("stage")} >= {"GERMINATED", "TRAINING"}
    assert made._step._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"dispatch": "unroll", "steps_per_dispatch": 3}], ids=["scan", "unroll"])
def test_a_run_interrupted_between_two_calls_resumes_to_the_same_bits(
    tmp_path: pathlib.Path, options: dict[str, Any]
) -> None:
    """Ctrl-C while data on the device is trained on, in mid-epoch; unrolled groups fall on the same positions again."""
    options = {"tick_every": 10, "steps_per_dispatch": 4, **options}
    whole, _, made = fit(**options)
    cut = trainer(tmp_path, **options)
    step, calls = cut._step, 0

    def interrupting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    cut._step = interrupting
    with pytest.raises(TrainingInterrupted):
        cut.fit(growing.start(cut), TRAIN, VALIDATION, epochs=3)
    again = trainer(tmp_path, **options)
    restored = again.restore()
    assert int(restored.batch) % BATCHES != 0
    state, _ = again.fit(restored, TRAIN, VALIDATION, epochs=3)
    chex.assert_trees_all_equal(bits(state), whole)
    assert made._step._cache_size() == (2 if options.get("dispatch") == "unroll" else 1)


def test_unrolled_groups_begin_at_multiples_of_their_size_and_stop_at_the_next_tick() -> None:
    """So grouping follows from position and tick alone, wherever a run is taken up."""
    calls = Calls(esper_jax.graft(growing.Net()), LOSS)
    feed = Feed(Batches(TRAIN, BATCH, jax.random.key(0)), calls, Dispatch("unroll", 4), 1 << 30)
    morph = esper_jax.morph(growing.Net().init(jax.random.key(0), TRAIN[0][:1]))

    def groups(start: int, room: int) -> list[tuple[int, int]]:
        epoch, found = feed.epoch(morph, 0, start), []
        while (position := epoch.position, chunk := epoch.take(room))[1] is not None:
            found.append((position, chunk[1]))
        return found

    assert groups(0, 100) == [(0, 4), (4, 4), (8, 4), (12, 1)]
    assert groups(5, 100) == [(5, 1), (6, 1), (7, 1), (8, 4), (12, 1)]
    assert groups(8, 3) == [(i, 1) for i in range(8, 13)]


def test_batches_of_another_shape_start_a_group_of_their_own_and_none_is_lost() -> None:
    sizes = [4, 4, 4, 2, 2, 4]
    stream = [(np.full((n, 3), i, np.float32), np.zeros(n, np.int32)) for i, n in enumerate(sizes)]
    calls = Calls(esper_jax.graft(growing.Net()), LOSS)
    feed = Feed(Batches(stream, BATCH, jax.random.key(0)), calls, Dispatch("scan", 4), 0)
    morph = esper_jax.morph(growing.Net().init(jax.random.key(0), TRAIN[0][:1]))
    epoch, found = feed.epoch(morph, 0, 1), []
    while (chunk := epoch.take(100)) is not None:
        found.append([(int(x[0, 0]), len(x)) for x in chunk[0][0][: chunk[1]]])
        assert len(chunk[0][0]) == 4
    assert found == [[(1, 4), (2, 4)], [(3, 2), (4, 2)], [(5, 4)]]


@pytest.mark.parametrize("name", HOSTS)
def test_only_hosts_with_a_convolution_step_alone_on_the_cpu_wherever_their_sites_are(name: str) -> None:
    given = host(name)
    calls = Calls(esper_jax.graft(given.model), LOSS)
    morph = esper_jax.morph(given.variables, where="Dense")
    assert convolves(calls, morph, (given.x, given.y)) == (name == "cnn")
    alone = name == "cnn" and jax.default_backend() == "cpu"
    assert Dispatch().chosen(calls, morph, (given.x, given.y)) == ("loop" if alone else "scan")
    assert Dispatch(steps=4).chosen(calls, morph, (given.x, given.y)) == ("unroll" if alone else "scan")
    assert Dispatch("scan").chosen(calls, morph, (given.x, given.y)) == "scan"


def test_groups_are_small_where_batches_are_large() -> None:
    batch = jax.ShapeDtypeStruct((256, 128, 128, 3), jnp.float32)
    assert Dispatch().size("scan", batch, 1000) == 1
    assert Dispatch().size("scan", batch, None) == Dispatch().size("loop", batch, 1000) == 1
    assert Dispatch(steps=7).size("scan", batch, None) == 7
    assert Dispatch().size("unroll", jax.ShapeDtypeStruct((64, 64), jnp.float32), 1000) == 4


@pytest.mark.parametrize(
    ("length", "places"), [(0, 16), (1, 16), (64, 64), (128, 128), (129, 80), (1000, 128), (1010, 128)]
)
def test_the_calls_of_an_epoch_share_its_steps_out(monkeypatch, length: int, places: int) -> None:
    batch = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    assert Dispatch().size("scan", batch, length) == places
    assert Dispatch().size("scan", jax.ShapeDtypeStruct((1024, 2048), jnp.float32), length) == min(places, 8)
    monkeypatch.setattr("esper_jax.tolaria.dispatch.alone", lambda: False)
    assert Dispatch().size("scan", batch, length) == min(places, 32)


def test_calls_grow_while_they_are_short_and_shrink_where_steps_are_slow() -> None:
    now, found = [0.0], []
    pace = Pace(lambda: now[0])

    def train(step_seconds: float, calls: int) -> list[int]:
        found.clear()
        for _ in range(calls):
            count = pace.steps
            now[0] += count * step_seconds
            pace.ended(count)
            found.append(pace.steps)
        return found

    pace.began()
    assert train(1e-3, 6) == [8, 16, 32, 64, 128, 128]
    assert train(1e-2, 4) == [64, 32, 32, 32]  # between a quarter and half a second: as it is
    assert train(10.0, 7) == [16, 8, 4, 2, 1, 1, 1]
    now[0] += 100.0  # a tick
    pace.began()
    assert train(0.2, 2) == [2, 2]
    now[0] += 1e-3
    pace.ended(1)  # a call cut short by a tick says nothing of a whole one
    assert pace.steps == 2
    now[0] += 1.0
    pace.ended(64)  # nor does one from before make calls longer
    assert pace.steps == 2


def test_calls_of_slow_steps_stay_short_though_an_epoch_has_few_of_them(monkeypatch) -> None:
    """By a clock that counts steps of 0.4 seconds: four batches an epoch are two calls, of which none is waited for."""
    from esper_jax.tolaria.run import Run

    counts, dispatch, now = [], Run.dispatch, [0.0]

    def slow(self: Run, batches: Any, count: int) -> None:
        counts.append(count)
        dispatch(self, batches, count)
        now[0] += 0.4 * count

    monkeypatch.setattr(Run, "dispatch", slow)
    monkeypatch.setattr("esper_jax.tolaria.run.Pace", lambda: Pace(lambda: now[0]))
    fit((TRAIN[0][:64], TRAIN[1][:64]), epochs=5, controller=None)
    assert counts[:1] == [4] and set(counts[-4:]) == {1}


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_has_the_same_bits_whatever_its_pace(by_default, monkeypatch, steps: int) -> None:
    monkeypatch.setattr(Pace, "ended", lambda self, count: setattr(self, "steps", steps))
    state, history, made = fit(tick_every=9)
    chex.assert_trees_all_equal(state, by_default[0])
    assert history["train_loss"] == by_default[1]["train_loss"] and made._step._cache_size() == 1


def test_options_that_cannot_work_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="dispatch must be one of auto, scan, loop, unroll"):
        trainer(dispatch="fast")
    with pytest.raises(ValueError, match="steps_per_dispatch must be a whole number of 1 or more, got 0"):
        trainer(steps_per_dispatch=0)
    with pytest.raises(ValueError, match="one step a call"):
        trainer(dispatch="loop", steps_per_dispatch=2)
    with pytest.raises(ValueError, match="compute_dtype must be a floating dtype"):
        trainer(compute_dtype=jnp.int8)
    with pytest.raises(ValueError, match="resident_bytes must be a whole number of 0 or more"):
        trainer(resident_bytes=-1)
    with pytest.raises(TypeError, match="rest_alone must be True or False, got 'yes'"):
        trainer(rest_alone="yes")


def test_a_run_whose_resting_seeds_leave_the_host_alone_goes_the_same_way(by_default) -> None:
    """`rest_alone` through `fit`: a seed's whole life in one program, and the numbers of the run without it."""
    state, history, made = fit(tick_every=9, rest_alone=True)
    chex.assert_trees_all_close(state.morph, by_default[0].morph, atol=1e-5)
    assert [e.data for e in history.of_kind("stage")] == [e.data for e in by_default[1].of_kind("stage")]
    assert made._step._cache_size() == 1


def test_no_more_than_three_calls_wait_on_the_device_and_nothing_is_fetched_before_the_tick(monkeypatch) -> None:
    """The arrays that come out of the train program are read by nobody until the tick."""
    from esper_jax.tolaria.run import Run

    fetched = []
    array = type(jnp.zeros(()))
    for name in ("__array__", "__int__", "__float__", "__bool__", "__index__", "item", "tolist"):
        original = getattr(array, name)
        record = lambda self, *a, original=original, name=name, **k: (  # noqa: E731
            fetched.append(name),
            original(self, *a, **k),
        )[1]
        monkeypatch.setattr(array, name, record)
    at_tick, tick, waiting = [], Run.tick, []
    dispatch = Run.dispatch

    def watched_tick(self: Run, validation: Any, **given: Any) -> bool:
        at_tick.append(list(fetched))
        stopped = tick(self, validation, **given)
        fetched.clear()
        return stopped

    def watched_dispatch(self: Run, batches: Any, count: int) -> None:
        if self.epoch == 1 and self.batch == 0:
            fetched.clear()
        dispatch(self, batches, count)
        waiting.append(len(self.running))

    monkeypatch.setattr(Run, "tick", watched_tick)
    monkeypatch.setattr(Run, "dispatch", watched_dispatch)
    fit(epochs=3, steps_per_dispatch=2)
    assert at_tick[1:] == [[], []]
    assert max(waiting) == 2 and len(waiting) == 21


def test_bf16_computes_in_bf16_on_float32_master_weights() -> None:
    made = trainer(compute_dtype=jnp.bfloat16, controller=None, planted=None)
    state = growing.start(made)
    text = str(jax.make_jaxpr(lambda s, b: one_step(made._calls, made.tx, False, s, b))(state, (TRAIN[0], TRAIN[1])))
    lines = [line for line in text.splitlines() if " dot_general[" in line]
    products = [line for line in lines if ":f32[]" not in line]  # but for the squared norm of the float32 gradient
    assert products and all(":bf16[" in line.split("=")[0] for line in products)
    state, history = made.fit(state, TRAIN, VALIDATION, epochs=4)
    floats = [
        leaf for leaf in jax.tree.leaves((state.morph, state.opt_state)) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert floats and all(leaf.dtype == jnp.float32 for leaf in floats)
    assert history["train_loss"][-1] < history["train_loss"][0]
    kernel = state.morph.host["params"]["Dense_0"]["kernel"]
    assert (kernel != kernel.astype(jnp.bfloat16).astype(jnp.float32)).any()


def test_bf16_trains_a_planted_seed_too() -> None:
    state, history, made = fit(compute_dtype=jnp.bfloat16, epochs=5)
    assert "TRAINING" in {event.data["after"] for event in history.of_kind("stage")}
    assert any(np.abs(leaf).sum() > 0 for leaf in jax.tree.leaves(state.morph.seeds))
    assert made._step._cache_size() == 1


def loops(jaxpr: Any) -> list[str]:
    """The bodies of the loops that a jaxpr holds, inner ones too."""
    found = []
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            found += loops(inner)
        if equation.primitive.name == "while":
            found.append(str(equation.params["body_jaxpr"]))
    return found


@pytest.mark.parametrize("probe_every", [0, 50])
def test_where_resting_seeds_leave_the_host_alone_a_step_is_the_empty_morphs_own(probe_every: int) -> None:
    """The loop's body, equation for equation, and so the host's bits; a seed that trains is met by another."""
    given = host("mlp")
    calls, tx = Calls(esper_jax.graft(given.model), LOSS), growable(optax.adam(1e-2))
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), (given.x, given.y))

    def state(planted: str | None) -> TrainState:
        morph = esper_jax.morph(given.variables, where="Dense", planted=planted, slots=1)
        return TrainState.create(morph, tx, key=jax.random.key(0))

    def program() -> Any:
        return make_steps(calls, tx, probe_every, Dispatch("scan", rest_alone=True))

    bodies = {name: loops(jax.make_jaxpr(program())(state(name), batches, 3).jaxpr) for name in (None, "lora")}
    steps = [body for body in bodies[None] if "while" not in body]
    assert len(steps) == (2 if probe_every else 1)
    assert steps[-1] in bodies["lora"]
    planted = program()
    alone, _ = program()(state(None), batches, 3)
    rested, _ = planted(state("lora"), batches, 3)
    chex.assert_trees_all_equal(
        (rested.morph.host, rested.opt_state.host, bits(rested.meters)),
        (alone.morph.host, alone.opt_state.host, bits(alone.meters)),
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(rested.morph.seeds))
    grown = state("lora")
    site = grown.morph.spec.sites[0].path
    morph = esper_jax.advance(esper_jax.germinate(grown.morph, site, "lora", key=jax.random.key(1)), site, 0)
    before = bits(morph.seeds)
    grown, _ = planted(grown.replace(morph=morph), batches, 3)
    moved = jax.tree.map(lambda new, old: np.any(new != old), bits(grown.morph.seeds), before)
    assert any(jax.tree.leaves(moved))
    assert planted._cache_size() == 1


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_the_host_is_the_same_to_the_bit_whether_a_planted_seed_of_the_loop_sleeps_or_trains(name: str) -> None:
    """Contract 16 in the loop that `fit` runs: parameters, statistics, optimizer state and what was measured."""
    given = host(name)
    calls, tx = Calls(esper_jax.graft(given.model), LOSS), growable(optax.adamw(1e-2))
    steps = make_steps(calls, tx, 4, Dispatch("scan"))
    batches = jnp.stack([given.x * (1 + i) for i in range(7)]), jnp.stack([given.y] * 7)
    site = {"mlp": "Dense_1", "transformer": "CheckpointBlock_0/Dense_0"}[name]
    morph = esper_jax.morph(given.variables, where=f"{site}$", planted="lora", slots=1)

    def run(trains: bool) -> TrainState:
        grown = morph
        if trains:
            grown = esper_jax.advance(esper_jax.germinate(morph, site, "lora", key=jax.random.key(1)), site, 0)
        return steps(TrainState.create(grown, tx, key=jax.random.key(0)), batches, 7)[0]

    slept, trained = run(False), run(True)
    chex.assert_trees_all_equal(trained.morph.host, slept.morph.host)
    chex.assert_trees_all_equal(trained.opt_state.host, slept.opt_state.host)
    chex.assert_trees_all_equal(trained.meters, slept.meters)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(trained.morph.seeds))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slept.morph.seeds))
    assert steps._cache_size() == 1


def test_a_span_trains_in_the_loop() -> None:
    """Its source is a layer without a seed, which steps that know nothing of probes must reach all the same."""
    given = host("mlp")
    calls, tx = Calls(esper_jax.graft(given.model), LOSS), growable(optax.adam(1e-2))
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), (given.x, given.y))
    morph = esper_jax.morph(given.variables, model=given.model, example=given.x)
    span = esper_jax.spans(given.model, morph, given.x)[0]
    key = jax.random.key(1)
    morph = esper_jax.germinate(morph, span=span.ends, blueprint="units", units=2, key=key, **span.config)
    (plant,) = morph.spec.plants
    morph = esper_jax.advance(morph, plant.site, plant.slot)
    before = bits(morph.seeds)
    state = TrainState.create(morph, tx, key=jax.random.key(0))
    state, metrics = make_steps(calls, tx, 2, Dispatch("scan"))(state, batches, 3)
    moved = jax.tree.map(lambda new, old: np.any(new != old), bits(state.morph.seeds), before)
    assert any(jax.tree.leaves(moved)) and np.isfinite(metrics["loss"])


def test_a_seed_that_faults_out_within_a_call_leaves_the_steps_that_follow_to_the_host() -> None:
    """However its steps are grouped: three faults prune it, and the host is that of a network with empty slots."""
    given = host("mlp")
    calls, tx = Calls(esper_jax.graft(given.model), LOSS), growable(optax.adam(1e-2))
    steps = make_steps(calls, tx, 4, Dispatch("scan", rest_alone=True))
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), (given.x, given.y))
    morph = esper_jax.morph(given.variables, where="Dense_1", planted="lora", slots=1)
    site = morph.spec.sites[0].path
    morph = esper_jax.advance(esper_jax.germinate(morph, site, "lora", key=jax.random.key(1)), site, 0)
    morph = morph.replace(seeds=jax.tree.map(lambda leaf: leaf * jnp.nan, morph.seeds))

    def run(morph: Any, sizes: list[int]) -> TrainState:
        state = TrainState.create(morph, tx, key=jax.random.key(0))
        for size in sizes:
            state, _ = steps(state, batches, size)
        return state

    together, apart = run(morph, [8]), run(morph, [1] * 8)
    chex.assert_trees_all_equal(bits(together), bits(apart))
    chex.assert_trees_all_equal(together.morph.host, run(esper_jax.morph(given.variables), [8]).morph.host)
    assert int(together.morph.state[site].stage[0]) == Stage.PRUNED and int(together.step) == 8
    assert steps._cache_size() == 2  # the planted program, and that of empty slots


def test_accumulated_gradients_move_host_and_seed_as_one_batch_of_the_whole() -> None:
    """`optax.MultiSteps` through `growable`: four batches of 16 against one of 64; the seed on its own count."""
    given = host("mlp")
    morph = esper_jax.morph(given.variables, where="Dense_1", planted="lora", slots=1)
    morph = esper_jax.advance(esper_jax.germinate(morph, "Dense_1", "lora", key=jax.random.key(0)), "Dense_1", 0)
    x = jax.random.normal(jax.random.key(1), (64, given.x.shape[1]))
    y = jnp.tile(given.y, 64)[:64]
    calls = Calls(esper_jax.graft(given.model), LOSS)

    def trained(tx: Any, batch: int) -> Any:
        tx = growable(tx)
        steps = make_steps(calls, tx, 0, Dispatch("scan"))
        state = TrainState.create(morph, tx, key=jax.random.key(0))
        batches = x.reshape(-1, batch, x.shape[1]), y.reshape(-1, batch)
        for _ in range(2):
            state, _ = steps(state, batches, len(batches[0]))
        return state.morph

    four, one = trained(optax.MultiSteps(optax.adam(1e-2), 4), 16), trained(optax.adam(1e-2), 64)
    chex.assert_trees_all_close(four.params, one.params, atol=2e-5)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), four.params, morph.params)
    assert min(jax.tree.leaves(moved["host"])) > 1e-3 and max(jax.tree.leaves(moved["seeds"])) > 1e-3


class Deep(nn.Module):
    """A stack whose activations are kept, or recomputed by a policy."""

    policy: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layer = nn.remat(Layer, policy=self.policy) if self.policy else Layer
        for i in range(6):
            x = layer(name=f"layer_{i}")(x)
        return nn.Dense(2)(x)


class Layer(nn.Module):
    """Wide inside, narrow outside."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.Dense(8)(nn.tanh(nn.Dense(64)(x)))


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable", None])
def test_a_rematerialised_host_stays_so_in_the_step(policy: str | None) -> None:
    """What the host's own gradient recomputes by its policy, the step with probes and a seed in it recomputes too."""
    policies = jax.checkpoint_policies
    model, x, y = Deep(getattr(policies, policy) if policy else None), jnp.ones((16, 8)), jnp.zeros(16, jnp.int32)
    variables = model.init(jax.random.key(0), x)
    bare = jax.make_jaxpr(jax.grad(lambda v: LOSS(model.apply(v, x), y).mean()))(variables)
    calls, tx = Calls(esper_jax.graft(model), LOSS), growable(optax.sgd(0.1))
    batches = jax.tree.map(lambda leaf: leaf[None], (x, y))

    def step(probe_every: int, planted: str | None, alone: bool = False) -> str:
        morph = esper_jax.morph(variables, where="layer_3/Dense_0", planted=planted, slots=1)
        state = TrainState.create(morph, tx, key=jax.random.key(0))
        dispatch = Dispatch("scan", rest_alone=alone)
        return str(jax.make_jaxpr(make_steps(calls, tx, probe_every, dispatch))(state, batches, 1))

    recomputed = 12 if policy else 6
    assert str(bare).count("= tanh") == recomputed
    assert step(0, None).count("= tanh") == recomputed
    assert step(1, "lora").count("= tanh") == recomputed
    assert step(50, "lora").count("= tanh") == 2 * recomputed  # a step that measures is one more body of the loop
    assert step(50, "lora", alone=True).count("= tanh") == 3 * recomputed  # and one in which every seed rests
    assert step(50, None, alone=True) == step(50, None)
    norms = len(jax.tree.leaves(variables))
    assert step(0, None).count(" dot_general[") == str(bare).count(" dot_general[") + norms
