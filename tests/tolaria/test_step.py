"""The train step: what the host learns while seeds sleep, train, fail and enter."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import Stage, TrainState, growable, make_train_step
from esper_jax.kasmina.morph import Morph
from tests.kasmina.hosts import HOSTS, host

LOSS = optax.softmax_cross_entropy_with_integer_labels
PLANTED = {"mlp": ("Dense_1", "lora"), "cnn": ("Conv_0", "conv_light"), "transformer": (None, "lora")}


def clipped() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2))


def planted(name: str) -> tuple[Morph, str, str]:
    given = host(name)
    _, blueprint = PLANTED[name]
    where = PLANTED[name][0] or r"Block_0/Dense_0"
    morph = esper_jax.morph(given.variables, where=where, planted=blueprint, slots=1)
    return morph, morph.spec.sites[0].path, blueprint


def run(name: str, germinate_at: int, train_at: int, steps: int) -> tuple[TrainState, int]:
    """Train; the planted seed germinates and begins to train at the steps given (after the end: never)."""
    given = host(name)
    morph, site, blueprint = planted(name)
    tx = growable(clipped())
    state = TrainState.create(morph, tx, key=jax.random.key(3))
    step = make_train_step(given.model, LOSS, tx, probe_every=10)
    for i in range(steps):
        if i == germinate_at:
            state = state.replace(morph=esper_jax.germinate(state.morph, site, blueprint, key=jax.random.key(9)))
        if i == train_at:
            state = state.replace(morph=esper_jax.advance(state.morph, site, 0))
        x = given.x + 0.1 * jax.random.normal(jax.random.key(i), given.x.shape)
        state, _ = step(state, (x, given.y))
    return state, step._cache_size()


@pytest.mark.parametrize("name", HOSTS)
def test_host_is_equal_to_the_bit_whether_a_seed_trains_or_sleeps_and_nothing_recompiles(name: str) -> None:
    """Contract 16: germinating at step 50, TRAINING until 100, against a seed that stays dormant."""
    grown, programs = run(name, 50, 55, 100)
    plain, _ = run(name, 10**6, 10**6, 100)
    chex.assert_trees_all_equal(grown.morph.host, plain.morph.host)
    chex.assert_trees_all_equal(grown.opt_state.host, plain.opt_state.host)
    moved = jax.tree.map(lambda leaf: float(jnp.abs(leaf).sum()), grown.morph.seeds)
    assert sum(jax.tree.leaves(moved)) > 0
    assert programs == 1


@pytest.mark.parametrize("name", HOSTS)
def test_host_of_a_dormant_plant_learns_as_the_bare_host_in_a_loop_of_its_own(name: str) -> None:
    """Contract 15, 16: against optax alone on the model alone; another program, so float tolerance."""
    given = host(name)
    tx, params = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)), given.variables["params"]
    rest = {k: v for k, v in given.variables.items() if k != "params"}
    opt_state = tx.init(params)
    morph, _, _ = planted(name)
    state = TrainState.create(morph, growable(tx), key=jax.random.key(3))
    step = make_train_step(given.model, LOSS, growable(tx), probe_every=0)

    @jax.jit
    def bare(params, rest, opt_state, i):
        def loss_fn(params):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), i), 0)
            kwargs = {**given.call_kwargs(True), "rngs": {"dropout": key}, "mutable": ["batch_stats"]}
            logits, updated = given.model.apply({"params": params, **rest}, given.x, **kwargs)
            return LOSS(logits, given.y).mean(), updated

        grads, updated = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), {**rest, **updated}, opt_state

    for i in range(10):
        state, _ = step(state, (given.x, given.y))
        params, rest, opt_state = bare(params, rest, opt_state, i)
    chex.assert_trees_all_close(state.morph.host["params"], params, atol=2e-5)


def test_nan_seed_never_touches_the_host_and_is_pruned_by_its_third_fault() -> None:
    """Contract 18."""
    given = host("mlp")
    morph, site, _ = planted("mlp")
    tx = growable(clipped())
    step = make_train_step(given.model, LOSS, tx, donate=False)
    sick = esper_jax.advance(esper_jax.germinate(morph, site, "lora", key=jax.random.key(0)), site, 0)
    sick = sick.replace(seeds=jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), sick.seeds))
    a = TrainState.create(morph, tx, key=jax.random.key(3))
    b = TrainState.create(sick, tx, key=jax.random.key(3))
    stages = []
    for _ in range(4):
        a, _ = step(a, (given.x, given.y))
        b, metrics = step(b, (given.x, given.y))
        stages.append(int(b.morph.state[site].stage[0]))
    chex.assert_trees_all_equal(a.morph.host, b.morph.host)
    assert stages == [Stage.TRAINING, Stage.TRAINING, Stage.PRUNED, Stage.PRUNED]
    assert int(b.morph.state[site].faults[0]) == 3 and float(metrics["faults"]) == 0


def test_noise_in_the_batch_changes_nothing_but_the_step_count_and_is_counted() -> None:
    given = host("cnn")
    morph, _, _ = planted("cnn")
    tx = growable(clipped())
    state = TrainState.create(morph, tx, key=jax.random.key(3))
    step = make_train_step(given.model, LOSS, tx, donate=False)
    state, _ = step(state, (given.x, given.y))
    after, metrics = step(state, (given.x.at[0].set(jnp.nan), given.y))
    chex.assert_trees_all_equal(after.morph.host, state.morph.host)
    chex.assert_trees_all_equal(after.opt_state, state.opt_state)
    assert float(metrics["skipped"]) == 1 and int(after.meters.skipped) == 1 and int(after.step) == 2


def test_a_seed_is_not_blamed_for_a_batch_that_breaks_the_host() -> None:
    given = host("mlp")
    morph, site, _ = planted("mlp")
    tx = growable(clipped())
    seeded = esper_jax.advance(esper_jax.germinate(morph, site, "lora", key=jax.random.key(0)), site, 0)
    state = TrainState.create(seeded, tx, key=jax.random.key(3))
    step = make_train_step(given.model, LOSS, tx)
    for _ in range(4):
        state, metrics = step(state, (given.x * jnp.nan, given.y))
    assert int(state.morph.state[site].faults[0]) == 0 and float(metrics["faults"]) == 0
    assert int(state.morph.state[site].stage[0]) == Stage.TRAINING


def test_health_and_ratio_are_the_contracts_formulas_on_the_seeds_gradient() -> None:
    """Contract 8."""
    from esper_jax.kasmina.observe import gradient_health

    grads = {"a": jnp.array([0.0, 1e-8, 0.5, 20.0]), "b": jnp.full((4,), 0.1)}
    health, exploding, finite = gradient_health(grads)
    assert float(health) == pytest.approx(1 - 0.5 * 2 / 8 - 0.8 * 1 / 8)
    assert float(exploding) == pytest.approx(1 / 8) and bool(finite)
    health, _, finite = gradient_health({"a": jnp.array([jnp.nan, 1.0])})
    assert float(health) == 0 and not bool(finite)


@pytest.mark.parametrize("unroll", [False, True])
def test_several_steps_a_call_equal_as_many_single_ones(unroll: bool) -> None:
    given = host("mlp")
    morph, _, _ = planted("mlp")
    tx = growable(clipped())
    xs = jnp.stack([given.x + i for i in range(4)])
    ys = jnp.stack([given.y] * 4)
    many = make_train_step(given.model, LOSS, tx, steps=4, unroll=unroll)
    one = make_train_step(given.model, LOSS, tx)
    a, metrics = many(TrainState.create(morph, tx, key=jax.random.key(3)), (xs, ys))
    b = TrainState.create(morph, tx, key=jax.random.key(3))
    for x in xs:
        b, _ = one(b, (x, given.y))
    assert metrics["loss"].shape == (4,)
    chex.assert_trees_all_close(a.morph.host, b.morph.host, atol=1e-6)


def test_probes_measure_what_numpy_measures_at_the_layer() -> None:
    """Signals of the first sampled batch: variance, silent units and gain of a Dense, recomputed by hand."""
    given = host("mlp")
    morph = esper_jax.morph(given.variables)
    tx = growable(optax.sgd(0.0))
    step = make_train_step(given.model, LOSS, tx, probe_every=2)
    state = TrainState.create(morph, tx, key=jax.random.key(3))
    for _ in range(3):
        state, _ = step(state, (given.x, given.y))
    from esper_jax.kasmina.probe import Probe

    probe = Probe(*np.asarray(state.meters.stats["Dense_0"]))
    dense = given.variables["params"]["Dense_0"]
    h = np.asarray(given.x @ dense["kernel"] + dense["bias"])

    def loss(kernel: jax.Array) -> jax.Array:
        params = {**given.variables["params"], "Dense_0": {**dense, "kernel": kernel}}
        return LOSS(given.model.apply({"params": params}, given.x), given.y).mean()

    gradient = np.asarray(jax.grad(loss)(dense["kernel"]))
    assert probe.calls == 2
    assert probe.variance / 2 == pytest.approx(h.var(0).mean(), rel=1e-4)
    assert probe.silent / 2 == pytest.approx((h <= 0).all(0).mean(), abs=1e-6)
    assert probe.gain / 2 == pytest.approx(np.square(gradient).sum(), rel=1e-3)
    centred = h - h.mean(0)
    correlation = np.abs(np.corrcoef(centred.T))
    off = (correlation.sum() - np.trace(correlation)) / (h.shape[1] * (h.shape[1] - 1))
    assert probe.correlation / 2 == pytest.approx(off, rel=1e-3)


@pytest.mark.parametrize("batch", [(1, 2, 3), {"a": 1}, "xy"])
def test_a_batch_in_another_form_says_what_a_batch_is(batch: object) -> None:
    from esper_jax.tolaria.step import unpack_batch

    with pytest.raises(ValueError, match="pair \\(inputs, targets\\)"):
        unpack_batch(batch) if not isinstance(batch, str) else unpack_batch(list(batch) * 2)
