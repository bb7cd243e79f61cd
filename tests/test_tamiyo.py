"""Tamiyo: when seeds are germinated, kept and pruned (contract 25 to 27); controllers are pure functions."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_jax.kasmina import Gates, Plant, Site, Spec, Stage
from esper_jax.kasmina.blueprints import make_plant
from esper_jax.protocol import Controller, Feedback
from esper_jax.tamiyo import FixedSchedule, RandomSchedule, Tamiyo
from esper_jax.tolaria.veto import Limits, veto

from .control_world import NAN, SITES, World, report, seed_report, site_report, sites_of

GATES = Gates(min_training_ticks=3)
NAMES = ("lora", "mlp")
KEY = np.array([0, 7], np.uint32)
SPEC = Spec(SITES, 2)
ANYTHING = Limits(confidence=0, urgency=0, per_epoch=100, cooldown=0)


def tamiyo(**settings) -> Tamiyo:
    return Tamiyo(**{"blueprints": NAMES, "gates": GATES} | settings)


def controllers() -> list:
    plan = {0: [("a", "lora", {"rank": 2})], 2: [("b", "mlp")]}
    return [
        tamiyo(min_epoch=0),
        tamiyo(gates=Gates(strict=True), max_live=6),
        FixedSchedule(plan, gates=GATES),
        FixedSchedule(plan, keep="always", gates=GATES),
        RandomSchedule(blueprints=NAMES, gates=GATES, rate=0.7, min_epoch=0, max_live=6),
    ]


def ready(controller: Tamiyo, spec: Spec = SPEC, **changes):
    """Tamiyo's state where nothing but the report and `changes` keeps it from growing."""
    state = controller.init(spec, KEY)
    values = {"stabilised": True, "plateau": 3, "best": 60.0} | changes
    arrays = {name: np.array(value, np.asarray(getattr(state, name)).dtype) for name, value in values.items()}
    return dataclasses.replace(state, **arrays)


def held(controller, contributions, scores=None, started=50.0, **seed):
    """Decisions at the last of a row of reports of one HOLDING seed, and the state after it."""
    state = controller.init(SPEC, KEY)
    seeds = [seed_report(stage=Stage.TRAINING)]
    _, state = controller.decide(state, report(score=started), ())
    _, state = controller.decide(state, report(score=started, seeds=seeds), ())
    decisions = ()
    scores = [started + 1.0] * len(contributions) if scores is None else scores
    for tick, (contribution, score) in enumerate(zip(contributions, scores, strict=True)):
        values = {"contribution": contribution, "steps": tick + 1} | seed
        decisions, state = controller.decide(state, report(score=score, seeds=[seed_report(**values)]), ())
    return decisions, state


def same(one, two) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return jax.tree.structure(one) == jax.tree.structure(two) and all(
        a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs
    )


# --- random reports ---------------------------------------------------------------------------------------------------

POINTS = st.sampled_from([NAN, -1.0, 0.0, 0.05, 0.5, 1.0, 3.0, 50.0, 52.5, 90.0])


@st.composite
def layouts(draw) -> tuple[Spec, dict]:
    """A spec with lean seeds and seeds planted ahead, each in some stage."""
    plants, stages = [], {}
    often = [Stage.HOLDING] * 4 + [Stage.BLENDING] * 2
    for site, slot in itertools.product(SITES, range(2)):
        what = draw(st.sampled_from(["lean", "resident", "empty"]))
        if what != "empty":
            plants.append(make_plant(site, slot, draw(st.sampled_from(NAMES)), {}, "add", what == "resident"))
            legal = [s for s in Stage if what == "resident" or s != Stage.DORMANT]
            stages[site.path, slot] = draw(st.sampled_from(often + legal))
    return Spec(SITES, 2, tuple(plants)), stages


