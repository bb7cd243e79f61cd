"""Whatever is given for an argument of a public call, it is taken, or refused in a sentence that names it."""

from __future__ import annotations

import inspect

import flax.linen as nn
import jax.numpy as jnp
import pytest

from .calls import CASES, GOOD, MORPH, Net

NAN, INF = float("nan"), float("inf")
VALUES = [None, False, True, -1, 0, 1, 2.5, -0.5, INF, NAN, 1 << 70, "", "4", "epoch", "x\ny", b"x", object()]
VALUES += [[], [1], (), {}, {"a": 1}, {1: 2}, int, print, jnp.ones(2), nn.Dense]
JUNK = {"nan": NAN, "inf": INF, "True": True, "x\\ny": "x\ny", "bytes": b"x", "object": object()}
JUNK |= {"{1: 2}": {1: 2}, "int": int}
"""Values that nothing takes but what `TAKEN` names, and flags True."""
OURS = (ValueError, TypeError, KeyError)
MODEL = "graft() needs a Flax module"
SAID = {
    ("Tolaria", "model"): MODEL,
    ("make_train_step", "forward"): MODEL,
    ("compact", "model"): MODEL,
    ("compare", "model"): MODEL,
    ("fold", "model"): MODEL,
    ("growth_scores", "forward"): MODEL,
    ("spans", "model"): MODEL,
    ("stack with a model", "model"): MODEL,
    ("morph", "params"): "morph() ",
    ("sites", "params"): "morph() ",
    ("Tolaria.init", "params"): "morph() ",
    ("Tolaria.evaluate", "state"): "evaluate() needs a TrainState or a Morph",
    ("Dispatch", "mode"): "dispatch must be one of",
    ("TamiyoClient", "url"): "http://host:port",
}
"""What is said of an argument where it is not called by its name: by what it becomes, or as `Tolaria` calls it."""
PATH = {"x\\ny"}
"""A path may hold any text."""
TAKEN = {
    ("Tolaria", "where"): {"x\\ny"},  # a regular expression, that only init() can try
    ("Tolaria", "urza"): {"{1: 2}"},  # whatever has a get()
    ("restore_morph", "urza"): {"{1: 2}"},
    ("Tolaria", "checkpoint_dir"): PATH,
    ("Tolaria", "compile_cache"): PATH,
    ("restore_morph", "directory"): PATH,
    ("Tolaria.restore", "directory"): PATH,
    ("Urza", "url"): PATH,
    ("JsonlSink", "path"): PATH,
    ("Background", "spool"): PATH,
    ("TensorBoardSink", "directory"): PATH,
    ("WandbSink", "directory"): PATH,
    **{(call, "score"): {"nan", "inf"} for call in GOOD if call != "Tolaria"},  # NaN is one that was not measured
}
TAKEN["contributions", "score"] = set()
TAKEN |= {("Gates", name): {"inf"} for name in ("max_exploding", "min_improvement", "min_ratio", "min_contribution")}
"""By call and argument: junk that is taken nevertheless."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Files that a call makes are made in a directory of the test's own."""
    monkeypatch.chdir(tmp_path)


def refusal(call: str, name: str, value: object) -> Exception | None:
    """What a call says to that value; None where it is taken."""
    function, good = GOOD[call]
    try:
        function(**{**good, name: value})
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("call", GOOD)
def test_good_arguments_are_taken(call):
    function, good = GOOD[call]
    function(**good)


@pytest.mark.parametrize(("call", "name"), CASES)
def test_any_value_is_taken_or_refused_in_a_sentence(call, name):
    """Of the right kind of error, and with the argument's name in it, or what `SAID` has."""
    named = name.removesuffix("s"), SAID.get((call, name), name)
    said = {repr(value): refusal(call, name, value) for value in VALUES}
    wrong = {
        value: f"{type(error).__name__}: {error}"
        for value, error in said.items()
        if error is not None and not (isinstance(error, OURS) and any(word in str(error) for word in named))
    }
    assert wrong == {}


@pytest.mark.parametrize(("call", "name"), CASES)
def test_junk_is_refused(call, name):
    flag = str(inspect.signature(GOOD[call][0]).parameters[name].annotation).startswith("bool")
    expected = TAKEN.get((call, name), set()) | ({"True"} if flag else set())
    assert {word for word, value in JUNK.items() if refusal(call, name, value) is None} == expected


BESIDE = {
    "gradients of other seeds": ("observe", {"grads": MORPH.params}, "grads"),
    "a model without an example": ("fold", {"example": None}, "together"),
    "updates of a Linen model": ("graft", {"apply": Net(), "updates": True}, "updates"),
    "a loss that gives nothing": ("growth_scores", {"loss": print}, "loss must give an array"),
    "a span between unknown layers": ("growth_scores", {"spans": [("Dense_0", "nowhere")]}, "in spans"),
    "a score that gives a text": ("contributions", {"score": lambda morph: "0.5"}, "what score gives must be a number"),
    "a text for a health": ("summary", {"health": {"Dense_0": "good"}}, "health"),
    "a name that is taken": ("register_blueprint", {"name": "lora"}, "exists already"),
    "functions and a module": ("register_blueprint", {"module": lambda site: Net()}, "either init= and apply="),
    "a sink that takes no events": ("Fanout", {"sinks": [None]}, "one of sinks"),
    "a directory for a file": ("JsonlSink", {"path": "."}, "is a directory"),
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_is_of_the_right_kind_and_does_not_fit_is_refused_too(what):
    call, given, words = BESIDE[what]
    function, good = GOOD[call]
    with pytest.raises((ValueError, TypeError, KeyError), match=words):
        function(**{**good, **given})
