"""Gates: each passes when all it asks is measured and met, and names what failed otherwise."""

import jax
import jax.numpy as jnp
import pytest

from esper_jax import Gates, Lifecycle, SeedState, Stage
from esper_jax.kasmina import gates, lifecycle
from esper_jax.kasmina.gates import REASONS

NAN = float("nan")
STRICT, LOOSE = Gates(strict=True), Gates()


def state(stage, **fields):
    made = SeedState.empty(1).replace(stage=jnp.asarray([stage], jnp.int32))
    return made.replace(**{k: jnp.asarray([v], getattr(made, k).dtype) for k, v in fields.items()})


GOOD2 = {"steps": 10, "health": 0.7, "exploding": 0.0, "stage_score": 50.0, "ratio": 0.1}
GOOD3 = {"ramp_start": 0.0, "ramp_target": 1.0, "ramp_steps": 5, "ramp_done": 5, "alpha": 1.0}
GOOD5 = {"contribution": 1.0, "health": 0.9}
CASES = [
    ("g1", Stage.GERMINATED, {}, {}, "passed"),
    ("g1", Stage.GERMINATED, {}, {"ready": False}, "its program is not ready"),
    ("g1", Stage.GERMINATED, {}, {"finite": False}, "its parameters are not finite"),
    ("g1", Stage.TRAINING, {}, {}, "is in another stage"),
    ("g2", Stage.TRAINING, GOOD2, {}, "passed"),
    ("g2", Stage.TRAINING, GOOD2, {"gates": STRICT, "score": 50.5}, "passed"),
    ("g2", Stage.GERMINATED, GOOD2, {}, "is in another stage"),
    ("g2", Stage.TRAINING, {**GOOD2, "steps": 9}, {}, "has not trained for enough ticks"),
    ("g2", Stage.TRAINING, {**GOOD2, "health": NAN}, {}, "its gradient health is not measured"),
    ("g2", Stage.TRAINING, {**GOOD2, "exploding": NAN}, {}, "its gradient health is not measured"),
    ("g2", Stage.TRAINING, {**GOOD2, "health": 0.69}, {}, "its gradient health is too low"),
    ("g2", Stage.TRAINING, {**GOOD2, "exploding": 0.5}, {}, "its gradient is exploding"),
    ("g2", Stage.TRAINING, {**GOOD2, "ratio": NAN, "stage_score": NAN}, {"score": NAN}, "passed"),
    ("g2", Stage.TRAINING, GOOD2, {"gates": STRICT, "score": 50.4}, "the score has not improved"),
    ("g2", Stage.TRAINING, GOOD2, {"gates": STRICT, "score": NAN}, "the score has not improved"),
    (
        "g2",
        Stage.TRAINING,
        {**GOOD2, "stage_score": NAN},
        {"gates": STRICT, "score": 60.0},
        "the score has not improved",
    ),
    ("g2", Stage.TRAINING, {**GOOD2, "ratio": 0.09}, {"gates": STRICT, "score": 60.0}, "its gradient ratio"),
    ("g2", Stage.TRAINING, {**GOOD2, "ratio": NAN}, {"gates": STRICT, "score": 60.0}, "its gradient ratio"),
    ("g3", Stage.BLENDING, GOOD3, {}, "passed"),
    ("g3", Stage.HOLDING, GOOD3, {}, "is in another stage"),
    ("g3", Stage.BLENDING, {**GOOD3, "ramp_done": 4}, {}, "its alpha ramp has not ended"),
    ("g3", Stage.BLENDING, {**GOOD3, "ramp_target": 0.5, "alpha": 0.5}, {}, "its alpha ramp does not end at 1"),
    ("g3", Stage.BLENDING, {**GOOD3, "alpha": 0.99}, {}, "its alpha ramp does not end at 1"),
    ("g3", Stage.BLENDING, {}, {}, "its alpha ramp does not end at 1"),
    ("g5", Stage.HOLDING, GOOD5, {"gates": STRICT}, "passed"),
    ("g5", Stage.HOLDING, {**GOOD5, "contribution": 0.01}, {}, "passed"),
    ("g5", Stage.BLENDING, GOOD5, {}, "is in another stage"),
    ("g5", Stage.HOLDING, {**GOOD5, "contribution": NAN}, {}, "its contribution is not measured"),
    ("g5", Stage.HOLDING, {**GOOD5, "contribution": NAN}, {"gates": STRICT}, "its contribution is not measured"),
    ("g5", Stage.HOLDING, {**GOOD5, "contribution": 0.0}, {}, "its contribution is too low"),
    ("g5", Stage.HOLDING, {**GOOD5, "contribution": 0.99}, {"gates": STRICT}, "its contribution is too low"),
    ("g5", Stage.HOLDING, {**GOOD5, "health": NAN}, {}, "its gradient health is not measured"),
    ("g5", Stage.HOLDING, {**GOOD5, "health": 0.6}, {}, "its gradient health is too low"),
]