@st.composite
def histories(draw):
    """Some reports in a row of one layout, with anything measured, or not."""
    spec, stages = draw(layouts())
    reports = []
    for epoch in range(draw(st.integers(1, 6))):
        seeds = []
        for plant in spec.plants:
            stage = stages[plant.site, plant.slot]
            if stage == Stage.DORMANT:
                continue
            blending = stage == Stage.BLENDING
            alpha = (
                draw(st.sampled_from([0.0, 0.5, 1.0]))
                if blending
                else float(Stage.HOLDING <= stage <= Stage.FOSSILIZED)
            )
            values = {name: draw(POINTS) for name in ("contribution", "stage_score")}
            values |= {"alpha": alpha, "steps": draw(st.sampled_from([3, 5, 13, 60, 0]))}
            values |= {"ramping": blending and draw(st.booleans()), "pruning": blending and draw(st.booleans())}
            values |= {"health": draw(st.sampled_from([1.0, 0.75, 0.3, NAN]))}
            seeds.append(seed_report(plant.site, plant.slot, plant.blueprint, stage, **values))
        gains = {site.path: draw(st.sampled_from([NAN, 0.0, 1.0, 7.0, math.inf])) for site in SITES}
        sites = sites_of(spec, stages, gains)
        reports.append(report(10 + epoch, draw(POINTS), draw(st.floats(0, 5)), sites, seeds))
    return spec, reports


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(history=histories(), which=st.integers(0, 4))
def test_contract_26_27_every_decision_on_random_reports_is_legal_and_explained(history, which):
    controller, (spec, reports) = controllers()[which], history
    state = ready(controller, spec) if isinstance(controller, Tamiyo) else controller.init(spec, KEY)
    for one in reports:
        decisions, state = controller.decide(state, one, ())
        for decision in decisions:
            assert 0 < decision.confidence <= 1
            assert 0 < decision.urgency <= 1
            assert decision.reason
            assert "\n" not in decision.reason
            refusal = veto(decision, one, spec, limits=ANYTHING, gates=controller.gates)
            planned = isinstance(controller, FixedSchedule) and decision.action == "germinate"
            lucky = isinstance(controller, RandomSchedule) and refusal is not None and "finite score" in refusal
            assert refusal is None or planned or lucky, refusal
        targets = [(d.site, d.slot) for d in decisions if d.action != "germinate"]
        assert len(set(targets)) == len(targets)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(history=histories(), which=st.integers(0, 4))
def test_decide_is_pure_and_a_state_that_was_saved_decides_the_same(history, which):
    controller, (spec, reports) = controllers()[which], history
    first = saved = controller.init(spec, KEY)
    feedback = ()
    for one in reports:
        before = jax.tree.map(np.copy, first)
        decisions, after = controller.decide(first, one, feedback)
        assert same(first, before)
        again, after_again = controller.decide(first, one, feedback)
        assert (decisions, True) == (again, same(after, after_again))
        from_saved, after_saved = controller.decide(saved, one, feedback)
        assert (decisions, True) == (from_saved, same(after, after_saved))
        first = after
        saved = jax.tree.map(jnp.asarray, after)  # what a checkpoint gives back may be jax arrays
        feedback = tuple(Feedback(d, "refused", "test", NAN, NAN, NAN, 1.0) for d in decisions)


@pytest.mark.parametrize("controller", controllers(), ids=lambda c: type(c).__name__)
def test_a_state_is_a_pytree_of_numpy_arrays_whose_shapes_never_change(controller):
    assert isinstance(controller, Controller)
    state = controller.init(SPEC, KEY)
    shapes = lambda tree: [(type(x), x.shape, x.dtype) for x in jax.tree.leaves(tree)]  # noqa: E731
    assert all(kind is np.ndarray and dtype.itemsize <= 4 for kind, _, dtype in shapes(state))
    world = World(controller)
    for _ in range(20):
        world.tick()
    assert shapes(world.control) == shapes(state)


# --- contract 25: when to germinate -----------------------------------------------------------------------------------


