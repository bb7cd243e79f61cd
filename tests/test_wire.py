"""The wire between a run and a service: all comes back to the bit, and what is not an answer changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import esper_jax
from esper_jax import Decision, Feedback, FixedSchedule, Spec, Stage, Tamiyo, TamiyoClient
from esper_jax.protocol import Report
from esper_jax.tamiyo import packing, wire
from esper_jax.tolaria.apply import apply_decision, resolve
from esper_jax.tolaria.veto import Limits, veto

from .control_world import SITES, report, seed_report

NAN = float("nan")
SPEC = Spec(SITES, 2)
KEY = np.array([1, 2**32 - 1], np.uint32)
reals = st.floats(width=64) | st.sampled_from([NAN, math.inf, -math.inf, -0.0, 5e-324])


def same(a: Any, b: Any) -> bool:
    """Equal values with equal bits: NaN is NaN, and -0.0 is not 0.0."""
    if isinstance(a, float) and isinstance(b, float):
        return np.float64(a).tobytes() == np.float64(b).tobytes() or math.isnan(a) and math.isnan(b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@st.composite
def reports(draw: Any) -> Report:
    """Reports with any floats in them."""
    sites = tuple(dataclasses.replace(site, gain=draw(reals), dead=draw(reals)) for site in report().sites)
    stage = st.sampled_from(Stage)
    seeds = tuple(
        seed_report(site, slot, stage=draw(stage), health=draw(reals), waits_for=draw(st.text(max_size=9)))
        for site, slot in (("a", 0), ("b", 1))
    )
    pairs = {(("a", 0), ("b", 1)): draw(reals)}
    return Report(draw(st.integers(0, 9999)), draw(st.integers(0, 2**31 - 1)), *(draw(reals),) * 3, sites, seeds, pairs)


@given(reports(), reals, st.sampled_from(["applied", "refused"]))
@settings(max_examples=40, deadline=None)
def test_a_question_carries_report_and_feedback_to_the_bit_but_no_clock(sent, number, outcome) -> None:
    decision = Decision("germinate", "a", 1, "lora", {"rank": 4, "wide": [1, 2]}, reason="why\x1b[2J not")
    feedback = Feedback(decision, outcome, "rule", number, 2.0, NAN, seconds=1.5)
    name, body = packing.ask(SPEC, KEY, None, sent, packing.feedback_lines([feedback]))
    task = packing.understand(wire.decode(body, wire.Question))
    assert task.id == name and task.leaves is None and task.spec == SPEC and (task.key == KEY).all()
    assert same(task.report, sent)
    clean = dataclasses.replace(decision, reason="why [2J not")
    assert same(task.feedback, (dataclasses.replace(feedback, decision=clean, seconds=NAN),))
    assert (
        packing.ask(SPEC, KEY, None, sent, packing.feedback_lines([dataclasses.replace(feedback, seconds=9.0)]))[1]
        == body
    )


arrays = st.sampled_from(
    [
        np.array(True),
        np.zeros((0, 3), np.float32),
        np.array([NAN, np.inf, -0.0], np.float32),
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.array(-(2**63), np.int64),
        np.array([1.5, 2.5], ml_dtypes.bfloat16),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    ]
)


@given(
    st.recursive(arrays, lambda x: st.dictionaries(st.sampled_from("abc"), x) | st.lists(x, max_size=3), max_leaves=6)
)
@settings(max_examples=40, deadline=None)
def test_any_state_of_numpy_arrays_comes_back_to_the_bit(state) -> None:
    leaves = wire.decode_all(wire.encode(packing.leaves_of(state)), wire.Leaf)
    template = jax.tree.map(np.zeros_like, state)
    back = packing.state_of(leaves, template)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for mine, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert (mine.dtype, mine.shape, mine.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


@pytest.mark.parametrize("controller", [Tamiyo(), FixedSchedule({3: [("a", "lora")]}), esper_jax.RandomSchedule()])
def test_the_shipped_controllers_states_travel(controller) -> None:
    state = controller.init(SPEC, KEY)
    _, state = controller.decide(state, report(), ())
    back = packing.state_of(
        wire.decode_all(wire.encode(packing.leaves_of(state)), wire.Leaf), controller.init(SPEC, KEY)
    )
    assert same([a.tobytes() for a in jax.tree.leaves(state)], [a.tobytes() for a in jax.tree.leaves(back)])


def test_a_state_that_is_not_the_controllers_is_refused_and_names_what_differs() -> None:
    leaves = packing.leaves_of({"a": np.zeros(3, np.float32)})
    for template in ({"a": np.zeros(4, np.float32)}, {"b": np.zeros(3, np.float32)}, {"a": np.zeros(3, np.int32)}, {}):
        with pytest.raises(wire.WireError, match="the state is not this controller's"):
            packing.state_of(leaves, template)
    short = [wire.Leaf(path="a", dtype="float32", shape=[3], data=b"123")]
    with pytest.raises(wire.WireError, match="has 3 bytes, its shape needs 12"):
        packing.check_leaves(short)
    with pytest.raises(wire.WireError, match="dtype"):
        packing.leaves_of({"a": np.array(["text"])})


def test_the_schemas_are_json_schema_and_an_answer_keeps_to_its_own() -> None:
    import jsonschema

    schemas = wire.schemas()
    answer = json.loads(packing.answer("0" * 32, [Decision("prune", "a", 0)], {"n": np.array(1)}, "me", False))
    jsonschema.validate(answer, schemas["answer"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**answer, "decisions": [{"action": "explode", "site": "a"}]}, schemas["answer"])
    _, body = packing.ask(SPEC, KEY, packing.leaves_of({"n": np.array(1)}), report(seeds=[seed_report()]), [])
    jsonschema.validate(json.loads(body), schemas["question"])


# A client whose answers are made up here: the whole way from bytes to decisions, without the sockets.


class Fed(TamiyoClient):
    """A client that is fed bytes instead of asking a service."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", lag=0, attempts=1, failures=10**6, timeout=30)
        self._mail._exchange = self._feed  # type: ignore[method-assign]
        self.make: Any = None

    def _feed(self, body: bytes, deadline: float) -> tuple[int, bytes]:
        return 200, self.make(json.loads(body)["id"])


