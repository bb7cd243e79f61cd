"""A site's health is made of what was measured there, and of nothing else."""

import dataclasses
import math

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.health import Health, site_health
from esper_jax.nissa import events
from esper_jax.protocol import HealthSignal, Report, terms
from esper_jax.tolaria.report import Measured, changed_health, make_report
from esper_jax.tolaria.state import TrainState

WELL = {"variance": 1.0, "dead": 0.0, "silent": 0.0, "correlation": 0.3, "gradient": 0.1}
NAN = math.nan


def test_a_layer_that_is_well_has_health_one():
    assert site_health(**WELL) == Health(1, 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("change", "term", "expected"),
    [
        ({"dead": 0.25, "silent": 0.25}, "activity", 0.75),
        ({"silent": 0.5}, "activity", 0.75),
        ({"dead": 0.5, "silent": 0.75}, "activity", 0.375),
        ({"dead": 1.0, "silent": 1.0}, "activity", 0.0),
        ({"variance": 10**-7.5}, "spread", 0.5),
        ({"variance": 1e8}, "spread", 1 / 3),
        ({"variance": 0.0}, "spread", 0.0),
        ({"variance": math.inf}, "spread", 0.0),
        ({"correlation": 0.875}, "diversity", 0.75),
        ({"correlation": 1.0}, "diversity", 0.0),
        ({"gradient": 10**-7.5}, "flow", 0.5),
        ({"gradient": 1e4}, "flow", 1 / 3),
        ({"gradient": 0.0}, "flow", 0.0),
        ({"gradient": math.inf}, "flow", 0.0),
        ({"faults": [(1, 4)]}, "trust", 0.75),
        ({"faults": [(1, 4), (1, 2), (0, 9)]}, "trust", 0.5),
        ({"faults": [(3, 1)]}, "trust", 0.0),
        ({"faults": [(1, 0)]}, "trust", 0.0),
    ],
)
def test_each_measurement_moves_its_own_term_and_the_score_by_as_much(change, term, expected):
    found = site_health(**{**WELL, **change})
    assert found.terms[term] == pytest.approx(expected) and found.score == pytest.approx(expected)
    assert all(value == 1 for name, value in found.terms.items() if name != term) and found.weakest == term


REAL = st.floats(0, 1) | st.floats(0, allow_infinity=False) | st.sampled_from([NAN, 0.0])