def test_contract_25_germinates_at_the_site_of_highest_gain_on_a_plateau_with_the_numbers_as_reason():
    sites = [site_report(site, gain=gain) for site, gain in zip(SITES, (0.1, 0.034, 0.2), strict=True)]
    (decision,), _ = tamiyo().decide(ready(tamiyo()), report(score=60.0, sites=sites), ())
    assert (decision.action, decision.site, decision.blueprint) == ("germinate", "c", "lora")
    assert "plateau of 4 ticks at 60.00, gain 0.2 is the highest of 3" in decision.reason
    assert (decision.confidence, decision.urgency) == pytest.approx((1 - 4 ** -(4 / 3), (4 / 3) / (4 / 3 + 0.5)))


@pytest.mark.parametrize(
    "why_not",
    [
        {"stabilised": False},
        {"plateau": 1},
        {"since_prune": 3},
        {"since_growth": 3},
        {"best": 40.0},  # this report's score is a new best
        {"penalty": [6.0, 6.0]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_contract_25_no_germination_while_any_condition_fails(why_not):
    assert tamiyo().decide(ready(tamiyo(), **why_not), report(), ())[0] == ()
    assert tamiyo().decide(ready(tamiyo()), report(), ())[0] != ()


@pytest.mark.parametrize(
    "one",
    [
        report(epoch=4),
        report(score=NAN),
        report(sites=[site_report(site, free=()) for site in SITES]),
        report(sites=[site_report(site, fitting=("norm",)) for site in SITES]),
        report(seeds=[seed_report("a", slot, stage=Stage.TRAINING) for slot in (0, 1)]),
        report(seeds=[seed_report(stage=Stage.BLENDING, pruning=True)]),
    ],
    ids=["too early", "no score", "no free slot", "nothing fits", "too many on trial", "a prune is under way"],
)
def test_contract_25_no_germination_for_a_report_that_forbids_it(one):
    _, state = tamiyo().decide(tamiyo().init(SPEC), dataclasses.replace(one, epoch=1), ())  # its seeds are no news
    seen = ready(tamiyo(), best=100.0)
    assert tamiyo().decide(dataclasses.replace(seen, watch=state.watch), one, ())[0] == ()
    allowed = report(seeds=[seed_report(stage=Stage.TRAINING)])
    _, state = tamiyo().decide(tamiyo().init(SPEC), allowed, ())
    assert tamiyo().decide(dataclasses.replace(seen, watch=state.watch), allowed, ())[0] != ()


def test_contract_25_stabilised_is_latched_after_three_ticks_between_minus_5_and_plus_3_percent():
    controller = tamiyo(min_epoch=0)
    state = controller.init(SPEC, KEY)
    # Improvements: 50 %, 2 %, -4 %, 10 % (breaks the row), 1 %, 1 %, 1 % (latched), then wild for good.
    changes, latched = (0.5, 0.02, -0.04, 0.1, 0.01, 0.01, 0.01, 0.4, -3.0, 0.4), []
    loss = 4.0
    _, state = controller.decide(state, report(loss=loss), ())
    for change in changes:
        loss *= 1 - change
        _, state = controller.decide(state, report(loss=loss), ())
        latched.append(bool(state.stabilised))
    assert latched == [False] * 6 + [True] * 4


def test_contract_25_slow_progress_adds_up_and_a_score_at_the_ceiling_is_a_plateau():
    controller = tamiyo()
    state = controller.init(SPEC, KEY)
    plateaus = []
    for score in (99.0, 99.06, 99.12, 99.18, 99.24, 100.0, 100.0, 100.0, NAN, 100.0):
        _, state = controller.decide(state, report(epoch=1, score=score), ())
        plateaus.append(int(state.plateau))
    assert plateaus == [0, 1, 0, 1, 0, 0, 1, 2, 2, 3]


def test_contract_25_unmeasured_sites_come_last_and_are_doubted():
    gains = (NAN, 0.0, NAN)
    sites = [site_report(site, gain=gain) for site, gain in zip(SITES, gains, strict=True)]
    (measured,), _ = tamiyo().decide(ready(tamiyo()), report(sites=sites), ())
    assert measured.site == "b"
    (unknown,), _ = tamiyo().decide(ready(tamiyo()), report(sites=[sites[0], sites[2]]), ())
    assert unknown.site == "a"
    assert "not measured" in unknown.reason
    assert unknown.confidence == pytest.approx(0.8 * measured.confidence)


def test_contract_25_a_site_without_a_seed_on_trial_goes_before_one_with_a_higher_gain():
    gains = {"a": 9.0, "b": 2.0, "c": 1.0}
    sites = [site_report(site, free=(1,), gain=gains[site.path]) for site in SITES]
    seeds = [seed_report("a", stage=Stage.TRAINING)]
    state = tamiyo().decide(ready(tamiyo()), report(epoch=3, sites=sites, seeds=seeds), ())[1]
    state = dataclasses.replace(state, plateau=np.array(3, np.int32), since_growth=np.array(9, np.int32))
    (decision,), _ = tamiyo().decide(state, report(sites=sites, seeds=seeds), ())
    assert (decision.site, "2 free site(s) without" in decision.reason) == ("b", True)


def test_contract_25_blueprints_take_turns_and_pass_over_what_does_not_fit():
    controller = tamiyo(blueprints=("lora", "conv_light", "mlp"))
    state, chosen = ready(controller), []
    for _ in range(4):
        (decision,), state = controller.decide(state, report(), ())
        chosen.append(decision.blueprint)
        state = dataclasses.replace(state, since_growth=np.array(9, np.int32))
    assert chosen == ["lora", "mlp", "lora", "mlp"]


def test_contract_25_a_prune_costs_its_blueprint_2_halved_each_epoch_and_3_is_too_much():
    controller = tamiyo(max_live=6)
    state = ready(controller)
    live = [seed_report(site, stage=Stage.TRAINING) for site in "abc"]
    gone = [dataclasses.replace(seed, stage=Stage.PRUNED) for seed in live]
    _, state = controller.decide(state, report(seeds=live), ())
    _, state = controller.decide(state, report(seeds=gone[:2] + live[2:]), ())
    assert state.penalty.tolist() == [4.0, 0.0]
    assert (int(state.since_prune), int(state.plateau)) == (0, 0)
    for left, chosen in ((5.9, "lora"), (6.0, "mlp")):  # halved by the next report
        (decision,), _ = controller.decide(ready(controller, penalty=[left, 0.0]), report(), ())
        assert decision.blueprint == chosen
    _, state = controller.decide(state, report(seeds=gone), ())
    assert state.penalty.tolist() == [4.0, 0.0]  # 4 / 2 + 2
    for expected in (2.0, 1.0, 0.5):
        _, state = controller.decide(state, report(), ())
        assert state.penalty[0] == expected


def test_contract_25_a_seed_that_vanished_or_was_first_seen_pruned_counts_as_pruned():
    controller = tamiyo()
    _, state = controller.decide(ready(controller), report(seeds=[seed_report("b", 1, "mlp", Stage.TRAINING)]), ())
    _, state = controller.decide(state, report(seeds=[seed_report("a", 0, "lora", Stage.EMBARGOED)]), ())
    assert state.penalty.tolist() == [2.0, 2.0]


def test_contract_25_five_epochs_pass_between_a_prune_and_the_next_germination():
    world = World(tamiyo())
    world.until("germinate")
    world.until("prune", contribution=-1.0)
    pruned = next(t for t in range(30) if world.tick() is not None and world.control.since_prune == 0)
    start = world.epoch
    world.until("germinate")
    assert world.epoch - start == 5, pruned


def test_contract_25_a_refused_germination_makes_way_for_another_at_once():
    controller, limits = tamiyo(blueprints=("lora",)), Limits(max_parameters=10)
    world = World(controller, limits=limits)
    for _ in range(12):
        world.tick(gain={"a": 3.0, "b": 2.0, "c": 1.0})
    proposed = [(decision.site, refusal) for _, decision, refusal in world.log]
    assert [site for site, _ in proposed[:4]] == ["a", "b", "c", "a"]
    assert all("parameter budget" in refusal for _, refusal in proposed)
    first, *_, fourth = [epoch for epoch, _, _ in world.log][:4]
    assert fourth - first > controller.refusal_ticks


def test_contract_25_seeds_planted_ahead_are_germinated_though_no_slot_is_empty():
    plants = tuple(make_plant(site, 0, "mlp", {}, "add", True) for site in SITES)
    world = World(tamiyo(), slots=1, residents=plants)
    decision = world.until("germinate", gain={"b": 5.0})
    assert (decision.site, decision.blueprint) == ("b", "mlp")
    assert (world.stage("b"), world.spec.plants) == (Stage.GERMINATED, plants)


def test_contract_25_nothing_grows_at_a_tick_at_which_something_is_pruned_or_fossilised():
    falling = report(seeds=[seed_report(stage=Stage.TRAINING, stage_score=90.0)])
    _, state = tamiyo().decide(tamiyo().init(SPEC), falling, ())
    decisions, _ = tamiyo().decide(dataclasses.replace(ready(tamiyo()), watch=state.watch), falling, ())
    assert [d.action for d in decisions] == ["prune"]


# --- contract 26: what to keep ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING])
@pytest.mark.parametrize(("steps", "score", "pruned"), [(5, 47.9, True), (4, 40.0, False), (5, 48.0, False)])
def test_contract_26_prunes_after_5_epochs_in_stage_when_the_score_fell_more_than_2_points(stage, steps, score, pruned):
    seeds = [seed_report(stage=stage, steps=steps, stage_score=50.0)]
    decisions, _ = tamiyo().decide(tamiyo().init(SPEC), report(score=score, seeds=seeds), ())
    assert [d.action for d in decisions] == ["prune"] * pruned
    if pruned:
        assert "fell 2.10 points, from 50.00 to 47.90, in 5 ticks" in decisions[0].reason
        assert (decisions[0].confidence > 0.75, decisions[0].urgency > 0.667) == (True, True)


def test_contract_26_an_unmeasured_stage_score_or_score_prunes_nothing():
    for score, started in ((10.0, NAN), (NAN, 50.0)):
        seeds = [seed_report(stage=Stage.TRAINING, stage_score=started)]
        assert tamiyo().decide(tamiyo().init(SPEC), report(score=score, seeds=seeds), ())[0] == ()


def test_contract_13_26_a_seed_that_is_being_ramped_down_is_not_judged_again():
    seeds = [seed_report(stage=Stage.BLENDING, alpha=0.5, stage_score=90.0, steps=60, pruning=True)]
    assert tamiyo().decide(tamiyo().init(SPEC), report(seeds=seeds), ())[0] == ()


@pytest.mark.parametrize(
    ("alpha", "ramping", "steps"), [(0.0, False, 0), (1.0, False, 8), (0.4, False, 8), (0.4, True, 0)]
)
def test_contract_13_26_a_seed_with_a_share_of_the_output_is_ramped_down_unless_a_ramp_is_under_way(
    alpha, ramping, steps
):
    seeds = [seed_report(stage=Stage.BLENDING, alpha=alpha, ramping=ramping, stage_score=60.0)]
    (decision,), _ = tamiyo(tempo=8).decide(tamiyo().init(SPEC), report(seeds=seeds), ())
    assert (decision.action, decision.steps) == ("prune", steps)
    assert ramping == ("a ramp is under way" in decision.reason)


def test_contract_26_fossilises_what_passes_g5_and_prunes_what_does_not():
    for contributions, action in (([0.5, 0.6, 0.4], "fossilize"), ([0.0, -0.6, -0.4], "prune")):
        (decision,), _ = held(tamiyo(), contributions)
        assert (decision.action, decision.confidence > 0.7, decision.urgency > 0.6) == (action, True, True)
        mean = sum(contributions) / 3
        assert f"contribution {mean:.2f}" in decision.reason


@pytest.mark.parametrize(("contribution", "action"), [(0.9, "prune"), (1.0, "fossilize")])
def test_contract_10_26_strict_mode_asks_for_a_full_point(contribution, action):
    (decision,), _ = held(tamiyo(gates=Gates(strict=True)), [contribution] * 4)
    assert decision.action == action


def test_contract_26_nothing_is_decided_before_three_measurements_in_holding():
    for few in ([5.0, 5.0], [-5.0, -5.0], [NAN] * 20, [NAN, NAN, 5.0, 5.0]):
        assert held(tamiyo(max_live=1), few)[0] == ()
    assert held(tamiyo(max_live=1), [NAN, 5.0, 5.0, 5.0])[0] != ()


def test_contract_26_a_contribution_measured_while_blending_is_not_counted():
    state, decisions = tamiyo(max_live=1).init(SPEC), ()
    for steps, contribution in enumerate((90.0, -1.0, -1.0, -1.0)):
        seeds = [seed_report(steps=steps, contribution=contribution)]
        decisions, state = tamiyo(max_live=1).decide(state, report(seeds=seeds), ())
    assert "contribution -1.00 +- 0.03 points over 3 measurements" in decisions[0].reason


def test_contract_26_the_noisier_the_contribution_the_less_confident_until_the_mean_decides():
    quiet, noisy = ([0.4, 0.5, 0.6], [-4.0, 0.5, 5.0])
    (sure,), _ = held(tamiyo(), quiet)
    (unsure,), _ = held(tamiyo(), noisy)
    assert sure.action == unsure.action == "fossilize"
    assert unsure.confidence < 0.7 < sure.confidence
    (late,), _ = held(tamiyo(), noisy * 4)
    assert (late.action, late.confidence >= 0.75) == ("fossilize", True)


def test_contract_10_26_a_good_mean_waits_for_the_gate_and_not_for_ever():
    assert held(tamiyo(), [3.0, 3.0, -0.1])[0] == ()
    assert held(tamiyo(), [3.0, 3.0, 3.0], health=0.5)[0] == ()
    (decision,), _ = held(tamiyo(), [3.0] * 12, health=0.5)
    assert (decision.action, "health is too low" in decision.reason) == ("prune", True)


def test_contract_26_a_high_contribution_with_a_lower_score_than_at_germination_is_a_dependency():
    (decision,), _ = held(tamiyo(), [4.0] * 3, scores=[49.0] * 3, started=50.0)
    assert decision.action == "prune"
    assert "-1.00 points since germination: a dependency, not a gain" in decision.reason
    (small,), _ = held(tamiyo(), [0.09] * 3, scores=[49.0] * 3, started=50.0)
    assert small.action == "fossilize"
    (gain,), _ = held(tamiyo(), [4.0] * 3, scores=[50.5] * 3, started=50.0)
    assert gain.action == "fossilize"


def test_contract_26_the_score_at_germination_is_remembered_through_the_whole_life():
    world = World(tamiyo())
    germinated = world.until("germinate", score=70.0)
    row = [site.path for site in SITES].index(germinated.site)
    decision = world.until("prune", score=69.0, contribution=2.0)
    assert "dependency" in decision.reason
    assert float(world.control.watch.started[row, 0]) == 70.0


def test_a_seed_whose_gate_never_opens_is_pruned_with_that_reason():
    world = World(tamiyo(patience=20))
    world.until("germinate")
    decision = world.until("prune", health=0.2)
    assert "21 ticks in TRAINING (limit 20)" in decision.reason
    assert "gradient health is too low" in decision.reason


def test_keeping_always_prunes_nothing_and_fossilises_when_g5_opens():
    keeper = FixedSchedule({0: [("a", "lora")]}, keep="always", gates=GATES)
    bad = [seed_report(stage_score=90.0, contribution=-3.0, steps=90)]
    assert keeper.decide(keeper.init(SPEC), report(epoch=0, seeds=bad), ())[0][0].action == "germinate"
    world = World(keeper)
    for _ in range(30):
        world.tick(contribution=-1.0)
    assert world.stage("a") == Stage.HOLDING
    assert world.until("fossilize", contribution=0.1).site == "a"


# --- whole lives ------------------------------------------------------------------------------------------------------


def test_contract_25_26_a_run_grows_keeps_what_helps_and_prunes_what_harms_and_no_decision_is_refused():
    world = World(tamiyo(), key=3)
    for _ in range(60):
        world.tick(score=80.0, gain={"a": 2.0, "b": 3.0}, contribution=lambda site, slot: 1.2 if site == "b" else -0.6)
    assert [refusal for _, _, refusal in world.log] == [None] * len(world.log)
    kept = {(d.site, d.action) for _, d, _ in world.log if d.action != "germinate"}
    assert kept == {("b", "fossilize"), ("a", "prune"), ("c", "prune")}
    grown = [epoch for epoch, decision, _ in world.log if decision.action == "germinate"]
    assert grown[0] == 5
    assert min(b - a for a, b in itertools.pairwise(grown)) >= 4
    live = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)
    assert sum(world.stage(site.path, slot) in live for site in SITES for slot in (0, 1)) <= 2


def test_a_run_that_goes_on_from_a_saved_state_decides_as_the_uninterrupted_one():
    def play(world: World, first: int, last: int) -> None:
        for epoch in range(first, last):
            wave = 80 + (epoch % 3) * 0.3
            world.tick(score=wave, contribution=0.4 * (epoch % 4) - 0.3, gain={"a": epoch % 5, "b": 2.0})

    for make in (tamiyo, lambda: RandomSchedule(blueprints=NAMES, gates=GATES, rate=0.3)):
        whole, halves = World(make()), World(make())
        play(whole, 0, 50)
        play(halves, 0, 23)
        halves.controller = make()
        halves.control = jax.tree.map(jnp.asarray, halves.control)
        play(halves, 23, 50)
        assert halves.log == whole.log
        assert len(whole.log) > 3
        assert same(halves.control, whole.control)


# --- schedules --------------------------------------------------------------------------------------------------------


def test_a_fixed_schedule_proposes_each_germination_once_at_its_epoch_or_the_first_report_after_it():
    plan = {10: [("a", "lora", {"rank": 4}), ("b", "mlp")], 3: [["c", "lora"]]}
    schedule = FixedSchedule(plan)
    state, seen = schedule.init(SPEC, KEY), []
    for epoch in (1, 3, 3, 4, 12, 13):
        decisions, state = schedule.decide(state, report(epoch=epoch), ())
        seen += [(epoch, d.site, d.blueprint, dict(d.config)) for d in decisions]
    assert seen == [(3, "c", "lora", {}), (12, "a", "lora", {"rank": 4}), (12, "b", "mlp", {})]


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({1: [("x", "lora")]}, KeyError, "names site 'x'; known: a, b, c"),
        ({1: [("a", "laura")]}, KeyError, "unknown blueprint 'laura'; known: .*lora"),
        ({1: [("a", "lora", {"rnk": 3})]}, TypeError, "no config 'rnk'; known: rank=8"),
        ({1: [("a", "conv_light")]}, ValueError, "'a' is dense"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_the_run(plan, error, message):
    with pytest.raises(error, match=message):
        FixedSchedule(plan).init(SPEC)


@pytest.mark.parametrize("plan", [{-1: []}, {1.5: []}, {1: ["a"]}, {1: [("a",)]}, {1: [("a", 3)]}, {True: []}])
def test_a_malformed_plan_is_refused_when_it_is_written(plan):
    with pytest.raises(ValueError, match="plan"):
        FixedSchedule(plan)


def test_a_random_schedule_grows_at_its_rate_at_every_site_and_blueprint_and_differs_by_key():
    schedule = RandomSchedule(blueprints=NAMES, rate=0.25, min_epoch=5)
    runs = {}
    for key in (1, 2):
        state, runs[key] = schedule.init(SPEC, np.array([0, key], np.uint32)), []
        for epoch in range(400):
            decisions, state = schedule.decide(state, report(epoch=epoch), ())
            runs[key] += [(epoch, d.site, d.blueprint) for d in decisions]
    assert runs[1] != runs[2]
    for run in runs.values():
        assert 70 < len(run) < 130  # 395 ticks at 0.25: 98.75, standard deviation 8.6
        assert min(epoch for epoch, _, _ in run) >= 5
        assert {(site, name) for _, site, name in run} == set(itertools.product("abc", NAMES))


def test_a_random_schedules_draws_do_not_depend_on_what_became_of_its_seeds():
    schedule = RandomSchedule(blueprints=NAMES, rate=0.5, max_live=1)
    free, busy = [], []
    crowd = [seed_report("a", stage=Stage.TRAINING)]
    for seeds, seen in (((), free), (crowd, busy)):
        state = schedule.init(SPEC, KEY)
        for epoch in range(40):
            now = report(epoch=epoch, seeds=seeds if epoch < 20 else ())
            seen += [(epoch, d.site, d.blueprint) for d in schedule.decide(state, now, ())[0]]
            state = schedule.decide(state, now, ())[1]
    assert busy == [entry for entry in free if entry[0] >= 20]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "some"}, "'contribution' or 'always', got 'some'"),
        ({"tempo": 4}, "tempo must be one of 3, 5, 8"),
        ({"plateau": 0}, "plateau must be a whole number above 0, got 0"),
        ({"max_fall": NAN}, "max_fall must be a number above 0, got nan"),
        ({"max_holding": 2}, "max_holding must be min_holding=3 or more, got 2"),
        ({"cooldown": -1}, "cooldown must be 0 or more, got -1"),
        ({"stable_low": 0.1}, "stable_low=0.1 must be below stable_high=0.03"),
        ({"blueprints": ()}, "one or more different names"),
        ({"blueprints": ("lora", "lora")}, "one or more different names"),
        ({"configs": {"se": {}}}, "configs has 'se', which is not among the blueprints"),
    ],
)
def test_a_setting_out_of_range_is_one_sentence_with_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        tamiyo(**settings)