CLIENT = Fed()
HOST = {"params": {n: {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)} for n in "abc"}}
MORPH = esper_jax.germinate(esper_jax.morph(HOST, slots=2), "a", "lora", key=jax.random.key(0), rank=2)
REPORT = report(seeds=[seed_report(stage=Stage.TRAINING)], sites=None)
VALID = [
    {
        "action": "germinate",
        "site": "b",
        "slot": 1,
        "blueprint": "lora",
        "config": {"rank": 2},
        "reason": "a reason " * 40,
    },
    {"action": "germinate", "site": "c", "stored": "0123abcd"},
    {"action": "prune", "site": "a", "slot": 0, "steps": 0},
    {"action": "set_alpha", "site": "a", "slot": 0, "alpha": 0.5, "steps": 3},
    {"action": "advance", "site": "a", "slot": 0, "confidence": 0.9, "urgency": 0.9},
]


HERE = "@" * 32
"""Stands for the id of the question, which is known only once it was asked."""


def valid(name: str = HERE) -> dict[str, Any]:
    """An answer that a client uses."""
    state = [{"path": "['n']", "dtype": "int32", "shape": [], "data": "BwAAAA=="}]
    return {
        "v": 1,
        "question": name,
        "decisions": copy.deepcopy(VALID),
        "state": state,
        "controller": "c",
        "mock": False,
    }


def fed(make: Any) -> tuple[tuple[Decision, ...], Any, list[str]]:
    """What a client decides when it is given those bytes; its state; the kinds of its notices."""
    CLIENT.make = make
    before = CLIENT.init(MORPH.spec, KEY)
    decisions, after = CLIENT.decide(before, REPORT, ())
    told = [notice.kind for notice in CLIENT.notices()]
    return decisions, after, told


def used_or_not(data: bytes) -> None:
    """The answer is used and does no harm, or it is one outage, no decisions and the state as before."""
    decisions, state, told = fed(lambda name: data.replace(HERE.encode(), name.encode()))
    event(told[0])
    assert told in (["answer"], ["outage"]) and (told == ["answer"] or decisions == () and state.remote.size == 0)
    harmless(decisions)


