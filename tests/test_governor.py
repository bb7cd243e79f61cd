"""The governor: when training is rolled back (contract 21, 22) and which decisions are vetoed (contract 23, 27)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_jax.kasmina import Gates, Site, Spec, Stage
from esper_jax.kasmina.blueprints import make_plant
from esper_jax.kasmina.stages import EDGES
from esper_jax.protocol import ACTIONS, Decision
from esper_jax.tamiyo.keeping import gate5
from esper_jax.tolaria.governor import Governor, check
from esper_jax.tolaria.veto import Limits, veto

from .control_world import NAN, SITES, report, seed_report, site_report

LOSSES = st.one_of(st.floats(0, 10, width=32), st.sampled_from([math.nan, math.inf, 1e6, math.log(10)]))


def run(losses, config=Governor(), classes=None, train=1.0):
    """The verdicts of a row of checks, and the last state."""
    state, verdicts = config.init(), []
    for loss in losses:
        state, verdict = check(config, state, train, loss, classes)
        verdicts.append(verdict)
    return verdicts, state


# --- contract 21: rollback --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["training", "validation"])
def test_contract_21_a_non_finite_loss_rolls_back_at_once(bad, which):
    config = Governor()
    losses = (bad, 1.0) if which == "training" else (1.0, bad)
    _, verdict = check(config, config.init(), *losses)
    assert (verdict.rollback, verdict.rule, verdict.snapshot) == (True, "non-finite", False)
    assert verdict.reason == f"the {which} loss is {bad}"


@pytest.mark.parametrize("classes", [2, 10, 97])
def test_contract_21_collapse_needs_a_good_past_and_a_loss_of_guessing_and_rolls_back_at_once(classes):
    guess = math.log(classes)
    for past, loss, collapses in (
        (0.59, 1.064, True),
        (0.59, 0.936, True),
        (0.59, 1.066, False),
        (0.59, 0.934, False),
        (0.61, 1.0, False),
    ):
        verdicts, _ = run([past * guess] * 4 + [loss * guess], classes=classes)
        assert (verdicts[-1].rollback, verdicts[-1].rule == "collapse") == (collapses, collapses)
    assert f"guessing among {classes} classes ({guess:.4g})" in run([0.1, guess], classes=classes)[0][-1].reason


def test_contract_21_collapse_is_not_looked_for_without_classes_or_a_past():
    guess = math.log(10)
    assert not run([0.1] * 4 + [guess])[0][-1].rollback
    assert not run([0.1] * 4 + [guess], classes=1)[0][-1].rollback
    assert not run([guess] * 5, classes=10)[0][-1].rollback


def test_contract_21_divergence_is_three_anomalous_checks_in_a_row():
    verdicts, state = run([1.0] * 10 + [9.0, 9.0, 9.0])
    assert [v.rollback for v in verdicts[-3:]] == [False, False, True]
    assert [v.rule for v in verdicts[-3:]] == ["divergence"] * 3
    assert verdicts[-1].reason == "the validation loss 9 is above 1 + 6 x 0 and 3 x 1, 3 check(s) in a row (limit 3)"
    assert int(state.divergences) == 0  # a rollback clears the strikes
    broken, _ = run([1.0] * 10 + [9.0, 9.0, 1.0, 9.0, 9.0])
    assert not any(v.rollback for v in broken)


@pytest.mark.parametrize(("samples", "anomalous"), [(9, False), (10, True)])
def test_contract_21_divergence_needs_10_samples(samples, anomalous):
    assert (run([1.0] * samples + [99.0])[0][-1].rule == "divergence") == anomalous


def test_contract_21_divergence_needs_both_6_sigma_and_3_times_the_mean():
    calm, wild = [1.0] * 12, [0.1, 1.9] * 6
    assert run([*calm, 2.9])[0][-1].rule == ""  # far above 6 sigma, below 3 x mean
    assert run([*calm, 3.1])[0][-1].rule == "divergence"
    assert run([*wild, 6.3])[0][-1].rule == ""  # above 3 x mean, below 1 + 6 x 0.9
    assert run([*wild, 6.5])[0][-1].rule == "divergence"


def test_contract_21_divergence_keeps_its_sense_for_losses_below_0():
    assert run([-2.0] * 12 + [-1.9])[0][-1].rule == ""
    assert run([-2.0] * 12 + [2.1])[0][-1].rule == "divergence"


def test_contract_21_anomalous_losses_do_not_enter_the_window_of_20():
    _, state = run([1.0] * 12 + [50.0, 50.0, 50.0, 2.3, math.nan, 1.5], classes=10)
    assert state.losses[~np.isnan(state.losses)].tolist() == [1.0] * 12 + [1.5]  # 2.3: a collapse
    _, state = run(np.linspace(1, 2, 50))
    assert np.allclose(state.losses, np.linspace(1, 2, 50)[-20:])


@settings(max_examples=200, deadline=None)
@given(losses=st.lists(LOSSES, max_size=40), classes=st.sampled_from([None, 10]))
def test_contract_21_the_window_stays_finite_and_checks_are_pure_and_resume_from_a_saved_state(losses, classes):
    config = Governor()
    state = saved = config.init()
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
    for loss in losses:
        before = jax.tree.map(np.copy, state)
        after, verdict = check(config, state, 1.0, loss, classes)
        resumed, resumed_verdict = check(config, saved, 1.0, loss, classes)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
            assert np.array_equal(a, b, equal_nan=True)
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(resumed), strict=True):
            assert np.array_equal(a, b, equal_nan=True)
        assert verdict == resumed_verdict
        assert verdict.rollback or math.isfinite(loss)
        assert not (verdict.rollback and verdict.snapshot)
        assert bool(verdict.reason) == bool(verdict.rule)
        assert not np.isinf(after.losses).any()
        assert 0 <= int(after.divergences) < config.strikes
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == shapes
        state, saved = after, jax.tree.map(jnp.asarray, after)


# --- contract 22: snapshots -------------------------------------------------------------------------------------------


def test_contract_22_a_snapshot_is_due_every_5_checks():
    verdicts, _ = run([1.0] * 16)
    assert [i + 1 for i, verdict in enumerate(verdicts) if verdict.snapshot] == [5, 10, 15]


def test_contract_22_a_due_snapshot_waits_for_a_healthy_check():
    verdicts, _ = run([1.0] * 14 + [9.0, 9.0, 1.0] + [1.0] * 5)
    assert [i + 1 for i, verdict in enumerate(verdicts) if verdict.snapshot] == [5, 10, 17, 22]


def test_contract_21_22_an_unmeasured_validation_loss_is_no_sample_and_clears_no_strike():
    verdicts, state = run([1.0] * 10 + [9.0, None, 9.0, None, 9.0])
    assert [verdict.rollback for verdict in verdicts[-5:]] == [False] * 4 + [True]
    assert np.sum(~np.isnan(state.losses)) == 10
    verdicts, _ = run([1.0] * 14 + [9.0, None, 1.0])
    assert [verdict.snapshot for verdict in verdicts[-3:]] == [False, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window must be a whole number of 1 or more, got 0"),
        ({"strikes": 1.5}, "strikes must be a whole number"),
        ({"min_samples": 30}, "min_samples=30 cannot exceed window=20"),
        ({"sigmas": -1}, "sigmas must be 0 or more, got -1"),
        ({"factor": 0.5}, "factor must be 1 or more, got 0.5"),
    ],
)
def test_a_governor_with_a_threshold_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Governor(**settings)


# --- contract 23: vetoes ----------------------------------------------------------------------------------------------

SPEC = Spec(SITES, 2)
GROW = Decision("germinate", "a", None, "lora", {"rank": 2})
PASSING = {"contribution": 1.5, "health": 1.0}


def on(stage, action="prune", *, gates=Gates(), steps=0, alpha=None, **values):
    """The veto of an action on a seed in that stage at site a, slot 0."""
    decision = Decision(action, "a", 0, steps=steps, alpha=alpha)
    return veto(decision, report(seeds=[seed_report(stage=stage, **values)]), SPEC, gates=gates)


def test_contract_23_27_what_keeps_every_rule_passes():
    assert veto(GROW, report(), SPEC) is None
    assert on(Stage.TRAINING) is None
    assert on(Stage.HOLDING, "fossilize", **PASSING) is None
    assert on(Stage.HOLDING, "set_alpha", alpha=0.5, steps=3) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": "grow"}, "action: 'grow' is not one of germinate, fossilize"),
        ({"site": "z"}, "site: there is no 'z'; known: a, b, c"),
        ({"blueprint": "laura"}, "blueprint: unknown blueprint 'laura'; known: "),
        ({"blueprint": None}, "blueprint: unknown blueprint 'None'"),
        ({"blueprint": "se", "config": {}}, "blueprint: blueprint 'se' is made for conv"),
        ({"config": {"rnk": 2}}, "blueprint: blueprint 'lora' has no config 'rnk'; known: rank=8"),
        ({"config": {"rank": "two"}}, "blueprint: blueprint 'lora' with"),
        ({"config": {"blend": "mix"}}, "blueprint: unknown blend 'mix'"),
        ({"slot": 7}, "free slot: slot 7 is not free at 'a' for lora; free ones: 0, 1"),
        ({"confidence": 0.7}, "confidence: 0.7 is not above 0.7"),
        ({"confidence": NAN}, "confidence: nan is not above 0.7"),
        ({"confidence": "high"}, "confidence: 'high' is not above 0.7"),
        ({"urgency": 0.6}, "urgency: 0.6 is not above 0.6"),
    ],
)
def test_contract_23_27_a_veto_of_a_germination_names_the_rule_and_the_values(changes, message):
    refusal = veto(dataclasses.replace(GROW, **changes), report(), SPEC)
    assert refusal is not None
    assert refusal.startswith(message)
    assert "\n" not in refusal


def test_contract_23_germination_needs_a_finite_score_a_free_slot_and_a_blueprint_that_fits_now():
    assert "finite score: the validation score is nan" in veto(GROW, report(score=NAN), SPEC)
    full = Spec(SITES, 1, (make_plant(SITES[0], 0, "mlp", {}, "add", False),))
    assert "free slot: no slot free at 'a'" in veto(GROW, report(sites=[site_report(SITES[0], ())]), full)
    only = report(sites=[site_report(SITES[0], fitting=("mlp",))])
    assert "fit: 'lora' cannot germinate at 'a' now; those that can: mlp" in veto(GROW, only, SPEC)
    assert "not in the report" in veto(GROW, report(sites=[]), SPEC)


@pytest.mark.parametrize("score", [NAN, math.inf])
def test_contract_23_without_a_finite_score_a_seed_may_only_be_pruned(score):
    seeds = [seed_report(**PASSING)]
    for action in ("prune", "fossilize", "set_alpha", "advance"):
        refusal = veto(Decision(action, "a", 0, alpha=0.5, steps=3), report(score=score, seeds=seeds), SPEC)
        assert (refusal is None) == (action == "prune")


def test_contract_23_seeds_planted_ahead_are_free_for_their_own_blueprint_and_config_once():
    plants = tuple(make_plant(SITES[0], slot, "lora", {"rank": 4}, "add", True) for slot in (0, 1))
    spec = Spec(SITES, 2, plants)
    ahead = report(sites=[site_report(SITES[0], fitting=("lora",))])
    plain = dataclasses.replace(GROW, config={})
    assert veto(plain, ahead, spec) is None
    assert veto(dataclasses.replace(GROW, config={"rank": 4}), ahead, spec) is None
    assert "free slot" in veto(GROW, ahead, spec)  # rank 2
    assert "free slot" in veto(dataclasses.replace(GROW, blueprint="mlp", config={}), ahead, spec)
    assert veto(plain, ahead, spec, applied=[plain]) is None
    assert "free slot" in veto(plain, ahead, spec, applied=[plain, plain])
    second = dataclasses.replace(plain, slot=1)
    assert "slot 1 is not free at 'a' for lora; free ones: 0" in veto(second, ahead, spec, applied=[second])


def test_contract_23_a_slot_taken_at_this_tick_is_not_free_any_more():
    grown = SPEC.with_plant(make_plant(SITES[0], 0, "lora", {}, "add", False))
    assert veto(GROW, report(), grown, applied=[GROW]) is None
    grown = grown.with_plant(make_plant(SITES[0], 1, "lora", {}, "add", False))
    assert "free slot: no slot free" in veto(GROW, report(), grown, applied=[GROW, GROW])


def test_contract_23_the_parameter_budget_counts_all_seeds_and_those_germinated_at_this_tick():
    one = report(seeds=[seed_report("b", parameters=100)])
    size = 2 * (8 + 8)  # lora of rank 2 between 8 and 8 features
    assert veto(GROW, one, SPEC, limits=Limits(max_parameters=100 + size)) is None
    refusal = veto(GROW, one, SPEC, limits=Limits(max_parameters=99 + size))
    assert refusal == f"parameter budget: {size} for lora and 100 of other seeds exceed the limit of {99 + size}"
    other = dataclasses.replace(GROW, site="c")
    limits = Limits(max_parameters=100 + 2 * size - 1)
    assert veto(GROW, one, SPEC, limits=limits) is None
    assert "parameter budget" in veto(GROW, one, SPEC, applied=[other], limits=limits)


@pytest.mark.parametrize("stage", list(Stage))
def test_contract_1_23_prune_and_fossilize_follow_the_legal_edges_and_no_other(stage):
    for action, target in (("prune", Stage.PRUNED), ("fossilize", Stage.FOSSILIZED)):
        refusal = on(stage, action, **PASSING)
        assert (refusal is None) == (target in EDGES[stage])
        if refusal is not None:
            assert refusal.startswith(f"legal stage: cannot {action} a slot 0 in {stage.name}")


def test_contract_12_13_23_alpha_moves_only_in_blending_and_holding_when_no_ramp_is_under_way():
    for stage in Stage:
        moves = stage in (Stage.BLENDING, Stage.HOLDING)
        assert (on(stage, "set_alpha", alpha=0.5, steps=3) is None) == moves
    assert "ramp: one is under way" in on(Stage.BLENDING, "set_alpha", alpha=0.9, ramping=True)
    for wrong in (None, NAN, -0.1, 1.1):
        assert "is not between 0 and 1" in on(Stage.HOLDING, "set_alpha", alpha=wrong)
    assert "is at 1 already" in on(Stage.HOLDING, "set_alpha", alpha=1.0)
    assert "-1 ticks" in on(Stage.HOLDING, "set_alpha", alpha=0.5, steps=-1)


def test_contract_13_23_a_scheduled_prune_waits_for_the_ramp_and_a_sudden_one_does_not():
    decision = Decision("prune", "a", 0, steps=5)
    blending = dataclasses.replace(seed_report(stage=Stage.BLENDING), alpha=0.5)
    for changes, rule in (({}, None), ({"ramping": True}, "ramp: one"), ({"pruning": True}, "ramp: a scheduled prune")):
        seeds = [dataclasses.replace(blending, **changes)]
        refusal = veto(decision, report(seeds=seeds), SPEC)
        assert refusal is None if rule is None else refusal.startswith(rule)
        assert veto(dataclasses.replace(decision, steps=0), report(seeds=seeds), SPEC) is None
    assert "-1 ticks" in on(Stage.TRAINING, steps=-1)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("contribution", [NAN, -1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("health", [NAN, 0.69, float(np.float32(0.7)), 1.0])
def test_contract_10_23_fossilising_needs_gate_g5_and_tamiyo_sees_the_same_gate(strict, contribution, health):
    gates = Gates(strict=strict)
    enough = contribution >= 1.0 if strict else contribution > 0
    refusal = on(Stage.HOLDING, "fossilize", gates=gates, contribution=contribution, health=health)
    assert (refusal is None) == (enough and health > 0.695)
    assert bool(refusal) == bool(gate5(seed_report(contribution=contribution, health=health), gates))
    if refusal:
        assert refusal.startswith("gate G5: a slot 0 its ")


def test_contract_7_to_10_23_advance_goes_around_no_gate():
    assert "gate: a slot 0 is TRAINING and its gradient health" in on(
        Stage.TRAINING, "advance", waits_for="its gradient health is too low"
    )
    just_moved = report(seeds=[seed_report(stage=Stage.TRAINING, steps=0)])
    assert "entered TRAINING at this tick" in veto(Decision("advance", "a", 0), just_moved, SPEC)
    assert "gate G5" in on(Stage.HOLDING, "advance", contribution=-1.0)
    assert on(Stage.HOLDING, "advance", **PASSING) is None
    for stage in (Stage.FOSSILIZED, Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT):
        assert on(stage, "advance").startswith("legal stage: cannot advance")


def test_contract_23_an_action_needs_a_seed_in_its_slot_and_one_action_a_seed_is_enough():
    seeds = report(seeds=[seed_report(), seed_report(slot=1)])
    for slot in (None, 5):
        refusal = veto(Decision("prune", "a", slot), seeds, SPEC)
        assert refusal == f"slot: there is no seed at a slot {slot}; slots with one: 0, 1"
    first = Decision("prune", "a", 0)
    assert "acted on at epoch 10 already" in veto(Decision("fossilize", "a", 0), seeds, SPEC, applied=[first])
    assert veto(Decision("prune", "a", 1), seeds, SPEC, applied=[first]) is None


# --- contract 27: limits ----------------------------------------------------------------------------------------------


def test_contract_27_at_most_three_actions_an_epoch():
    others = [Decision("prune", "b", slot) for slot in range(3)]
    assert veto(GROW, report(), SPEC, applied=others[:2]) is None
    assert veto(GROW, report(), SPEC, applied=others) == "actions per epoch: 3 were applied already, the limit is 3"


@pytest.mark.parametrize(("last", "free"), [(None, True), (10, True), (9, False), (8, True), (12, True)])
def test_contract_27_a_cooldown_lies_between_growth_epochs_and_binds_growth_only(last, free):
    refusal = veto(GROW, report(epoch=10), SPEC, last_growth=last)
    assert refusal is None if free else refusal == "cooldown: growth at epoch 9, 1 epoch(s) ago; the limit is 2"
    assert veto(Decision("prune", "a", 0), report(seeds=[seed_report()]), SPEC, last_growth=last) is None


@settings(max_examples=200, deadline=None)
@given(
    action=st.sampled_from(ACTIONS),
    stage=st.sampled_from(list(Stage)),
    confidence=st.floats(0, 1),
    urgency=st.floats(0, 1),
)
def test_contract_27_nothing_unsure_or_idle_passes(action, stage, confidence, urgency):
    decision = Decision(action, "a", 0, "lora", alpha=0.5, steps=3, confidence=confidence, urgency=urgency)
    refusal = veto(decision, report(seeds=[seed_report(stage=stage)]), SPEC)
    if confidence <= 0.7:
        assert refusal.startswith("confidence")
    elif urgency <= 0.6:
        assert refusal.startswith("urgency")
    else:
        assert refusal is None or not refusal.startswith(("confidence", "urgency"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confidence": 1.0}, "confidence must be 0 or more and below 1, got 1.0"),
        ({"urgency": NAN}, "urgency must be"),
        ({"per_epoch": -1}, "per_epoch must be a whole number of 0 or more, got -1"),
        ({"cooldown": 1.5}, "cooldown must be"),
        ({"max_parameters": -5}, "max_parameters must be"),
    ],
)
def test_limits_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Limits(**settings)


def test_asking_for_a_veto_changes_nothing_and_answers_the_same():
    site = Site("conv", "conv", (4,), (8,), spatial=2)
    spec = Spec((site,), 1)
    one = report(sites=[site_report(site, free=(0,), fitting=("conv_light",))])
    decision = Decision("germinate", "conv", None, "conv_light", {"groups": 4, "blend": "gate"})
    before = repr((decision, one, spec))
    assert veto(decision, one, spec) is None
    assert veto(decision, one, spec) is None
    assert repr((decision, one, spec)) == before