def ask(gate, seed, ready=True, finite=True, score=50.0, gates_=LOOSE):
    flags = [jnp.broadcast_to(jnp.asarray(flag), seed.stage.shape) for flag in (ready, finite)]
    calls = {
        "g1": lambda: gates.g1(seed, *flags),
        "g2": lambda: gates.g2(seed, jnp.float32(score), gates_),
        "g3": lambda: gates.g3(seed),
        "g5": lambda: gates.g5(seed, gates_),
    }
    return calls[gate]()


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(("gate", "stage", "fields", "given", "reason"), CASES)
def test_gate_passes_or_names_the_reason(gate, stage, fields, given, reason, jitted):
    """Contract 7, 8, 9, 10: an unmeasured quantity fails."""
    given = dict(given)
    used = given.pop("gates", LOOSE)
    call = lambda seed: ask(gate, seed, gates_=used, **given)  # noqa: E731
    passed, code = (jax.jit(call) if jitted else call)(state(stage, **fields))
    assert REASONS[int(code[0])].startswith(reason)
    assert bool(passed[0]) == (reason == "passed")


def test_gates_judge_each_slot_by_itself():
    """Contract 6: one call, slots with different answers, batched by `vmap` too."""
    seeds = [state(Stage.TRAINING, **{**GOOD2, "steps": s, "health": h}) for s, h in ((10, 0.9), (3, 0.9), (10, 0.1))]
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *seeds)
    passed, code = gates.g2(together, jnp.float32(1), LOOSE)
    assert passed.tolist() == [True, False, False]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    again, codes = jax.vmap(lambda s: gates.g2(s, jnp.float32(1), LOOSE))(stacked)
    assert (again[:, 0].tolist(), codes[:, 0].tolist()) == (passed.tolist(), code.tolist())


@pytest.mark.parametrize(
    ("stage", "fields", "to"),
    [
        (Stage.GERMINATED, {}, Stage.TRAINING),
        (Stage.TRAINING, {**GOOD2, "steps": 9}, Stage.BLENDING),
        (Stage.TRAINING, {**GOOD2, "steps": 8}, Stage.TRAINING),
        (Stage.BLENDING, {**GOOD3, "ramp_done": 4, "alpha": 0.8}, Stage.HOLDING),
        (Stage.HOLDING, {**GOOD5, "alpha": 1.0}, Stage.HOLDING),
    ],
)
def test_a_tick_opens_g1_to_g3_and_leaves_g5_to_a_decision(stage, fields, to):
    """Contract 7, 8, 9, 10: the tick counts itself, so the tenth in TRAINING is the first that may pass."""
    after, ticked = lifecycle.tick(state(stage, **fields), score=70.0)
    assert Stage(int(after.stage[0])) == to
    assert (int(ticked.before[0]), int(ticked.after[0])) == (stage, to)


@pytest.mark.parametrize("flag", ["ready", "finite"])
def test_a_seed_waits_in_germinated_while_its_program_is_not_ready_or_its_parameters_not_finite(flag):
    """Contract 7."""
    after, ticked = lifecycle.tick(state(Stage.GERMINATED), score=1.0, **{flag: False})
    assert int(after.stage[0]) == Stage.GERMINATED
    assert REASONS[int(ticked.reason[0])] == {"ready": CASES[1][4], "finite": CASES[2][4]}[flag]


def test_running_means_decay_by_nine_tenths_and_the_ratio_is_capped_at_ten():
    """Contract 8."""
    seed, one = state(Stage.TRAINING), jnp.ones(1, bool)
    seed = lifecycle.observe(seed, one, jnp.asarray([0.5]), jnp.asarray([40.0]), jnp.asarray([0.0]))
    assert (float(seed.health[0]), float(seed.ratio[0])) == (0.5, 10.0)
    seed = lifecycle.observe(seed, one, jnp.asarray([1.0]), jnp.asarray([0.0]), jnp.asarray([1.0]))
    assert seed.health[0] == pytest.approx(0.55) and seed.ratio[0] == pytest.approx(9.0)
    assert seed.exploding[0] == pytest.approx(0.1)
    same = lifecycle.observe(seed, ~one, jnp.zeros(1), jnp.zeros(1), jnp.zeros(1))
    assert same.health[0] == seed.health[0]


def test_an_infinite_ratio_is_capped_but_a_ratio_that_is_no_number_stays_unmeasured():
    """Contract 8: 0/0 is not a large ratio; it must not pass the gate."""
    seed, one, good = state(Stage.TRAINING, **GOOD2), jnp.ones(1, bool), jnp.ones(1)
    fresh = seed.replace(ratio=jnp.full(1, NAN))
    unmeasured = lifecycle.observe(fresh, one, good, jnp.full(1, NAN), 0 * good)
    assert not gates.g2(unmeasured, jnp.float32(60), STRICT)[0][0]
    capped = lifecycle.observe(fresh, one, good, jnp.full(1, float("inf")), 0 * good)
    assert float(capped.ratio[0]) == 10.0


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Gates(min_training_ticks=-1), "min_training_ticks"),
        (lambda: Gates(min_health=1.5), "min_health"),
        (lambda: Lifecycle(tempo=0), "tempo"),
        (lambda: Lifecycle(embargo_ticks=0), "embargo_ticks"),
        (lambda: Lifecycle(curve="cubic"), "linear, cosine, sigmoid"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(make, word):
    """Rule 4 of the design."""
    with pytest.raises(ValueError, match=word):
        make()