def harmless(decisions: tuple[Decision, ...]) -> None:
    """Each decision is refused in a sentence, or carried out, as a trainer would: nothing else may be raised."""
    for decision in decisions:
        assert decision.site in MORPH.spec.by_path
        decision, _, reason = resolve(decision, None)
        if reason or veto(decision, REPORT, MORPH.spec, limits=Limits()) is not None:
            continue
        try:
            morph, _ = apply_decision(MORPH, decision, key=jax.random.key(1), score=50.0)
        except (ValueError, KeyError, TypeError):
            continue
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), morph.host, MORPH.host))


def test_a_valid_answer_is_used() -> None:
    decisions, state, told = fed(lambda name: json.dumps(valid(name)).encode())
    assert [d.action for d in decisions] == [line["action"] for line in VALID] and told == ["answer"]
    assert decisions[0] == Decision("germinate", "b", 1, "lora", {"rank": 2}, reason="a reason " * 40)
    assert wire.decode_all(state.remote.tobytes(), wire.Leaf)[0].data == b"\7\0\0\0"
    harmless(decisions)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_bytes_that_are_not_an_answer_change_anything(data) -> None:
    decisions, state, told = fed(lambda name: data)
    assert decisions == () and told == ["outage"] and state.remote.size == 0 and int(state.missed) == 1


@given(st.integers(0, 2**32), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_an_answer_with_flipped_bytes_is_refused_or_harmless(seed, flips) -> None:
    dice = random.Random(seed)
    data = bytearray(json.dumps(valid()).encode())
    for _ in range(flips):
        kind, place = dice.randrange(3), dice.randrange(len(data))
        if kind == 0:
            data[place] = dice.randrange(256)
        elif kind == 1:
            del data[place : place + dice.randrange(1, 9)]
        else:
            data[place:place] = data[dice.randrange(len(data)) :][: dice.randrange(1, 9)]
    used_or_not(bytes(data))


ODD: list[Any] = [None, True, -1, 0, 1e308, 1.5, 10**9, 2**31, 10**30, "NaN", "nan", "", "x" * 3000, "zzz", "a"]
ODD += [[], [[]], {}, {"a": {}}, "../../etc/passwd", "\ud7ff", "\x1b[31m", {"rank": 10**9}, {"rank": "2"}, {"key": 1}]
ODD += [{"blend": "gate"}, [1] * 99]
odd = st.sampled_from(ODD)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_an_answer_with_a_wrong_value_anywhere_is_refused_or_harmless(data) -> None:
    whole = valid()
    place: Any = whole
    while True:
        step = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[step], dict | list) or not place[step] or not data.draw(st.integers(0, 3)):
            break
        place = place[step]
    change = data.draw(st.sampled_from(["set", "drop", "more"]))
    if change == "drop":
        del place[step]
    elif change == "set":
        place[step] = data.draw(odd)
    elif isinstance(place, dict):
        name = data.draw(st.sampled_from(["extra", "config", "alpha", "slot", "rank", "key", "score", "blend"]))
        place[name] = data.draw(odd)
    else:
        place.extend([place[step]] * data.draw(st.integers(1, 40)))
    used_or_not(json.dumps(whole).encode())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"site": "nowhere"}, "there is no site 'nowhere'"),
        ({"blueprint": "virus"}, "unknown blueprint 'virus'"),
        ({"config": {"rank": 10**9}}, "parameters is above max_parameters=10000000"),
        ({"config": {"rank": "8"}}, "cannot be built"),
        ({"config": {"deep": 1}}, "deep"),
        ({"slot": 2}, "has the slots 0 to 1, got 2"),
        ({"confidence": 1e9}, "Expected `float` <= 1.0"),
        ({"reason": 3}, "Expected `str`"),
        ({"steps": 10**12}, "Expected `int` <= 1000"),
        ({"action": "explode"}, "Invalid enum value"),
        ({"sudo": True}, "unknown field"),
        ({"stored": "../../etc/passwd"}, "Expected `str` matching regex"),
    ],
)
def test_a_decision_that_cannot_be_is_refused_with_its_reason(change, reason) -> None:
    def make(name: str) -> bytes:
        whole = valid(name)
        whole["decisions"] = [{**VALID[0], **change}]
        return json.dumps(whole).encode()

    CLIENT.make = make
    decisions, _ = CLIENT.decide(CLIENT.init(MORPH.spec, KEY), REPORT, ())
    (notice,) = CLIENT.notices()
    assert decisions == () and notice.kind == "outage" and reason in notice.data["error"]