@given(st.fixed_dictionaries(dict.fromkeys(WELL, REAL)), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_health_is_between_0_and_1_and_unmeasured_exactly_where_a_measurement_is(measured, faults):
    found = site_health(**measured, faults=faults)
    assert math.isnan(found.score) == any(map(math.isnan, measured.values()))
    assert all(math.isnan(value) or 0 <= value <= 1 for value in found)


@given(
    st.sampled_from([("dead", 0.0, 1.0), ("correlation", 0.0, 1.0), ("gradient", 1.0, 1e7), ("variance", 1.0, 1e12)]),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_worse_measurements_never_give_better_health(which, a, b):
    name, low, high = which
    better, worse = (low + (high - low) * share for share in sorted((a, b)))
    assert site_health(**{**WELL, name: worse}).score <= site_health(**{**WELL, name: better}).score


class Three(nn.Module):
    """Three layers; the last is where no test grows anything."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, name="first")(x))
        return nn.Dense(3, name="last")(nn.relu(nn.Dense(5, name="middle")(x)))


X = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
Y = np.arange(32) % 3
NOWHERE = Measured(0.0, 0.0, 0.0, {})


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Three().init)(jax.random.key(0), X)


def report_of(variables, grow, planted=None, slots=4, params=None) -> Report:
    """The report after one sampled step of a morph in which `grow` seeds train."""
    morph = esper_jax.morph(variables, slots=slots, planted=planted)
    for number, (site, blueprint) in enumerate(grow):
        morph = esper_jax.germinate(morph, site, blueprint, key=jax.random.key(number))
    life = {
        path: s.replace(stage=jnp.where(s.stage == Stage.GERMINATED, 2, s.stage)) for path, s in morph.state.items()
    }
    morph = morph.replace(state=life, host=variables if params is None else params)
    tx = esper_jax.growable(optax.sgd(0.1))
    step = esper_jax.make_train_step(Three(), optax.softmax_cross_entropy_with_integer_labels, tx)
    state, _ = step(TrainState.create(morph, tx, key=jax.random.key(1)), (X, Y))
    return make_report(state, NOWHERE, {})


@pytest.fixture(scope="module")
def crowded(variables):
    """The report with four seeds in use, at two of the three layers."""
    return report_of(variables, CROWD)


CROWD = [("first", "lora"), ("first", "mlp"), ("middle", "lora"), ("middle", "norm")]


@pytest.fixture(scope="module")
def alone(variables):
    """Health of the host's layers with no seed anywhere."""
    return {site.path: site.health for site in report_of(variables, []).sites}


@pytest.mark.parametrize(
    ("grow", "options"),
    [
        (CROWD, {}),
        ([("first", "lora")], {"slots": 1}),
        ([("middle", "lora")], {"planted": ["lora"], "slots": 2}),
    ],
)
def test_the_health_of_a_dormant_layer_does_not_hang_on_seeds_in_use(grow, options, variables, alone, crowded):
    """To the bit, with up to four seeds in use at other layers, planted or not, and any number of slots."""
    report = crowded if grow is CROWD else report_of(variables, grow, **options)
    found = {site.path: site.health for site in report.sites}
    assert 0.5 < alone["last"] <= 1
    dormant = [path for path in found if path not in {site for site, _ in grow}]
    assert "last" in dormant and {path: found[path] for path in dormant} == {path: alone[path] for path in dormant}


def test_dead_units_lower_the_health_of_their_layer(variables, alone):
    """Half of the middle layer's units fixed at -1: measured by the compiled step, shown in the report."""
    params = jax.tree.map(lambda leaf: leaf, variables)
    kernel, bias = (params["params"]["middle"][name] for name in ("kernel", "bias"))
    params["params"]["middle"] = {"kernel": kernel.at[:, :3].set(0.0), "bias": bias.at[:3].set(-1.0)}
    report = report_of(variables, [], params=params)
    site = next(site for site in report.sites if site.path == "middle")
    assert site.dead == pytest.approx(0.6) and terms(site, report.seeds)["activity"] == pytest.approx(0.4)
    assert site.health < 0.5 < alone["middle"]


def test_a_step_that_was_not_sampled_leaves_health_unmeasured(variables):
    tx = esper_jax.growable(optax.sgd(0.1))
    state = TrainState.create(esper_jax.morph(variables), tx, key=jax.random.key(1))
    report = make_report(state, NOWHERE, {})
    assert all(math.isnan(site.health) for site in report.sites) and changed_health(report, None) == ()


def test_signals_say_where_and_when_for_sites_and_for_seeds(crowded):
    """A layer has no slot; a seed that does not compute gives no signal."""
    resting = dataclasses.replace(crowded.seeds[-1], stage=Stage.PRUNED)
    report = dataclasses.replace(crowded, seeds=(*crowded.seeds[:-1], resting))
    signals = report.signals()
    assert [(s.site, s.slot) for s in signals] == [
        ("first", None), ("last", None), ("middle", None), ("first", 0), ("first", 1), ("middle", 0),
    ]  # fmt: skip
    assert {(s.epoch, s.step) for s in signals} == {(report.epoch, 1)}
    assert set(signals[0].terms) == {"activity", "spread", "diversity", "flow", "trust"} and signals[3].terms == {}
    assert signals[3].health == report.seeds[0].health


def test_a_signal_is_told_when_health_falls_below_half_and_when_it_recovers():
    """Once each way; what was not measured says nothing."""

    def report(epoch, health):
        site = esper_jax.protocol.SiteReport(
            "a", "dense", (0,), (), 1.0, 1 - health, 0.0, 0.0, 1.0, 1.0, 1.0, 1, health=health
        )
        return Report(epoch, 10 * epoch, 0.0, 0.0, 0.0, (site,), ())

    told, last = [], None
    for epoch, health in enumerate([0.9, NAN, 0.4, 0.3, NAN, 0.2, 0.8, 0.9]):
        told += changed_health(report(epoch, health), last)
        known = health if not math.isnan(health) or last is None else last["sites"]["a"]["health"]
        last = {"sites": {"a": {"health": known}}, "seeds": []}
    assert [(signal.epoch, signal.step, signal.health) for signal in told] == [(2, 20, 0.4), (6, 60, 0.8)]
    messages = [events.health(signal) for signal in told]
    assert messages[0].message == "a is ailing: health 0.40 (lowest: activity 0.40)"
    assert messages[1].message == "a is well again: health 0.80"
    assert messages[0].data["site"] == "a" and messages[0].data["slot"] is None and messages[0].data["ailing"] is True
    seed = HealthSignal("a", 2, 3, 30, 0.1, {})
    assert events.health(seed).message == "a slot 2 is ailing: health 0.10"


def test_summary_shows_the_health_of_sites_where_it_is_given(variables):
    morph = esper_jax.morph(variables)
    table = esper_jax.summary(morph, {"first": 0.875, "last": NAN}).splitlines()
    assert "site health" in table[0] and "0.875" in table[1] and "site health" not in esper_jax.summary(morph)
    assert table[2].split()[:6] == ["last", "dense", "5", "->", "3", "-"]