def test_blueprints_that_cannot_grow_are_refused_before_the_run():
    with pytest.raises(KeyError, match="unknown blueprint 'nope'; known:"):
        Tamiyo(blueprints=("nope",)).init(SPEC)
    with pytest.raises(TypeError, match="no config 'rnk'"):
        Tamiyo(blueprints=("lora",), configs={"lora": {"rnk": 1}}).init(SPEC)
    with pytest.raises(ValueError, match=r"se fits any site of this model \(kinds: dense\)"):
        RandomSchedule(blueprints=("se",)).init(SPEC, KEY)


def test_a_report_of_another_model_is_refused_by_name():
    other = Spec((Site("z", "dense", (8,), (8,)),), 2, (Plant("z", 0, "lora"),))
    state = tamiyo().init(SPEC)
    with pytest.raises(ValueError, match="z slot 0 is reported, but the controller was started without it"):
        tamiyo().decide(state, report(sites=[site_report(other.sites[0])], seeds=[seed_report("z")]), ())


@pytest.mark.parametrize("made", [Tamiyo(last_epoch=11), RandomSchedule(rate=1.0, last_epoch=11)])
def test_nothing_germinates_after_the_last_epoch_so_that_trials_can_end(made):
    spec = Spec(tuple(SITES))
    state = made.init(spec, np.array([0, 1], np.uint32))
    born = []
    for epoch in range(1, 40):
        decisions, state = made.decide(state, report(epoch=epoch, score=50.0, loss=1.0), ())
        born += [epoch for decision in decisions if decision.action == "germinate"]
    assert born and max(born) <= 11
